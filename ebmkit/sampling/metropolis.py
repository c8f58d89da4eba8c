r"""Samplers that accept or reject, and so are exact for p^(1/T) at any step size: MALA and HMC.

**MALA** (Roberts & Tweedie 1996) accepts a Langevin step of size :math:`\eta` with probability

.. math::
    \min\Bigl(1, \frac{p(x')^{1/T}\, q(x \mid x')}{p(x)^{1/T}\, q(x' \mid x)}\Bigr), \qquad
    q(x' \mid x) = \mathcal N(x';\ x + \eta s(x),\ 2\eta T).

**Hamiltonian Monte Carlo** (Duane et al. 1987; Neal 2011, section 3) gives a position x a momentum
:math:`v \sim \mathcal N(0, I)` and moves it under the energy
:math:`H(x, v) = -\log p(x) / T + \|v\|^2 / 2` by leapfrog steps of size :math:`\epsilon`,

.. math::
    v &\leftarrow v + \tfrac\epsilon2\, s(x) / T, \\
    x &\leftarrow x + \epsilon\, v, \\
    v &\leftarrow v + \tfrac\epsilon2\, s(x) / T,

which keep volumes and can be run backwards. So accepting the end with probability
:math:`\min(1, e^{H(x, v) - H(x', v')})` leaves :math:`p^{1/T}` invariant at any step; the error of
H is of order :math:`\epsilon^2`. With a single leapfrog step it is MALA of
:math:`\eta = \epsilon^2 / 2T`: the same proposal, accepted by the same ratio.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from ebmkit.sampling.base import (
    DensityFunction,
    Info,
    density_of,
    normal_like,
    per_chain,
    root_mean_square,
)
from ebmkit.sampling.entry import LevelConfig, SamplerEntry
from ebmkit.sampling.langevin import langevin_move


class DensityChain(NamedTuple):
    """The state of samplers that accept or reject: positions, density and score there."""

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

    Each chain's step size is drawn anew from epsilon * [1 - jitter, 1 + jitter], so that no
    proposal goes round an orbit and comes back.
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
    """What both samplers share; ``steps`` and ``start`` of the settings are those of jobs."""

    steps = None

    def __init__(self, density: DensityFunction, config: MALAConfig | HMCConfig) -> None:
        self.density, self.sigma = density, config.sigma
        self.step_size, self.temperature = config.step_size, config.temperature

    def init(self, x: Tensor) -> DensityChain:
        """Chains that start at ``x`` (B, ...)."""
        return DensityChain(x, 0, *self.density(x, self.sigma))


class MALA(MetropolisSampler):
    """Metropolis-adjusted Langevin; its settings are a `MALAConfig`."""

    def step(self, state: DensityChain, generator: torch.Generator) -> tuple[DensityChain, Info]:
        """Propose a Langevin move, and accept it or stay."""
        x, noise_std = state.x, math.sqrt(2 * self.step_size * self.temperature)
        xi = normal_like(x, generator)
        proposed = langevin_move(x, state.score, self.step_size, noise_std, xi)
        log_density, score = self.density(proposed, self.sigma)
        back = (x - langevin_move(proposed, score, self.step_size, 0.0, xi)) / noise_std
        log_ratio = (log_density - state.log_density) / self.temperature
        log_ratio = log_ratio + 0.5 * (xi.square() - back.square()).flatten(1).sum(1)
        return adjusted(state, DensityChain(proposed, 0, log_density, score), log_ratio, generator)


class HMC(MetropolisSampler):
    """Hamiltonian Monte Carlo with unit mass; each leapfrog step evaluates the density once."""

    def __init__(self, density: DensityFunction, config: HMCConfig) -> None:
        super().__init__(density, config)
        self.leapfrogs, self.jitter = config.leapfrogs, config.jitter

    def step(self, state: DensityChain, generator: torch.Generator) -> tuple[DensityChain, Info]:
        """A new momentum, the leapfrog steps, and their end accepted or not."""
        x, log_density, score = state.x, state.log_density, state.score
        start = momentum = normal_like(x, generator)
        size: float | Tensor = self.step_size
        if self.jitter:
            u = torch.rand(len(x), generator=generator, dtype=x.dtype, device=x.device)
            size = per_chain(size * (1 + self.jitter * (2 * u - 1)), x)
        for _ in range(self.leapfrogs):
            momentum = momentum + size / (2 * self.temperature) * score
            x = x + size * momentum
            log_density, score = self.density(x, self.sigma)
            momentum = momentum + size / (2 * self.temperature) * score
        kinetic = 0.5 * (start.square() - momentum.square()).flatten(1).sum(1)
        log_ratio = (log_density - state.log_density) / self.temperature + kinetic
        return adjusted(state, DensityChain(x, 0, log_density, score), log_ratio, generator)


def adjusted(
    state: DensityChain, proposed: DensityChain, log_ratio: Tensor, generator: torch.Generator
) -> tuple[DensityChain, Info]:
    """``proposed`` where a uniform number is below exp(``log_ratio`` (B,)), ``state`` elsewhere."""
    x = state.x
    u = torch.rand(len(x), generator=generator, dtype=log_ratio.dtype, device=x.device)
    # where the ratio is NaN the proposal itself is taken, for `Chains` to find
    accepted = (u.log() < log_ratio) | log_ratio.isnan()
    rows = per_chain(accepted, x)
    new = DensityChain(
        torch.where(rows, proposed.x, x),  # type: ignore[arg-type]
        state.step + 1,
        torch.where(accepted, proposed.log_density, state.log_density),
        torch.where(rows, proposed.score, state.score),  # type: ignore[arg-type]
    )
    return new, Info(root_mean_square(new.x - x), accepted=accepted)


MALA_ENTRY = SamplerEntry(
    name="mala",
    description="Metropolis-adjusted Langevin: exact for the model's density",
    config=MALAConfig,
    needs=("density",),
    make=lambda model, c, config: MALA(density_of(model, c), config),
    noisy_end=True,
)

HMC_ENTRY = SamplerEntry(
    name="hmc",
    description="Hamiltonian Monte Carlo: exact for the model's density, with longer moves",
    config=HMCConfig,
    needs=("density",),
    make=lambda model, c, config: HMC(density_of(model, c), config),
    noisy_end=True,
)
