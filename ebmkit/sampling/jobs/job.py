r"""A sampling job: batches of chains, from their start to their end, interrupted or not.

Batch b of B chains starts from numbers drawn by a generator that is a function of
(seed, "sample", b, 0), and takes step t with one of (seed, "sample", b, t). So a job that was
interrupted, and is resumed from the state that it saved, ends with the same bits, and so does one
that lost its last steps because it was killed.

The folder of a job is, from its first step to its last file::

    DIR/
      unfinished/settings.json             what the samples depend on
      unfinished/batch-00000.safetensors   a batch of chains at its end, with its record
      unfinished/state.safetensors         the batch that is under way
      samples.h5  samples.png  path.png  path.gif  sampling.json

``unfinished`` goes when ``sampling.json`` is there. Every file is written in one move, and those of
tensors carry a digest of themselves. A chain that diverges stops (`ebmkit.sampling.Chains`); its
image is the last finite one, and it is marked.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor

from ebmkit.compile import device_of
from ebmkit.energy import EnergyModel, ScoreModel, classifies
from ebmkit.errors import UserError
from ebmkit.models.saving import digest
from ebmkit.randomness import keyed_generator
from ebmkit.sampling.base import Chains, Sampler, State
from ebmkit.sampling.entry import SamplerEntry, find_sampler, noise_levels
from ebmkit.sampling.jobs.record import Record, Summary, as_from_file, run_chains
from ebmkit.sampling.jobs.settings import (
    BUFFER,
    SETTINGS,
    UNFINISHED,
    SamplingSettings,
    cautions,
    parse_labels,
)
from ebmkit.sampling.jobs.sources import Sources
from ebmkit.sampling.target import clean_level
from ebmkit.storage import held, make_folder, write_atomically
from ebmkit.storage.reading import read_json
from ebmkit.storage.tensors import read_tensors
from ebmkit.training.config import difference

SAVE_SECONDS = 30.0
"""Time between states saved for the case that the process is killed."""

SHOWN = 16
"""Chains whose path is recorded, the first of the job."""

STATE, DONE = "state", "sampling.json"

Hook = Callable[[int, int], None]


class SamplingFolder:
    """The files of one sampling job; nothing is touched before `begin`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.home = path / UNFINISHED

    def begin(self, settings: SamplingSettings) -> None:
        """Make the folder, or resume the one that an interrupted job with ``settings`` left.

        Raises:
            UserError: if samples are finished there, something else is, or the settings were
                others; or it cannot be made.
        """
        path, known = self.path, self.home / SETTINGS
        if (path / DONE).exists():
            raise UserError(f"{str(path)!r} holds finished samples: choose another --out")
        if known.is_file():
            self._check_same(settings)
            return
        if path.exists() and (not path.is_dir() or any(_foreign(path))):
            raise UserError(
                f"{str(path)!r} holds something else than samples of an interrupted run: choose "
                "another --out"
            )
        make_folder(self.home)
        write_atomically(known, json.dumps(settings.model_dump(mode="json"), indent=2).encode())

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Within, no other process works in the folder.

        Raises:
            Busy: if one does.
        """
        with held(self.home, "sampling"):
            yield

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write ``tensors`` under ``name``.

        Raises:
            UserError: if the disk is full or not writable.
        """
        state = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        content = safetensors.torch.save(state, metadata={"sha256": digest(state)})
        write_atomically(self.file(name), content)

    def load(self, name: str) -> dict[str, Tensor] | None:
        """What was saved under ``name``, on the CPU; None if nothing was.

        Raises:
            UserError: if the file is damaged.
        """
        path = self.file(name)
        if not path.is_file():
            return None
        try:
            state, metadata = read_tensors(path)
        except UserError:
            state, metadata = {}, {}
        if not state or metadata.get("sha256") != digest(state):
            raise UserError(
                f"{str(path)!r} is damaged: remove it, and its batch of chains is drawn anew"
            )
        return state

    def finish(self, document: dict[str, Any]) -> None:
        """Write ``sampling.json``, and remove what was only needed to resume."""
        content = json.dumps(document, indent=1, allow_nan=False).encode()
        write_atomically(self.path / DONE, content)
        shutil.rmtree(self.home, ignore_errors=True)

    def file(self, name: str) -> Path:
        """Where tensors are saved under ``name``."""
        return self.home / f"{name}.safetensors"

    def _check_same(self, settings: SamplingSettings) -> None:
        try:
            old = read_json(self.home / SETTINGS)
        except UserError:
            old = None
        if not isinstance(old, dict):
            raise UserError(
                f"{str(self.home / SETTINGS)!r} is damaged: it does not parse; choose another --out"
            )
        with contextlib.suppress(ValidationError):  # later fields have defaults, names are upgraded
            old = SamplingSettings.model_validate(old).model_dump(mode="json")
        found = difference(old, settings.model_dump(mode="json"))
        if found is not None:
            key, before, now = found
            raise UserError(
                f"{str(self.path)!r} holds unfinished samples of other settings: {key} was "
                f"{before!r} and is now {now!r}; resume with the former, or choose another --out"
            )


def _foreign(path: Path) -> Iterator[Path]:
    """What lies in ``path`` and is not of a job that was stopped before it began."""
    for entry in path.iterdir():
        if entry.name != UNFINISHED or not entry.is_dir():
            yield entry
        else:
            yield from (p for p in entry.iterdir() if not p.name.startswith("."))


class Interrupted(Exception):
    """The job was stopped after saving; the same job on the same folder resumes.

    Attributes:
        done: steps of batches that are done.
        total: steps of batches in all.
    """

    def __init__(self, done: int, total: int) -> None:
        super().__init__(f"interrupted after step {done} of {total}")
        self.done, self.total = done, total


class SamplingJob:
    """Draws the samples that ``settings`` describe.

    Args:
        model: frozen, on its device.
        settings: as `make_settings` gave them.
        folder: where batches and states are saved.
        sources: what chains start from, and are compared with.
        save_seconds: time between states saved.

    Attributes:
        entry: of the sampler; None where the buffer is taken as it is.
        length: steps of each chain at most.
        labels: of the chains, (N,) int64, or None.
        cautions: what to know of the samples beforehand, in sentences.

    Raises:
        UserError: if settings and model do not fit.
    """

    def __init__(
        self,
        model: ScoreModel,
        settings: SamplingSettings,
        folder: SamplingFolder,
        sources: Sources | None = None,
        save_seconds: float = SAVE_SECONDS,
    ) -> None:
        self.model, self.settings, self.folder = model, settings, folder
        self.sources = sources or Sources()
        self.save_seconds = save_seconds
        self.device = device_of(model)
        self.labels = parse_labels(model, settings.label, settings.count)
        self.entry: SamplerEntry[Any] | None = None
        self.length, self.cautions = 1, list[str]()
        if settings.sampler != BUFFER:
            self.entry, self.config = find_sampler(settings.sampler), settings.config
            sampler = self.entry.build(model, self._labels(0), self.config)
            self.length = self.entry.length(sampler, self.config)
            self.cautions = cautions(model, self.entry, sampler, settings)
        self._slots = self._choose_slots() if settings.start == BUFFER else None

    @property
    def total(self) -> int:
        """Steps of all batches, at the most."""
        return self.settings.batches * self.length

    @torch.no_grad()
    def run(self, progress: Hook | None = None, stop: Callable[[], bool] = lambda: False) -> None:
        """Draw what is not drawn yet.

        Args:
            progress: called with (steps done, steps in all) after each step of a batch.
            stop: called after each step; where it is true, the state is saved.

        Raises:
            Interrupted: if it was.
            UserError: if a file is damaged or cannot be written, or a chain starts at NaN or Inf.
        """
        progress = progress or (lambda done, total: None)
        for number in range(self.settings.batches):
            if not self.folder.file(batch_name(number)).is_file():
                self._run_batch(number, progress, stop)
            progress((number + 1) * self.length, self.total)

    def finished(self, number: int) -> dict[str, Tensor]:
        """Batch ``number`` after `run`: ``samples`` (B, C, H, W), ``finite`` (B,), ``died`` (B,),
        the step at which a chain diverged or -1, perhaps ``log_density`` (B,), ``log_joint``
        (B, C), and the record's."""
        found = self.folder.load(batch_name(number))
        assert found is not None
        return found

    def energies(self, x: Tensor) -> dict[str, Tensor]:
        """Of images on any device ``log_density`` (N,), and ``log_joint`` (N, C) where labels were
        trained; empty of a plain denoiser."""
        if not isinstance(self.model, EnergyModel):
            return {}
        level, size = clean_level(self.model), self.settings.batch_size
        with torch.no_grad():
            parts = [self.model.energies(p.to(self.device), level) for p in torch.split(x, size)]
        found = {"log_density": torch.cat([p.log_density.float().cpu() for p in parts])}
        if classifies(self.model):
            found["log_joint"] = torch.cat([p.log_joint().float().cpu() for p in parts])
        return found

    def _run_batch(self, number: int, progress: Hook, stop: Callable[[], bool]) -> None:
        c = self._labels(number)
        if self.entry is None:
            x = self._from_buffer(number)
            self._finish(number, x, torch.full((len(x),), -1), Record(1), 0.0, c)
            return
        sampler = self.entry.build(self.model, c, self.config)
        shown = min(SHOWN, self.settings.batch_size) if number == 0 else 0
        record = Record(self.length, self._summary(sampler, c), shown)
        chains, seconds = self._begin(number, sampler, record, c)
        clock = saved = time.perf_counter()

        def after(step: int) -> None:
            nonlocal saved
            now, done = time.perf_counter(), number * self.length + step
            if stop() or now - saved > self.save_seconds:
                self._save(number, chains, record, seconds + now - clock)
                saved = now
                if stop():
                    raise Interrupted(done, self.total)
            progress(done, self.total)

        run_chains(chains, self.length, lambda t: self._generator(number, t), record, after)
        x = self.entry.finish(self.model, sampler, chains.state.x, c)
        died = torch.full((len(x),), -1)
        for chain, step in chains.diverged.items():
            died[chain] = step
        lost = ~x.flatten(1).isfinite().all(1)  # at the very end
        died[lost.cpu() & (died < 0)] = chains.state.step
        rows = (lost | (died >= 0).to(lost.device))[:, None, None, None]
        x = torch.where(rows, chains.state.x, x)
        record.frame(x, chains.state.step, last=True)
        self._finish(number, x, died, record, seconds + time.perf_counter() - clock, c)

    def _begin(
        self, number: int, sampler: Sampler[Any], record: Record, c: Tensor | None
    ) -> tuple[Chains[Any], float]:
        """The chains of a batch and the seconds spent: at the start, or as they were saved."""
        saved = self.folder.load(STATE)
        if saved is None or int(saved["batch"]) != number:
            state = as_from_file(sampler.init(self._start(number, sampler, c)))
            record.frame(state.x, 0)
            return Chains(sampler, state), 0.0
        try:
            fields = {k[6:]: v for k, v in saved.items() if k.startswith("state.")}
            if fields["x"].shape != (len(saved["finished"]), *self.settings.shape):
                raise ValueError(fields["x"].shape)
            blank = sampler.init(fields["x"].to(self.device))
            values = {
                name: int(value) if isinstance(getattr(blank, name), int) else value.to(self.device)
                for name, value in fields.items()
            }
            died = {int(k): int(s) for k, s in saved["died"].tolist()} if "died" in saved else {}
            chains = Chains(sampler, blank._replace(**values), died)
            chains.finished = saved["finished"].to(self.device)
            record.restore(saved)
            return chains, float(saved["seconds"])
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError, OverflowError):
            what = f"{str(self.folder.home)!r} holds a state that is not of this job"
            raise UserError(f"{what}: choose another --out") from None

    def _save(self, number: int, chains: Chains[Any], record: Record, seconds: float) -> None:
        fields: dict[str, Any] = chains.state._asdict()
        tensors = {f"state.{name}": torch.as_tensor(value) for name, value in fields.items()}
        if chains.diverged:
            tensors["died"] = torch.tensor(list(chains.diverged.items()))
        tensors["batch"], tensors["finished"] = torch.tensor(number), chains.finished
        tensors["seconds"] = torch.tensor(seconds, dtype=torch.float64)
        self.folder.save(STATE, tensors | record.tensors())

    def _finish(
        self,
        number: int,
        x: Tensor,
        died: Tensor,
        record: Record,
        seconds: float,
        c: Tensor | None,
    ) -> None:
        tensors = {"samples": x, "died": died, "finite": died < 0}
        tensors["seconds"] = torch.tensor(seconds, dtype=torch.float64)
        if c is not None:
            tensors["labels"] = c
        self.folder.save(batch_name(number), tensors | self.energies(x) | record.tensors())
        self.folder.file(STATE).unlink(missing_ok=True)

    def _start(self, number: int, sampler: Sampler[Any], c: Tensor | None) -> Tensor:
        assert self.entry is not None
        generator = self._generator(number, 0)
        if self.settings.start == BUFFER:
            x, level = self._from_buffer(number), noise_levels(sampler)[0]
            if level is None:
                return x
            return x + level * torch.randn(x.shape, generator=generator, device=self.device)
        train, mean = self.sources.train, torch.full((), 0.5, device=self.device)
        if train is not None:
            train = train[0].to(self.device), None if train[1] is None else train[1].to(self.device)
        if self.settings.start == "mean":
            if train is None:
                raise UserError("chains start from the mean image: give images of the data set")
            mean = train[0].mean(0)
        rows = self.settings.rows(number)
        shape = (rows.stop - rows.start, *self.settings.shape)
        return self.entry.start(
            self.model, sampler, self.config, shape, generator, c, train, mean
        ).to(self.device)

    def _summary(self, sampler: Sampler[Any], c: Tensor | None) -> Summary | None:
        """The log-density that a chain samples, where it is one at one level."""
        model = self.model
        if self.entry is None or self.entry.no_law or not isinstance(model, EnergyModel):
            return None

        def summary(state: State) -> Tensor:
            known: Tensor | None = getattr(state, "log_density", None)
            if known is not None:
                return known
            return model.log_density(state.x, noise_levels(sampler)[1], c)

        return summary

    def _choose_slots(self) -> Tensor:
        """Slots (N,) of the replay buffer; without a step also the labels of its chains."""
        buffer, count = self.sources.buffer, self.settings.count
        if buffer is None:
            raise UserError("chains start from the replay buffer: give the run's")
        if self.entry is None:
            asked, size = count, len(buffer)
            if self.labels is not None:
                if not buffer.num_classes:
                    raise UserError(
                        "this replay buffer holds chains of no label: leave out --label"
                    )
                asked, size = int(self.labels.bincount().max()), size // buffer.num_classes
            if asked > size:
                what = "a label" if self.labels is not None else "this replay buffer"
                raise UserError(
                    f"{asked} chains of {what} are asked for and it has {size}: take fewer"
                )
        generator = keyed_generator("cpu", self.settings.seed, "sample", "buffer")
        if self.labels is not None and buffer.num_classes:
            return buffer.choose(count, generator, self.labels)
        order = torch.randperm(len(buffer), generator=generator)
        slots = order[torch.arange(count) % len(buffer)]
        if self.labels is None and buffer.labels is not None and self.entry is None:
            self.labels = buffer.labels[slots]
        return slots

    def _from_buffer(self, number: int) -> Tensor:
        assert self.sources.buffer is not None
        assert self._slots is not None
        images = self.sources.buffer.images[self._slots[self.settings.rows(number)]]
        return images.to(self.device)

    def _labels(self, number: int) -> Tensor | None:
        if self.labels is None:
            return None
        return self.labels[self.settings.rows(number)].to(self.device)

    def _generator(self, number: int, step: int) -> torch.Generator:
        return keyed_generator(self.device, self.settings.seed, "sample", number, step)


def batch_name(number: int) -> str:
    """The name under which a finished batch is saved."""
    return f"batch-{number:05}"
