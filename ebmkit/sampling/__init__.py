"""Samplers of any model: chains on a score, a density or a denoiser, never on a network."""

from ebmkit.sampling.ascent import (
    ASCENT_ENTRY,
    KADKHODAIE_SIMONCELLI_ENTRY,
    Ascent,
    StochasticAscent,
)
from ebmkit.sampling.base import (
    Chains,
    Sampler,
    denoiser_of,
    density_of,
    label_density_of,
    score_of,
)
from ebmkit.sampling.diffusion import DDIM, DDIM_ENTRY, DDPM_ENTRY, noise_predictor_of
from ebmkit.sampling.entry import SAMPLERS, ClassGaussians, SamplerEntry, find_sampler
from ebmkit.sampling.langevin import (
    ANNEALED_ENTRY,
    LANGEVIN_ENTRY,
    PC_ENTRY,
    SGLD_ENTRY,
    AnnealedLangevin,
    Langevin,
    PredictorCorrector,
    geometric_sigmas,
    langevin_move,
)
from ebmkit.sampling.metropolis import HMC, HMC_ENTRY, MALA, MALA_ENTRY

__all__ = [
    "DDIM",
    "HMC",
    "MALA",
    "SAMPLERS",
    "AnnealedLangevin",
    "Ascent",
    "Chains",
    "ClassGaussians",
    "Langevin",
    "PredictorCorrector",
    "Sampler",
    "SamplerEntry",
    "StochasticAscent",
    "denoiser_of",
    "density_of",
    "find_sampler",
    "geometric_sigmas",
    "label_density_of",
    "langevin_move",
    "noise_predictor_of",
    "score_of",
]

for _entry in (
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
):
    SAMPLERS[_entry.name] = _entry  # type: ignore[assignment]
