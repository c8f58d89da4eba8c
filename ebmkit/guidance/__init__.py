"""Guidance of diffusion models, and of any sampler, by the energies of a classifier."""

from ebmkit.guidance.combine import (
    Guidance,
    View,
    classifier_free,
    guided_denoiser,
    guided_density,
    guided_noise,
    guided_score,
    weight_of_diffusers,
    weight_of_thesis,
)
from ebmkit.guidance.guides import (
    accumulated_guide,
    classifier_guide,
    dual_guide,
    energy_guide,
    pgd_guide,
)
from ebmkit.guidance.logits import LogitModel
from ebmkit.guidance.schedules import GUIDANCE_SCHEDULES, GuidanceSchedule, parse_schedule

__all__ = [
    "GUIDANCE_SCHEDULES",
    "Guidance",
    "GuidanceSchedule",
    "LogitModel",
    "View",
    "accumulated_guide",
    "classifier_free",
    "classifier_guide",
    "dual_guide",
    "energy_guide",
    "guided_denoiser",
    "guided_density",
    "guided_noise",
    "guided_score",
    "parse_schedule",
    "pgd_guide",
    "weight_of_diffusers",
    "weight_of_thesis",
]
