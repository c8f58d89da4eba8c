r"""Watching over a run that may diverge, and what is done about it.

Maximum likelihood with short chains is not a descent on anything: when the chains no longer follow
the model, the difference of energies

.. math:: g = \overline{\log p(\tilde y)} - \overline{\log p(y)}

between negatives and images runs away, then the gradients, then everything else. So after each step
four things are looked at (`WatchConfig`):

========  =============================================================================
finite    every loss and the gradient are numbers
gap       |g|, smoothed over some ten steps, and g itself at ten times that
sample    root mean square of the negatives about gray: images reach 0.5
gradient  its norm, against the running mean of the past
========  =============================================================================

On a breach nothing is patched over. The run goes back to the last state that was good (network,
optimiser, averaged weights, running means, chains), changes *one* thing, the next in a stated
order, and goes on with other random chains: ``rate`` multiplies the learning rate, ``steps`` the
Langevin steps, ``penalty`` raises the penalty of squared energies. A state counts as good when the
run went on for a while after it without a breach. After a bounded number of breaches the run ends
and tells its history. Changes and count are part of a checkpoint.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Divergence", "DivergenceMonitor", "Measures", "Mitigations", "WatchConfig", "sentence"]

Change = Literal["rate", "steps", "penalty"]

RATE_FACTOR, STEPS_FACTOR, LEAST_PENALTY, PENALTY_FACTOR = 0.3, 1.5, 0.01, 4.0
MOST_STEPS = 4
"""Langevin steps are not raised beyond so many times those configured."""

SMOOTH = 0.9
"""Weight of the past in the smoothed gap and the running mean of gradient norms."""


class WatchConfig(BaseModel):
    """When a run that needs negatives has gone astray, and what is changed then."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    gap: float = Field(
        50.0, gt=0, description="maximum smoothed energy difference of samples and data, nats"
    )
    sample: float = Field(
        5.0, gt=0, description="maximum rms distance of samples from gray, image units"
    )
    gradient: float = Field(
        1000.0, gt=1, description="maximum ratio of the gradient norm to its running mean"
    )
    every: int = Field(50, ge=1, description="steps between rollback snapshots")
    breaches: int = Field(10, ge=0, description="maximum number of rollbacks before the run ends")
    order: tuple[Change, ...] = Field(
        ("rate", "steps", "penalty"),
        min_length=1,
        description="mitigations, applied in turn: one per rollback",
    )


class Measures(NamedTuple):
    """What is looked at after a step.

    Attributes:
        step: number of steps done.
        losses: each term's mean.
        gap: of the energies, nats.
        sample: rms of the negatives about gray, image units.
        gradient: norm of the gradient.
    """

    step: int
    losses: dict[str, float]
    gap: float
    sample: float
    gradient: float


@dataclass(frozen=True)
class Mitigations:
    """What breaches have changed so far.

    Attributes:
        rate: factor of the learning rate.
        steps: factor of the Langevin steps.
        penalty: added to the configured penalty.
    """

    rate: float = 1.0
    steps: float = 1.0
    penalty: float = 0.0

    def after(self, change: Change) -> Mitigations:
        """With one thing changed."""
        if change == "rate":
            return Mitigations(self.rate * RATE_FACTOR, self.steps, self.penalty)
        if change == "steps":
            return Mitigations(self.rate, min(MOST_STEPS, self.steps * STEPS_FACTOR), self.penalty)
        penalty = self.penalty * PENALTY_FACTOR or LEAST_PENALTY
        return Mitigations(self.rate, self.steps, penalty)

    def document(self) -> dict[str, float]:
        """As plain values."""
        return {"rate": self.rate, "steps": self.steps, "penalty": self.penalty}


class Divergence(NamedTuple):
    """A run that went astray.

    Attributes:
        at: step at which it was seen.
        reason: in words.
        back: step it went back to.
        change: what was changed; None: there was nothing left to try.
    """

    at: int
    reason: str
    back: int
    change: str | None


@dataclass
class DivergenceMonitor:
    """Looks at the measures of each step, keeps states to go back to, and counts breaches.

    Args:
        config: limits and policy.

    Attributes:
        remedies: those in force.
        history: all breaches so far.
    """

    config: WatchConfig
    remedies: Mitigations = field(default_factory=Mitigations)
    history: list[Divergence] = field(default_factory=list)
    _gap: float = 0.0
    _gradient: float = math.nan
    _states: list[tuple[int, Any]] = field(default_factory=list)

    @property
    def states(self) -> list[tuple[int, Any]]:
        """The states to go back to, by step, oldest first."""
        return self._states

    @property
    def holds_a_state(self) -> bool:
        """Whether there is a state to go back to."""
        return bool(self._states)

    def astray(self, now: Measures) -> str | None:
        """Why the run has gone astray at ``now``, in words; None if it has not."""
        for name, loss in now.losses.items():
            if not math.isfinite(loss):
                return f"loss {name!r} is {loss}"
        if not math.isfinite(now.gradient):
            return f"the gradient's norm is {now.gradient}"
        self._gap = SMOOTH * self._gap + (1 - SMOOTH) * now.gap
        if abs(self._gap) > self.config.gap or abs(now.gap) > 10 * self.config.gap:
            return (
                f"log p of samples and data differ by {now.gap:.4g} nats "
                f"(watch.gap={self.config.gap:g})"
            )
        if not now.sample <= self.config.sample:
            return (
                f"samples lie {now.sample:.4g} from gray, in image units "
                f"(watch.sample={self.config.sample:g})"
            )
        usual = self._gradient
        if now.gradient > self.config.gradient * usual:
            return (
                f"the gradient's norm is {now.gradient:.4g}, usually {usual:.4g} "
                f"(watch.gradient={self.config.gradient:g})"
            )
        known = math.isfinite(usual)
        self._gradient = SMOOTH * usual + (1 - SMOOTH) * now.gradient if known else now.gradient
        return None

    def due(self, step: int) -> bool:
        """Whether the state after ``step`` is to be kept."""
        return step % self.config.every == 0

    def keep(self, step: int, state: Any) -> None:
        """Keep ``state``, a copy that nobody changes; the last three are kept."""
        self._states = [*self._states, (step, state)][-3:]

    def breach(self, at: int, reason: str) -> tuple[Divergence, Any]:
        """Note a breach; what to change, and the state to go back to.

        The newest state that the run outlived by half the distance between states; states after it
        are given up. The breach's ``change`` is None when no more are borne.
        """
        old = [s for s in self._states if s[0] <= at - self.config.every / 2] or self._states[:1]
        back, state = old[-1]
        self._states = old
        change: Change | None = None
        if len(self.history) < self.config.breaches:
            change = self.config.order[len(self.history) % len(self.config.order)]
            self.remedies = self.remedies.after(change)
        found = Divergence(at, reason, back, change)
        self.history.append(found)
        self._gap, self._gradient = 0.0, math.nan
        return found, state

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as plain values."""
        return {
            "remedies": self.remedies.document(),
            "history": [list(breach) for breach in self.history],
            "gap": self._gap,
            "gradient": self._gradient,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a `state`; states to go back to are to be given by `keep`."""
        self.remedies = Mitigations(**state["remedies"])
        self.history = [Divergence(*row) for row in state["history"]]
        self._gap, self._gradient = state["gap"], state["gradient"]
        self._states = []


def sentence(breach: Divergence) -> str:
    """A breach in words."""
    changes = {
        "rate": f"learning rate times {RATE_FACTOR:g}",
        "steps": f"Langevin steps times {STEPS_FACTOR:g}",
        "penalty": "penalty of squared energies raised",
    }
    what = changes.get(breach.change or "", "nothing left to try")
    return f"step {breach.at}: {breach.reason}; back to step {breach.back}, {what}"
