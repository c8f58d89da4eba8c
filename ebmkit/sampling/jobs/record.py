r"""The steps of a batch of chains, and what is recorded of them: sums, log-densities, frames.

Each step leaves the number of chains that moved, and the sums over them of the noise level, of
acceptance and of the root mean square move; batches add up. Log-densities of all chains are
recorded every few steps, for `ebmkit.sampling.diagnostics`. Frames are of the first chains; since a
schedule may end early, every second is dropped when there are too many, and the stride doubles.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ebmkit.sampling.base import Chains, Info, State

MAX_DRAWS = 200
"""Log-densities recorded of a chain, about."""

MAX_FRAMES = 48
"""Frames recorded of the path, at the most."""

Summary = Callable[[State], Tensor]


class Record:
    """Records a batch of chains.

    Args:
        length: steps it may take.
        summary: the log-density (B,) of a state; None: none is recorded.
        shown: number of chains whose path is recorded.
    """

    def __init__(self, length: int, summary: Summary | None = None, shown: int = 0) -> None:
        self.every = max(1, length // MAX_DRAWS)
        self.summary, self.shown = summary, shown
        self.stride = 1
        self.sums: list[Tensor] = []
        self.draws: list[Tensor] = []
        self.frames: list[Tensor] = []
        self.moments: list[int] = []

    def note(self, state: State, info: Info, active: Tensor) -> None:
        """Record a step, of which the ``active`` (B,) chains count."""
        self.sums.append(_sums(info, active))
        if self.summary is not None and state.step % self.every == 0:
            self.draws.append(self.summary(state).detach().double().cpu())
        if state.step % self.stride == 0:
            self.frame(state.x, state.step)

    def frame(self, x: Tensor, step: int, last: bool = False) -> None:
        """Record a frame: the start, a step, or the finished samples as the ``last``."""
        if not self.shown:
            return
        self.frames.append((x[: self.shown].clamp(0, 1) * 255).round().to(torch.uint8).cpu())
        self.moments.append(step)
        if len(self.frames) > MAX_FRAMES and not last:
            self.stride *= 2
            left = [k for k, moment in enumerate(self.moments) if moment % self.stride == 0]
            self.frames = [self.frames[k] for k in left]
            self.moments = [self.moments[k] for k in left]

    def tensors(self) -> dict[str, Tensor]:
        """Everything recorded, by name: ``sums`` (T, 4), ``draws`` (N, B), ``frames``
        (K, S, C, H, W) uint8 and ``moments`` (K,), their steps; and ``stride``."""
        lists = {"sums": self.sums, "draws": self.draws, "frames": self.frames}
        found = {name: torch.stack(values) for name, values in lists.items() if values}
        if self.moments:
            found["moments"] = torch.tensor(self.moments)
        return found | {"stride": torch.tensor(self.stride)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Resume from what `tensors` gave.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError: if it is nothing of that kind.
        """
        self.stride = int(tensors["stride"])
        if self.stride < 1:
            raise ValueError(self.stride)
        self.sums, self.draws, self.frames = (
            list(tensors.get(name, ())) for name in ("sums", "draws", "frames")
        )
        self.moments = tensors["moments"].tolist() if "moments" in tensors else []


def run_chains(
    chains: Chains[Any],
    length: int,
    generator: Callable[[int], torch.Generator],
    record: Record,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """Take ``chains`` to their end, or to step ``length``.

    Args:
        chains: at any step.
        length: steps at the most.
        generator: of a step, a function of its number alone.
        record: of all steps so far.
        after: called with the number of each step that is done.
    """
    while not chains.done and chains.state.step < length:
        active = ~chains.finished
        info = chains.advance(generator(chains.state.step + 1))
        chains.state = as_from_file(chains.state)
        active[list(chains.diverged)] = False
        record.note(chains.state, info, active)
        after(chains.state.step)


def as_from_file(state: Any) -> Any:
    """``state`` in the layout in memory that a file would give it, whatever the network's was.

    Sums of floats depend on it, so that resumed chains would differ.
    """
    fields: dict[str, Any] = state._asdict()
    plain = torch.contiguous_format  # clone: one channel passes for contiguous in any layout
    return state._replace(
        **{k: v.clone(memory_format=plain) for k, v in fields.items() if isinstance(v, Tensor)}
    )


def _sums(info: Info, active: Tensor) -> Tensor:
    """Number of active chains, and sums over them of sigma, acceptance and move, (4,) float64."""
    nothing = torch.full((), torch.nan, dtype=torch.float64, device=active.device)
    found = [active.double().sum()]
    for values in (info.sigma, info.accepted, info.move):
        found.append(nothing if values is None else values.double()[active].sum())
    return torch.stack(found).cpu()


def means_of(batches: list[Tensor]) -> dict[str, list[Any]]:
    """The means of each step over all chains that moved, None where they have no meaning.

    Args:
        batches: the ``sums`` (T, 4) of each, of different lengths.

    Returns:
        The number of ``chains`` at each step, and means of ``sigma``, ``acceptance`` and ``move``.
    """
    length = max((len(sums) for sums in batches), default=0)
    total = torch.zeros(length, 4, dtype=torch.float64)
    for sums in batches:
        total[: len(sums)] += sums
    found: dict[str, list[Any]] = {"chains": [int(n) for n in total[:, 0].tolist()]}
    for column, name in enumerate(("sigma", "acceptance", "move"), 1):
        means = (total[:, column] / total[:, 0]).tolist()
        found[name] = [float(f"{m:.6g}") if math.isfinite(m) else None for m in means]
    return found
