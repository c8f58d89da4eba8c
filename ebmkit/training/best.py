"""The best weights so far by validation, which belong to the checkpoint."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ebmkit.energy import ScoreModel
from ebmkit.models.saving import weights_file
from ebmkit.training.checkpoints import BEST

if TYPE_CHECKING:
    from ebmkit.training.runs import RunFolder

__all__ = ["Best"]


class Best:
    """Keeps the weights of the least validation loss.

    Attributes:
        loss: the least so far; infinite before the first validation.
        weights: safetensors; None before the first validation, and where nothing is saved.
    """

    def __init__(self) -> None:
        self.loss = math.inf
        self.weights: bytes | None = None
        self._on_disk: bytes | None = None

    def offer(self, loss: float, model: ScoreModel, saves: bool) -> None:
        """Note ``loss`` if it is the least so far; keep the ``model`` if it ``saves``."""
        if loss < self.loss:
            self.loss = loss
            self.weights = weights_file(model) if saves else None

    def restore(self, run: RunFolder) -> None:
        """Read the weights of the present `loss` from ``run``; if they are lost, begin anew."""
        if math.isfinite(self.loss):
            self.weights = self._on_disk = run.read_best()
            self.loss = math.inf if self.weights is None else self.loss

    def files(self) -> dict[str, bytes]:
        """What is to be written with the next checkpoint; nothing if it is there already."""
        if self.weights is None or self.weights is self._on_disk:
            return {}
        return {BEST: self.weights}

    def written(self) -> None:
        """Note that `files` was."""
        self._on_disk = self.weights
