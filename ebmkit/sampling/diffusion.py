r"""DDPM and DDIM as one update between two noise levels.

In image units (`ebmkit.noise`) a diffusion chain is at :math:`y = x + \sigma\epsilon`.
A noise predictor estimates :math:`\hat\epsilon`, so the predicted clean image is
:math:`\hat x = y - \sigma\hat\epsilon`. The chain moves to the next level :math:`\sigma' < \sigma`
by

.. math:: y' = \hat x + a\, \hat\epsilon + b\, \xi, \qquad \xi \sim \mathcal N(0, I).

The samplers of this family differ in a and b. With the standard deviation of the posterior of y'
given y and x, :math:`s = \sigma' \sqrt{1 - \sigma'^2 / \sigma^2}`,

==================================== ==================================== =========================
sampler                              a                                    b
==================================== ==================================== =========================
DDIM, eta = 0                        :math:`\sigma'`                      0
DDIM, any eta (RCG eq. 2.25)         :math:`\sqrt{\sigma'^2 - \eta^2s^2}` :math:`\eta s`
DDPM: eta = 1 at all T steps         :math:`\sigma'^2 / \sigma`           :math:`s`
DDPM, ``fixed_large``                :math:`\sigma'^2 / \sigma`           :math:`r \sqrt{\sigma^2 -
                                                                          \sigma'^2}`
ancestral sampling (Song et al.)     :math:`\sigma'^2 / \sigma`           :math:`s`
==================================== ==================================== =========================

Here :math:`r^2 = (h^2 + \sigma'^2)/(h^2 + \sigma^2)`, where 1/h is the width of the model's range
of images; r converts from the scaled coordinates of the model, in which this variance is
:math:`\beta_t`. At :math:`\sigma' = 0` all are :math:`y' = \hat x`. With eta = 0 the update is an
Euler step of the probability-flow equation :math:`dy/d\sigma = \hat\epsilon`, with an error of
first order in the step. With eta = 1 it is `PredictorCorrector` without corrections.

Any denoiser predicts the noise, :math:`\hat\epsilon = (y - D(y, \sigma)) / \sigma`. A blind model
with class Gaussians (`ebmkit.class_gaussians`) computes D at the level that it estimates, which is
then calibrated; sigma and sigma' are those of the schedule, so chains do not stall. Levels outside
the trained range are skipped (`Schedule.within`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Protocol, get_args

import torch
from pydantic import Field
from torch import Tensor

from ebmkit.energy import ScoreModel
from ebmkit.errors import UserError
from ebmkit.noise import Schedule, Spacing, check_positive, make_schedule
from ebmkit.sampling.base import (
    Chain,
    DenoiserFunction,
    Info,
    Labels,
    PositionSampler,
    blind_denoiser_of,
    denoiser_of,
    next_state,
    normal_like,
    trained_range,
)
from ebmkit.sampling.entry import SamplerConfig, SamplerEntry
from ebmkit.sampling.langevin import DOWN_LEVELS

Variance = Literal["fixed_small", "fixed_large"]


class NoisePredictor(Protocol):
    """Map (u_t, t) to the noise in u_t, in the shape of u_t, as diffusion networks do.

    ``u_t`` is in the model's own coordinates, sqrt(abar) u + sqrt(1 - abar) eps.
    """

    def __call__(self, u: Tensor, t: int, /) -> Tensor: ...


def noise_predictor_of(denoiser: DenoiserFunction, schedule: Schedule) -> NoisePredictor:
    """Noise predictor (y - D(y, sigma)) / sigma of a ``denoiser``, blind or not.

    ``schedule`` maps timesteps to noise levels and coordinates.
    """

    def predict(u: Tensor, t: int) -> Tensor:
        y, sigma = schedule.to_image_units(u, t), schedule.sigma(t)
        return (y - denoiser(y, sigma)) / sigma

    return predict


def update_coefficients(
    sigma: float, lower: float, eta: float, variance: Variance = "fixed_small", half: float = 0.5
) -> tuple[float, float]:
    """Coefficients a and b of the module's table, from level ``sigma`` to ``lower``.

    Both are in image units; ``lower`` is 0 at the end. ``half`` is h."""
    deviation = lower * math.sqrt(max(0.0, 1 - (lower / sigma) ** 2))
    a = math.sqrt(max(0.0, lower**2 - (eta * deviation) ** 2))
    if variance == "fixed_large" and lower:
        shrunk = math.sqrt((half**2 + lower**2) / (half**2 + sigma**2))
        return a, shrunk * math.sqrt(sigma**2 - lower**2)
    return a, eta * deviation


class DDIM(PositionSampler):
    """Diffusion chain over any timesteps, between DDIM (eta 0) and DDPM (eta 1, all steps).

    The state is in image units: y = x + sigma(t) * eps at the current timestep, and the image
    itself at the end.

    Args:
        noise_predictor: a diffusion network, or `noise_predictor_of` a denoiser.
        schedule: noise schedule.
        timesteps: decreasing timesteps, as from `Schedule.timesteps`.
        eta: share of fresh noise, from 0 to 1.
        clip: whether to clip the predicted clean image to [0, 1].
        rederive: whether to recompute the noise from the clipped image, as DDPM does; DDIM in
            `diffusers` does not by default.
        variance: ``fixed_small``, or ``fixed_large``, DDPM's larger variance, for eta 1 only.

    Raises:
        UserError: if eta or variance is not legal, or the timesteps do not decrease.
    """

    def __init__(
        self,
        noise_predictor: NoisePredictor,
        schedule: Schedule,
        timesteps: Sequence[int],
        eta: float = 0.0,
        clip: bool = False,
        rederive: bool = True,
        variance: Variance = "fixed_small",
    ) -> None:
        check_positive("eta", eta, zero=True)
        if eta > 1:
            raise UserError(f"eta {eta} is above 1: take 0 (DDIM, deterministic) to 1 (ancestral)")
        if variance not in get_args(Variance):
            raise UserError(f"unknown variance {variance!r}: fixed_small or fixed_large")
        if variance == "fixed_large" and eta != 1:
            raise UserError(f"variance fixed_large belongs to eta 1, not to {eta:g}")
        if not timesteps:
            raise UserError("no timesteps are given: take 1 or more")
        levels = [schedule.sigma(t) for t in (*timesteps, -1)]
        if min(timesteps) < 0 or any(b >= a for a, b in itertools.pairwise(levels)):
            raise UserError("timesteps must go down to 0, as schedule.timesteps(50) gives")
        self.noise_predictor, self.schedule = noise_predictor, schedule
        self.timesteps, self.sigmas = tuple(timesteps), tuple(levels)
        self.eta, self.clip, self.rederive, self.variance = eta, clip, rederive, variance
        self.steps = len(self.timesteps)

    def step(self, state: Chain, generator: torch.Generator) -> tuple[Chain, Info]:
        """Move to the next timestep, or from the last one to the clean image."""
        y, t = state.x, self.timesteps[state.step]
        sigma, lower = self.sigmas[state.step : state.step + 2]
        noise = self.noise_predictor(self.schedule.from_image_units(y, t), t)
        clean = y - sigma * noise
        if self.clip:
            clean = clean.clamp(0, 1)
            noise = (y - clean) / sigma if self.rederive else noise
        low, high = self.schedule.image_range
        a, b = update_coefficients(sigma, lower, self.eta, self.variance, 1 / (high - low))
        moved = clean + a * noise if a else clean
        if b:
            moved = moved + b * normal_like(y, generator)
        return next_state(state, moved, sigma)


TIMESTEPS = "number of timesteps out of 1000; levels outside the model's range are skipped"


class DDIMConfig(SamplerConfig):
    """Settings of ``ddim``."""

    steps: int = Field(100, ge=1, le=1000, description=TIMESTEPS)
    eta: float = Field(
        0.0, ge=0, le=1, description="eta, the share of fresh noise; 0: deterministic, 1: ancestral"
    )
    schedule: Literal["linear", "cosine"] | None = Field(
        None, description="noise schedule; null: that of the diffusion model, else linear"
    )
    spacing: Spacing = Field(
        "trailing", description="timestep spacing: leading, linspace, trailing"
    )
    clip: bool = Field(True, description="clip the predicted clean image to [0, 1]")


class DDPMConfig(DDIMConfig):
    """Settings of ``ddpm``."""

    steps: int = Field(1000, ge=1, le=1000, description=TIMESTEPS)
    eta: float = Field(1.0, ge=0, le=1, description="eta, the share of fresh noise")


def _make(model: ScoreModel, c: Labels, config: DDIMConfig) -> DDIM:
    """Chain over the timesteps in the trained range of ``model``."""
    own = model.schedule
    schedule = own or make_schedule(config.schedule or "linear")
    if own is not None and config.schedule is not None:
        other = make_schedule(config.schedule, len(own), own.image_range)
        if not torch.allclose(own.betas.double(), other.betas, rtol=1e-4):
            raise UserError(
                f"schedule {config.schedule!r} is not the one that this diffusion model was "
                "trained on: leave it out"
            )
    if config.steps > len(schedule):
        raise UserError(f"{config.steps} timesteps are too many: this model has {len(schedule)}")
    timesteps = schedule.within(
        schedule.timesteps(config.steps, config.spacing), trained_range(model)
    )
    estimates = model.class_gaussians is not None and not model.noise_conditional
    denoiser = blind_denoiser_of(model, c) if estimates else denoiser_of(model, c)
    predictor = noise_predictor_of(denoiser, schedule)
    return DDIM(predictor, schedule, timesteps, config.eta, config.clip)


DDIM_ENTRY = SamplerEntry(
    name="ddim",
    description="deterministic sampling at some timesteps of a diffusion schedule "
    "(Song et al. 2021)",
    config=DDIMConfig,
    needs=("levels",),
    make=_make,
    no_stationary_distribution=DOWN_LEVELS,
    priority=2,
)

ENTRIES = (
    replace(
        DDIM_ENTRY,
        name="ddpm",
        description="ancestral sampling at every timestep of a diffusion schedule (Ho et al. 2020)",
        config=DDPMConfig,
        priority=0,
    ),
    DDIM_ENTRY,
)
