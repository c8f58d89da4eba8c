r"""A sampling job: batches of chains, from their start to their end, whatever comes between.

Batch b of B chains starts from numbers drawn by a generator that is a function of
(seed, "sample", b, 0), and takes step t with one of (seed, "sample", b, t). So a job that was
interrupted, and goes on from the state that it saved, ends with the same bits, and so does one that
lost its last steps because it was killed. States are laid out anew after each step as a file
would give them back, since sums of floats depend on the order in memory.

A chain that leaves the finite numbers stops there (`ebmkit.sampling.Chains`); its image is the last
finite one, and it is marked.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ebmkit.compile import device_of
from ebmkit.energy import EnergyModel, ScoreModel, classifies
from ebmkit.errors import UserError
from ebmkit.randomness import keyed_generator
from ebmkit.sampling.base import Chains, Sampler, State
from ebmkit.sampling.jobs.diagnose import CHAINS_AT_ONE_LEVEL
from ebmkit.sampling.jobs.keeping import STATE, SamplingFolder
from ebmkit.sampling.jobs.labels import parse_labels
from ebmkit.sampling.jobs.record import SHOWN, Record, Summary
from ebmkit.sampling.jobs.settings import BUFFER, SamplingSettings, cautions, config_of
from ebmkit.sampling.jobs.sources import Sources, choose_slots
from ebmkit.sampling.levels import first_level
from ebmkit.sampling.presets import SamplerEntry, find_sampler

__all__ = ["Interrupted", "SamplingJob", "density_level"]

SAVE_SECONDS = 30.0
"""Time between states saved for the case that the process is killed."""

Hook = Callable[[int, int], None]


class Interrupted(Exception):
    """The job was stopped after saving; the same job on the same folder goes on.

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
        folder: where batches and states are kept.
        sources: what chains start from, and are compared with.
        save_seconds: time between states saved.

    Attributes:
        entry: of the sampler; None where the buffer is taken as it is.
        length: steps of each chain at most.
        labels: of the chains, (N,) int64, or None.

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
            self.entry, self.config = find_sampler(settings.sampler), config_of(settings)
            sampler = self._sampler(self._labels(0))
            self.length = self.entry.length(sampler, self.config)
            self.cautions = cautions(model, self.entry, sampler, settings)
        self._slots = self._chosen_slots()

    @property
    def batches(self) -> int:
        """How many there are."""
        return -(-self.settings.count // self.settings.batch_size)

    @torch.no_grad()
    def run(self, progress: Hook | None = None, stop: Callable[[], bool] = lambda: False) -> None:
        """Draw what is not drawn yet.

        Args:
            progress: told of (steps done, steps in all) after each step of a batch.
            stop: asked after each step; where it says yes, the state is saved.

        Raises:
            Interrupted: if it did.
            UserError: if a file is damaged or cannot be written, or a chain starts at numbers that
                are not finite.
        """
        for number in range(self.batches):
            if not self.folder.has(batch_name(number)):
                self._batch(number, progress, stop)
            if progress is not None:
                progress((number + 1) * self.length, self.batches * self.length)

    def finished(self, number: int) -> dict[str, Tensor]:
        """Batch ``number`` after `run`: ``samples`` (B, C, H, W), ``finite`` (B,), ``died`` (B,),
        the step or -1, perhaps ``log_density`` (B,), ``log_joint`` (B, C), and the record's."""
        found = self.folder.load(batch_name(number))
        assert found is not None
        return found

    def log_density(self, x: Tensor) -> Tensor | None:
        """log p of images (N, C, H, W), as of the samples; None of a plain denoiser."""
        energies = self._energies(x)
        return energies.get("log_density")

    def _batch(self, number: int, progress: Hook | None, stop: Callable[[], bool]) -> None:
        c = self._labels(number)
        if self.entry is None:
            x = self._from_buffer(number)
            record = Record(1, None, 0)
            self._keep(number, x, x.new_zeros(len(x), dtype=torch.long) - 1, record, 0.0, c)
            return
        sampler = self._sampler(c)
        shown = min(SHOWN, self.settings.batch_size) if number == 0 else 0
        record = Record(self.length, self._summary(sampler, c), shown)
        chains, spent = self._begun(number, sampler, record, c)
        clock = saved = time.perf_counter()
        while not chains.done and chains.state.step < self.length:
            step = chains.state.step + 1
            before, dead = chains.finished.clone(), set(chains.died)
            info = chains.advance(self._generator(number, step))
            chains.state = _as_from_file(chains.state)
            active = ~before
            active[[k for k in chains.died if k not in dead]] = False
            record.note(chains.state, info, active)
            now = time.perf_counter()
            if stop() or now - saved > self.save_seconds:
                self._save(number, chains, record, spent + now - clock)
                saved = now
                if stop():
                    raise Interrupted(self._done(number, step), self.batches * self.length)
            if progress is not None:
                progress(self._done(number, step), self.batches * self.length)
        x = self.entry.finish(self.model, sampler, chains.state.x, c)
        died = torch.full((len(x),), -1)
        for chain, step in chains.died.items():
            died[chain] = step
        lost = ~x.flatten(1).isfinite().all(1)  # at the very end
        died[lost.cpu() & (died < 0)] = chains.state.step
        rows = (lost | (died >= 0).to(lost.device))[:, None, None, None]
        x = torch.where(rows, chains.state.x, x)
        record.end(x, chains.state.step)
        self._keep(number, x, died, record, spent + time.perf_counter() - clock, c)

    def _begun(
        self, number: int, sampler: Sampler[Any], record: Record, c: Tensor | None
    ) -> tuple[Chains[Any], float]:
        """The chains of a batch: at their start, or where they were saved."""
        kept = self.folder.load(STATE)
        if kept is None or int(kept["batch"]) != number:
            x = _as_from_file(sampler.init(self._start(number, sampler, c)))
            record.begin(x.x)
            return Chains(sampler, x), 0.0
        try:
            chains = self._restored(sampler, kept)
            record.restore(kept)
            seconds = float(kept["seconds"])
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError, OverflowError):
            what = f"{str(self.folder.home)!r} holds a state that is not of this job"
            raise UserError(f"{what}: choose another --out") from None
        return chains, seconds

    def _restored(self, sampler: Sampler[Any], kept: dict[str, Tensor]) -> Chains[Any]:
        """The chains of a state that was saved.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError: if it is of another job.
        """
        fields = {k[6:]: v for k, v in kept.items() if k.startswith("state.")}
        count = len(kept["finished"])
        if fields["x"].shape != (count, *self.settings.shape):
            raise ValueError(fields["x"].shape)
        blank = sampler.init(fields["x"].to(self.device))
        values = {
            name: int(value) if isinstance(getattr(blank, name), int) else value.to(self.device)
            for name, value in fields.items()
        }
        died = {int(k): int(s) for k, s in kept["died"].tolist()} if "died" in kept else {}
        chains = Chains(sampler, blank._replace(**values), died)
        chains.finished = kept["finished"].to(self.device)
        return chains

    def _save(self, number: int, chains: Chains[Any], record: Record, seconds: float) -> None:
        fields: dict[str, Any] = chains.state._asdict()
        tensors = {f"state.{name}": torch.as_tensor(value) for name, value in fields.items()}
        if chains.died:
            tensors["died"] = torch.tensor(list(chains.died.items()))
        own = {
            "batch": torch.tensor(number),
            "finished": chains.finished,
            "seconds": torch.tensor(seconds, dtype=torch.float64),
        }
        self.folder.save(STATE, tensors | own | record.tensors())

    def _keep(
        self,
        number: int,
        x: Tensor,
        died: Tensor,
        record: Record,
        seconds: float,
        c: Tensor | None,
    ) -> None:
        tensors = {
            "samples": x,
            "died": died,
            "finite": died < 0,
            "seconds": torch.tensor(seconds, dtype=torch.float64),
        }
        if c is not None:
            tensors["labels"] = c
        self.folder.save(batch_name(number), tensors | self._energies(x) | record.tensors())
        self.folder.forget(STATE)

    def _energies(self, x: Tensor) -> dict[str, Tensor]:
        """log p, and log p with each label where labels were trained, of images on any device."""
        if not isinstance(self.model, EnergyModel):
            return {}
        level, size = density_level(self.model), self.settings.batch_size
        with torch.no_grad():
            parts = [self.model.energies(p.to(self.device), level) for p in torch.split(x, size)]
        found = {"log_density": torch.cat([p.log_density.float().cpu() for p in parts])}
        if classifies(self.model):
            found["log_joint"] = torch.cat([p.log_joint().float().cpu() for p in parts])
        return found

    def _sampler(self, c: Tensor | None) -> Sampler[Any]:
        assert self.entry is not None
        return self.entry.build(self.model, c, self.config)

    def _start(self, number: int, sampler: Sampler[Any], c: Tensor | None) -> Tensor:
        assert self.entry is not None
        generator = self._generator(number, 0)
        if self.settings.start == BUFFER:
            x, level = self._from_buffer(number), first_level(sampler)
            if level is None:
                return x
            return x + level * torch.randn(x.shape, generator=generator, device=self.device)
        train, mean = self.sources.train, 0.5 * torch.ones((), device=self.device)
        if train is not None:
            train = train[0].to(self.device), None if train[1] is None else train[1].to(self.device)
        if self.settings.start == "mean":
            if train is None:
                raise UserError("chains start from the mean image: give images of the data set")
            mean = train[0].mean(0)
        count = min(self.settings.batch_size, self.settings.count - self._rows(number).start)
        shape = (count, *self.settings.shape)
        return self.entry.start(
            self.model, sampler, self.config, shape, generator, c, train, mean
        ).to(self.device)

    def _summary(self, sampler: Sampler[Any], c: Tensor | None) -> Summary | None:
        """The log-density that a chain samples, where it is one at one level."""
        model = self.model
        if self.settings.sampler not in CHAINS_AT_ONE_LEVEL or not isinstance(model, EnergyModel):
            return None

        def summary(state: State) -> Tensor:
            known: Tensor | None = getattr(state, "log_density", None)
            if known is not None:
                return known
            return model.log_density(state.x, getattr(sampler, "sigma", None), c)

        return summary

    def _chosen_slots(self) -> Tensor | None:
        if self.settings.start != BUFFER:
            return None
        buffer, count = self.sources.buffer, self.settings.count
        if buffer is None:
            raise UserError("chains start from the replay buffer: give the run's")
        if self.settings.sampler == BUFFER:
            self._check_room(len(buffer), buffer.num_classes)
        generator = keyed_generator("cpu", self.settings.seed, "sample", "buffer")
        slots = choose_slots(buffer, count, self.labels, generator)
        if self.labels is None and buffer.labels is not None and self.settings.sampler == BUFFER:
            self.labels = buffer.labels[slots]
        return slots

    def _check_room(self, held: int, classes: int) -> None:
        count = self.settings.count
        if self.labels is not None and not classes:
            raise UserError("this replay buffer holds chains of no label: leave out --label")
        if self.labels is not None:
            count, held = int(self.labels.bincount().max()), held // classes
        if count > held:
            what = "a label" if self.labels is not None else "this replay buffer"
            raise UserError(f"{count} chains of {what} are asked for and it has {held}: take fewer")

    def _from_buffer(self, number: int) -> Tensor:
        assert self.sources.buffer is not None
        assert self._slots is not None
        return self.sources.buffer.images[self._slots[self._rows(number)]].to(self.device)

    def _labels(self, number: int) -> Tensor | None:
        return None if self.labels is None else self.labels[self._rows(number)].to(self.device)

    def _rows(self, number: int) -> slice:
        size = self.settings.batch_size
        return slice(number * size, min((number + 1) * size, self.settings.count))

    def _done(self, number: int, step: int) -> int:
        return number * self.length + step

    def _generator(self, number: int, step: int) -> torch.Generator:
        return keyed_generator(self.device, self.settings.seed, "sample", number, step)


def batch_name(number: int) -> str:
    """The name under which a finished batch is kept."""
    return f"batch-{number:05}"


def density_level(model: ScoreModel) -> float | None:
    """The noise level at which log-densities of samples are given: the model's lowest, if any."""
    limits = model.card.sigma_range if model.card else None
    return limits[0] if limits and model.noise_conditional else None


def _as_from_file(state: Any) -> Any:
    """``state`` in the layout that a file would give it, whatever the network left."""
    fields: dict[str, Any] = state._asdict()
    plain = torch.contiguous_format  # clone: one channel passes for contiguous in any layout
    return state._replace(
        **{k: v.clone(memory_format=plain) for k, v in fields.items() if isinstance(v, Tensor)}
    )
