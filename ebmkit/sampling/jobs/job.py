r"""A sampling job: batches of chains, from their start to their end, interrupted or not.

Batch b of B chains starts from numbers drawn by a generator that is a function of
(seed, "sample", b, 0), and takes step t with one of (seed, "sample", b, t). So a job that was
interrupted, and is resumed from the state that it saved, ends with the same bits, and so does one
that lost its last steps because it was killed.

In its `JobFolder` the job saves each batch at its end, with its record, as ``batch-00000``; at last
``samples.h5``, the plots and ``sampling.json`` lie there (`ebmkit.sampling.jobs.results`). A chain
that diverges stops (`ebmkit.sampling.Chains`); its image is the last finite one, and it is marked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ebmkit.compile import device_of
from ebmkit.energy import EnergyModel, ScoreModel, classifies
from ebmkit.errors import UserError
from ebmkit.randomness import keyed_generator
from ebmkit.sampling.base import Sampler, State
from ebmkit.sampling.entry import SamplerEntry, find_sampler, noise_levels
from ebmkit.sampling.jobs.chains import SAVE_SECONDS, Hook, Interrupted, Record, run_chains
from ebmkit.sampling.jobs.folder import STATE, JobFolder
from ebmkit.sampling.jobs.settings import BUFFER, SamplingSettings, cautions, parse_labels
from ebmkit.sampling.jobs.sources import Sources
from ebmkit.sampling.target import clean_level

SHOWN = 16
"""Chains whose path is recorded, the first of the job."""


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
        folder: JobFolder,
        sources: Sources | None = None,
        save_seconds: float = SAVE_SECONDS,
    ) -> None:
        self.model, self.settings, self.folder = model, settings, folder
        self.sources, self.save_seconds = sources or Sources(), save_seconds
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
                try:
                    self._run_batch(number, progress, stop)
                except Interrupted as stopped:
                    done = number * self.length + stopped.done
                    raise Interrupted(done, self.total) from None
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
        c, rows, seconds = self._labels(number), self.settings.rows(number), 0.0
        if self.entry is None:
            x, record = self._from_buffer(number), Record(1)
            died = torch.full((len(x),), -1)
        else:
            sampler = self.entry.build(self.model, c, self.config)
            shown = min(SHOWN, self.settings.batch_size) if number == 0 else 0
            record = Record(self.length, self._summary(sampler, c), shown)
            chains, seconds = run_chains(
                sampler,
                lambda: self._start(number, sampler, c),
                (rows.stop - rows.start, *self.settings.shape),
                self.length,
                lambda step: self._generator(number, step),
                record,
                lambda step: progress(number * self.length + step, self.total),
                folder=self.folder,
                batch=number,
                stop=stop,
                save_seconds=self.save_seconds,
            )
            x = self.entry.finish(self.model, sampler, chains.state.x, c)
            died = torch.full((len(x),), -1)
            for chain, step in chains.diverged.items():
                died[chain] = step
            lost = ~x.flatten(1).isfinite().all(1)  # at the very end
            died[lost.cpu() & (died < 0)] = chains.state.step
            lost = lost | (died >= 0).to(lost.device)
            x = torch.where(lost[:, None, None, None], chains.state.x, x)
            record.frame(x, chains.state.step, last=True)
        tensors = {"samples": x, "died": died, "finite": died < 0}
        tensors["seconds"] = torch.tensor(seconds, dtype=torch.float64)
        if c is not None:
            tensors["labels"] = c
        self.folder.save(batch_name(number), tensors | self.energies(x) | record.tensors())
        self.folder.file(STATE).unlink(missing_ok=True)

    def _start(self, number: int, sampler: Sampler[Any], c: Tensor | None) -> Tensor:
        assert self.entry is not None
        generator, rows = self._generator(number, 0), self.settings.rows(number)
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
        shape = (rows.stop - rows.start, *self.settings.shape)
        return self.entry.start(
            self.model, sampler, self.config, shape, generator, c, train, mean
        ).to(self.device)

    def _summary(self, sampler: Sampler[Any], c: Tensor | None) -> Callable[[State], Tensor] | None:
        """The log-density that a chain samples, where it is one at one level."""
        model, level = self.model, noise_levels(sampler)[1]
        if self.entry is None or self.entry.no_law or not isinstance(model, EnergyModel):
            return None

        def summary(state: State) -> Tensor:
            known: Tensor | None = getattr(state, "log_density", None)
            return model.log_density(state.x, level, c) if known is None else known

        return summary

    def _choose_slots(self) -> Tensor:
        """Slots (N,) of the replay buffer; without a step also the labels of its chains."""
        buffer, count, labels = self.sources.buffer, self.settings.count, self.labels
        if buffer is None:
            raise UserError("chains start from the replay buffer: give the run's")
        if self.entry is None:
            asked, size, what = count, len(buffer), "this replay buffer"
            if labels is not None:
                if not buffer.num_classes:
                    raise UserError(
                        "this replay buffer holds chains of no label: leave out --label"
                    )
                asked, what = int(labels.bincount().max()), "a label"
                size //= buffer.num_classes
            if asked > size:
                raise UserError(
                    f"{asked} chains of {what} are asked for and it has {size}: take fewer"
                )
        generator = keyed_generator("cpu", self.settings.seed, "sample", "buffer")
        if labels is not None and buffer.num_classes:
            return buffer.choose(count, generator, labels)
        order = torch.randperm(len(buffer), generator=generator)
        slots = order[torch.arange(count) % len(buffer)]
        if labels is None and buffer.labels is not None and self.entry is None:
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
