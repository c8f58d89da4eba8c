r"""Noise levels.

Everywhere in ebmkit, sigma is the standard deviation of the noise in *image units*: images live in
[0, 1]. People say "25" and mean :math:`25/255`; so options and configuration fields accept the
fraction as text, and a bare "25" is refused with the fraction that was probably meant ("25/1"
insists on it; a float is taken as it is, so that saved configurations load again).
"""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import BeforeValidator

from ebmkit.errors import UserError

__all__ = [
    "Radius",
    "Sigma",
    "SigmaOrZero",
    "format_sigma",
    "in_255ths",
    "parse_radius",
    "parse_sigma",
]


def parse_sigma(value: object, allow_zero: bool = False) -> float:
    """Read a noise level from ``0.1``, ``"0.1"`` or ``"25/255"``.

    Args:
        value: a number or its text.
        allow_zero: accept 0, no noise.

    Returns:
        The standard deviation in image units.

    Raises:
        UserError: if the value does not parse, is not finite, is not above 0 (not 0 or above), or
            is a bare number above 1 as text or whole number, which nobody means in image units.

    >>> parse_sigma("51/255")
    0.2
    """
    text = str(value).strip()
    try:
        top, slash, bottom = text.partition("/")
        sigma = float(top) / float(bottom) if slash else float(text)
    except (ValueError, ZeroDivisionError):
        raise UserError(
            f"sigma {text!r} is not a noise level: write a number or a fraction, as in 25/255"
        ) from None
    if not math.isfinite(sigma) or sigma < 0 or (sigma == 0 and not allow_zero):
        least = "not below 0" if allow_zero else "above 0"
        raise UserError(f"sigma {text!r} must be a finite number {least}, as in 25/255")
    if sigma > 1 and not slash and not isinstance(value, float):
        raise UserError(
            f"sigma {text!r} is beyond the range of an image, 0 to 1: did you mean {text}/255? "
            f"(if not, write {text}/1)"
        )
    return sigma


def _parse_sigma_or_zero(value: object) -> float:
    return parse_sigma(value, allow_zero=True)


def parse_radius(value: object) -> float:
    """Read the radius of a ball of images, image units: a number, its text or a fraction.

    2 is 2, for an l2 radius may well be above 1.

    Raises:
        UserError: if it does not parse or is not a finite number of 0 or more.

    >>> parse_radius("51/255"), parse_radius("2")
    (0.2, 2.0)
    """
    text = str(value).strip()
    try:
        top, slash, bottom = text.partition("/")
        radius = float(top) / float(bottom) if slash else float(text)
    except (ValueError, ZeroDivisionError):
        raise UserError(
            f"{text!r} is no radius: write a number or a fraction, as in 0.5 or 8/255"
        ) from None
    if not 0 <= radius < math.inf:
        raise UserError(f"radius {text!r} must be a finite number of 0 or more, as in 0.5 or 8/255")
    return radius


def format_sigma(sigma: float) -> str:
    """Write a noise level in 255ths, as people read it.

    >>> format_sigma(25 / 255)
    '25/255'
    """
    return f"{sigma * 255:.4g}/255"


Sigma = Annotated[float, BeforeValidator(parse_sigma)]
"""A pydantic field holding a noise level; accepts the forms of `parse_sigma`."""

SigmaOrZero = Annotated[float, BeforeValidator(_parse_sigma_or_zero)]
"""The same where 0 stands for no noise."""

Radius = Annotated[float, BeforeValidator(parse_radius)]
"""A pydantic field holding a radius of 0 or more; accepts the forms of `parse_radius`."""


def in_255ths(sigma: float) -> str:
    """How JSON keys and pictures name a noise level.

    >>> in_255ths(25 / 255)
    '25'
    """
    return f"{sigma * 255:.4g}"
