"""Samplers of any model: chains on a score, a density or a denoiser, never on a network."""

from ebmkit.noise import Schedule, make_schedule
from ebmkit.sampling.annealed import (
    ANNEALED_ENTRY,
    PC_ENTRY,
    AnnealedLangevin,
    PredictorCorrector,
    geometric_sigmas,
)
from ebmkit.sampling.ascent import ASCENT_ENTRY, Ascent
from ebmkit.sampling.base import Chain, Chains, Info, Sampler, State
from ebmkit.sampling.diagnostics import (
    Trace,
    effective_size,
    energy_gap,
    random_projections,
    split_rhat,
)
from ebmkit.sampling.diffusion import DDIM, DDIM_ENTRY, DDPM_ENTRY, noise_predictor_of
from ebmkit.sampling.entry import SAMPLERS, SamplerEntry, default_sampler, find_sampler
from ebmkit.sampling.inverse import (
    BlockAverage,
    Compressed,
    LowPass,
    Measurement,
    Pixels,
    center_hole,
    random_pixels,
)
from ebmkit.sampling.kadkhodaie_simoncelli import (
    KADKHODAIE_SIMONCELLI_ENTRY,
    StochasticAscent,
    make_restorer,
)
from ebmkit.sampling.langevin import (
    JEM_NOISE,
    JEM_STEP,
    LANGEVIN_ENTRY,
    SGLD_ENTRY,
    Langevin,
    langevin_move,
)
from ebmkit.sampling.metropolis import HMC, HMC_ENTRY, MALA, MALA_ENTRY
from ebmkit.sampling.starts import ClassGaussians, ReplayBuffer
from ebmkit.sampling.target import (
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
    "AnnealedLangevin",
    "Ascent",
    "BlockAverage",
    "Chain",
    "Chains",
    "ClassGaussians",
    "Compressed",
    "Info",
    "Langevin",
    "LowPass",
    "Measurement",
    "Pixels",
    "PredictorCorrector",
    "ReplayBuffer",
    "Sampler",
    "SamplerEntry",
    "Schedule",
    "State",
    "StochasticAscent",
    "Trace",
    "blind_denoiser_of",
    "center_hole",
    "default_sampler",
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

SAMPLERS.update(
    (entry.name, entry)
    for entry in (
        LANGEVIN_ENTRY,
        SGLD_ENTRY,
        MALA_ENTRY,
        HMC_ENTRY,
        ANNEALED_ENTRY,
        PC_ENTRY,
        DDPM_ENTRY,
        DDIM_ENTRY,
        KADKHODAIE_SIMONCELLI_ENTRY,
        ASCENT_ENTRY,
    )
)
