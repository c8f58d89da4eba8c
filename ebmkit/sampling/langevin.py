r"""Langevin dynamics, with and without acceptance, and Hamiltonian Monte Carlo.

Overdamped Langevin dynamics :math:`dx = s(x)\,dt + \sqrt{2T}\,dW` has the stationary density
:math:`p^{1/T}`. One step of size :math:`\eta`, in image units squared,

.. math:: x' = x + \eta\, s(x) + \sqrt{2 \eta T}\, \xi, \qquad \xi \sim \mathcal N(0, I),

is `langevin_move`, which all samplers here except HMC call. Without a Metropolis correction the
chain has a bias of first order in :math:`\eta` (on a Gaussian of variance v the stationary variance
is :math:`v / (1 - \eta / 2v)`). At T = 0 it is gradient ascent.

**SGLD** as in JEM (arXiv 1912.03263) uses noise that does not match the step size: the temperature
is :math:`T = \text{noise}^2 / 2\eta`, and no tempered density is sampled exactly. JEM's step 1 and
noise 0.01 are for images u = 2x - 1 in [-1, 1]: :math:`u' = u + \nabla_u + 0.01\,\xi`. With
:math:`\nabla_u = s(x)/2` this is :math:`x' = x + s(x)/4 + 0.005\,\xi` (`JEM_STEP`, `JEM_NOISE`).

**MALA** (Roberts & Tweedie 1996) is exact at any step size: it accepts a step with probability

.. math::
    \min\Bigl(1, \frac{p(x')^{1/T}\, q(x \mid x')}{p(x)^{1/T}\, q(x' \mid x)}\Bigr), \qquad
    q(x' \mid x) = \mathcal N(x';\ x + \eta s(x),\ 2\eta T).

**Hamiltonian Monte Carlo** (Duane et al. 1987; Neal 2011, section 3) adds to a position x a
momentum :math:`v \sim \mathcal N(0, I)` and simulates the dynamics of the energy
:math:`H(x, v) = -\log p(x) / T + \|v\|^2 / 2` by leapfrog steps of size :math:`\epsilon`,

.. math:: v \leftarrow v + \tfrac\epsilon2\, s(x) / T, \qquad x \leftarrow x + \epsilon\, v, \qquad
    v \leftarrow v + \tfrac\epsilon2\, s(x) / T,

which preserve volume and are reversible. So accepting their end point with probability
:math:`\min(1, e^{H(x, v) - H(x', v')})` leaves :math:`p^{1/T}` invariant at any step size; the
error of H is of order :math:`\epsilon^2`. With a single leapfrog step it is MALA with
:math:`\eta = \epsilon^2 / 2T`: the same proposal and the same acceptance ratio.

**Geometric noise levels** :math:`\sigma_1 > \dots > \sigma_L`.
Annealed Langevin (Song & Ermon 2019; RCG algorithm 2) takes several Langevin steps at each level,
of size :math:`\eta_i = r\,\sigma_i^2`. Predictor-corrector (Song et al. 2021, VE) first moves from
one level to the next,

.. math::
    x' = x + (\sigma_i^2 - \sigma_{i+1}^2)\, s_{\sigma_i}(x)
         + \sigma_{i+1} \sqrt{1 - \sigma_{i+1}^2 / \sigma_i^2}\; \xi ,

and then takes Langevin steps at that level, of size
:math:`\eta = 2\,\text{snr}^2 \sigma_{i+1}^2`. Song et al. use
:math:`2\,(\text{snr}\,\|\xi\| / \|s\|)^2` with norms averaged over the batch. Since
:math:`\|s\|` is about :math:`\sqrt d / \sigma`, the two agree in high dimensions, and here chains
stay independent.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ebmkit.energy import ScoreModel, per_image
from ebmkit.errors import UserError
from ebmkit.noise import Sigma, SigmaOrZero, check_positive
from ebmkit.sampling.base import (
    HIGHEST,
    LOWEST,
    Chain,
    DensityFunction,
    Info,
    PositionSampler,
    ScoreFunction,
    density_of,
    highest_level,
    lowest_level,
    next_state,
    normal_like,
    root_mean_square,
    score_of,
)
from ebmkit.sampling.entry import START, LevelConfig, SamplerConfig, SamplerEntry, Start

JEM_STEP, JEM_NOISE = 0.25, 0.005
"""JEM's step size and noise, for images in [0, 1]."""


def langevin_move(
    x: Tensor, score: Tensor, step_size: float | Tensor, noise_std: float | Tensor, xi: Tensor
) -> Tensor:
    """Return ``x + step_size * score + noise_std * xi``.

    ``score`` is per image unit; ``xi`` is standard normal, unused if ``noise_std`` is the number 0.
    ``step_size`` (image units squared) and ``noise_std`` (image units) are numbers or (B,).
    """
    moved = x + per_image(step_size, x) * score
    if isinstance(noise_std, Tensor) or noise_std:
        moved = moved + per_image(noise_std, x) * xi
    return moved


class Langevin(PositionSampler):
    """Unadjusted Langevin dynamics at one noise level; SGLD if ``noise_std`` is given.

    Args:
        score: score function of the target.
        step_size: eta, image units squared.
        temperature: T; 0 is gradient ascent.
        noise_std: standard deviation of the noise, image units; None: sqrt(2 eta T).
        sigma: noise level passed to the score, for models that take one.
        drift_clip: bound on each entry of eta * score, as in JEM++ (arXiv 2109.09032).
        bounds: range to which x is clipped after each step; None: no clipping.
        normal: maps (x, generator) to standard normal numbers in the shape of x.

    Raises:
        UserError: if a number is not legal.
    """

    steps = None

    def __init__(
        self,
        score: ScoreFunction,
        step_size: float,
        temperature: float = 1.0,
        noise_std: float | None = None,
        sigma: float | None = None,
        drift_clip: float | None = None,
        bounds: tuple[float, float] | None = None,
        normal: Callable[[Tensor, torch.Generator], Tensor] = normal_like,
    ) -> None:
        self.score, self.sigma, self.normal = score, sigma, normal
        self.step_size = check_positive("step size", step_size)
        check_positive("temperature", temperature, zero=True)
        own = math.sqrt(2 * step_size * temperature)
        self.noise_std = own if noise_std is None else check_positive("noise", noise_std, zero=True)
        if drift_clip is not None:
            check_positive("drift clip", drift_clip)
        self.drift_clip, self.bounds = drift_clip, bounds

    def step(self, state: Chain, generator: torch.Generator) -> tuple[Chain, Info]:
        """Take the step x + eta s(x) + noise * xi."""
        x = state.x
        score, step_size = self.score(x, self.sigma), self.step_size
        if self.drift_clip is not None:
            score = (step_size * score).clamp(-self.drift_clip, self.drift_clip)
            step_size = 1.0
        moved = langevin_move(x, score, step_size, self.noise_std, self.normal(x, generator))
        if self.bounds is not None:
            moved = moved.clamp(*self.bounds)
        return next_state(state, moved)


class LangevinConfig(LevelConfig):
    """Settings of ``langevin``."""

    step_size: float = Field(1e-4, gt=0, description="step size eta, image units squared")
    temperature: float = Field(
        1.0, ge=0, description="temperature T: samples p^(1/T); 0: gradient ascent"
    )


class SGLDConfig(LevelConfig):
    """Settings of ``sgld``."""

    steps: int = Field(
        20, ge=1, description="number of steps per chain; JEM takes 20, starting from its buffer"
    )
    start: Start = Field("uniform", description=START)
    step_size: float = Field(
        JEM_STEP,
        gt=0,
        description="step size eta, image units squared; default: JEM's 1 in [-1, 1]",
    )
    noise: SigmaOrZero = Field(
        JEM_NOISE, description="standard deviation of the noise; default: JEM's 0.01 in [-1, 1]"
    )
    drift_clip: float | None = Field(
        None, gt=0, description="bound on each entry of eta * score, as in JEM++"
    )


class DensityChain(NamedTuple):
    """State of samplers that accept or reject: positions with their log-density and score."""

    x: Tensor
    step: int
    log_density: Tensor
    score: Tensor


class MALAConfig(LevelConfig):
    """Settings of ``mala``."""

    step_size: float = Field(
        1e-4, gt=0, description="step size eta; tune for an acceptance of 0.57"
    )
    temperature: float = Field(1.0, gt=0, description="temperature T: samples p^(1/T)")


class HMCConfig(LevelConfig):
    """Settings of ``hmc``.

    For each proposal, the step size of each chain is drawn from epsilon * [1 - jitter, 1 + jitter],
    so that no trajectory follows a periodic orbit back to its start.
    """

    steps: int = Field(200, ge=1, description="number of proposals per chain")
    step_size: float = Field(
        0.01,
        gt=0,
        description="step size epsilon; tune for an acceptance of 0.65 (Beskos et al. 2013)",
    )
    leapfrogs: int = Field(10, ge=1, description="leapfrog steps per proposal")
    jitter: float = Field(
        0.2, ge=0, lt=1, description="relative range of random variation of the step size"
    )
    temperature: float = Field(1.0, gt=0, description="temperature T: samples p^(1/T)")


class MetropolisSampler:
    """Base of `MALA` and `HMC`; only jobs use ``steps`` and ``start`` of the settings."""

    steps = None

    def __init__(self, density: DensityFunction, config: MALAConfig | HMCConfig) -> None:
        self.density, self.sigma = density, config.sigma
        self.step_size, self.temperature = config.step_size, config.temperature

    def init(self, x: Tensor) -> DensityChain:
        """State of chains that start at ``x`` (B, ...)."""
        return DensityChain(x, 0, *self.density(x, self.sigma))


class MALA(MetropolisSampler):
    """Metropolis-adjusted Langevin algorithm."""

    def step(self, state: DensityChain, generator: torch.Generator) -> tuple[DensityChain, Info]:
        """Propose a Langevin move, and accept or reject it."""
        return mala_step(
            self.density, state, self.step_size, self.sigma, generator, self.temperature
        )


class HMC(MetropolisSampler):
    """Hamiltonian Monte Carlo with unit mass; each leapfrog step evaluates the density once."""

    def __init__(self, density: DensityFunction, config: HMCConfig) -> None:
        super().__init__(density, config)
        self.leapfrogs, self.jitter = config.leapfrogs, config.jitter

    def step(self, state: DensityChain, generator: torch.Generator) -> tuple[DensityChain, Info]:
        """Draw a momentum, take the leapfrog steps, and accept or reject their end point."""
        x, log_density, score = state.x, state.log_density, state.score
        start = momentum = normal_like(x, generator)
        size: float | Tensor = self.step_size
        if self.jitter:
            u = torch.rand(len(x), generator=generator, dtype=x.dtype, device=x.device)
            size = per_image(size * (1 + self.jitter * (2 * u - 1)), x)
        for _ in range(self.leapfrogs):
            momentum = momentum + size / (2 * self.temperature) * score
            x = x + size * momentum
            log_density, score = self.density(x, self.sigma)
            momentum = momentum + size / (2 * self.temperature) * score
        kinetic = 0.5 * (start.square() - momentum.square()).flatten(1).sum(1)
        log_ratio = (log_density - state.log_density) / self.temperature + kinetic
        return metropolis_step(state, DensityChain(x, 0, log_density, score), log_ratio, generator)


def mala_step(
    density: DensityFunction,
    state: DensityChain,
    step_size: float,
    sigma: float | None,
    generator: torch.Generator,
    temperature: float = 1.0,
) -> tuple[DensityChain, Info]:
    """Take a MALA step of ``step_size`` (image units squared) on the density at level ``sigma``."""
    x, noise_std = state.x, math.sqrt(2 * step_size * temperature)
    xi = normal_like(x, generator)
    proposed = langevin_move(x, state.score, step_size, noise_std, xi)
    log_density, score = density(proposed, sigma)
    back = (x - langevin_move(proposed, score, step_size, 0.0, xi)) / noise_std
    log_ratio = (log_density - state.log_density) / temperature
    log_ratio = log_ratio + 0.5 * (xi.square() - back.square()).flatten(1).sum(1)
    return metropolis_step(
        state, DensityChain(proposed, 0, log_density, score), log_ratio, generator
    )


def metropolis_step(
    state: DensityChain, proposed: DensityChain, log_ratio: Tensor, generator: torch.Generator
) -> tuple[DensityChain, Info]:
    """Accept ``proposed`` with probability min(1, exp(``log_ratio``)), (B,), or keep ``state``."""
    x = state.x
    u = torch.rand(len(x), generator=generator, dtype=log_ratio.dtype, device=x.device)
    # a NaN ratio accepts the proposal, so that `Chains` detects the divergence
    accepted = (u.log() < log_ratio) | log_ratio.isnan()
    rows = per_image(accepted, x)
    new = DensityChain(
        torch.where(rows, proposed.x, x),  # type: ignore[arg-type]
        state.step + 1,
        torch.where(accepted, proposed.log_density, state.log_density),
        torch.where(rows, proposed.score, state.score),  # type: ignore[arg-type]
    )
    return new, Info(root_mean_square(new.x - x), accepted=accepted)


DOWN_LEVELS = "runs over decreasing noise levels"
"""`SamplerEntry.no_stationary_distribution` of samplers over decreasing noise levels."""


def geometric_sigmas(high: float, low: float, count: int) -> tuple[float, ...]:
    """Return ``count`` geometric noise levels from ``high`` down to ``low``, image units.

    Raises:
        UserError: if ``high`` is below ``low``, or there are too few levels.

    >>> geometric_sigmas(1.0, 0.25, 3)
    (1.0, 0.5, 0.25)
    """
    check_positive("the lowest noise level", low)
    if high < low:
        raise UserError(f"noise levels must go down: {high:g} is below {low:g}")
    if count < 1 or (count == 1 and high != low):
        raise UserError(f"{count} noise levels cannot go from {high:g} to {low:g}: take 2 or more")
    return tuple(high * (low / high) ** (i / max(1, count - 1)) for i in range(count))


class RangeConfig(SamplerConfig):
    """Settings of samplers over decreasing noise levels."""

    high: Sigma | None = Field(None, description="first noise level; null: the model's highest")
    low: Sigma | None = Field(
        None, description="last noise level; null: 0.01, or the model's lowest if that is higher"
    )

    def resolve_levels(self, model: ScoreModel) -> Self:
        ends = {"high": highest_level(model, self.high), "low": lowest_level(model, self.low)}
        return self.model_copy(update=ends)

    def sigmas(self, count: int) -> tuple[float, ...]:
        """Return ``count`` geometric levels from ``high`` to ``low``."""
        return geometric_sigmas(self.high or HIGHEST, self.low or LOWEST, count)


class AnnealedConfig(RangeConfig):
    """Settings of ``annealed-langevin``."""

    steps: int = Field(300, ge=1, description="number of steps over all noise levels")
    inner: int = Field(5, ge=1, description="number of steps at each noise level")
    rate: float = Field(0.1, gt=0, description="step size divided by the squared noise level")
    temperature: float = Field(1.0, ge=0, description="temperature T; 0: gradient ascent")

    @model_validator(mode="after")
    def _check_whole_levels(self) -> Self:
        if self.steps % self.inner or self.steps == self.inner:
            raise ValueError(
                f"{self.steps} steps are not two or more noise levels of {self.inner} steps: take "
                f"a multiple, as {max(2, round(self.steps / self.inner)) * self.inner}"
            )
        return self


class PCConfig(RangeConfig):
    """Settings of ``pc``."""

    steps: int = Field(200, ge=1, description="number of predictor steps, one per noise level")
    corrections: int = Field(
        1, ge=0, description="number of corrector (Langevin) steps at each noise level"
    )
    snr: float = Field(0.16, gt=0, description="signal-to-noise ratio of a corrector step")


class AnnealedLangevin(PositionSampler):
    """Langevin dynamics over decreasing noise levels (RCG algorithm 2).

    ``sigmas`` are in image units, usually from `geometric_sigmas`; ``config`` applies to each.

    Raises:
        UserError: if the levels do not decrease.
    """

    def __init__(
        self, score: ScoreFunction, sigmas: tuple[float, ...], config: AnnealedConfig
    ) -> None:
        self.score, self.sigmas, self.config = score, check_descending(sigmas), config
        self.steps = len(sigmas) * config.inner

    def step(self, state: Chain, generator: torch.Generator) -> tuple[Chain, Info]:
        """Take one Langevin step at the current level."""
        x, sigma = state.x, self.sigmas[state.step // self.config.inner]
        step_size = self.config.rate * sigma**2
        noise_std = math.sqrt(2 * step_size * self.config.temperature)
        xi = normal_like(x, generator)
        moved = langevin_move(x, self.score(x, sigma), step_size, noise_std, xi)
        return next_state(state, moved, sigma)


class PredictorCorrector(PositionSampler):
    """Predictor-corrector sampling over decreasing noise levels (Song et al. 2021, VE).

    ``sigmas`` are two or more levels, image units; the images at the last one are not denoised.
    Without corrections it is ancestral sampling.

    Raises:
        UserError: if the levels do not decrease.
    """

    def __init__(self, score: ScoreFunction, sigmas: tuple[float, ...], config: PCConfig) -> None:
        self.score, self.sigmas, self.config = score, check_descending(sigmas, 2), config
        self.steps = len(sigmas) - 1

    def step(self, state: Chain, generator: torch.Generator) -> tuple[Chain, Info]:
        """Move to the next level, and take the correction steps there."""
        x = state.x
        now, then = self.sigmas[state.step : state.step + 2]
        fall = now**2 - then**2
        noise_std = then * math.sqrt(fall) / now
        moved = langevin_move(x, self.score(x, now), fall, noise_std, normal_like(x, generator))
        for _ in range(self.config.corrections):
            score, step_size = self.score(moved, then), 2 * (self.config.snr * then) ** 2
            xi = normal_like(x, generator)
            moved = langevin_move(moved, score, step_size, math.sqrt(2 * step_size), xi)
        return next_state(state, moved, then)


def check_descending(sigmas: tuple[float, ...], least: int = 1) -> tuple[float, ...]:
    """Return ``sigmas`` if they are ``least`` or more positive levels that do not increase."""
    for sigma in sigmas:
        check_positive("noise level", sigma)
    if len(sigmas) < least:
        raise UserError(f"{len(sigmas)} noise levels are given: take {least} or more")
    if any(b > a for a, b in itertools.pairwise(sigmas)):
        raise UserError("noise levels must go down, as geometric_sigmas(1.0, 0.01, 10) gives")
    return tuple(sigmas)


ENTRIES = (
    SamplerEntry(
        name="langevin",
        description="unadjusted Langevin dynamics (ULA) at one noise level",
        config=LangevinConfig,
        needs=("score",),
        make=lambda model, c, config: Langevin(
            score_of(model, c), config.step_size, config.temperature, sigma=config.sigma
        ),
        noisy_end=True,
    ),
    SamplerEntry(
        name="sgld",
        description="Langevin dynamics with less noise than its step requires, as in JEM",
        config=SGLDConfig,
        needs=("score",),
        make=lambda model, c, config: Langevin(
            score_of(model, c),
            config.step_size,
            noise_std=config.noise,
            sigma=config.sigma,
            drift_clip=config.drift_clip,
        ),
        caveat="its noise does not match its step size, so it does not sample the model's density",
        priority=1,
        min_fresh_steps=100,
    ),
    SamplerEntry(
        name="mala",
        description="Metropolis-adjusted Langevin: exact for the model's density",
        config=MALAConfig,
        needs=("density",),
        make=lambda model, c, config: MALA(density_of(model, c), config),
        noisy_end=True,
    ),
    SamplerEntry(
        name="hmc",
        description="Hamiltonian Monte Carlo: exact for the model's density, with longer moves",
        config=HMCConfig,
        needs=("density",),
        make=lambda model, c, config: HMC(density_of(model, c), config),
        noisy_end=True,
    ),
    SamplerEntry(
        name="annealed-langevin",
        description="Langevin dynamics over decreasing noise levels (Song & Ermon 2019)",
        config=AnnealedConfig,
        needs=("levels",),
        make=lambda model, c, config: AnnealedLangevin(
            score_of(model, c), config.sigmas(config.steps // config.inner), config
        ),
        noisy_end=True,
        no_stationary_distribution=DOWN_LEVELS,
    ),
    SamplerEntry(
        name="pc",
        description="predictor-corrector over decreasing noise levels (Song et al. 2021)",
        config=PCConfig,
        needs=("levels",),
        make=lambda model, c, config: PredictorCorrector(
            score_of(model, c), config.sigmas(config.steps + 1), config
        ),
        noisy_end=True,
        no_stationary_distribution=DOWN_LEVELS,
    ),
)
