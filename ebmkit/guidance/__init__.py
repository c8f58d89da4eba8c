"""Guidance of diffusion models and other samplers by the energies of a classifier."""

from ebmkit.guidance.guides import (
    CLASSIFIER_FREE,
    GUIDANCE_SCHEDULES,
    GUIDES,
    GuidanceSchedule,
    accumulated_guide,
    check_guide,
    classifier_guide,
    dual_guide,
    energy_guide,
    parse_schedule,
    pgd_guide,
)
from ebmkit.guidance.model import (
    GuidedModel,
    LogitModel,
    class_energies,
    guided_model,
    stored_energies,
)
from ebmkit.guidance.score import (
    Guidance,
    GuidanceConfig,
    classifier_free,
    guided_denoiser,
    guided_density,
    guided_noise,
    guided_score,
    make_guidance,
)

__all__ = [
    "CLASSIFIER_FREE",
    "GUIDANCE_SCHEDULES",
    "GUIDES",
    "Guidance",
    "GuidanceConfig",
    "GuidanceSchedule",
    "GuidedModel",
    "LogitModel",
    "accumulated_guide",
    "check_guide",
    "class_energies",
    "classifier_free",
    "classifier_guide",
    "dual_guide",
    "energy_guide",
    "guided_denoiser",
    "guided_density",
    "guided_model",
    "guided_noise",
    "guided_score",
    "make_guidance",
    "parse_schedule",
    "pgd_guide",
    "stored_energies",
]
