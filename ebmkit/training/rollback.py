r"""Divergence detection and rollback, for objectives that need negatives.

Maximum likelihood with short chains does not minimise a fixed function. When the chains no longer
follow the model, the energy difference between negatives and images,
:math:`g = \overline{\log p(\tilde y)} - \overline{\log p(y)}`, diverges, then the gradients, then
the weights. So the monitor checks after each step (limits: `RollbackConfig`):

========  =============================================================================
finite    all losses and the gradient, for NaN and Inf
gap       |g|, smoothed over about ten steps, and g itself at ten times that limit
sample    root mean square of the negatives about gray; images reach 0.5
gradient  norm of the gradient, relative to its running mean
========  =============================================================================

On divergence the run rolls back to the last snapshot after which it continued for a while (network,
optimiser, averaged weights, running means, chains). It applies *one* mitigation, the next in the
configured order, and continues with other random numbers: ``rate`` multiplies the learning rate,
``steps`` the Langevin steps, ``penalty`` raises the penalty of squared energies. After a maximum
number of rollbacks the run ends and reports its history. Checkpoints contain mitigations and
history.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field, FiniteFloat, NonNegativeInt
from torch import Tensor

from ebmkit.errors import UserError, validated
from ebmkit.objectives.likelihood import Negatives
from ebmkit.sampling.entry import ReplayBuffer
from ebmkit.training.config import RollbackConfig
from ebmkit.training.state import Saved, TrainingState, check_tensor
from ebmkit.training.step import StepStats

RATE_FACTOR, STEPS_FACTOR, LEAST_PENALTY, PENALTY_FACTOR = 0.3, 1.5, 0.01, 4.0
MOST_STEPS = 4  # maximum factor of the configured Langevin steps
SMOOTH = 0.9  # weight of the past in the smoothed gap and the running mean of gradient norms
SNAPSHOTS = 3  # maximum number of snapshots kept
CHANGES = {
    "rate": f"learning rate times {RATE_FACTOR:g}",
    "steps": f"Langevin steps times {STEPS_FACTOR:g}",
    "penalty": "penalty of squared energies raised",
    None: "maximum number of rollbacks reached",
}
"""Mitigation -> its description."""


class Mitigations(NamedTuple):
    """Mitigations so far: factors of the learning rate and of the Langevin steps, and the amount
    added to the penalty."""

    rate: Annotated[FiniteFloat, Field(gt=0, le=1)] = 1.0
    steps: Annotated[FiniteFloat, Field(ge=1, le=MOST_STEPS)] = 1.0
    penalty: Annotated[FiniteFloat, Field(ge=0)] = 0.0

    def after(self, change: str) -> Mitigations:
        """These mitigations and one more, ``change``."""
        if change == "rate":
            return self._replace(rate=self.rate * RATE_FACTOR)
        if change == "steps":
            return self._replace(steps=min(MOST_STEPS, self.steps * STEPS_FACTOR))
        return self._replace(penalty=self.penalty * PENALTY_FACTOR or LEAST_PENALTY)


class Divergence(NamedTuple):
    """A divergence: step of detection, reason, step of the restored snapshot, and mitigation (None:
    the run ends)."""

    at: int
    reason: str
    back: int
    change: str | None

    def sentence(self) -> str:
        """One-line description."""
        what = CHANGES.get(self.change, CHANGES[None])
        return f"step {self.at}: {self.reason}; back to step {self.back}, {what}"


class Snapshot(NamedTuple):
    """A state for rollback, on the CPU; never modified."""

    step: NonNegativeInt
    state: dict[str, Any]
    """State of `TrainingState`, validated when it is used."""
    chains: Tensor
    """Images of the replay buffer, (M, C, H, W)."""
    best: bytes | Tensor | None
    """Best weights at that step; in a checkpoint a tensor of their bytes."""


class SavedRollback(Saved):
    """Part of a checkpoint for `Rollback`, without the chains, which have their own file."""

    remedies: Mitigations
    history: list[Divergence]
    gap: float
    gradient: float
    attempt: NonNegativeInt
    kept: list[Snapshot] = Field([])


class DivergenceMonitor:
    """Checks the statistics of each step, keeps the newest snapshots, and counts divergences."""

    def __init__(self, config: RollbackConfig) -> None:
        self.config, self.mitigations = config, Mitigations()
        self.history, self.snapshots = list[Divergence](), list[Snapshot]()  # oldest first
        self.gap, self.gradient = 0.0, math.nan  # both smoothed

    def check(self, stats: StepStats, gap: float, sample: float) -> str | None:
        """Return why the run has diverged in a step, or None if it has not. ``gap`` is in nats,
        ``sample`` is the rms of the negatives about gray, in image units."""
        limits, usual, norm = self.config, self.gradient, stats.grad_norm
        if stats.fault is not None:
            return stats.fault
        self.gap = SMOOTH * self.gap + (1 - SMOOTH) * gap
        if abs(self.gap) > limits.gap or abs(gap) > 10 * limits.gap:
            return (
                f"log p of samples and data differ by {gap:.4g} nats (rollback.gap={limits.gap:g})"
            )
        if not sample <= limits.sample:
            far = f"samples lie {sample:.4g} from gray, in image units"
            return f"{far} (rollback.sample={limits.sample:g})"
        if norm > limits.gradient * usual:
            large = f"the gradient's norm is {norm:.4g}, usually {usual:.4g}"
            return f"{large} (rollback.gradient={limits.gradient:g})"
        known = math.isfinite(usual)
        self.gradient = SMOOTH * usual + (1 - SMOOTH) * norm if known else norm
        return None

    def keep(self, snapshot: Snapshot) -> None:
        """Add ``snapshot``, and drop the oldest one beyond `SNAPSHOTS`."""
        self.snapshots = [*self.snapshots, snapshot][-SNAPSHOTS:]

    def diverged(self, at: int, reason: str) -> tuple[Divergence, Snapshot]:
        """Record a divergence; return it and the snapshot to restore: the newest after which the
        run continued for half the distance between snapshots. Later snapshots are dropped."""
        old = [s for s in self.snapshots if s.step <= at - self.config.every / 2]
        self.snapshots = old or self.snapshots[:1]
        change: str | None = None
        if len(self.history) < self.config.max_rollbacks:
            change = self.config.order[len(self.history) % len(self.config.order)]
            self.mitigations = self.mitigations.after(change)
        found = Divergence(at, reason, self.snapshots[-1].step, change)
        self.history.append(found)
        self.gap, self.gradient = 0.0, math.nan
        return found, self.snapshots[-1]


class Rollback:
    """Monitors a run that draws ``negatives`` for its objective ``term``, and rolls its ``state``
    back on divergence."""

    def __init__(
        self, config: RollbackConfig, term: str, negatives: Negatives, state: TrainingState
    ) -> None:
        self.monitor, self.negatives = DivergenceMonitor(config), negatives
        self.state, self._term = state, term
        self._apply()

    def sample_rms(self) -> float:
        """Root mean square of the negatives about gray, the same in all processes."""
        return float(self.negatives.world.mean_(self.negatives.spread.clone()))

    def check(self, stats: StepStats) -> str | None:
        """Return why the run has diverged in the last step; if it has not, take a snapshot every
        ``rollback.every`` steps and return None."""
        reason = self.monitor.check(stats, stats.parts[self._term], self.sample_rms())
        if reason is None and self.state.step % self.monitor.config.every == 0:
            self.snapshot()
        return reason

    def snapshot(self) -> None:
        """Take a snapshot of the current state, in host memory."""
        own = self.state.state_dict(), self.negatives.buffer.images
        state, chains = _host_copy(own)
        self.monitor.keep(Snapshot(self.state.step, state, chains, self.state.best.weights))

    def restore_snapshot(self, reason: str) -> Divergence:
        """Roll back to the last good snapshot and apply one more mitigation.

        Raises:
            UserError: if the snapshot, which may come from a file, belongs to another run.
        """
        divergence, snapshot = self.monitor.diverged(self.state.step, reason)
        spent = self.state.seconds
        self.state.load_state_dict(_host_copy(snapshot.state))
        assert not isinstance(snapshot.best, Tensor)
        self.state.best.weights, self.state.seconds = snapshot.best, spent
        self.negatives.buffer.images.copy_(snapshot.chains)
        self.negatives.attempt = len(self.monitor.history)
        self._apply()
        return divergence

    def row(self, divergence: Divergence, detail: list[str] | None) -> dict[str, Any]:
        """Metrics row of ``divergence``; ``detail`` is the diagnosis of NaN or Inf."""
        return {
            "kind": "rollback",
            "step": divergence.back,
            "at": divergence.at,
            "reason": divergence.reason,
            "change": divergence.change,
            "message": divergence.sentence(),
            **self.monitor.mitigations._asdict(),
        } | ({} if detail is None else {"detail": detail})

    def too_many_rollbacks(self, run: Path | None, detail: list[str] | None) -> UserError:
        """Return the error that ends the run in folder ``run`` after too many rollbacks."""
        history = self.monitor.history
        saved = f"; the last good state is in {str(run)!r}" if run else ""
        return UserError(
            f"the run diverged {len(history)} times and is given up{saved}; try a lower "
            "optimizer.lr, more negatives.steps or a smaller negatives.step_size:",
            [*(d.sentence() for d in history), *(f"  {line}" for line in detail or ())],
        )

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint, without the chains: mitigations, history, snapshots."""
        monitor = self.monitor
        best: dict[int, Tensor] = {}  # snapshots often share their best weights
        for weights in (snapshot.best for snapshot in monitor.snapshots):
            if weights is not None and id(weights) not in best:
                best[id(weights)] = torch.frombuffer(bytearray(weights), dtype=torch.uint8)
        return {
            "remedies": monitor.mitigations._asdict(),
            "history": [list(divergence) for divergence in monitor.history],
            "gap": monitor.gap,
            "gradient": monitor.gradient,
            "attempt": self.negatives.attempt,
            "kept": [[*own[:3], best.get(id(own.best))] for own in monitor.snapshots],
        }

    def load_state_dict(self, state: Any, buffer: Any) -> None:
        """Restore a `state_dict` and its chains, the bytes of an HDF5 file.

        Raises:
            UserError: if they belong to another run.
        """
        if not isinstance(buffer, bytes):
            raise UserError("the checkpoint has no replay buffer, which this run needs")
        images = ReplayBuffer.read_images(buffer, "the replay buffer of the checkpoint")
        own, monitor = self.negatives.buffer.images, self.monitor
        check_tensor("the replay buffer", images, own)
        saved = validated(SavedRollback, state, "the checkpoint: rollback")
        own.copy_(images)
        monitor.mitigations, monitor.history = saved.remedies, saved.history
        monitor.gap, monitor.gradient, monitor.snapshots = saved.gap, saved.gradient, []
        for snapshot in saved.kept:
            check_tensor(f"the chains kept at step {snapshot.step}", snapshot.chains, own)
            best = snapshot.best
            weights = best.numpy().tobytes() if isinstance(best, Tensor) else best
            monitor.keep(snapshot._replace(best=weights))
        self.negatives.attempt = saved.attempt
        self._apply()

    def _apply(self) -> None:
        """Apply the mitigations to the negatives."""
        config, mitigations = self.negatives.config, self.monitor.mitigations
        self.negatives.steps = math.ceil(config.steps * mitigations.steps)
        self.negatives.penalty = config.penalty + mitigations.penalty


def _host_copy(state: Any) -> Any:
    """A copy of ``state``, dictionaries, lists and tuples of tensors, on the CPU."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: _host_copy(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map(_host_copy, state))
    return state
