r"""A batch of chains from start to end, interrupted or not, and what is recorded of it.

Each step leaves the number of chains that moved, and the sums over them of the noise level, of
acceptance and of the root mean square move; batches add up. Log-densities of all chains are
recorded every few steps, for `ebmkit.sampling.diagnostics`. Frames are of the first chains; since a
schedule may end early, every second is dropped when there are too many, and the stride doubles.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ebmkit.errors import UserError
from ebmkit.sampling.base import Chains, Info, Sampler, State
from ebmkit.sampling.jobs.folder import STATE, JobFolder

SAVE_SECONDS = 30.0
"""Time between states saved for the case that the process is killed."""

MAX_DRAWS = 200
"""Log-densities recorded of a chain, about."""

MAX_FRAMES = 48
"""Frames recorded of the path, at the most."""

Hook = Callable[[int, int], None]
"""Called with the steps done and the steps in all."""


class Interrupted(Exception):
    """The job was stopped after saving; the same job on the same folder resumes.

    Attributes:
        done: steps that are done.
        total: steps in all.
    """

    def __init__(self, done: int, total: int) -> None:
        super().__init__(f"interrupted after step {done} of {total}")
        self.done, self.total = done, total


class Record:
    """Records a batch of chains.

    Args:
        length: steps it may take.
        summary: state to log-density (B,); None: none is recorded.
        shown: number of chains whose path is recorded.
    """

    def __init__(
        self, length: int, summary: Callable[[Any], Tensor] | None = None, shown: int = 0
    ) -> None:
        self.every = max(1, length // MAX_DRAWS)
        self.summary, self.shown = summary, shown
        self.stride = 1
        self.sums: list[Tensor] = []
        self.draws: list[Tensor] = []
        self.frames: list[Tensor] = []
        self.moments: list[int] = []

    def note(self, state: State, info: Info, active: Tensor) -> None:
        """Record a step, of which the ``active`` (B,) chains count."""
        nothing = torch.full((), torch.nan, dtype=torch.float64, device=active.device)
        sums = [active.double().sum()]
        for values in (info.sigma, info.accepted, info.move):
            sums.append(nothing if values is None else values.double()[active].sum())
        self.sums.append(torch.stack(sums).cpu())
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
    sampler: Sampler[Any],
    start: Callable[[], Tensor],
    shape: tuple[int, ...],
    length: int,
    generator: Callable[[int], torch.Generator],
    record: Record,
    progress: Callable[[int], None] = lambda step: None,
    *,
    folder: JobFolder | None = None,
    batch: int = 0,
    stop: Callable[[], bool] = lambda: False,
    save_seconds: float = SAVE_SECONDS,
) -> tuple[Chains[Any], float]:
    """Take chains from their start, or from where they were saved, to their end.

    Args:
        sampler: steps of whose chains are taken.
        start: gives the starting points, if they are needed.
        shape: of the starting points, (B, ...).
        length: steps at the most.
        generator: of a step, a function of its number alone.
        record: of all steps.
        progress: called with the number of each step that is done.
        folder: where the chains are saved; None: nowhere.
        batch: which chains of the job they are.
        stop: asked after each step; where it is true, the chains are saved.
        save_seconds: time between states saved.

    Returns:
        The chains, and the seconds spent on them.

    Raises:
        Interrupted: if they were; ``done`` and ``total`` are of this batch.
        UserError: if what was saved is damaged or cannot be written, or a chain starts at NaN or
            Inf.
    """
    saved = folder.load(STATE) if folder else None
    if folder and saved and int(saved["batch"]) == batch:
        try:
            chains, seconds = _resumed(sampler, saved, shape, record, generator(0).device)
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError, OverflowError):
            what = f"{str(folder.home)!r} holds a state that is not of this job"
            raise UserError(f"{what}: choose another --out") from None
    else:
        state = as_from_file(sampler.init(start()))
        record.frame(state.x, 0)
        chains, seconds = Chains(sampler, state), 0.0
    clock = last = time.perf_counter()
    while not chains.done and chains.state.step < length:
        active = ~chains.finished
        info = chains.advance(generator(chains.state.step + 1))
        chains.state = as_from_file(chains.state)
        active[list(chains.diverged)] = False
        record.note(chains.state, info, active)
        stopping, now = stop(), time.perf_counter()
        if folder and (stopping or now - last > save_seconds):
            fields: dict[str, Any] = chains.state._asdict()
            tensors = {f"state.{name}": torch.as_tensor(value) for name, value in fields.items()}
            if chains.diverged:
                tensors["died"] = torch.tensor(list(chains.diverged.items()))
            tensors |= {"batch": torch.tensor(batch), "finished": chains.finished}
            tensors["seconds"] = torch.tensor(seconds + now - clock, dtype=torch.float64)
            folder.save(STATE, tensors | record.tensors())
            last = now
        if stopping:
            raise Interrupted(chains.state.step, length)
        progress(chains.state.step)
    return chains, seconds + time.perf_counter() - clock


def _resumed(
    sampler: Sampler[Any],
    saved: dict[str, Tensor],
    shape: tuple[int, ...],
    record: Record,
    device: torch.device,
) -> tuple[Chains[Any], float]:
    """The chains as they were saved, and the seconds spent on them; any error if they were not."""
    fields = {name[6:]: value for name, value in saved.items() if name.startswith("state.")}
    if fields["x"].shape != shape or saved["finished"].shape != shape[:1]:
        raise ValueError(fields["x"].shape)
    blank = sampler.init(fields["x"].to(device))
    values = {
        name: int(value) if isinstance(getattr(blank, name), int) else value.to(device)
        for name, value in fields.items()
    }
    died = {int(k): int(s) for k, s in saved["died"].tolist()} if "died" in saved else {}
    chains = Chains(sampler, blank._replace(**values), died)
    chains.finished = saved["finished"].to(device)
    record.restore(saved)
    return chains, float(saved["seconds"])


def as_from_file(state: Any) -> Any:
    """``state`` in the layout in memory that a file would give it, whatever the network's was.

    Sums of floats depend on it, so that resumed chains would differ.
    """
    fields: dict[str, Any] = state._asdict()
    plain = torch.contiguous_format  # clone: one channel passes for contiguous in any layout
    return state._replace(
        **{k: v.clone(memory_format=plain) for k, v in fields.items() if isinstance(v, Tensor)}
    )


def means_of(batches: list[Tensor]) -> dict[str, list[Any]]:
    """The number of ``chains`` that moved at each step, and their means of ``sigma``,
    ``acceptance`` and ``move``, None where they have no meaning; of ``sums`` (T, 4) by batch."""
    length = max((len(sums) for sums in batches), default=0)
    total = torch.zeros(length, 4, dtype=torch.float64)
    for sums in batches:
        total[: len(sums)] += sums
    found: dict[str, list[Any]] = {"chains": [int(n) for n in total[:, 0].tolist()]}
    for column, name in enumerate(("sigma", "acceptance", "move"), 1):
        means = (total[:, column] / total[:, 0]).tolist()
        found[name] = [float(f"{m:.6g}") if math.isfinite(m) else None for m in means]
    return found
