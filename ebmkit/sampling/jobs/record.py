r"""What is kept of a batch's steps: sums of each step, log-densities, frames of the path.

Each step leaves the number of chains that moved, and the sums over them of the noise level, of
acceptance and of the root mean square move; batches add up. Log-densities of all chains are kept
every few steps, for `ebmkit.sampling.diagnostics`. Frames are kept of the first chains; since a
schedule may end early, every second is dropped when there are too many, and the stride doubles.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ebmkit.sampling.base import Info, State

__all__ = ["DRAWS", "FRAMES", "SHOWN", "Record", "means_of"]

DRAWS = 200
"""Log-densities kept of a chain, about."""

FRAMES = 48
"""Frames kept of the path, at the most."""

SHOWN = 16
"""Chains whose path is kept, the first of the job."""

Summary = Callable[[State], Tensor]


class Record:
    """Follows a batch of chains.

    Args:
        length: steps it may take.
        summary: the log-density (B,) of a state; None: none is kept.
        shown: number of chains whose path is kept.
    """

    def __init__(self, length: int, summary: Summary | None, shown: int) -> None:
        self.every = max(1, length // DRAWS)
        self.summary, self.shown = summary, shown
        self.stride = 1
        self._sums: list[Tensor] = []
        self._draws: list[Tensor] = []
        self._frames: list[Tensor] = []
        self._moments: list[int] = []

    def begin(self, x: Tensor) -> None:
        """The first frame, of where chains start."""
        self._frame(x, 0)

    def note(self, state: State, info: Info, active: Tensor) -> None:
        """A step, of which the ``active`` (B,) chains count."""
        self._sums.append(_sums(info, active))
        if self.summary is not None and state.step % self.every == 0:
            self._draws.append(self.summary(state).detach().double().cpu())
        if state.step % self.stride == 0:
            self._frame(state.x, state.step)

    def end(self, x: Tensor, step: int) -> None:
        """The last frame, of the finished samples."""
        self._frame(x, step, last=True)

    def tensors(self) -> dict[str, Tensor]:
        """Everything kept, by name: ``sums`` (T, 4), ``draws`` (N, B), ``frames`` (K, S, C, H, W)
        uint8 and ``moments`` (K,), their steps; and ``stride``."""
        found = {"stride": torch.tensor(self.stride)}
        if self._sums:
            found["sums"] = torch.stack(self._sums).cpu()
        if self._draws:
            found["draws"] = torch.stack(self._draws)
        if self._frames:
            found["frames"] = torch.stack(self._frames)
            found["moments"] = torch.tensor(self._moments)
        return found

    def restore(self, kept: dict[str, Tensor]) -> None:
        """Go on from what `tensors` gave.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError: if it is nothing of that kind.
        """
        self.stride = int(kept["stride"])
        if self.stride < 1:
            raise ValueError(self.stride)
        self._sums = list(kept["sums"]) if "sums" in kept else []
        self._draws = list(kept["draws"]) if "draws" in kept else []
        self._frames = list(kept["frames"]) if "frames" in kept else []
        self._moments = kept["moments"].tolist() if "moments" in kept else []

    def _frame(self, x: Tensor, step: int, last: bool = False) -> None:
        if not self.shown:
            return
        self._frames.append((x[: self.shown].clamp(0, 1) * 255).round().to(torch.uint8).cpu())
        self._moments.append(step)
        if len(self._frames) > FRAMES and not last:
            self.stride *= 2
            kept = [k for k, moment in enumerate(self._moments) if moment % self.stride == 0]
            self._frames = [self._frames[k] for k in kept]
            self._moments = [self._moments[k] for k in kept]


def _sums(info: Info, active: Tensor) -> Tensor:
    """Number of active chains, and sums over them of sigma, acceptance and move, (4,) float64."""
    nothing = torch.full((), torch.nan, dtype=torch.float64, device=active.device)
    found = [active.double().sum()]
    for values in (info.sigma, info.accepted, info.move):
        found.append(nothing if values is None else values.double()[active].sum())
    return torch.stack(found).cpu()


class Means(NamedTuple):
    """Of each step over all chains that moved: numbers, None where they have no meaning."""

    chains: list[int]
    sigma: list[float | None]
    acceptance: list[float | None]
    move: list[float | None]


def means_of(batches: list[Tensor]) -> Means:
    """The means of each step over the ``sums`` (T, 4) of batches, of different lengths."""
    length = max((len(sums) for sums in batches), default=0)
    total = torch.zeros(length, 4, dtype=torch.float64)
    for sums in batches:
        total[: len(sums)] += sums
    columns: list[list[float | None]] = []
    for column in (1, 2, 3):
        means = total[:, column] / total[:, 0]
        columns.append([float(f"{m:.6g}") if math.isfinite(m) else None for m in means.tolist()])
    return Means([int(n) for n in total[:, 0].tolist()], *columns)
