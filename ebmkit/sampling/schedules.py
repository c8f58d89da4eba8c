"""Noise schedules, as samplers know them: `ebmkit.schedules`."""

from ebmkit.schedules import (
    SCHEDULES,
    Schedule,
    Spacing,
    cosine_betas,
    linear_betas,
    make_schedule,
)

__all__ = [
    "SCHEDULES",
    "Schedule",
    "Spacing",
    "cosine_betas",
    "linear_betas",
    "make_schedule",
]
