r"""Classifier-free guidance: two predictions mixed at a weight w (Ho & Salimans, 2207.12598),

.. math:: \hat\epsilon = \epsilon_u + w\,(\epsilon_c - \epsilon_u) ,

w = 0 unconditional and w = 1 conditional: it is guidance by the classifier that the two imply.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

from ebmkit.errors import UserError

__all__ = ["classifier_free", "weight_of_diffusers", "weight_of_thesis"]

F = TypeVar("F", bound=Callable[..., Any])


def classifier_free(conditional: F, unconditional: F, weight: float) -> F:
    """out_u + w (out_c - out_u), of noise predictions, scores or denoisers alike.

    Args:
        conditional: of the label.
        unconditional: of the same arguments.
        weight: w; 0 is ``unconditional`` and 1 ``conditional``, each alone and to the bit.

    Raises:
        UserError: if the weight is below 0 or not finite.
    """
    if not 0 <= weight < math.inf:
        raise UserError(f"scale {weight} must be a finite number of 0 or more")
    if weight in (0, 1):
        return conditional if weight else unconditional

    def mixed(*arguments: Any) -> Any:
        base = unconditional(*arguments)
        return base + weight * (conditional(*arguments) - base)

    return cast(F, mixed)


def weight_of_diffusers(guidance_scale: float) -> float:
    """w of `diffusers`' ``guidance_scale``, which mixes in the same way: the number itself."""
    return guidance_scale


def weight_of_thesis(s: float) -> float:
    """w of RCG's s (algorithm 4: (s + 1) eps_c - s eps_u), where s = 0 is conditional: 1 + s."""
    return 1 + s
