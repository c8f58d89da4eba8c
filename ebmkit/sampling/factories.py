"""Each sampler of the table, made of a model, labels and settings.

All noise levels lie where the model was trained; a model in closed form has no limit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ebmkit.energy import ScoreModel
from ebmkit.errors import UserError
from ebmkit.noise import Schedule, make_schedule
from ebmkit.sampling import config as configs
from ebmkit.sampling.ascent import Ascent
from ebmkit.sampling.diffusion import DDIM, noise_predictor_of
from ebmkit.sampling.hmc import HMC
from ebmkit.sampling.inverse import Measurement
from ebmkit.sampling.kadkhodaie import StochasticAscent
from ebmkit.sampling.langevin import (
    MALA,
    AnnealedLangevin,
    Langevin,
    PredictorCorrector,
    geometric_sigmas,
)
from ebmkit.sampling.levels import check_level, highest, lowest
from ebmkit.sampling.target import (
    blind_denoiser_of,
    denoiser_of,
    density_of,
    label_density_of,
    score_of,
)

__all__ = [
    "make_annealed",
    "make_ascent",
    "make_ddim",
    "make_hmc",
    "make_ks",
    "make_langevin",
    "make_mala",
    "make_pc",
    "make_sgld",
]

Labels = Tensor | int | None


def make_langevin(model: ScoreModel, c: Labels, config: configs.LangevinConfig) -> Langevin:
    return Langevin(
        score_of(model, c), config.step_size, config.temperature, sigma=_level(model, config)
    )


def make_sgld(model: ScoreModel, c: Labels, config: configs.SGLDConfig) -> Langevin:
    return Langevin(
        score_of(model, c),
        config.step_size,
        noise_std=config.noise,
        sigma=_level(model, config),
        largest_drift=config.largest_drift,
    )


def make_mala(model: ScoreModel, c: Labels, config: configs.MALAConfig) -> MALA:
    sigma = _level(model, config)
    return MALA(density_of(model, c), config.step_size, config.temperature, sigma)  # type: ignore[arg-type]


def make_hmc(model: ScoreModel, c: Labels, config: configs.HMCConfig) -> HMC:
    return HMC(
        density_of(model, c),  # type: ignore[arg-type]
        config.step_size,
        config.leapfrogs,
        config.jitter,
        config.temperature,
        _level(model, config),
    )


def make_annealed(model: ScoreModel, c: Labels, config: configs.AnnealedConfig) -> AnnealedLangevin:
    ends = highest(model, config.high), lowest(model, config.low)
    sigmas = geometric_sigmas(*ends, max(1, config.steps // config.inner))
    return AnnealedLangevin(
        score_of(model, c), sigmas, config.inner, config.rate, config.temperature
    )


def make_pc(model: ScoreModel, c: Labels, config: configs.PCConfig) -> PredictorCorrector:
    ends = highest(model, config.high), lowest(model, config.low)
    sigmas = geometric_sigmas(*ends, config.steps + 1)
    return PredictorCorrector(score_of(model, c), sigmas, config.corrections, config.snr)


def make_ddim(model: ScoreModel, c: Labels, config: configs.DDIMConfig) -> DDIM:
    schedule = _schedule(model, config.schedule)
    if config.steps > len(schedule):
        raise UserError(f"{config.steps} timesteps cannot be had: this model has {len(schedule)}")
    wanted = schedule.timesteps(config.steps, config.spacing)
    usable = schedule.within(wanted, model.card.sigma_range if model.card else None)
    predictor = noise_predictor_of(denoiser_of(model, c), schedule)
    return DDIM(predictor, schedule, usable, config.eta, config.clip)


def _schedule(model: ScoreModel, asked: str | None) -> Schedule:
    """The noise levels of a diffusion model, or those called ``asked``; linear if none is."""
    own = model.schedule
    if own is None:
        return make_schedule(asked or "linear")
    if asked is not None:
        other = make_schedule(asked, len(own), own.image_range)
        if not torch.allclose(own.betas.double(), other.betas, rtol=1e-4):
            raise UserError(
                f"schedule {asked!r} is not the one that this diffusion model was trained on: "
                "leave it out"
            )
    return own


def make_ks(
    model: ScoreModel,
    c: Labels,
    config: configs.StochasticAscentConfig,
    measurement: Measurement | None = None,
    measured: Tensor | None = None,
) -> StochasticAscent:
    last = lowest(model, config.last_sigma)
    return StochasticAscent(
        blind_denoiser_of(model, c),
        highest(model, config.first_sigma),
        last,
        config.first_step,
        config.beta,
        config.largest_step,
        measurement,
        measured,
        config.steps,
    )


def make_ascent(model: ScoreModel, c: Labels, config: configs.AscentConfig) -> Ascent:
    assert c is not None
    climb = label_density_of if config.objective == "label" else density_of
    return Ascent(
        climb(model, c),  # type: ignore[arg-type]
        config.step_size,
        config.direction,
        config.radius,
        config.ball,
        sigma=_level(model, config),
    )


def _level(model: ScoreModel, config: configs.LevelConfig) -> float | None:
    """Where the target is taken: what was asked for, or the lowest level, where there is one."""
    if config.sigma is not None:
        return check_level(model, config.sigma)
    limits = model.card.sigma_range if model.card else None
    return limits[0] if limits and model.noise_conditional else None
