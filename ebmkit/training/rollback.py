"""What a trainer does beside the gradient where an objective needs negatives: chains and a watch.

See `ebmkit.objectives.likelihood` for the chains and `ebmkit.training.divergence` for what
diverged means and what is done then.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ebmkit.errors import UserError
from ebmkit.objectives.likelihood import Negatives
from ebmkit.sampling.buffer import ReplayBuffer
from ebmkit.training.checkpoint_state import SavedWatch, check_tensor, parts_of, restore_parts
from ebmkit.training.divergence import Divergence, DivergenceMonitor, Measures, sentence
from ebmkit.training.engine import StepStats
from ebmkit.training.nonfinite import is_finite, keep_report, report_of, told
from ebmkit.validation import validated

if TYPE_CHECKING:
    from ebmkit.training.trainer import Trainer

__all__ = ["Recovery"]


class Snapshot(NamedTuple):
    """A state to go back to: the trainer's, its chains, and the best weights by then."""

    state: dict[str, Any]
    chains: Tensor
    best_weights: bytes | None


class Recovery:
    """Draws a trainer's negatives, watches over it, and takes it back when it goes astray.

    Args:
        trainer: the trainer, all of whose other parts are made.
        negatives: its chains.
    """

    def __init__(self, trainer: Trainer, negatives: Negatives) -> None:
        self.trainer, self.negatives = trainer, negatives
        self.watch = DivergenceMonitor(trainer.config.watch)
        self._term = next(n for n, p in trainer.preparations.items() if p is negatives)
        self._apply()

    def keep_first(self) -> None:
        """Keep the trainer's present state, if there is none to go back to yet."""
        if not self.watch.holds_a_state:
            self.keep()

    def learning_rate(self, rate: float) -> float:
        """The rate that is left of ``rate``."""
        return rate * self.watch.remedies.rate

    def measures(self, reading: StepStats) -> Measures:
        """What the watch looks at, the same in all processes."""
        trainer = self.trainer
        spread = trainer.world.mean_(self.negatives.spread.clone())
        gap = reading.parts[self._term]
        return Measures(trainer.step, reading.parts, gap, float(spread), reading.grad_norm)

    def look(self, reading: StepStats) -> bool:
        """Look at the last step; whether the trainer was taken back.

        Raises:
            UserError: if it has gone astray too often; the message tells the history.
        """
        reason = self.watch.astray(self.measures(reading))
        if reason is None:
            if self.watch.due(self.trainer.step):
                self.keep()
            return False
        detail = None if is_finite(reading) else self._looked_into(reading)
        breach, state = self.watch.breach(self.trainer.step, reason)
        self._go_back(breach, state, detail)
        return True

    def keep(self) -> None:
        """Keep the trainer's present state to go back to, in the host's memory."""
        trainer = self.trainer
        state = tree_map_only(Tensor, _on_host, parts_of(trainer))
        chains = _on_host(self.negatives.buffer.images)
        self.watch.keep(trainer.step, Snapshot(state, chains, trainer.best.weights))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the chains: remedies, history, states to go back to."""
        best: dict[int, Tensor] = {}  # most have the same
        kept = []
        for step, own in self.watch.states:
            weights = own.best_weights
            if weights is not None and id(weights) not in best:
                best[id(weights)] = torch.frombuffer(bytearray(weights), dtype=torch.uint8)
            kept.append([step, own.state, own.chains, best.get(id(weights))])
        return {**self.watch.state(), "attempt": self.negatives.attempt, "kept": kept}

    def buffer(self) -> bytes:
        """The chains as an HDF5 file."""
        return self.negatives.buffer.to_bytes()

    def restore(self, state: Any, buffer: Any) -> None:
        """Go back to a `state` and its `buffer`.

        Raises:
            UserError: if they are of another run.
        """
        if not isinstance(buffer, bytes):
            raise UserError("the checkpoint has no replay buffer, which this run needs")
        images = ReplayBuffer.read_images(buffer, "the replay buffer of the checkpoint")
        own = self.negatives.buffer.images
        check_tensor("the replay buffer", images, own)
        saved = validated(SavedWatch, state, "the checkpoint: watch")
        own.copy_(images)
        self.watch.restore(saved.model_dump(exclude={"attempt", "kept"}))
        for step, own_state, chains, best in saved.kept:
            check_tensor(f"the chains kept at step {step}", chains, own)
            weights = None if best is None else best.numpy().tobytes()
            self.watch.keep(step, Snapshot(own_state, chains, weights))
        self.negatives.attempt = saved.attempt
        self._apply()

    def _looked_into(self, reading: StepStats) -> list[str]:
        """What is found of a step that is not finite, in short lines; all of it is written."""
        trainer = self.trainer
        report = report_of(trainer, trainer.step, reading, trainer.drawn)
        if trainer.run is not None:
            where = keep_report(trainer.run.path, report)
            return [*told(report), where.removeprefix("; ")]
        return told(report)

    def _go_back(self, breach: Divergence, kept: Snapshot, detail: list[str] | None) -> None:
        trainer, number = self.trainer, len(self.watch.history)
        spent = trainer.seconds
        restore_parts(trainer, tree_map_only(Tensor, _on_host, kept.state))
        trainer.best.weights = kept.best_weights
        trainer.seconds_before, trainer.begun = spent, trainer.clock()
        self.negatives.buffer.images.copy_(kept.chains)
        self.negatives.attempt = number
        self._apply()
        row: dict[str, Any] = {
            "kind": "breach",
            "step": breach.back,
            "at": breach.at,
            "reason": breach.reason,
            "change": breach.change,
            "told": sentence(breach),
            **self.watch.remedies.document(),
        }
        if detail is not None:
            row["detail"] = detail
        trainer.save(gone_back=(number, row))
        trainer.report(row, written=True)
        if breach.change is None:
            self._give_up(detail or [])

    def _give_up(self, detail: list[str]) -> None:
        run, history = self.trainer.run, self.watch.history
        saved = f"; the last good state is in {str(run.path)!r}" if run else ""
        raise UserError(
            f"the run went astray {len(history)} times and is given up{saved}; try a lower "
            "optimizer.lr, more negatives.steps or a smaller negatives.step_size:",
            [*map(sentence, history), *(f"  {line}" for line in detail)],
        )

    def _apply(self) -> None:
        """Let the changes of past breaches take effect."""
        config, remedies = self.trainer.config.negatives, self.watch.remedies
        self.negatives.steps = math.ceil(config.steps * remedies.steps)
        self.negatives.penalty = config.penalty + remedies.penalty


def _on_host(tensor: Tensor) -> Tensor:
    """A copy of ``tensor`` on the CPU that nobody changes."""
    return tensor.detach().to("cpu", copy=True)
