r"""Sampling a density of each noise level: annealed MALA, and annealed importance sampling.

A noise-conditional energy is a density :math:`f_k(y)` at each of decreasing levels
:math:`\sigma_0 > \dots > \sigma_n`, perhaps not normalised. A step from level k to k + 1 first
draws from an approximation of the reverse of adding noise of variance
:math:`\Delta = \sigma_k^2 - \sigma_{k+1}^2`,

.. math:: y' = y + \Delta\, s_k(y) + b\, \xi, \qquad
    b^2 = \Delta\, \bigl(1 - \tfrac{\Delta}{d} \|s_k(y)\|^2\bigr), \qquad
    \frac{\sigma_{k+1}^2}{\sigma_k^2} \le \frac{b^2}{\Delta} \le 1 .

For Gaussian data the mean is exact, and b^2 is in expectation the mean variance over all directions
(Bao et al., arXiv 2201.06503). Then it takes MALA moves (`ebmkit.sampling.langevin`) with the
target :math:`f_{k+1}`, of size :math:`\eta = r\, \sigma_{k+1}^2 / d^{1/3}`: the acceptance
depends little on d and sigma (Roberts & Rosenthal 1998).

**Annealed importance sampling** (Neal 2001; Del Moral et al. 2006, section 3.3) gives each chain a
weight. It starts from the Gaussian :math:`q = \mathcal N(\tfrac12, \sigma_0^2 I)`, with

.. math:: \log w = \log \frac{f_0(y_0)}{q(y_0)} + \sum_k \log
    \frac{f_{k+1}(y')\; \mathcal N(y_k;\, y', \Delta I)}
         {f_k(y_k)\; \mathcal N(y';\, y_k + \Delta s_k(y_k),\, b^2 I)} .

As MALA leaves :math:`f_{k+1}` invariant, :math:`E[w\, h(y_n)] = \int f_n h` for any function h,
whatever the number of levels and moves and the quality of the score. So the mean of w estimates the
normalising constant :math:`Z = \int f_n` without bias, and weighted averages over chains estimate
expectations: of the shares of modes, for example. If the densities of all levels belong to one
distribution of clean images, :math:`\log w` has a variance of first order in the distance of the
levels. Weights of MALA moves alone, without the reverse kernel, have a variance of about
:math:`2 d \log^2(\sigma_0 / \sigma_n) / n` even if each move draws from :math:`f_k`, because the
norm of the noise changes between levels: with 64 entries and n = 200 levels from 40 to 0.01, 44.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from ebmkit.sampling.base import DensityFunction, Info, density_of, normal_like, root_mean_square
from ebmkit.sampling.entry import SamplerEntry
from ebmkit.sampling.langevin import (
    DOWN_LEVELS,
    DensityChain,
    RangeConfig,
    check_descending,
    langevin_move,
    mala_step,
)

CENTRE = 0.5
"""Mean of the Gaussian that AIS starts from: gray, as for ``start=noise``."""


class AnnealedMALAConfig(RangeConfig):
    """Settings of ``annealed-mala``."""

    steps: int = Field(200, ge=1, description="number of steps, one per noise level")
    moves: int = Field(1, ge=0, description="number of MALA moves at each noise level")
    rate: float = Field(
        1.0,
        gt=0,
        description="size of a move, divided by the squared noise level and multiplied by the cube "
        "root of the number of entries; tune for an acceptance of 0.57 or more",
    )


class AISConfig(AnnealedMALAConfig):
    """Settings of ``ais``."""

    steps: int = Field(400, ge=1, description="number of steps, one per noise level")


class WeightedChain(NamedTuple):
    """State: positions, their log-density and score, and log-weights (B,) float64."""

    x: Tensor
    step: int
    log_density: Tensor
    score: Tensor
    log_weight: Tensor


class AnnealedMALA:
    """MALA at decreasing levels ``sigmas``, two or more, image units.

    The images at the last level are not denoised. Weights are relative to the density of the
    starting points at the first level.

    Raises:
        UserError: if the levels do not decrease.
    """

    def __init__(
        self, density: DensityFunction, sigmas: tuple[float, ...], config: AnnealedMALAConfig
    ) -> None:
        self.density, self.sigmas, self.config = density, check_descending(sigmas, 2), config
        self.steps = len(sigmas) - 1

    def init(self, x: Tensor) -> WeightedChain:
        """State of chains that start at ``x`` (B, ...), noisy images at the first level."""
        log_density, score = self.density(x, self.sigmas[0])
        return WeightedChain(x, 0, log_density, score, torch.zeros_like(log_density).double())

    def step(self, state: WeightedChain, generator: torch.Generator) -> tuple[WeightedChain, Info]:
        """Move to the next level, and take the MALA moves there."""
        x, score, (now, then) = state.x, state.score, self.sigmas[state.step : state.step + 2]
        fall, entries, xi = now**2 - then**2, x[0].numel(), normal_like(x, generator)
        ratio = 1 - fall / entries * score.flatten(1).square().sum(1)  # b^2 / Delta
        ratio = ratio.clamp((then / now) ** 2, 1.0)
        moved = langevin_move(x, score, fall, (fall * ratio).sqrt(), xi)
        chain = DensityChain(moved, 0, *self.density(moved, then))
        squares = xi.square() - (x - moved).square() / fall
        kernels = 0.5 * (entries * ratio.log() + squares.flatten(1).sum(1))  # log N / N
        log_weight = state.log_weight + (chain.log_density - state.log_density + kernels)
        shares = []
        for _ in range(self.config.moves):
            step_size = self.config.rate * then**2 / entries ** (1 / 3)
            chain, info = mala_step(self.density, chain, step_size, then, generator)
            shares.append(info.accepted.double())  # type: ignore[union-attr]
        accepted = torch.stack(shares).mean(0) if shares else None
        new = WeightedChain(chain.x, state.step + 1, chain.log_density, chain.score, log_weight)
        level = torch.full_like(ratio, then)
        return new, Info(root_mean_square(new.x - x), level, accepted)


class AIS(AnnealedMALA):
    """Annealed importance sampling; chains must start from gray with noise of the first level."""

    def init(self, x: Tensor) -> WeightedChain:
        """State of chains that start at ``x`` (B, ...), draws of N(1/2, sigma_0^2)."""
        state = super().init(x)
        squares = ((x - CENTRE) / self.sigmas[0]).square() + math.log(2 * math.pi)
        log_start = -(0.5 * squares + math.log(self.sigmas[0])).flatten(1).sum(1)
        return state._replace(log_weight=(state.log_density - log_start).double())


ENTRIES = (
    SamplerEntry(
        name="annealed-mala",
        description="Metropolis-adjusted Langevin moves at each of decreasing noise levels",
        config=AnnealedMALAConfig,
        needs=("density", "levels", "conditional"),
        make=lambda model, c, config: AnnealedMALA(
            density_of(model, c), config.sigmas(config.steps + 1), config
        ),
        noisy_end=True,
        no_stationary_distribution=DOWN_LEVELS,
    ),
    SamplerEntry(
        name="ais",
        description="annealed importance sampling: weighted samples, log Z (Neal 2001)",
        config=AISConfig,
        needs=("density", "levels", "conditional"),
        make=lambda model, c, config: AIS(
            density_of(model, c), config.sigmas(config.steps + 1), config
        ),
        noisy_end=True,
        no_stationary_distribution=DOWN_LEVELS,
        weighted=True,
    ),
)
