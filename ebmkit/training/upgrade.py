"""Checkpoints of earlier versions, brought to today's form.

=================  ============================================  ==================================
until              what a checkpoint had                         today
=================  ============================================  ==================================
2026-11-20         ``running``: mapping from term to mean        tensor, in the order of the terms
2026-11-20         an optimiser that is not fused                the same state, for a fused one
2026-11-25         no ``seconds``, ``precision``, ``watch``      0; as computed now; none
2026-11-26         no ``kept`` in ``watch``                      kept anew from here on
=================  ============================================  ==================================

Configurations need nothing: fields that came later have defaults that change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["upgraded"]


def upgraded(state: dict[str, Any], balanced: Sequence[str]) -> dict[str, Any]:
    """A checkpoint's ``state`` in today's form; itself, if it is of today.

    Args:
        state: as a version wrote it.
        balanced: names of the terms that have a running mean, in order.

    Raises:
        TypeError, ValueError: if it is of no version.
    """
    state = {"seconds": 0.0, "best": math.inf, "precision": None, "watch": None, **state}
    if isinstance(state.get("running"), dict):
        means = [float(state["running"].get(name, 1.0)) for name in balanced]
        state["running"] = torch.tensor(means)
    return state
