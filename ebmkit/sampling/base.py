r"""Sampler interface, the functions of a model that samplers call, and the runner of chains.

A sampler consists of two pure functions: ``init`` returns the state of B chains at given starting
points, ``step`` maps a state and a random generator to the next state and a report (`Info`). A
state is a `NamedTuple` of numbers and of tensors with one row per chain; it holds everything that
the next step needs, so an interrupted chain resumes from its saved state.

At fixed labels c, a sampler calls one of these functions of images (B, ...), never the network:

.. math::
    \text{score:}   & \quad (x, \sigma) \mapsto \nabla_x \log p_\sigma(x \mid c) \\
    \text{density:} & \quad (x, \sigma) \mapsto
                            \log p_\sigma(x \mid c),\ \nabla_x \log p_\sigma(x \mid c) \\
    \text{denoiser:}& \quad (y, \sigma) \mapsto E[x \mid y, c]

Sigma is a float or (B,) in image units, or None for a blind model. Functions of this module build
them from a model and labels c, a number or (B,). They raise `UserError` if the model has no labels
or one is out of range. The log-density holds up to one constant per label.

`Chains` runs a sampler. A chain that reaches NaN or Inf has diverged: it returns to its last finite
state and stops. Chains are independent, so the others are not affected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ebmkit.energy import DensityModel, Noise, ScoreModel, per_image
from ebmkit.errors import UserError
from ebmkit.noise import check_trained


class State(Protocol):
    """Fields of every state: positions ``x`` (B, ...) and the number of steps done."""

    @property
    def x(self) -> Tensor: ...
    @property
    def step(self) -> int: ...


class Chain(NamedTuple):
    """State of samplers that need only the positions."""

    x: Tensor
    step: int


class Info(NamedTuple):
    """Report of a step, one entry per chain (B,); None where undefined.

    Attributes:
        move: root mean square of the change over the entries of x, image units.
        sigma: noise level that was passed to the target or estimated, image units.
        accepted: whether the proposal was accepted; of several proposals, the share.
        finished: whether the chain needs no further step.
    """

    move: Tensor
    sigma: Tensor | None = None
    accepted: Tensor | None = None
    finished: Tensor | None = None


S = TypeVar("S", bound=State)


class Sampler(Protocol[S]):
    """Sampler interface; the target is an argument of the constructor.

    Samplers over several noise levels have an attribute ``sigmas`` (first to last), samplers at one
    level an attribute ``sigma``.

    Attributes:
        steps: length of the schedule; None: unlimited.
    """

    @property
    def steps(self) -> int | None: ...

    def init(self, x: Tensor) -> S:
        """State of chains that start at ``x`` (B, ...)."""
        ...

    def step(self, state: S, generator: torch.Generator) -> tuple[S, Info]:
        """Next state and its report; ``state`` is not changed."""
        ...


class PositionSampler:
    """Base of samplers whose state is a `Chain`."""

    def init(self, x: Tensor) -> Chain:
        """State of chains that start at ``x`` (B, ...), noisy images at the first level, if any."""
        return Chain(x, 0)


def next_state(state: Chain, x: Tensor, sigma: float | None = None) -> tuple[Chain, Info]:
    """State after a step to ``x`` at noise level ``sigma``, and report."""
    level = None if sigma is None else torch.full_like(x.flatten(1)[:, 0], sigma)
    return Chain(x, state.step + 1), Info(root_mean_square(x - state.x), level)


class Chains(Generic[S]):
    """Run the chains of a sampler; diverged chains stop.

    Args:
        sampler: any sampler.
        state: initial state; ``sampler.init(x)`` for new chains.
        diverged: chain -> step at which it diverged, for resumed chains.

    Attributes:
        state: current state; finite everywhere.
        finished: (B,) bool, chains that need no further step, including diverged ones.

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
        """Whether no chain needs a further step, or the schedule has ended."""
        length = self.sampler.steps
        return (length is not None and self.state.step >= length) or bool(self.finished.all())

    def advance(self, generator: torch.Generator) -> Info:
        """Advance all unfinished chains by one step."""
        old = self.state
        new, info = self.sampler.step(old, generator)
        lost = ~_is_finite(new) & ~self.finished
        stopped = lost | self.finished
        if bool(stopped.any()):
            before = _per_image_fields(old)
            for name, value in _per_image_fields(new).items():
                back = torch.where(per_image(stopped, value), before[name], value)  # type: ignore[arg-type]
                new = new._replace(**{name: back})  # type: ignore[attr-defined]
        self.diverged |= dict.fromkeys(torch.nonzero(lost).flatten().tolist(), new.step)
        self.finished = stopped if info.finished is None else stopped | info.finished
        self.state = new
        return info

    def run(
        self, steps: int, generator: torch.Generator, after: Callable[[S, Info], None] | None = None
    ) -> S:
        """Take up to ``steps`` steps, fewer if the chains are `done` before; return the last state.

        ``after`` is called with the state and the report after each step.

        Raises:
            UserError: if ``steps`` is below 1.
        """
        if steps < 1:
            raise UserError(f"{steps} steps are too few: take 1 or more")
        for _ in range(steps):
            if self.done:
                break
            info = self.advance(generator)
            if after is not None:
                after(self.state, info)
        return self.state


def normal_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers with the shape, dtype and device of ``x``."""
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def root_mean_square(change: Tensor) -> Tensor:
    """Root mean square over the entries of each chain, (B,)."""
    return change.flatten(1).square().mean(1).sqrt()


def unit_length(gradient: Tensor) -> Tensor:
    """Scale ``gradient`` (B, ...) to l2 norm 1 for each chain; a gradient of 0 stays 0."""
    norm: Tensor = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
    return gradient / per_image(norm.clamp_min(torch.finfo(norm.dtype).tiny), gradient)


def _per_image_fields(state: Any) -> dict[str, Tensor]:
    """Fields of a state that have one row per chain."""
    count = len(state.x)
    fields = state._asdict().items()
    return {n: v for n, v in fields if isinstance(v, Tensor) and v.shape[:1] == (count,)}


def _is_finite(state: State) -> Tensor:
    """Mask (B,) bool of the chains that are finite in every field."""
    fields = _per_image_fields(state).values()
    return torch.stack([v.reshape(len(v), -1).isfinite().all(1) for v in fields]).all(0)


Labels = Tensor | int | None

HIGHEST, LOWEST = 1.0, 0.01
"""Default highest and lowest noise level, image units."""


class ScoreFunction(Protocol):
    """Map (x, sigma) to the score, in the shape of x, per image unit."""

    def __call__(self, x: Tensor, sigma: Noise | None = None, /) -> Tensor: ...


class DensityFunction(Protocol):
    """Map (x, sigma) to the log-density (B,) in nats and its gradient, in the shape of x."""

    def __call__(self, x: Tensor, sigma: Noise | None = None, /) -> tuple[Tensor, Tensor]: ...


DenoiserFunction = ScoreFunction
"""Map (y, sigma) to an estimate of the clean image, in the shape of y; blind without sigma."""


def score_of(model: ScoreModel, c: Labels = None) -> ScoreFunction:
    """Score function of p(x), or of p(x|c) with labels."""
    _check_labels(model, c)
    return lambda x, sigma=None: model.score(x, sigma, c)


def density_of(model: ScoreModel, c: Labels = None) -> DensityFunction:
    """Density function of log p(x), or of log p(x|c) up to a constant; it takes one forward pass.

    Raises:
        UserError: if the model has no density.
    """
    density_model = _density_model(model, c)
    return lambda x, sigma=None: density_model.density_and_score(x, sigma, c)


def label_density_of(model: ScoreModel, c: Tensor | int) -> DensityFunction:
    """Density function of log p(c|x) for labels ``c``, the target of ascent on a classifier.

    Of a guided model it is the guidance term.

    Raises:
        UserError: if the model has no density.
    """
    density_model = _density_model(model, c)
    return lambda x, sigma=None: density_model.label_density_and_score(x, c, sigma)


def denoiser_of(model: ScoreModel, c: Labels = None) -> DenoiserFunction:
    """Denoiser function of ``model``, conditional on labels if they are given."""
    _check_labels(model, c)
    return lambda y, sigma=None: model.denoise(y, sigma, c)


def blind_denoiser_of(model: ScoreModel, c: Labels = None) -> DenoiserFunction:
    """Denoiser function of a blind ``model`` at the noise level that the model estimates.

    The estimate sqrt(d) / ||score|| is unbounded where the score is small, and so is the change of
    the image. So it is clamped to the trained range.
    """
    _check_labels(model, c)
    limits = trained_range(model)
    return lambda y, sigma=None: model.denoise_blind(y, c, limits)[0]


# --- noise levels of a model ---------------------------------------------------------------------


def trained_range(model: ScoreModel) -> tuple[float, float] | None:
    """Lowest and highest noise level of training, image units; None: no limits are known."""
    return model.card.sigma_range if model.card else None


def clean_level(model: ScoreModel) -> float | None:
    """Noise level for clean images: the lowest of ``model``, or None if it takes no noise level."""
    limits = trained_range(model)
    return limits[0] if limits and model.noise_conditional else None


def highest_level(
    model: ScoreModel, requested: float | None = None, default: float = HIGHEST
) -> float:
    """First noise level of chains: ``requested``, checked, else the highest, or ``default``."""
    limits = trained_range(model)
    if requested is not None:
        return check_trained(requested, limits)
    return limits[1] if limits else default


def lowest_level(
    model: ScoreModel, requested: float | None = None, default: float = LOWEST
) -> float:
    """Last noise level of chains: ``requested``, checked, or ``default`` in the trained range."""
    limits = trained_range(model)
    if requested is not None:
        return check_trained(requested, limits)
    return min(max(default, limits[0]), limits[1]) if limits else default


SPREAD = 0.25
"""Typical standard deviation of a pixel, image units."""


def hiding_level(shape: Sequence[int]) -> float:
    """Noise level that hides an image of ``shape``: the typical distance of images from gray."""
    return SPREAD * math.sqrt(math.prod(shape))


def _density_model(model: ScoreModel, c: Labels) -> DensityModel:
    if not isinstance(model, DensityModel):
        raise UserError(
            f"{type(model).__name__} is a plain denoiser and has no log-density: take a sampler "
            "that needs only the score"
        )
    _check_labels(model, c)
    return model


def _check_labels(model: ScoreModel, c: Labels) -> None:
    if c is not None:
        labels = torch.as_tensor(c)
        model.check_labels(c, torch.zeros(labels.numel(), device=labels.device))
