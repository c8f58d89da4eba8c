r"""Noise levels.

Everywhere in ebmkit, sigma is the standard deviation of the noise in *image units*: images live in
[0, 1]. People say "25" and mean :math:`25/255`; so options and configuration fields accept the
fraction as text, and a bare number above 1 that can only be a slip is refused with the fraction
that was probably meant.
"""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import BeforeValidator

from ebmkit.errors import UserError

__all__ = ["Sigma", "format_sigma", "parse_sigma"]


def parse_sigma(value: object) -> float:
    """Read a noise level from ``0.1``, ``"0.1"`` or ``"25/255"``.

    Returns:
        The standard deviation in image units.

    Raises:
        UserError: if the value does not parse, is not finite, or is not above 0.

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
    if not math.isfinite(sigma) or sigma <= 0:
        raise UserError(f"sigma {text!r} must be a finite number above 0, as in 25/255")
    return sigma


def format_sigma(sigma: float) -> str:
    """Write a noise level in 255ths, as people read it.

    >>> format_sigma(25 / 255)
    '25/255'
    """
    return f"{sigma * 255:.4g}/255"


Sigma = Annotated[float, BeforeValidator(parse_sigma)]
"""A pydantic field holding a noise level; accepts the forms of `parse_sigma`."""
