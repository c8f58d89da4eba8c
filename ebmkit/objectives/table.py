"""The table of objectives."""

from ebmkit.objectives.adversarial import ADV, TRADES
from ebmkit.objectives.base import Objective, Scale
from ebmkit.objectives.classification import CE
from ebmkit.objectives.diffusion import DDPM
from ebmkit.objectives.likelihood import CML, ML
from ebmkit.objectives.score_matching import ISM, denoising
from ebmkit.registry import Table

__all__ = ["ALIASES", "OBJECTIVES"]

OBJECTIVES: dict[str, Objective] = Table(
    "objective",
    {
        "ce": CE,
        "adv": ADV,
        "trades": TRADES,
        "dsm": denoising(),
        "dsm-mean": denoising(Scale.MEAN),
        "dsm-sum": denoising(Scale.SUM),
        "cdsm": denoising(conditional=True),
        "cdsm-mean": denoising(Scale.MEAN, conditional=True),
        "cdsm-sum": denoising(Scale.SUM, conditional=True),
        "ml": ML,
        "cml": CML,
        "ism": ISM,
        "ddpm": DDPM,
    },
)

ALIASES: dict[str, tuple[str, ...]] = {"jem": ("ce", "ml")}
"""Short names of sums of objectives."""
