"""Samplers: chains driven by a score, a log-density or a denoiser of any model."""

from ebmkit.class_gaussians import ClassGaussians
from ebmkit.sampling import annealed, ascent, diffusion, heun, langevin
from ebmkit.sampling.annealed import AIS, AnnealedMALA
from ebmkit.sampling.ascent import Ascent, StochasticAscent
from ebmkit.sampling.base import (
    Chains,
    Sampler,
    denoiser_of,
    density_of,
    label_density_of,
    score_of,
)
from ebmkit.sampling.diffusion import DDIM, noise_predictor_of
from ebmkit.sampling.entry import SAMPLERS, SamplerEntry, find_sampler
from ebmkit.sampling.heun import Heun, karras_sigmas
from ebmkit.sampling.langevin import (
    HMC,
    MALA,
    AnnealedLangevin,
    Langevin,
    PredictorCorrector,
    geometric_sigmas,
    langevin_move,
)

__all__ = [
    "AIS",
    "DDIM",
    "HMC",
    "MALA",
    "SAMPLERS",
    "AnnealedLangevin",
    "AnnealedMALA",
    "Ascent",
    "Chains",
    "ClassGaussians",
    "Heun",
    "Langevin",
    "PredictorCorrector",
    "Sampler",
    "SamplerEntry",
    "StochasticAscent",
    "denoiser_of",
    "density_of",
    "find_sampler",
    "geometric_sigmas",
    "karras_sigmas",
    "label_density_of",
    "langevin_move",
    "noise_predictor_of",
    "score_of",
]

_MODULES = (langevin, annealed, diffusion, heun, ascent)  # each has `ENTRIES`
SAMPLERS.update({entry.name: entry for module in _MODULES for entry in module.ENTRIES})
