"""The best weights so far by validation, which belong to the checkpoint."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ebmkit.core import ScoreModel
from ebmkit.models.saving import weights_file
from ebmkit.training.checkpoints import BEST

if TYPE_CHECKING:
    from ebmkit.training.runs import RunFolder

__all__ = ["Best"]


class Best:
    """Keeps the weights of the least validation loss.

    Args:
        run: where they are written; None: the loss alone is kept.

    Attributes:
        loss: the least so far; infinite before the first validation.
        weights: safetensors; None before the first validation.
    """

    def __init__(self, run: RunFolder | None) -> None:
        self.loss = math.inf
        self.weights: bytes | None = None
        self._run = run
        self._on_disk: bytes | None = None

    def offer(self, loss: float, model: ScoreModel) -> None:
        """Keep the weights of ``model`` if its ``loss`` is the least so far."""
        if loss < self.loss:
            self.loss = loss
            self.weights = weights_file(model) if self._run is not None else None

    def restore(self) -> None:
        """Read the weights of the present `loss` from the run; if they are lost, begin anew."""
        if self._run is not None and math.isfinite(self.loss):
            self.weights = self._on_disk = self._run.read_best()
            self.loss = math.inf if self.weights is None else self.loss

    def files(self) -> dict[str, bytes]:
        """What is to be written with the next checkpoint; nothing if it is there already."""
        if self.weights is None or self.weights is self._on_disk:
            return {}
        return {BEST: self.weights}

    def written(self) -> None:
        """Note that `files` was."""
        self._on_disk = self.weights
