r"""Langevin dynamics at one noise level, and SGLD as JEM uses it.

Overdamped Langevin dynamics :math:`dx = s(x)\,dt + \sqrt{2T}\,dW` has the stationary density
:math:`p^{1/T}`. One step of size :math:`\eta`, in image units squared,

.. math:: x' = x + \eta\, s(x) + \sqrt{2 \eta T}\, \xi, \qquad \xi \sim \mathcal N(0, I),

is `langevin_move`, of which the adjusted, the annealed and the predictor-corrector samplers are
made, too. Without a correction the chain has a bias of first order in :math:`\eta` (on a Gaussian
of variance v the stationary variance is :math:`v / (1 - \eta / 2v)`). At T = 0 it is gradient
ascent.

SGLD as JEM uses it (arXiv 1912.03263) takes noise of a deviation that does not belong to its step,
so it samples no tempered density exactly: the ratio is a temperature of
:math:`T = \text{noise}^2 / 2\eta`. JEM's step 1 and noise 0.01 hold for images in [-1, 1]. Such an
image is u = 2x - 1, of which :math:`u' = u + \nabla_u + 0.01\,\xi`; with
:math:`\nabla_u = s(x)/2` that is :math:`x' = x + s(x)/4 + 0.005\,\xi`: `JEM_STEP`, `JEM_NOISE`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor

from ebmkit.noise import SigmaOrZero
from ebmkit.sampling.base import (
    Chain,
    Info,
    PositionSampler,
    check_positive,
    moved_to,
    normal_like,
    per_chain,
)
from ebmkit.sampling.entry import START, LevelConfig, SamplerEntry, Start
from ebmkit.sampling.target import ScoreFunction, score_of

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
        xi: standard normal, shape of x; not used where ``noise_std`` is the number 0.
    """
    moved = x + per_chain(step_size, x) * score
    if isinstance(noise_std, Tensor) or noise_std:
        moved = moved + per_chain(noise_std, x) * xi
    return moved


class Langevin(PositionSampler):
    """Unadjusted Langevin dynamics at one noise level; SGLD with a noise of its own.

    Args:
        score: of the target.
        step_size: eta, image units squared.
        temperature: T; 0 is gradient ascent.
        noise_std: deviation of the noise instead of sqrt(2 eta T), image units.
        sigma: noise level passed to the score, for models that take one.
        drift_clip: bound on each entry of eta * score (JEM++, arXiv 2109.09032, clips so).
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
        """x + eta s(x) + noise * xi."""
        x = state.x
        score, step_size = self.score(x, self.sigma), self.step_size
        if self.drift_clip is not None:
            score = (step_size * score).clamp(-self.drift_clip, self.drift_clip)
            step_size = 1.0
        moved = langevin_move(x, score, step_size, self.noise_std, self.normal(x, generator))
        if self.bounds is not None:
            moved = moved.clamp(*self.bounds)
        return moved_to(state, moved)


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


LANGEVIN_ENTRY = SamplerEntry(
    name="langevin",
    description="unadjusted Langevin dynamics (ULA) at one noise level",
    config=LangevinConfig,
    needs=("score",),
    make=lambda model, c, config: Langevin(
        score_of(model, c), config.step_size, config.temperature, sigma=config.sigma
    ),
    noisy_end=True,
)

SGLD_ENTRY = SamplerEntry(
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
    caveat="its noise does not belong to its step, so its law is not the model's",
    priority=1,
    fresh_steps=100,
)
