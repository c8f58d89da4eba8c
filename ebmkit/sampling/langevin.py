r"""Langevin dynamics, written once: plain, adjusted, annealed, and as a corrector.

Overdamped Langevin dynamics :math:`dx = s(x)\,dt + \sqrt{2T}\,dW` has the stationary density
:math:`p^{1/T}`. One step of size :math:`\eta`, in image units squared,

.. math:: x' = x + \eta\, s(x) + \sqrt{2 \eta T}\, \xi, \qquad \xi \sim \mathcal N(0, I),

is `langevin_move`, and everything here is made of it. Without a correction the chain has a bias of
first order in :math:`\eta` (on a Gaussian of variance v the stationary variance is
:math:`v / (1 - \eta / 2v)`). At T = 0 it is gradient ascent.

SGLD as JEM uses it (arXiv 1912.03263) takes noise of a deviation that does not belong to its step,
so it samples no tempered density exactly: the ratio is a temperature of
:math:`T = \text{noise}^2 / 2\eta`. JEM's step 1 and noise 0.01 hold for images in [-1, 1]. Such an
image is u = 2x - 1, of which :math:`u' = u + \nabla_u + 0.01\,\xi`; with
:math:`\nabla_u = s(x)/2` that is :math:`x' = x + s(x)/4 + 0.005\,\xi`: `JEM_STEP`, `JEM_NOISE`.

MALA (Roberts & Tweedie 1996) accepts the move with probability

.. math::
    \min\Bigl(1, \frac{p(x')^{1/T}\, q(x \mid x')}{p(x)^{1/T}\, q(x' \mid x)}\Bigr), \qquad
    q(x' \mid x) = \mathcal N(x';\ x + \eta s(x),\ 2\eta T),

and so leaves the target invariant at any step.

Annealed Langevin (Song & Ermon 2019; RCG algorithm 2) goes down geometric noise levels
:math:`\sigma_1 > \dots > \sigma_L`, with a number of steps at each, of size
:math:`\eta_i = r\,\sigma_i^2`. Predictor-corrector (Song et al. 2021, VE) first goes from one level
to the next,

.. math::
    x' = x + (\sigma_i^2 - \sigma_{i+1}^2)\, s_{\sigma_i}(x)
         + \sigma_{i+1} \sqrt{1 - \sigma_{i+1}^2 / \sigma_i^2}\; \xi ,

and then corrects by Langevin steps there, of size
:math:`\eta = 2\,\text{snr}^2 \sigma_{i+1}^2`. Song et al. take
:math:`2\,(\text{snr}\,\|\xi\| / \|s\|)^2` with norms averaged over the batch; since
:math:`\|s\|` is about :math:`\sqrt d / \sigma` the two agree in many dimensions, and here no chain
sees another.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ebmkit.errors import UserError
from ebmkit.sampling.base import Chain, Info, check_positive, per_chain
from ebmkit.sampling.target import DensityFunction, ScoreFunction

__all__ = [
    "JEM_NOISE",
    "JEM_STEP",
    "MALA",
    "AnnealedLangevin",
    "DensityChain",
    "Langevin",
    "PredictorCorrector",
    "adjusted",
    "geometric_sigmas",
    "langevin_move",
    "normal_like",
    "root_mean_square",
]

JEM_STEP, JEM_NOISE = 0.25, 0.005
"""JEM's step and noise, for images in [0, 1]."""


def langevin_move(
    x: Tensor, score: Tensor, step_size: float | Tensor, noise_std: float | Tensor, xi: Tensor
) -> Tensor:
    """``x + step_size * score + noise_std * xi``, the one Langevin step of this library.

    Args:
        x: (B, ...).
        score: of the same shape, per image unit.
        step_size: image units squared, a number or (B,).
        noise_std: deviation of the noise, image units, a number or (B,).
        xi: standard normal, shape of x; not looked at where ``noise_std`` is the number 0.
    """
    moved = x + per_chain(step_size, x) * score
    if isinstance(noise_std, Tensor) or noise_std:
        moved = moved + per_chain(noise_std, x) * xi
    return moved


def normal_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers of x's shape, type and device."""
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def root_mean_square(change: Tensor) -> Tensor:
    """Root mean square over the entries of each chain, (B,)."""
    return change.flatten(1).square().mean(1).sqrt()


def geometric_sigmas(high: float, low: float, count: int) -> tuple[float, ...]:
    """``count`` noise levels from ``high`` down to ``low``, of equal ratio, image units.

    Raises:
        UserError: if they do not go down, or there are fewer than two for different ends.

    >>> geometric_sigmas(1.0, 0.25, 3)
    (1.0, 0.5, 0.25)
    """
    check_positive("the lowest noise level", low)
    if high < low:
        raise UserError(f"noise levels must go down: {high:g} is below {low:g}")
    if count < 1 or (count == 1 and high != low):
        raise UserError(f"{count} noise levels cannot go from {high:g} to {low:g}: take 2 or more")
    if count == 1:
        return (high,)
    return tuple(high * (low / high) ** (i / (count - 1)) for i in range(count))


class Langevin:
    """Unadjusted Langevin dynamics at one noise level; SGLD with a noise of its own.

    Args:
        score: of the target.
        step_size: eta, image units squared.
        temperature: T; 0 is gradient ascent.
        noise_std: deviation of the noise instead of sqrt(2 eta T), image units.
        sigma: noise level handed to the score, for models that take one.
        largest_drift: bound on each entry of eta * score (JEM++, arXiv 2109.09032, clips so).
        bounds: x is clipped to them after each step; None: not at all.
        normal: (x, generator) to standard normal numbers of x's shape.

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
        largest_drift: float | None = None,
        bounds: tuple[float, float] | None = None,
        normal: Callable[[Tensor, torch.Generator], Tensor] = normal_like,
    ) -> None:
        self.score, self.sigma, self.normal = score, sigma, normal
        self.step_size = check_positive("step size", step_size)
        check_positive("temperature", temperature, zero=True)
        if noise_std is not None:
            check_positive("noise", noise_std, zero=True)
        if largest_drift is not None:
            check_positive("largest drift", largest_drift)
        own = math.sqrt(2 * step_size * temperature)
        self.noise_std = own if noise_std is None else noise_std
        self.largest_drift, self.bounds = largest_drift, bounds

    def init(self, x: Tensor) -> Chain:
        """Chains that start at ``x`` (B, ...)."""
        return Chain(x, 0)

    def step(self, state: Chain, generator: torch.Generator) -> tuple[Chain, Info]:
        """x + eta s(x) + noise * xi."""
        x = state.x
        score, step_size = self.score(x, self.sigma), self.step_size
        if self.largest_drift is not None:
            score = (step_size * score).clamp(-self.largest_drift, self.largest_drift)
            step_size = 1.0
        moved = langevin_move(x, score, step_size, self.noise_std, self.normal(x, generator))
        if self.bounds is not None:
            moved = moved.clamp(*self.bounds)
        return Chain(moved, state.step + 1), Info(root_mean_square(moved - x))


class DensityChain(NamedTuple):
    """The state of samplers that accept or reject: the density is known where they are."""

    x: Tensor
    step: int
    log_density: Tensor
    score: Tensor


class MALA:
    """Metropolis-adjusted Langevin: exact for p^(1/T) at any step size.

    Args:
        density: log-density and score of the target.
        step_size: eta, image units squared; an acceptance near 0.57 is best in many dimensions.
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
        temperature: float = 1.0,
        sigma: float | None = None,
    ) -> None:
        self.density, self.sigma = density, sigma
        self.step_size = check_positive("step size", step_size)
        self.temperature = check_positive("temperature", temperature)

    def init(self, x: Tensor) -> DensityChain:
        """Chains that start at ``x`` (B, ...)."""
        return DensityChain(x, 0, *self.density(x, self.sigma))

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


def adjusted(
    state: DensityChain, proposed: DensityChain, log_ratio: Tensor, generator: torch.Generator
) -> tuple[DensityChain, Info]:
    """``proposed`` where a uniform number is below exp(``log_ratio`` (B,)), ``state`` elsewhere."""
    x = state.x
    u = torch.rand(len(x), generator=generator, dtype=log_ratio.dtype, device=x.device)
    # where the ratio is not a number the proposal itself is kept, for `Chains` to find
    accepted = (u.log() < log_ratio) | log_ratio.isnan()
    rows = per_chain(accepted, x)
    moved = torch.where(rows, proposed.x, x)  # type: ignore[arg-type]
    new = DensityChain(
        moved,
        state.step + 1,
        torch.where(accepted, proposed.log_density, state.log_density),
        torch.where(rows, proposed.score, state.score),  # type: ignore[arg-type]
    )
    return new, Info(root_mean_square(moved - x), accepted=accepted)


class AnnealedLangevin:
    """Langevin dynamics down a list of noise levels (RCG algorithm 2).

    Args:
        score: of the target at each level; a blind one may not look at the level.
        sigmas: levels, image units, usually `geometric_sigmas`.
        inner: steps at each.
        rate: step size at a level over its square, r.
        temperature: T; 0 is ascent.

    Raises:
        UserError: if a number is not legal.
    """

    def __init__(
        self,
        score: ScoreFunction,
        sigmas: tuple[float, ...],
        inner: int = 5,
        rate: float = 0.1,
        temperature: float = 1.0,
    ) -> None:
        self.sigmas = _checked(sigmas)
        if inner < 1:
            raise UserError(f"{inner} steps at each noise level move no chain: take 1 or more")
        self.score, self.inner = score, inner
        self.rate = check_positive("rate", rate)
        self.temperature = check_positive("temperature", temperature, zero=True)
        self.steps = len(sigmas) * inner

    def init(self, x: Tensor) -> Chain:
        """Chains that start at ``x`` (B, ...), images with noise of the first level."""
        return Chain(x, 0)

    def step(self, state: Chain, generator: torch.Generator) -> tuple[Chain, Info]:
        """One Langevin step at the present level."""
        x, sigma = state.x, self.sigmas[state.step // self.inner]
        step_size = self.rate * sigma**2
        noise_std = math.sqrt(2 * step_size * self.temperature)
        xi = normal_like(x, generator)
        moved = langevin_move(x, self.score(x, sigma), step_size, noise_std, xi)
        info = Info(root_mean_square(moved - x), sigma=torch.full_like(x.flatten(1)[:, 0], sigma))
        return Chain(moved, state.step + 1), info


class PredictorCorrector:
    """From each noise level to the next, then Langevin steps there (Song et al. 2021, VE).

    Args:
        score: of the target at each level.
        sigmas: levels, image units; at the last it ends, without denoising.
        corrections: Langevin steps at each level after the first; 0 is ancestral sampling.
        snr: ratio of drift to noise of a correction.

    Raises:
        UserError: if a number is not legal.
    """

    def __init__(
        self,
        score: ScoreFunction,
        sigmas: tuple[float, ...],
        corrections: int = 1,
        snr: float = 0.16,
    ) -> None:
        self.sigmas = _checked(sigmas)
        if len(sigmas) < 2:
            raise UserError("a predictor goes from one noise level to the next: give 2 or more")
        if corrections < 0:
            raise UserError(f"{corrections} corrections cannot be done: take 0 or more")
        self.score, self.corrections = score, corrections
        self.snr = check_positive("snr", snr)
        self.steps = len(sigmas) - 1

    def init(self, x: Tensor) -> Chain:
        """Chains that start at ``x`` (B, ...), images with noise of the first level."""
        return Chain(x, 0)

    def step(self, state: Chain, generator: torch.Generator) -> tuple[Chain, Info]:
        """To the next level, and the corrections there."""
        x = state.x
        now, then = self.sigmas[state.step : state.step + 2]
        fall = now**2 - then**2
        noise_std = then * math.sqrt(fall) / now
        moved = langevin_move(x, self.score(x, now), fall, noise_std, normal_like(x, generator))
        for _ in range(self.corrections):
            score, step_size = self.score(moved, then), 2 * (self.snr * then) ** 2
            xi = normal_like(x, generator)
            moved = langevin_move(moved, score, step_size, math.sqrt(2 * step_size), xi)
        info = Info(root_mean_square(moved - x), sigma=torch.full_like(x.flatten(1)[:, 0], then))
        return Chain(moved, state.step + 1), info


def _checked(sigmas: tuple[float, ...]) -> tuple[float, ...]:
    for sigma in sigmas:
        check_positive("noise level", sigma)
    if not sigmas or any(b > a for a, b in itertools.pairwise(sigmas)):
        raise UserError("noise levels must go down, as geometric_sigmas(1.0, 0.01, 10) gives")
    return tuple(sigmas)
