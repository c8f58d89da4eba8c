r"""Hamiltonian Monte Carlo (Duane et al. 1987; Neal 2011, section 3).

A position x gets a momentum :math:`v \sim \mathcal N(0, I)` and moves under the energy
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

import torch
from torch import Tensor

from ebmkit.errors import UserError
from ebmkit.sampling.base import Info, check_positive, per_chain
from ebmkit.sampling.langevin import DensityChain, adjusted, normal_like
from ebmkit.sampling.target import DensityFunction

__all__ = ["HMC"]


class HMC:
    """Hamiltonian Monte Carlo with unit mass: exact for p^(1/T) at any step size.

    Args:
        density: log-density and score of the target.
        step_size: epsilon of a leapfrog step, image units; an acceptance near 0.65 is best in many
            dimensions (Beskos et al. 2013).
        leapfrogs: leapfrog steps of a proposal, each one evaluation of the density.
        jitter: each chain's step size is drawn anew from epsilon * [1 - jitter, 1 + jitter], so
            that no proposal goes round an orbit and comes back; from 0 up to, not with, 1.
        temperature: T, above 0.
        sigma: noise level handed to the density, for models that take one.

    Raises:
        UserError: if a number is not legal.
    """

    steps = None

    def __init__(
        self,
        density: DensityFunction,
        step_size: float,
        leapfrogs: int = 10,
        jitter: float = 0.0,
        temperature: float = 1.0,
        sigma: float | None = None,
    ) -> None:
        self.density, self.sigma = density, sigma
        self.step_size = check_positive("step size", step_size)
        self.temperature = check_positive("temperature", temperature)
        if leapfrogs < 1:
            raise UserError(f"{leapfrogs} leapfrog steps move no chain: take 1 or more")
        if not 0 <= jitter < 1:
            raise UserError(f"jitter {jitter} must be at least 0 and below 1, a share of the step")
        self.leapfrogs, self.jitter = leapfrogs, jitter

    def init(self, x: Tensor) -> DensityChain:
        """Chains that start at ``x`` (B, ...)."""
        return DensityChain(x, 0, *self.density(x, self.sigma))

    def step(self, state: DensityChain, generator: torch.Generator) -> tuple[DensityChain, Info]:
        """A new momentum, the leapfrog steps, and their end accepted or not."""
        x, log_density, score = state.x, state.log_density, state.score
        start = momentum = normal_like(x, generator)
        size = self._step_sizes(x, generator)
        for _ in range(self.leapfrogs):
            momentum = momentum + size / (2 * self.temperature) * score
            x = x + size * momentum
            log_density, score = self.density(x, self.sigma)
            momentum = momentum + size / (2 * self.temperature) * score
        kinetic = 0.5 * (start.square() - momentum.square()).flatten(1).sum(1)
        log_ratio = (log_density - state.log_density) / self.temperature + kinetic
        return adjusted(state, DensityChain(x, 0, log_density, score), log_ratio, generator)

    def _step_sizes(self, x: Tensor, generator: torch.Generator) -> float | Tensor:
        if not self.jitter:
            return self.step_size
        u = torch.rand(len(x), generator=generator, dtype=x.dtype, device=x.device)
        return per_chain(self.step_size * (1 + self.jitter * (2 * u - 1)), x)
