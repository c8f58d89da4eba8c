"""The state of a run as saved in a checkpoint, and checks of a state that is loaded.

A checkpoint is a `SavedState` with ``precision``, for result tables, and, if an objective needs
negatives, ``rollback``: divergences and snapshots (`ebmkit.training.rollback`).

It may come from an untrusted source, and fused optimisers do not check the sizes of their tensors:
with moments of another shape they would read and write out of bounds. So the type of every entry
and the shape of every tensor are checked before anything is restored.

Checkpoints of earlier versions load. Until 2026-11-20 ``running`` was a mapping from term to mean,
and the optimiser was not fused. Until 2026-11-25 there was no ``seconds``, ``precision`` or
``rollback``, which had no ``kept`` until 2026-11-26 (the run then starts without snapshots) and was
called ``watch`` until December 2026.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt
from torch import Tensor, nn

from ebmkit.data import AnyImages, Stream, StreamedSet
from ebmkit.distributed import DistributedContext
from ebmkit.energy import ScoreModel
from ebmkit.errors import UserError, shown, validated
from ebmkit.models.saving import weights_file
from ebmkit.training.run_folder import BEST, RunFolder
from ebmkit.training.step import TrainingStep

SHOWN = 5
"""Maximum number of reasons for skipped samples in the metrics."""


class Saved(BaseModel):
    """Part of a checkpoint; its entries must have exactly the declared types."""

    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True)


class SavedOptimizer(Saved):
    """State of an optimiser, without group settings, which come from the configuration."""

    state: dict[NonNegativeInt, dict[str, Tensor]]  # by index of the parameter


class SavedState(Saved):
    """The part of a checkpoint that is the same for all objectives."""

    step: NonNegativeInt
    seconds: Annotated[FiniteFloat, Field(ge=0)]  # training time so far
    best: Annotated[float, Field(ge=-torch.inf)]  # lowest validation loss so far
    model: dict[str, Tensor]  # parameters and buffers, by name
    optimizer: SavedOptimizer
    average: dict[str, Tensor] | None  # averaged weights, by name, if averaging is on
    running: Tensor  # running means of the balanced terms
    unreadable: dict[NonNegativeInt, str] = {}  # skipped samples: index in the set -> reason


class Best:
    """The weights of the lowest validation loss, saved with the checkpoint."""

    def __init__(self) -> None:
        self.loss = math.inf  # before the first validation
        self.weights: bytes | None = None  # safetensors; None also if nothing is saved
        self._on_disk: bytes | None = None

    def offer(self, loss: float, model: ScoreModel, saves: bool) -> None:
        """Record ``loss`` if it is the lowest so far, and with ``saves`` the weights too."""
        if loss < self.loss:
            self.loss = loss
            self.weights = weights_file(model) if saves else None

    def restore(self, run: RunFolder) -> None:
        """Read the weights of the current `loss` from ``run``; if they are lost, reset `loss`."""
        if math.isfinite(self.loss):
            self.weights = self._on_disk = run.read_best()
            self.loss = math.inf if self.weights is None else self.loss

    def files(self) -> dict[str, bytes]:
        """Files to write with the next checkpoint; none if the weights are already on disk."""
        if self.weights is None or self.weights is self._on_disk:
            return {}
        return {BEST: self.weights}

    def written(self) -> None:
        """Record that `files` have been written."""
        self._on_disk = self.weights


class SkippedSamples:
    """Images that training skips because they cannot be read (``dataset.unreadable: skip``).

    Each process finds those of its share; `update` exchanges them whenever metrics or a checkpoint
    are written. They are part of the checkpoint.
    """

    def __init__(
        self, images: AnyImages, streams: Mapping[str, Stream], world: DistributedContext
    ) -> None:
        self.found: dict[int, str] = {}  # index of an image in the set -> why it cannot be read
        self._before, self._streams, self._world = images.excluded, streams, world
        self._may = isinstance(images, StreamedSet) and images.skip

    @property
    def reasons(self) -> tuple[str, ...]:
        """Reason of each skipped image, including those skipped when the data set was loaded."""
        return (*self._before, *self.found.values())

    def __len__(self) -> int:
        return len(self.reasons)

    def update(self) -> None:
        """Gather the images skipped since the last call; all processes must call this together."""
        if not self._may:
            return
        own = {n: why for stream in self._streams.values() for n, why in stream.skipped.items()}
        for found in self._world.gather(own):
            self.found |= found
        self.found = dict(sorted(self.found.items()))

    def row(self, step: int) -> dict[str, Any]:
        """Row for the end of the metrics: their count, and the first reasons."""
        reasons = list(self.reasons[:SHOWN])
        return {"kind": "unreadable", "step": step, "count": len(self), "reasons": reasons}


class TrainingState:
    """State of a run: the part of a checkpoint that is the same for all objectives.

    ``update`` holds model, optimiser, averaged weights and running means.
    """

    def __init__(self, update: TrainingStep, skipped: SkippedSamples) -> None:
        self.update, self.skipped = update, skipped
        self.step, self.best, self.seconds = 0, Best(), 0.0

    @property
    def seconds(self) -> float:
        """Time spent so far, including earlier processes, validations and checkpoints."""
        return self._before + time.perf_counter() - self._begun

    @seconds.setter
    def seconds(self, value: float) -> None:
        self._before = value
        self.start_clock()

    def start_clock(self) -> None:
        """Start measuring; the time is added to that spent before."""
        self._begun = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors, on their device, and plain values."""
        update, skipped = self.update, self.skipped.found
        return {
            "step": self.step,
            "seconds": self.seconds,
            "best": self.best.loss,
            "model": update.loss.model.state_dict(),
            "optimizer": update.optimizer.state_dict(),
            "average": update.average.state_dict() if update.average else None,
            "running": update.loss.running,
            "precision": update.precision,
            **({"unreadable": skipped} if skipped else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict` of this or an earlier version.

        Raises:
            UserError: if it does not fit this run.
        """
        update = self.update
        state = {"seconds": 0.0, "best": math.inf, "precision": None, **state}
        if isinstance(state.get("running"), dict):
            means = [state["running"].get(name, 1.0) for name in update.loss.balanced]
            try:
                state["running"] = torch.tensor([float(mean) for mean in means])
            except (TypeError, ValueError, RuntimeError):
                raise UserError("the checkpoint is of no version of this program") from None
        saved = validated(SavedState, state, "the checkpoint")
        check_tensor("'running'", saved.running, update.loss.running)
        _restore_module("model", update.loss.model, saved.model)
        restore_optimizer(update.optimizer, saved.optimizer)
        if update.average is not None:
            _restore_module("average", update.average, saved.average or {})
        update.loss.running.copy_(saved.running)
        update.reset()
        self.step, self.best.loss, self.seconds = saved.step, saved.best, saved.seconds
        self.skipped.found = dict(saved.unreadable)


def _restore_module(what: str, module: nn.Module, found: Mapping[str, Tensor]) -> None:
    """Restore the parameters and buffers of ``module``; ``what`` names it in errors."""
    own = module.state_dict()
    for name in [*own, *found]:
        if name not in found:
            raise _misfit(f"{what} {name!r} is missing")
        if name not in own:
            raise _misfit(f"{what} {shown(name)} is of another model")
        check_tensor(f"{what} {name!r}", found[name], own[name])
    module.load_state_dict(dict(found))


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: SavedOptimizer) -> None:
    """Restore the state of an optimiser of the same kind.

    Learning rates, weight decay and other group settings stay: the configuration sets them.

    Raises:
        UserError: if the state belongs to another optimiser or to other parameters.
    """
    adam, momentum = {"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"}
    groups = optimizer.param_groups
    names = [adam if "betas" in group else momentum for group in groups for _ in group["params"]]
    parameters = [p for group in groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for number, found in saved.state.items():
        if number >= len(parameters) or found.keys() != names[number]:
            raise _misfit(f"optimizer, parameter {number}, is of another optimiser or model")
        state[number] = {}
        for name, value in found.items():
            own = torch.zeros(()) if name == "step" else parameters[number]
            check_tensor(f"optimizer, parameter {number}, {name!r}", value, own)
            # fused kernels need dense tensors in the memory order of the parameter
            state[number][name] = torch.empty_like(own).copy_(value)
    own_groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": own_groups})


def check_tensor(what: str, found: Tensor, own: Tensor) -> None:
    """Check that ``found`` can replace ``own``.

    Raises:
        UserError: if its shape, type or layout differs.
    """
    if found.layout != torch.strided or found.shape != own.shape or found.dtype != own.dtype:
        has, needs = (
            f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in (found, own)
        )
        raise _misfit(f"{what} is {has}, and should be {needs}")


def _misfit(reason: str) -> UserError:
    return UserError(f"the checkpoint does not fit this run: {reason}")
