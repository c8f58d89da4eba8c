r"""What a sampler is, what it uses of a model, and how its chains are run.

A sampler is two functions, pure in their state: ``init`` makes the state of B chains from their
starting points, ``step`` maps a state and a source of randomness to the next state and a report
(`Info`). A state is a `NamedTuple` of numbers and of tensors with one row per chain; it holds all
that the next step needs, so an interrupted chain resumes from its saved state.

It sees functions of images (B, ...), never the network: at fixed labels c one of

.. math::
    \text{score:}   & \quad (x, \sigma) \mapsto \nabla_x \log p_\sigma(x \mid c) \\
    \text{density:} & \quad (x, \sigma) \mapsto
                            \log p_\sigma(x \mid c),\ \nabla_x \log p_\sigma(x \mid c) \\
    \text{denoiser:}& \quad (y, \sigma) \mapsto E[x \mid y, c]

with sigma a float or (B,), in image units, or None for a blind model. The functions here make them
of a model and labels c, a number or (B,), and raise `UserError` if labels are given and the model
has none, or one is out of range. The log-density holds up to one constant for each label.

`Chains` runs a sampler. A chain that reaches NaN or Inf has diverged: it is put back to its last
finite state and stops; the others are not affected, since no chain depends on another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ebmkit.energy import EnergyModel, LabelLogProbability, Noise, ScoreModel, upcast_energies
from ebmkit.errors import UserError
from ebmkit.noise import check_trained


class State(Protocol):
    """What every state has: positions ``x`` (B, ...) and the number of steps done."""

    @property
    def x(self) -> Tensor: ...
    @property
    def step(self) -> int: ...


class Chain(NamedTuple):
    """The state of samplers that depend on the positions alone."""

    x: Tensor
    step: int


class Info(NamedTuple):
    """Report of a step, one entry per chain (B,), None where it has no meaning.

    Attributes:
        move: root mean square of the change over the entries of x, image units.
        sigma: noise level at which the target was taken, or that was estimated, image units.
        accepted: whether the proposal was accepted.
        finished: whether the chain needs no further step.
    """

    move: Tensor
    sigma: Tensor | None = None
    accepted: Tensor | None = None
    finished: Tensor | None = None


S = TypeVar("S", bound=State)


class Sampler(Protocol[S]):
    """Chains on a target that was given when it was made.

    A sampler at several noise levels has them, first to last, as ``sigmas``; one at a single level
    as ``sigma``.

    Attributes:
        steps: length of its schedule; None: any number of steps can be taken.
    """

    @property
    def steps(self) -> int | None: ...

    def init(self, x: Tensor) -> S:
        """The state of chains that start at ``x`` (B, ...)."""
        ...

    def step(self, state: S, generator: torch.Generator) -> tuple[S, Info]:
        """The next state and its report; ``state`` is not changed."""
        ...


class PositionSampler:
    """Base of samplers whose state is a `Chain`."""

    def init(self, x: Tensor) -> Chain:
        """Chains that start at ``x`` (B, ...); of several noise levels, with the first's noise."""
        return Chain(x, 0)


def moved_to(state: Chain, x: Tensor, sigma: float | None = None) -> tuple[Chain, Info]:
    """The state after a step to ``x`` at noise level ``sigma``, and its report."""
    level = None if sigma is None else torch.full_like(x.flatten(1)[:, 0], sigma)
    return Chain(x, state.step + 1), Info(root_mean_square(x - state.x), level)


class Chains(Generic[S]):
    """Chains of a sampler, of which those that diverge stop.

    Args:
        sampler: any sampler.
        state: where they are; ``sampler.init(x)`` to begin.
        diverged: chain -> step at which it diverged, of chains that are resumed.

    Attributes:
        state: the present one; finite everywhere.
        finished: (B,) bool, chains that need no further step, diverged ones among them.

    Raises:
        UserError: if a chain starts at NaN or Inf.
    """

    def __init__(
        self, sampler: Sampler[S], state: S, diverged: dict[int, int] | None = None
    ) -> None:
        self.sampler, self.state = sampler, state
        self.diverged = dict(diverged or {})
        if not bool((finite := _is_finite(state)).all()):
            bad = torch.nonzero(~finite).flatten().tolist()
            more = f" and {len(bad) - 8} more" if len(bad) > 8 else ""
            raise UserError(f"chains {', '.join(map(str, bad[:8]))}{more} start at NaN or Inf")
        self.finished = torch.zeros(len(state.x), dtype=torch.bool, device=state.x.device)
        self.finished[list(self.diverged)] = True

    @property
    def done(self) -> bool:
        """Whether no chain needs a further step, or the schedule is at its end."""
        length = self.sampler.steps
        return (length is not None and self.state.step >= length) or bool(self.finished.all())

    def advance(self, generator: torch.Generator) -> Info:
        """One step of all chains that are not finished."""
        old = self.state
        new, info = self.sampler.step(old, generator)
        lost = ~_is_finite(new) & ~self.finished
        stopped = lost | self.finished
        if bool(stopped.any()):
            before = _per_chain_fields(old)
            for name, value in _per_chain_fields(new).items():
                back = torch.where(per_chain(stopped, value), before[name], value)  # type: ignore[arg-type]
                new = new._replace(**{name: back})  # type: ignore[attr-defined]
        self.diverged |= dict.fromkeys(torch.nonzero(lost).flatten().tolist(), new.step)
        self.finished = stopped if info.finished is None else stopped | info.finished
        self.state = new
        return info

    def run(
        self, steps: int, generator: torch.Generator, after: Callable[[S, Info], None] | None = None
    ) -> S:
        """Up to ``steps`` steps, fewer if the chains are `done` before; the last state.

        ``after`` is called with the state and the report after each step.

        Raises:
            UserError: if ``steps`` is below 1.
        """
        if steps < 1:
            raise UserError(f"{steps} steps move no chain: take 1 or more")
        for _ in range(steps):
            if self.done:
                break
            info = self.advance(generator)
            if after is not None:
                after(self.state, info)
        return self.state


def normal_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers of x's shape, type and device."""
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def root_mean_square(change: Tensor) -> Tensor:
    """Root mean square over the entries of each chain, (B,)."""
    return change.flatten(1).square().mean(1).sqrt()


def unit_length(gradient: Tensor) -> Tensor:
    """``gradient`` (B, ...) at l2 length 1 for each chain; 0 where it is 0."""
    norm = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
    return gradient / per_chain(norm.clamp_min(torch.finfo(norm.dtype).tiny), gradient)


def per_chain(value: float | Tensor, x: Tensor) -> float | Tensor:
    """A number, or one for each chain (B,), shaped to multiply ``x`` (B, ...)."""
    if isinstance(value, Tensor) and value.ndim:
        return value.reshape(-1, *[1] * (x.ndim - 1))
    return value


def check_positive(name: str, value: float, zero: bool = False) -> float:
    """``value`` itself.

    Raises:
        UserError: if it is not a finite number above 0 (or 0, if that is legal).
    """
    if not (0 if zero else math.ulp(0.0)) <= value < math.inf:
        legal = "of 0 or more" if zero else "above 0"
        raise UserError(f"{name} {value} must be a finite number {legal}")
    return value


def _per_chain_fields(state: Any) -> dict[str, Tensor]:
    """The fields of a state that have one row per chain."""
    count = len(state.x)
    fields = state._asdict().items()
    return {n: v for n, v in fields if isinstance(v, Tensor) and v.shape[:1] == (count,)}


def _is_finite(state: State) -> Tensor:
    """Which chains are finite in every field, (B,) bool."""
    fields = _per_chain_fields(state).values()
    return torch.stack([v.reshape(len(v), -1).isfinite().all(1) for v in fields]).all(0)


Labels = Tensor | int | None

HIGHEST, LOWEST = 1.0, 0.01
"""Ends of the noise levels where the model sets none, image units."""


class ScoreFunction(Protocol):
    """(x, sigma) to the score, shape of x, per image unit."""

    def __call__(self, x: Tensor, sigma: Noise | None = None, /) -> Tensor: ...


class DensityFunction(Protocol):
    """(x, sigma) to the log-density (B,) in nats and its gradient, shape of x."""

    def __call__(self, x: Tensor, sigma: Noise | None = None, /) -> tuple[Tensor, Tensor]: ...


DenoiserFunction = ScoreFunction
"""(y, sigma) to an estimate of the clean image, shape of y; no sigma: blind."""


def score_of(model: ScoreModel, c: Labels = None) -> ScoreFunction:
    """The score of ``model``, or of p(x|c)."""
    _check_labels(model, c)
    return lambda x, sigma=None: model.score(x, sigma, c)


def density_of(model: ScoreModel, c: Labels = None) -> DensityFunction:
    """log p(x), or log p(x|c) up to a constant, with its gradient, from one forward pass.

    Raises:
        UserError: if the model has no density.
    """
    energy_model = _energy_model(model, c)
    return lambda x, sigma=None: energy_model.density_and_score(x, sigma, c)


def label_density_of(model: ScoreModel, c: Tensor | int) -> DensityFunction:
    """log p(c|x) of labels ``c`` and its gradient: what ascent on a classifier climbs.

    Raises:
        UserError: if the model has no density.
    """
    energy_model = _energy_model(model, c)

    def density(x: Tensor, sigma: Noise | None = None) -> tuple[Tensor, Tensor]:
        target = LabelLogProbability(energy_model.check_labels(c, x))
        energies, (gradient,) = energy_model.value_and_grads(x, sigma, target)
        return target(upcast_energies(energies)), gradient

    return density


def denoiser_of(model: ScoreModel, c: Labels = None) -> DenoiserFunction:
    """The denoiser of ``model``, conditional on labels if they are given."""
    _check_labels(model, c)
    return lambda y, sigma=None: model.denoise(y, sigma, c)


def blind_denoiser_of(model: ScoreModel, c: Labels = None) -> DenoiserFunction:
    """The denoiser of a blind ``model`` at the noise level that it estimates.

    The estimate sqrt(d) / ||score|| is unbounded where the score is small, and so is the change
    made of it; so it is clamped to the levels that the model was trained for.
    """
    _check_labels(model, c)
    limits = trained_range(model)
    return lambda y, sigma=None: model.denoise_blind(y, c, limits)[0]


# --- noise levels of a model ---------------------------------------------------------------------


def trained_range(model: ScoreModel) -> tuple[float, float] | None:
    """The lowest and the highest noise level of training, image units; None: no limit is known."""
    return model.card.sigma_range if model.card else None


def clean_level(model: ScoreModel) -> float | None:
    """The noise level at which ``model`` takes clean images: its lowest, if it takes a level."""
    limits = trained_range(model)
    return limits[0] if limits and model.noise_conditional else None


def highest_level(model: ScoreModel, asked: float | None = None) -> float:
    """Where chains begin: ``asked`` (a `UserError` if untrained there), or the model's highest."""
    limits = trained_range(model)
    if asked is not None:
        return check_trained(asked, limits)
    return limits[1] if limits else HIGHEST


def lowest_level(model: ScoreModel, asked: float | None = None) -> float:
    """Where chains end: ``asked``, as `highest_level`, or 0.01, or the model's lowest above it."""
    limits = trained_range(model)
    if asked is not None:
        return check_trained(asked, limits)
    return min(max(LOWEST, limits[0]), limits[1]) if limits else LOWEST


def _energy_model(model: ScoreModel, c: Labels) -> EnergyModel:
    if not isinstance(model, EnergyModel):
        raise UserError(
            f"{type(model).__name__} is a plain denoiser and has no log-density: take a sampler "
            "that needs the score alone"
        )
    _check_labels(model, c)
    return model


def _check_labels(model: ScoreModel, c: Labels) -> None:
    if c is not None:
        labels = torch.as_tensor(c)
        model.check_labels(c, torch.zeros(labels.numel(), device=labels.device))
