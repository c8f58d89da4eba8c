"""Samplers of any model: chains on a score, a density or a denoiser, never on a network."""

from ebmkit.noise import SCHEDULES, Schedule, make_schedule
from ebmkit.sampling.ascent import Ascent
from ebmkit.sampling.base import Chain, Chains, Info, Sampler, State
from ebmkit.sampling.diagnostics import (
    Trace,
    effective_size,
    energy_gap,
    random_projections,
    split_rhat,
)
from ebmkit.sampling.diffusion import DDIM, NoisePredictor, noise_predictor_of
from ebmkit.sampling.hmc import HMC
from ebmkit.sampling.inverse import (
    BlockAverage,
    Compressed,
    LowPass,
    Measurement,
    Pixels,
    center_hole,
    random_pixels,
)
from ebmkit.sampling.kadkhodaie import StochasticAscent
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
from ebmkit.sampling.presets import SAMPLERS, SamplerEntry, find_sampler, make_restorer
from ebmkit.sampling.seeds import ClassGaussians
from ebmkit.sampling.target import (
    DenoiserFunction,
    DensityFunction,
    ScoreFunction,
    blind_denoiser_of,
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
    "SAMPLERS",
    "SCHEDULES",
    "AnnealedLangevin",
    "Ascent",
    "BlockAverage",
    "Chain",
    "Chains",
    "ClassGaussians",
    "Compressed",
    "DenoiserFunction",
    "DensityChain",
    "DensityFunction",
    "Info",
    "Langevin",
    "LowPass",
    "Measurement",
    "NoisePredictor",
    "Pixels",
    "PredictorCorrector",
    "Sampler",
    "SamplerEntry",
    "Schedule",
    "ScoreFunction",
    "State",
    "StochasticAscent",
    "Trace",
    "blind_denoiser_of",
    "center_hole",
    "denoiser_of",
    "density_of",
    "effective_size",
    "energy_gap",
    "find_sampler",
    "geometric_sigmas",
    "label_density_of",
    "langevin_move",
    "make_restorer",
    "make_schedule",
    "noise_predictor_of",
    "random_pixels",
    "random_projections",
    "score_of",
    "split_rhat",
]
