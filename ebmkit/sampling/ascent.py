r"""Gradient ascent to a label, and the stochastic ascent of Kadkhodaie & Simoncelli.

**Ascent to a label** (RCG sections 3.1-3.2). For a log-density :math:`\ell(x)`, either
:math:`\log p(c \mid x)` (`label_density_of`) or :math:`\log p(x, c)` (`density_of`), with gradient
g, a step is

.. math:: x' = \Pi\bigl(x + \eta\, n(g)\bigr), \qquad
    n(g) = g,\quad g / \|g\|_2 \quad\text{or}\quad \operatorname{sign} g .

:math:`\Pi` projects onto a ball around the start and onto the range of images; both are optional.
With a robust classifier the images come to look like the label ("perceptually aligned gradients");
with a plain classifier they hardly change. On the loss, in a small ball, this is projected gradient
descent, the attack of Madry et al. (arXiv 1706.06083). Santurkar et al. (2019) take 60 steps of 0.5
in l2 with projection onto a ball of radius 40, from samples of `ebmkit.sampling.ClassGaussians`.
With plain steps it is Langevin dynamics at temperature 0.

**Stochastic ascent with a blind denoiser** ("Stochastic solutions for linear inverse problems using
the prior implicit in a denoiser", NeurIPS 2021, arXiv 2007.13640) increases the density of noisy
images while the noise level decreases, with or without linear measurements. The residual
:math:`f(y) = D(y) - y` of a blind denoiser is :math:`\sigma^2 \nabla\log p_\sigma(y)` at a level
that the denoiser estimates: :math:`\sigma^2 = \|f(y)\|^2 / N` for N entries. Step t = 1, 2, ...
from :math:`y_0 \sim \mathcal N(0.5, \sigma_0^2 I)` is

.. math::
    h_t &= \frac{h_0 t}{1 + h_0 (t - 1)}, \qquad
    d_t = f(y_{t-1}), \qquad
    \sigma_t^2 = \|d_t\|^2 / N, \\
    \gamma_t^2 &= \bigl((1 - \beta h_t)^2 - (1 - h_t)^2\bigr)\, \sigma_t^2, \\
    y_t &= y_{t-1} + h_t d_t + \gamma_t z_t, \qquad z_t \sim \mathcal N(0, I)

(algorithm 1), until :math:`\sigma_t \le \sigma_L`. With beta = 1 no noise is added; with a small
beta each step reduces the noise by a fraction of only :math:`\beta h_t`. For measurements
:math:`m = M^\top x` (`ebmkit.sampling.inverse`), algorithm 2 uses

.. math:: d_t = (I - M M^\top) f(y_{t-1}) + M (m - M^\top y_{t-1}), \qquad
    y_0 \sim \mathcal N\bigl(0.5\,(I - M M^\top)\, e + M m,\ \sigma_0^2 I\bigr).

In the paper the final image still has noise of level :math:`\sigma_L`. Here one more step, with
h = 1 and no noise, returns the denoised image, which satisfies the measurements exactly.

The samples follow the prior, or the posterior, with a bias towards the modes. Along a direction of
variance v, the variance at noise level :math:`\sigma` converges to

.. math:: V = \sigma^2\, \frac{(1 - \beta h)^2 - (1 - h)^2}{1 - (1 - \kappa h)^2}
    \quad\text{instead of}\quad v + \sigma^2, \qquad \kappa = \frac{\sigma^2}{v + \sigma^2},

at a rate of :math:`\kappa h`, while the noise decreases at a rate of :math:`\beta h`; so it stops
changing near :math:`\sigma^2 = \beta v`. The ratio of the variances is :math:`1 - \beta` for small
h, but a half for h = 1, the limit of :math:`h_t`. ``largest_step`` bounds h, at the cost of more
steps (see docs/concepts/samplers.md). A second bias, that :math:`\|f\|^2 / N` is below the level
squared, vanishes for low-dimensional images.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, Self, get_args

import torch
from pydantic import Field
from torch import Tensor

from ebmkit.energy import ScoreModel, per_image
from ebmkit.errors import UserError, unknown_name
from ebmkit.noise import Sigma, check_positive
from ebmkit.sampling.base import (
    HIGHEST,
    LOWEST,
    Chain,
    DenoiserFunction,
    DensityFunction,
    Info,
    Labels,
    PositionSampler,
    blind_denoiser_of,
    density_of,
    highest_level,
    label_density_of,
    lowest_level,
    normal_like,
    root_mean_square,
    unit_length,
)
from ebmkit.sampling.entry import LevelConfig, SamplerConfig, SamplerEntry
from ebmkit.sampling.inverse import Measurement
from ebmkit.sampling.langevin import DOWN_LEVELS, langevin_move

Direction = Literal["l2", "plain", "sign"]
Ball = Literal["l2", "linf"]


class AscentChain(NamedTuple):
    """State of `Ascent`, with the starting points of the chains."""

    x: Tensor
    step: int
    start: Tensor


class Ascent:
    """Gradient ascent on a log-density, with normalised or plain steps.

    Args:
        density: log-density to increase, with its gradient.
        step_size: length of a step in image units (``l2``), of each entry (``sign``), or eta in
            image units squared (``plain``); a number or (B,).
        direction: ``l2``, ``plain`` or ``sign``.
        radius: radius of the ball around the start, image units, a number or (B,); None: no ball.
        ball: norm of the ball, ``l2`` or ``linf``.
        bounds: range to which x is clipped after each step, numbers or (B,); None: no clipping.
        sigma: noise level passed to the density, for models that take one.

    Raises:
        UserError: if a number or a name is not legal.
    """

    steps = None

    def __init__(
        self,
        density: DensityFunction,
        step_size: float | Tensor = 0.5,
        direction: Direction = "l2",
        radius: float | Tensor | None = None,
        ball: Ball = "l2",
        bounds: tuple[float, float] | tuple[Tensor, Tensor] | None = (0.0, 1.0),
        sigma: float | None = None,
    ) -> None:
        for kind, given, names in (("direction", direction, Direction), ("ball", ball, Ball)):
            if given not in get_args(names):
                raise unknown_name(kind, given, get_args(names))
        self.density, self.sigma = density, sigma
        for name, value in (("step size", step_size), ("radius", radius)):
            if isinstance(value, (int, float)):  # tensors (B,) are not checked
                check_positive(name, value)
        self.step_size, self.radius = step_size, radius
        self.direction, self.ball, self.bounds = direction, ball, bounds

    def init(self, x: Tensor) -> AscentChain:
        """State of chains that start at ``x`` (B, ...)."""
        return AscentChain(x, 0, x)

    def step(self, state: AscentChain, generator: torch.Generator) -> tuple[AscentChain, Info]:
        """Take one ascent step; ``generator`` is not used."""
        x = state.x
        _, gradient = self.density(x, self.sigma)
        if self.direction != "plain":
            gradient = gradient.sign() if self.direction == "sign" else unit_length(gradient)
        moved = langevin_move(x, gradient, self.step_size, 0.0, x)
        if self.radius is not None:
            moved = state.start + _within(moved - state.start, self.radius, self.ball)
        if self.bounds is not None:
            low, high = (per_image(bound, moved) for bound in self.bounds)
            moved = torch.clamp(moved, low, high)  # type: ignore[arg-type]  # both have one type
        return AscentChain(moved, state.step + 1, state.start), Info(root_mean_square(moved - x))


def _within(offset: Tensor, radius: float | Tensor, ball: Ball) -> Tensor:
    """Project offsets (B, ...) onto the ball."""
    if ball == "linf":
        bound = per_image(radius, offset)
        return torch.clamp(offset, -bound, bound)  # type: ignore[arg-type]  # both have one type
    norm: Tensor = torch.linalg.vector_norm(offset.flatten(1), dim=1)
    return offset * per_image(radius / norm.clamp_min(radius), offset)


class AscentConfig(LevelConfig):
    """Settings of ``ascent``."""

    steps: int = Field(60, ge=1, description="number of steps per chain")
    objective: Literal["label", "joint"] = Field(
        "label", description="function to increase: label (log p(c|x)) or joint (log p(x, c))"
    )
    step_size: float = Field(
        0.1, gt=0, description="length of a step, image units; Santurkar et al. use 0.5 at 224x224"
    )
    direction: Direction = Field(
        "l2",
        description="direction of a step: l2 (normalised gradient), plain (gradient), sign "
        "(sign of the gradient)",
    )
    radius: float | None = Field(
        None, gt=0, description="radius of a ball around the starting point; null: no ball"
    )
    ball: Ball = Field("l2", description="norm of the ball")


def _ascent(model: ScoreModel, c: Labels, config: AscentConfig) -> Ascent:
    assert c is not None
    density = (label_density_of if config.objective == "label" else density_of)(model, c)
    how = config.step_size, config.direction, config.radius, config.ball
    return Ascent(density, *how, sigma=config.sigma)


class StochasticAscentConfig(SamplerConfig):
    """Settings of ``kadkhodaie_simoncelli``."""

    steps: int = Field(2000, ge=1, description="maximum number of steps per chain")
    first_sigma: Sigma | None = Field(
        None, description="noise level of the starting points; null: the model's highest"
    )
    last_sigma: Sigma | None = Field(
        None, description="noise level at which a chain ends; null: 0.01, or the model's lowest"
    )
    first_step: float = Field(0.01, gt=0, le=1, description="first step size h_0")
    beta: float = Field(
        0.01, gt=0, le=1, description="beta: 1 adds no noise, smaller values add more"
    )
    largest_step: float = Field(
        1.0, gt=0, le=1, description="bound on the step size h_t; 1 in the paper"
    )

    def resolve_levels(self, model: ScoreModel) -> Self:
        last = lowest_level(model, self.last_sigma)
        first = highest_level(model, self.first_sigma)
        return self.model_copy(update={"first_sigma": first, "last_sigma": last})


class StochasticAscent(PositionSampler):
    """The sampler of Kadkhodaie & Simoncelli 2021, algorithms 1 and 2.

    Each chain estimates its noise level and ends when the level is low enough.

    Args:
        denoiser: blind denoiser, called without sigma.
        config: settings; noise levels default to 1 (first) and 0.01 (last).
        measurement: linear measurement for algorithm 2; None: algorithm 1.
        measured: measured values, (B, n) or (1, n).

    Raises:
        UserError: if the noise does not decrease, or only one of the last two is given.
    """

    def __init__(
        self,
        denoiser: DenoiserFunction,
        config: StochasticAscentConfig,
        measurement: Measurement | None = None,
        measured: Tensor | None = None,
    ) -> None:
        first, last = config.first_sigma or HIGHEST, config.last_sigma or LOWEST
        if not first > last:
            raise UserError(
                f"the noise must fall: first sigma {first:g} is not above last sigma {last:g}"
            )
        if (measurement is None) != (measured is None):
            raise UserError("measurement and measured belong together: give both")
        self.denoiser, self.config = denoiser, config
        self.sigmas, self.steps = (first, last), config.steps
        self.measurement, self.measured = measurement, measured

    def start(
        self, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Starting points of ``shape`` (B, C, H, W): gray, with the measured values, plus noise."""
        gray = torch.full(shape, 0.5, dtype=dtype, device=generator.device)
        if self.measurement is not None and self.measured is not None:
            gray = self.measurement.impose(gray, self.measured.to(gray).expand(len(gray), -1))
        return gray + self.sigmas[0] * normal_like(gray, generator)

    def step(self, state: Chain, generator: torch.Generator) -> tuple[Chain, Info]:
        """Take a noisy ascent step, or denoise the images of chains that end."""
        y, t, config = state.x, state.step + 1, self.config
        change = self.denoiser(y) - y
        if self.measurement is not None and self.measured is not None:
            change = self.measurement.impose(change, self.measured - self.measurement.measure(y))
        sigma = root_mean_square(change)
        h = self._step_size(t)
        gamma = ((1 - config.beta * h) ** 2 - (1 - h) ** 2) ** 0.5 * sigma
        moved = y + h * change + per_image(gamma, y) * normal_like(y, generator)
        finished = (sigma <= self.sigmas[1]) | (t >= self.steps)
        moved = torch.where(per_image(finished, y), y + change, moved)  # type: ignore[arg-type]
        info = Info(root_mean_square(moved - y), sigma=sigma, finished=finished)
        return Chain(moved, t), info

    def _step_size(self, t: int) -> float:
        first = self.config.first_step
        return min(self.config.largest_step, first * t / (1 + first * (t - 1)))

    def level_after(self, steps: int) -> float:
        """Noise level after ``steps`` with an ideal denoiser: step t multiplies it by 1 - beta h_t,
        until it is the last level."""
        factors = (1 - self.config.beta * self._step_size(t) for t in range(1, steps + 1))
        return max(self.sigmas[1], self.sigmas[0] * math.prod(factors))


KADKHODAIE_SIMONCELLI_ENTRY = SamplerEntry(
    name="kadkhodaie_simoncelli",
    description="stochastic ascent with a blind denoiser (Kadkhodaie & Simoncelli 2021)",
    config=StochasticAscentConfig,
    needs=("levels", "blind"),
    make=lambda model, c, config: StochasticAscent(blind_denoiser_of(model, c), config),
    no_stationary_distribution=DOWN_LEVELS,
    priority=3,
    starts_from_data=False,
)

ENTRIES = (
    KADKHODAIE_SIMONCELLI_ENTRY,
    SamplerEntry(
        name="ascent",
        description="gradient ascent to a label (Santurkar et al. 2019)",
        config=AscentConfig,
        needs=("density", "labels"),
        make=_ascent,
        no_stationary_distribution="maximises a function",
    ),
)


def make_restorer(
    model: ScoreModel,
    measurement: Measurement,
    measured: Tensor,
    config: StochasticAscentConfig | None = None,
    c: Labels = None,
) -> StochasticAscent:
    """Build the stochastic ascent to images that satisfy linear measurements exactly.

    ``model`` is a blind denoiser, ``measured`` (B, n) or (1, n) the values of ``measurement``,
    ``c`` labels, a number or (B,).

    Raises:
        UserError: if the sampler does not support the model, or a noise level is out of its range.
    """
    KADKHODAIE_SIMONCELLI_ENTRY.check(model, c)
    config = (config or StochasticAscentConfig()).resolve_levels(model)
    return StochasticAscent(blind_denoiser_of(model, c), config, measurement, measured)
