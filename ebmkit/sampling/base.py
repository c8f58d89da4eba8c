r"""What a sampler is, and how its chains are run.

A sampler is two functions, pure in their state: ``init`` makes the state of B chains from where
they start, ``step`` takes a state and a source of randomness to the next state and to what is worth
knowing of the step (`Info`). A state is a `NamedTuple` whose fields are numbers, or tensors with
one row per chain; it holds all that the next step needs, so it can be saved, and a chain that was
interrupted goes on.

`Chains` runs a sampler and watches over it: a chain that leaves the finite numbers is put back to
its last finite state, left there, and named; the others go on as if it were not there, since no
chain sees another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ebmkit.errors import UserError

__all__ = ["Chain", "Chains", "Info", "Sampler", "State", "check_positive", "per_chain"]


class State(Protocol):
    """What every state has: positions ``x`` (B, ...) and the number of steps done."""

    @property
    def x(self) -> Tensor: ...
    @property
    def step(self) -> int: ...


class Chain(NamedTuple):
    """The state of samplers that remember nothing but where they are."""

    x: Tensor
    step: int


class Info(NamedTuple):
    """What a step was like, one entry per chain (B,), None where it has no meaning.

    Attributes:
        move: root mean square of the change over the entries of x, image units.
        sigma: noise level at which the target was taken, or that was found, image units.
        accepted: whether the proposal was accepted.
        finished: whether the chain needs no further step.
    """

    move: Tensor
    sigma: Tensor | None = None
    accepted: Tensor | None = None
    finished: Tensor | None = None


S = TypeVar("S", bound=State)


class Sampler(Protocol[S]):
    """Chains on a target that was given when it was made.

    Attributes:
        steps: length of its schedule; None: any number of steps can be taken.
    """

    @property
    def steps(self) -> int | None: ...

    def init(self, x: Tensor) -> S:
        """The state of chains that start at ``x`` (B, ...)."""
        ...

    def step(self, state: S, generator: torch.Generator) -> tuple[S, Info]:
        """The next state, and what the step was like; ``state`` is left as it was."""
        ...


class Chains(Generic[S]):
    """Chains of a sampler, of which those that leave the finite numbers stop.

    Args:
        sampler: any sampler.
        state: where they are; ``sampler.init(x)`` to begin.
        died: chain -> step at which it left the finite numbers, of chains that go on.

    Attributes:
        state: the present one; finite everywhere.
        died: as above.
        finished: (B,) bool, chains that need no further step, the dead among them.

    Raises:
        UserError: if a chain starts at numbers that are not finite.
    """

    def __init__(self, sampler: Sampler[S], state: S, died: dict[int, int] | None = None) -> None:
        self.sampler, self.state = sampler, state
        self.died: dict[int, int] = dict(died or {})
        start = _finite_rows(state)
        if not bool(start.all()):
            bad = torch.nonzero(~start).flatten().tolist()
            raise UserError(f"chains {_some(bad)} start at numbers that are not finite")
        self.finished = torch.zeros(len(state.x), dtype=torch.bool, device=state.x.device)
        if self.died:
            self.finished[list(self.died)] = True

    @property
    def done(self) -> bool:
        """Whether no chain needs a further step, or the schedule is at its end."""
        length = self.sampler.steps
        return (length is not None and self.state.step >= length) or bool(self.finished.all())

    def advance(self, generator: torch.Generator) -> Info:
        """One step of all chains that are not finished."""
        old = self.state
        new, info = self.sampler.step(old, generator)
        lost = ~_finite_rows(new) & ~self.finished
        stopped = lost | self.finished
        if bool(stopped.any()):
            new = _put_back(stopped, old, new)
        for chain in torch.nonzero(lost).flatten().tolist():
            self.died[chain] = new.step
        self.finished = stopped if info.finished is None else stopped | info.finished
        self.state = new
        return info

    def run(
        self,
        steps: int,
        generator: torch.Generator,
        after: Callable[[S, Info], None] | None = None,
    ) -> S:
        """Up to ``steps`` steps, fewer where the chains are `done`; the last state.

        Args:
            steps: at the most.
            generator: on the device of the chains.
            after: told of each step.

        Raises:
            UserError: if ``steps`` is below 1.
        """
        if steps < 1:
            raise UserError(f"{steps} steps move no chain: take 1 or more")
        for _ in range(steps):
            if self.done:
                break
            info = self.advance(generator)
            if after is not None:
                after(self.state, info)
        return self.state


def per_chain(value: float | Tensor, x: Tensor) -> float | Tensor:
    """A number, or one for each chain (B,), shaped to multiply ``x`` (B, ...)."""
    if isinstance(value, Tensor) and value.ndim:
        return value.reshape(-1, *[1] * (x.ndim - 1))
    return value


def check_positive(name: str, value: float, zero: bool = False) -> float:
    """``value`` itself.

    Raises:
        UserError: if it is not a finite number above 0 (or 0, if that is legal).
    """
    least = 0.0 if zero else math.ulp(0.0)
    if not least <= value < math.inf:
        raise UserError(
            f"{name} {value} must be a finite number {'of 0 or more' if zero else 'above 0'}"
        )
    return value


def _rows(state: Any) -> dict[str, Tensor]:
    """The fields of a state that have one row per chain."""
    count = len(state.x)
    fields: dict[str, Any] = state._asdict()
    return {n: v for n, v in fields.items() if isinstance(v, Tensor) and v.shape[:1] == (count,)}


def _finite_rows(state: State) -> Tensor:
    """Which chains are finite in every field, (B,) bool."""
    found = [v.reshape(len(v), -1).isfinite().all(1) for v in _rows(state).values()]
    return torch.stack(found).all(0)


def _put_back(rows: Tensor, old: S, new: S) -> S:
    """``new`` with the ``rows`` (B,) of ``old``."""
    before = _rows(old)
    fields = {n: torch.where(per_chain(rows, v), before[n], v) for n, v in _rows(new).items()}  # type: ignore[arg-type]
    replaced: S = new._replace(**fields)  # type: ignore[attr-defined]
    return replaced


def _some(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return shown if len(numbers) <= 8 else f"{shown} and {len(numbers) - 8} more"
