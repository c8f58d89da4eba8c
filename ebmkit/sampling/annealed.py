r"""Samplers that go down geometric noise levels :math:`\sigma_1 > \dots > \sigma_L`.

Annealed Langevin (Song & Ermon 2019; RCG algorithm 2) takes a number of Langevin steps at each, of
size :math:`\eta_i = r\,\sigma_i^2`. Predictor-corrector (Song et al. 2021, VE) first goes from one
level to the next,

.. math::
    x' = x + (\sigma_i^2 - \sigma_{i+1}^2)\, s_{\sigma_i}(x)
         + \sigma_{i+1} \sqrt{1 - \sigma_{i+1}^2 / \sigma_i^2}\; \xi ,

and then corrects by Langevin steps there, of size
:math:`\eta = 2\,\text{snr}^2 \sigma_{i+1}^2`. Song et al. take
:math:`2\,(\text{snr}\,\|\xi\| / \|s\|)^2` with norms averaged over the batch; since
:math:`\|s\|` is about :math:`\sqrt d / \sigma` the two agree in many dimensions, and here no chain
depends on another.
"""

from __future__ import annotations

import itertools
import math
from typing import Self

import torch
from pydantic import Field, model_validator

from ebmkit.energy import ScoreModel
from ebmkit.errors import UserError
from ebmkit.noise import Sigma
from ebmkit.sampling.base import Chain, Info, PositionSampler, check_positive, moved_to, normal_like
from ebmkit.sampling.entry import SamplerConfig, SamplerEntry
from ebmkit.sampling.langevin import langevin_move
from ebmkit.sampling.target import ScoreFunction, highest_level, lowest_level, score_of

DOWN_LEVELS = "goes down noise levels"
"""Why chains of such samplers have no law (`SamplerEntry.no_law`)."""


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


class RangeConfig(SamplerConfig):
    """Settings of samplers that go down noise levels."""

    high: Sigma | None = Field(None, description="first noise level; null: the model's highest")
    low: Sigma | None = Field(
        None, description="last noise level; null: 0.01, or the model's lowest if that is higher"
    )

    def at_levels_of(self, model: ScoreModel) -> Self:
        ends = {"high": highest_level(model, self.high), "low": lowest_level(model, self.low)}
        return self.model_copy(update=ends)

    def sigmas(self, count: int) -> tuple[float, ...]:
        """``count`` geometric levels between the ends."""
        assert self.high is not None
        assert self.low is not None
        return geometric_sigmas(self.high, self.low, count)


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
                f"{self.steps} steps do not make two or more noise levels of {self.inner}: take a "
                f"multiple, as {max(2, round(self.steps / self.inner)) * self.inner}"
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
    """Langevin dynamics down a list of noise levels (RCG algorithm 2).

    Args:
        score: of the target at each level; a blind one may ignore the level.
        sigmas: levels, image units, usually `geometric_sigmas`.
        config: settings at each level.

    Raises:
        UserError: if levels do not go down.
    """

    def __init__(
        self, score: ScoreFunction, sigmas: tuple[float, ...], config: AnnealedConfig
    ) -> None:
        self.score, self.sigmas, self.config = score, _check_descending(sigmas), config
        self.steps = len(sigmas) * config.inner

    def step(self, state: Chain, generator: torch.Generator) -> tuple[Chain, Info]:
        """One Langevin step at the present level."""
        x, sigma = state.x, self.sigmas[state.step // self.config.inner]
        step_size = self.config.rate * sigma**2
        noise_std = math.sqrt(2 * step_size * self.config.temperature)
        xi = normal_like(x, generator)
        return moved_to(
            state, langevin_move(x, self.score(x, sigma), step_size, noise_std, xi), sigma
        )


class PredictorCorrector(PositionSampler):
    """From each noise level to the next, then Langevin steps there (Song et al. 2021, VE).

    Args:
        score: of the target at each level.
        sigmas: two levels or more, image units; at the last it ends, without denoising.
        config: settings of the corrections; 0 of them make it ancestral sampling.

    Raises:
        UserError: if levels do not go down.
    """

    def __init__(self, score: ScoreFunction, sigmas: tuple[float, ...], config: PCConfig) -> None:
        self.score, self.sigmas, self.config = score, _check_descending(sigmas, 2), config
        self.steps = len(sigmas) - 1

    def step(self, state: Chain, generator: torch.Generator) -> tuple[Chain, Info]:
        """To the next level, and the corrections there."""
        x = state.x
        now, then = self.sigmas[state.step : state.step + 2]
        fall = now**2 - then**2
        noise_std = then * math.sqrt(fall) / now
        moved = langevin_move(x, self.score(x, now), fall, noise_std, normal_like(x, generator))
        for _ in range(self.config.corrections):
            score, step_size = self.score(moved, then), 2 * (self.config.snr * then) ** 2
            xi = normal_like(x, generator)
            moved = langevin_move(moved, score, step_size, math.sqrt(2 * step_size), xi)
        return moved_to(state, moved, then)


def _check_descending(sigmas: tuple[float, ...], least: int = 1) -> tuple[float, ...]:
    for sigma in sigmas:
        check_positive("noise level", sigma)
    if len(sigmas) < least:
        raise UserError(f"{len(sigmas)} noise levels are given: take {least} or more")
    if any(b > a for a, b in itertools.pairwise(sigmas)):
        raise UserError("noise levels must go down, as geometric_sigmas(1.0, 0.01, 10) gives")
    return tuple(sigmas)


ANNEALED_ENTRY = SamplerEntry(
    name="annealed-langevin",
    description="Langevin dynamics over decreasing noise levels (Song & Ermon 2019)",
    config=AnnealedConfig,
    needs=("levels",),
    make=lambda model, c, config: AnnealedLangevin(
        score_of(model, c), config.sigmas(config.steps // config.inner), config
    ),
    noisy_end=True,
    no_law=DOWN_LEVELS,
)

PC_ENTRY = SamplerEntry(
    name="pc",
    description="predictor-corrector over decreasing noise levels (Song et al. 2021)",
    config=PCConfig,
    needs=("levels",),
    make=lambda model, c, config: PredictorCorrector(
        score_of(model, c), config.sigmas(config.steps + 1), config
    ),
    noisy_end=True,
    no_law=DOWN_LEVELS,
)
