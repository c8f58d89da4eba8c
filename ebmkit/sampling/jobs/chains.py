"""The folder of a job, its records and saved states, and the loop that runs its chains.

While a sampling or restoration job runs, its folder contains ``unfinished/`` with ``settings.json``
(everything that the results depend on) and saved tensors (``state`` holds the running chains), each
with its digest. `JobFolder.finish` removes it. Every file is written atomically.

Each step records the number of chains that moved, and sums over these chains: noise level,
acceptance and root mean square move; batches add up. Log-densities of all chains are recorded every
few steps, for `ebmkit.sampling.diagnostics`. Frames show the first chains. As a schedule may end
early, every second frame is dropped when there are too many, and the stride doubles.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import BaseModel
from torch import Tensor

from ebmkit.errors import Interrupted, UserError
from ebmkit.models.saving import digest
from ebmkit.sampling.base import Chains, Info, Sampler, State
from ebmkit.storage import held, make_folder, write_atomically
from ebmkit.storage.reading import read_json
from ebmkit.storage.tensors import read_tensors
from ebmkit.training.config import check_same

UNFINISHED, SETTINGS, STATE = "unfinished", "settings.json", "state"

SAVE_SECONDS = 30.0
"""Seconds between saved states, in case the process is killed."""

MAX_DRAWS, MAX_FRAMES = 200, 48
"""Approximate number of recorded log-densities per chain; maximum number of frames of the path."""

Hook = Callable[[int, int], None]
"""Called with (steps done, all steps)."""


class JobFolder:
    """Files of a job in the folder ``path``; nothing is written before `begin`.

    ``results`` names the results in messages. ``done`` is the name of the document that a finished
    job leaves; empty: the job shares its folder with other files.
    """

    def __init__(self, path: Path, results: str = "samples", done: str = "sampling.json") -> None:
        self.path, self.home, self.results, self.done = path, path / UNFINISHED, results, done

    def resumes(self, settings: BaseModel | dict[str, Any]) -> bool:
        """Whether the folder holds an interrupted job of the same ``settings``.

        If ``settings`` is a pydantic model, it upgrades saved settings of earlier versions.

        Raises:
            UserError: if the folder holds a job of other settings.
        """
        known = self.home / SETTINGS
        if not known.is_file():
            return False
        try:
            old = read_json(known)
        except UserError:
            old = None
        if not isinstance(old, dict):
            raise UserError(f"{str(known)!r} is damaged: it does not parse; choose another --out")
        what = f"{str(self.path)!r} holds unfinished {self.results} of other settings"
        check_same(old, settings, what, "resume with the former, or choose another --out")
        return True

    def begin(self, settings: BaseModel | dict[str, Any]) -> None:
        """Create the folder, or resume the job that `resumes` finds there.

        Raises:
            UserError: as `resumes`; if the folder cannot be created; or, if ``done`` is not empty,
                if the folder holds finished results or other files.
        """
        path = self.path
        if self.done and (path / self.done).exists():
            raise UserError(f"{str(path)!r} holds finished {self.results}: choose another --out")
        if self.resumes(settings):
            return
        if self.done and path.exists() and (not path.is_dir() or any(self._foreign())):
            raise UserError(
                f"{str(path)!r} holds other files than {self.results} of an interrupted run: "
                "choose another --out"
            )
        make_folder(path)
        make_folder(self.home)
        content = json.dumps(_plain(settings), indent=2).encode()
        write_atomically(self.home / SETTINGS, content)

    def _foreign(self) -> Iterator[Path]:
        """Files that do not belong to a job that was stopped before it began."""
        for entry in self.path.iterdir():
            if entry != self.home or not entry.is_dir():
                yield entry
            else:
                yield from (p for p in entry.iterdir() if not p.name.startswith("."))

    def alone(self, doing: str = "sampling") -> contextlib.AbstractContextManager[None]:
        """Lock the folder; raise ``FolderLocked`` if another process holds the lock."""
        return held(self.home, doing)

    def file(self, name: str) -> Path:
        """Path of the tensors saved under ``name``."""
        return self.home / f"{name}.safetensors"

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write ``tensors`` under ``name``; a `UserError` if the disk is full or not writable."""
        state = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        content = safetensors.torch.save(state, metadata={"sha256": digest(state)})
        write_atomically(self.file(name), content)

    def load(self, name: str) -> dict[str, Tensor] | None:
        """Load the tensors saved under ``name``, on the CPU; None if there are none.

        Raises:
            UserError: if the file is damaged.
        """
        path = self.file(name)
        if not path.is_file():
            return None
        with contextlib.suppress(UserError):
            state, metadata = read_tensors(path)
            if state and metadata.get("sha256") == digest(state):
                return state
        raise UserError(
            f"{str(path)!r} is damaged: remove it, and its batch of chains is drawn anew"
        )

    def finish(self, document: dict[str, Any] | None = None) -> None:
        """Write ``document`` as the file ``done``, and remove the files needed to resume."""
        if document is not None:
            content = json.dumps(document, indent=1, allow_nan=False).encode()
            write_atomically(self.path / self.done, content)
        shutil.rmtree(self.home, ignore_errors=True)


def _plain(settings: BaseModel | dict[str, Any]) -> dict[str, Any]:
    return settings if isinstance(settings, dict) else settings.model_dump(mode="json")


def batch_name(number: int) -> str:
    """Name under which a finished batch is saved."""
    return f"batch-{number:05}"


class Record:
    """Record of a batch of chains of up to ``length`` steps, and frames of the first ``shown``.

    ``summary`` maps a state to log-densities (B,); None: they are not recorded.
    """

    def __init__(
        self, length: int, summary: Callable[[Any], Tensor] | None = None, shown: int = 0
    ) -> None:
        self.every = max(1, length // MAX_DRAWS)
        self.summary, self.shown, self.stride = summary, shown, 1
        self.sums: list[Tensor] = []
        self.draws: list[Tensor] = []
        self.frames: list[Tensor] = []
        self.moments: list[int] = []
        self.level: Tensor | None = None  # (B,), noise level at the last step of each chain

    def note(self, state: State, info: Info, active: Tensor) -> None:
        """Record a step of the ``active`` (B,) chains."""
        nothing = torch.full((), torch.nan, dtype=torch.float64, device=active.device)
        sums = [active.double().sum()]
        for values in (info.sigma, info.accepted, info.move):
            sums.append(nothing if values is None else values.double()[active].sum())
        self.sums.append(torch.stack(sums).cpu())
        if info.sigma is not None:
            last = info.sigma.float().cpu()
            self.level = last if self.level is None else torch.where(active.cpu(), last, self.level)
        if self.summary is not None and state.step % self.every == 0:
            self.draws.append(self.summary(state).detach().double().cpu())
        if state.step % self.stride == 0:
            self.frame(state.x, state.step)

    def frame(self, x: Tensor, step: int, last: bool = False) -> None:
        """Record a frame: the start, a step, or (``last``) the finished samples."""
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
        """Recorded tensors by name: ``sums`` (T, 4), ``draws`` (N, B), ``frames`` (K, S, C, H, W)
        uint8, their steps ``moments`` (K,), ``last_sigma`` (B,), and ``stride``."""
        lists = {"sums": self.sums, "draws": self.draws, "frames": self.frames}
        found = {name: torch.stack(values) for name, values in lists.items() if values}
        if self.moments:
            found["moments"] = torch.tensor(self.moments)
        if self.level is not None:
            found["last_sigma"] = self.level
        return found | {"stride": torch.tensor(self.stride)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restore the record from `tensors`; other input may raise any error."""
        self.stride = int(tensors["stride"])
        if self.stride < 1:
            raise ValueError(self.stride)
        self.sums, self.draws, self.frames = (
            list(tensors.get(name, ())) for name in ("sums", "draws", "frames")
        )
        self.moments = tensors["moments"].tolist() if "moments" in tensors else []
        self.level = tensors.get("last_sigma")


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
    """Run chains from their start, or from a saved state, to their end.

    ``start`` returns starting points of ``shape`` (B, ...); it is not called if chains are resumed.
    ``generator`` maps the number of a step to its generator. At most ``length`` steps are taken;
    each is recorded, and ``progress`` is called with its number. The state of the chains of
    ``batch`` is saved in ``folder`` every ``save_seconds``, and when ``stop``, called after each
    step, returns True.

    Returns:
        The chains, and the seconds spent on them.

    Raises:
        Interrupted: if ``stop`` returned True; its steps are those of this batch.
        UserError: if the state is damaged or cannot be written, or a chain starts at NaN or Inf.
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
    """Saved chains and the seconds spent; an invalid state may raise any error."""
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
    """Return ``state`` in the memory layout that it has after loading from a file.

    Sums of floats depend on it, so resumed chains would differ.
    """
    fields: dict[str, Any] = state._asdict()
    plain = torch.contiguous_format  # clone: one channel counts as contiguous in any layout
    return state._replace(
        **{k: v.clone(memory_format=plain) for k, v in fields.items() if isinstance(v, Tensor)}
    )


def means_of(batches: list[Tensor]) -> dict[str, list[Any]]:
    """Number of ``chains`` that moved at each step, and their means of ``sigma``, ``acceptance``
    and ``move``, None if undefined, from the ``sums`` (T, 4) of each batch."""
    total = torch.zeros(max(map(len, batches), default=0), 4, dtype=torch.float64)
    for sums in batches:
        total[: len(sums)] += sums
    found: dict[str, list[Any]] = {"chains": [int(n) for n in total[:, 0].tolist()]}
    for column, name in enumerate(("sigma", "acceptance", "move"), 1):
        means = (total[:, column] / total[:, 0]).tolist()
        found[name] = [float(f"{m:.6g}") if math.isfinite(m) else None for m in means]
    return found
