"""Samplers of any model: chains on a score, a density or a denoiser, never on a network."""

from ebmkit.sampling.base import Chain, Chains, Info, Sampler, State
from ebmkit.sampling.diffusion import DDIM, NoisePredictor, noise_predictor_of
from ebmkit.sampling.hmc import HMC
from ebmkit.sampling.langevin import (
    JEM_NOISE,
    JEM_STEP,
    MALA,
    AnnealedLangevin,
    DensityChain,
    Langevin,
    PredictorCorrector,
    geometric_sigmas,
    langevin_move,
)
from ebmkit.sampling.schedules import SCHEDULES, Schedule, make_schedule
from ebmkit.sampling.target import (
    DenoiserFunction,
    DensityFunction,
    ScoreFunction,
    denoiser_of,
    density_of,
    label_density_of,
    score_of,
)

__all__ = [
    "DDIM",
    "HMC",
    "JEM_NOISE",
    "JEM_STEP",
    "MALA",
    "SCHEDULES",
    "AnnealedLangevin",
    "Chain",
    "Chains",
    "DenoiserFunction",
    "DensityChain",
    "DensityFunction",
    "Info",
    "Langevin",
    "NoisePredictor",
    "PredictorCorrector",
    "Sampler",
    "Schedule",
    "ScoreFunction",
    "State",
    "denoiser_of",
    "density_of",
    "geometric_sigmas",
    "label_density_of",
    "langevin_move",
    "make_schedule",
    "noise_predictor_of",
    "score_of",
]
