r"""Heun's method on the probability-flow equation, with the noise levels of Karras et al. 2022.

Images at level :math:`\sigma` become images at a lower one along

.. math:: \frac{dy}{d\sigma} = \hat\epsilon(y, \sigma)
    = \frac{y - D(y, \sigma)}{\sigma} = -\sigma\, s_\sigma(y) ,

which transports :math:`p_\sigma` exactly. With :math:`h = \sigma' - \sigma`, a step is

.. math:: \tilde y = y + h\, \hat\epsilon(y, \sigma), \qquad
    y' = y + \tfrac h2 \bigl(\hat\epsilon(y, \sigma) + \hat\epsilon(\tilde y, \sigma')\bigr) ,

and to :math:`\sigma' = 0` the first half, which gives D(y). This is algorithm 1 of Karras et al.
(arXiv 2206.00364) without noise: an error of second order in the step, where DDIM with eta = 0, an
Euler step, has first order, for two denoisings per step. The levels, for i from 0 to n - 1,

.. math:: \sigma_i = \Bigl(\sigma_{\max}^{1/\rho}
    + \tfrac{i}{n - 1} \bigl(\sigma_{\min}^{1/\rho} - \sigma_{\max}^{1/\rho}\bigr)\Bigr)^\rho,
    \qquad \sigma_n = 0 ,

are their equation 5. A multiple of sigma_max and sigma_min multiplies all of them, so the paper's
0.002 to 80 for images in [-1, 1] is 0.001 to 40 here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from pydantic import Field
from torch import Tensor

from ebmkit.energy import ScoreModel
from ebmkit.errors import UserError
from ebmkit.noise import Sigma, check_positive
from ebmkit.sampling.base import (
    Chain,
    DenoiserFunction,
    Info,
    PositionSampler,
    denoiser_of,
    hiding_level,
    highest_level,
    lowest_level,
    next_state,
    trained_range,
)
from ebmkit.sampling.entry import SamplerEntry
from ebmkit.sampling.langevin import DOWN_LEVELS, RangeConfig, check_descending

WIDEST, CLEAN = 40.0, 0.001
"""Default first noise level, and last one before the clean image, image units."""


def karras_sigmas(high: float, low: float, count: int, rho: float = 7.0) -> tuple[float, ...]:
    """Return ``count`` noise levels from ``high`` to ``low``, image units, without the final 0.

    Raises:
        UserError: if ``high`` is not above ``low``, or there are fewer than 2 levels.

    >>> karras_sigmas(4.0, 1.0, 3, rho=2)
    (4.0, 2.25, 1.0)
    """
    check_positive("the lowest noise level", low)
    if not high > low:
        raise UserError(f"noise levels must go down: {high:g} is not above {low:g}")
    if count < 2:
        raise UserError(f"{count} noise levels cannot go from {high:g} to {low:g}: take 2 or more")
    first, last = high ** (1 / rho), low ** (1 / rho)
    return tuple((first + i / (count - 1) * (last - first)) ** rho for i in range(count))


class Heun(PositionSampler):
    """Heun's method from the first of ``sigmas``, image units, through all of them to 0.

    Raises:
        UserError: if the levels do not decrease, or there is none.
    """

    def __init__(self, denoiser: DenoiserFunction, sigmas: Sequence[float]) -> None:
        self.denoiser = denoiser
        self.sigmas = (*check_descending(tuple(sigmas)), 0.0)
        self.steps = len(self.sigmas) - 1

    def step(self, state: Chain, generator: torch.Generator) -> tuple[Chain, Info]:
        """Move to the next level, or from the last one to the clean image."""
        y, (sigma, lower) = state.x, self.sigmas[state.step : state.step + 2]
        slope = self._slope(y, sigma)
        moved = y + (lower - sigma) * slope
        if lower:
            moved = y + (lower - sigma) / 2 * (slope + self._slope(moved, lower))
        return next_state(state, moved, sigma)

    def _slope(self, y: Tensor, sigma: float) -> Tensor:
        return (y - self.denoiser(y, sigma)) / sigma


class HeunConfig(RangeConfig):
    """Settings of ``heun``."""

    steps: int = Field(
        40, ge=2, description="number of noise levels; each but the last takes two denoisings"
    )
    high: Sigma | None = Field(
        None, description="first noise level; null: the model's highest, or 40 for closed forms"
    )
    low: Sigma | None = Field(
        None,
        description="last noise level before the clean image; null: 0.001, or the model's lowest "
        "if that is higher",
    )
    rho: float = Field(7.0, gt=0, description="rho: larger values put more levels at low noise")

    def resolve_levels(self, model: ScoreModel) -> Self:
        high, low = highest_level(model, self.high, WIDEST), lowest_level(model, self.low, CLEAN)
        return self.model_copy(update={"high": high, "low": low})

    def sigmas(self, count: int) -> tuple[float, ...]:
        """Return ``count`` levels from ``high`` to ``low``, without the final 0."""
        return karras_sigmas(self.high or WIDEST, self.low or CLEAN, count, self.rho)


def _hides_images(model: ScoreModel) -> bool:
    """Whether ``model`` takes the noise level, and was trained on noise that hides an image."""
    card, limits = model.card, trained_range(model)
    if card is None or limits is None or not card.image_size or model.schedule is not None:
        return False
    return model.noise_conditional and limits[1] >= hiding_level((card.channels, *card.image_size))


ENTRIES = (
    SamplerEntry(
        name="heun",
        description="deterministic sampling of second order over noise levels (Karras et al. 2022)",
        config=HeunConfig,
        needs=("levels",),
        make=lambda model, c, config: Heun(denoiser_of(model, c), config.sigmas(config.steps)),
        no_stationary_distribution=DOWN_LEVELS,
        priority=3,
        default_for=_hides_images,
    ),
)
