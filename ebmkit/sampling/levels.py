"""The noise levels of a sampler, inside those a model was trained for."""

from __future__ import annotations

from typing import Any

from ebmkit.energy import ScoreModel
from ebmkit.errors import UserError
from ebmkit.noise import format_sigma
from ebmkit.sampling.base import Sampler

__all__ = ["HIGHEST", "LOWEST", "check_level", "first_level", "highest", "last_level", "lowest"]

HIGHEST, LOWEST = 1.0, 0.01
"""Ends of the noise levels where the model sets none, image units."""

SLACK = 1e-6
"""Of a level that was written and read, as 100/255."""


def check_level(model: ScoreModel, sigma: float) -> float:
    """``sigma`` itself.

    Raises:
        UserError: if the model was trained for other levels.
    """
    limits = model.card.sigma_range if model.card else None
    if limits and not limits[0] * (1 - SLACK) <= sigma <= limits[1] * (1 + SLACK):
        raise UserError(
            f"noise level {format_sigma(sigma)} lies outside what this model was trained for: "
            f"take {format_sigma(limits[0])} to {format_sigma(limits[1])}, or train it for more"
        )
    return sigma


def highest(model: ScoreModel, asked: float | None) -> float:
    """The level at which chains begin: ``asked``, or the model's highest.

    Raises:
        UserError: if the model was not trained there.
    """
    if asked is not None:
        return check_level(model, asked)
    limits = model.card.sigma_range if model.card else None
    return limits[1] if limits else HIGHEST


def lowest(model: ScoreModel, asked: float | None) -> float:
    """The level at which chains end: ``asked``, or 0.01, or the model's lowest if that is higher.

    Raises:
        UserError: if the model was not trained there.
    """
    if asked is not None:
        return check_level(model, asked)
    limits = model.card.sigma_range if model.card else None
    return min(max(LOWEST, limits[0]), limits[1]) if limits else LOWEST


def first_level(sampler: Sampler[Any]) -> float | None:
    """The noise level at which a sampler begins, None where it has only one, or none."""
    levels = getattr(sampler, "sigmas", None)
    if levels:
        return float(levels[0])
    sigma: float | None = getattr(sampler, "first_sigma", None)
    return sigma


def last_level(sampler: Sampler[Any]) -> float | None:
    """The noise level of the images at its end, None where it has none."""
    levels = getattr(sampler, "sigmas", None)
    if levels:
        return float(levels[-1])
    sigma: float | None = getattr(sampler, "sigma", None)
    return sigma
