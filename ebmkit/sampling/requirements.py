"""What a sampler can need of a model, and why a model does not have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ebmkit.energy import EnergyModel, ScoreModel, classifies

__all__ = ["Need", "missing", "takes_labels"]

Need = Literal["score", "density", "labels", "levels", "blind"]
"""
- ``score``: any model has one.
- ``density``: a log-density, of which the score is the gradient.
- ``labels``: labels it was trained on.
- ``levels``: noise levels it was trained on, or all of them, in closed form.
- ``blind``: it takes no noise level and finds it by itself.
"""


def takes_labels(model: ScoreModel) -> bool:
    """Whether ``model`` has a score for each label that it was trained on.

    A class-conditional diffusion model has, and is no classifier.
    """
    conditional = not isinstance(model, EnergyModel) and model.num_classes > 0
    return conditional or classifies(model)


def missing(model: ScoreModel, needs: Sequence[Need]) -> str | None:
    """Why ``model`` does not have what a sampler ``needs``, for a sentence; None if it does."""
    reasons: dict[Need, tuple[bool, str]] = {
        "score": (True, ""),
        "density": (
            isinstance(model, EnergyModel),
            f"{type(model).__name__} is a plain denoiser and has no log-density",
        ),
        "labels": (takes_labels(model), "it was trained without labels"),
        "levels": (
            model.card is None or model.card.sigma_range is not None,
            "it was not trained to denoise, so noise levels mean nothing to it",
        ),
        "blind": (
            not model.noise_conditional,
            "it takes the noise level as an input, and this sampler reads it off a blind denoiser",
        ),
    }
    for need in needs:
        has, reason = reasons[need]
        if not has:
            return reason
    return None
