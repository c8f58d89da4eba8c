"""Sampling job: batches of chains from start to end, and the output files.

The generator of the starting points of batch b is a function of (seed, "sample", b, 0), that of its
step t of (seed, "sample", b, t). So a job that is interrupted or killed, and then resumed from its
saved state, gives bit-identical samples.

The job saves each finished batch with its record in its `JobFolder`, as ``batch-00000``; at the end
it writes ``samples.h5``, the plots and ``sampling.json``. A diverged chain stops
(`ebmkit.sampling.Chains`) and is marked; its image is the last finite one. ``samples.h5`` is also a
data set of kind ``hdf5`` (`ebmkit.data.hdf5`)::

    images       (N, H, W, C) uint8, clipped and rounded
    samples      (N, C, H, W) float32, unclipped
    finite       (N,) bool, false for diverged chains
    labels       (N,) int64, for samples with labels
    class_names  names of the labels
    log_density  (N,) float32, nats, up to the constant of the model
    log_joint    (N, C) float32, for models with labels
    log_weight   (N,) float64, importance weights, for samplers that have them

with attributes ``source`` (``fresh``, or ``buffer`` if chains continue those of the replay buffer),
``sampler``, ``settings`` (JSON), ``seed``, ``run``. There is no attribute ``filter``, because
samples are not filtered.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ebmkit.compile import device_of
from ebmkit.compute import environment
from ebmkit.energy import DensityModel, EnergyModel, ScoreModel, classifies
from ebmkit.errors import Interrupted, UserError
from ebmkit.guidance.model import GuidedDensityModel
from ebmkit.noise import format_sigma
from ebmkit.plots import DPI, GRAY, new_figure, save_figure
from ebmkit.randomness import keyed_generator
from ebmkit.sampling.base import Sampler, State, clean_level
from ebmkit.sampling.diagnostics import (
    FAR,
    arrival,
    chain_diagnostics,
    describe_arrival,
    energy_diagnostics,
    estimates_level,
    importance_diagnostics,
    importance_warnings,
    is_out_of_range,
    level_reached,
    noise_level,
)
from ebmkit.sampling.entry import SamplerEntry, find_sampler, noise_levels
from ebmkit.sampling.jobs.chains import (
    MAX_DRAWS,
    SAVE_SECONDS,
    STATE,
    Hook,
    JobFolder,
    Record,
    batch_name,
    means_of,
    run_chains,
)
from ebmkit.sampling.jobs.settings import (
    BUFFER,
    SamplingSettings,
    cautions,
    class_names_of,
    parse_labels,
)
from ebmkit.sampling.jobs.sources import Sources
from ebmkit.storage import write_atomically
from ebmkit.storage.atomic import replacing
from ebmkit.terminal import shown_name

SHOWN = 16
"""Number of chains whose path is recorded, the first of the job."""

ROWS, COLUMNS, MOMENTS, CHAINS = 20, 10, 10, 6
"""Maximum numbers of classes and samples per class in the grid, of steps and chains in the path."""


class SamplingJob:
    """Draws samples with the ``settings`` of `make_settings`.

    ``model`` is frozen and on its device. Finished batches, and states every ``save_seconds``, are
    saved in ``folder``; ``sources`` hold the images to start from and to compare with.

    Attributes:
        entry: entry of the sampler; None if the buffer is exported without a step.
        length: maximum number of steps of each chain; ``total``: of all batches.
        labels: labels of the chains, (N,) int64, or None.
        first_level: noise level at which chains start; None: a single level, or no step.
        last_level: noise level of the last images; None: no level.
        cautions: warnings that are known before sampling.
        assumption: what the starting points assume, a sentence; empty: nothing to state.

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
        self.first_level: float | None = None
        self.last_level: float | None = None
        self.assumption = ""
        if settings.sampler != BUFFER:
            self.entry, self.config = find_sampler(settings.sampler), settings.config
            sampler = self.entry.build(model, self._labels(0), self.config)
            self.length = self.entry.length(sampler, self.config)
            self.first_level, self.last_level = noise_levels(sampler)
            self.cautions = cautions(model, self.entry, sampler, settings)
            if settings.start == "class_gaussian" and self.first_level is not None:
                of = "of all images" if self.labels is None else "of the label's images"
                self.assumption = (
                    f"chains start at {format_sigma(self.first_level)}, where noisy images are "
                    f"taken to be Gaussian: the mean and covariance {of}, plus the noise; the "
                    "model samples below this level"
                )
        self.total = settings.batches * self.length
        self._slots = self._choose_slots() if settings.start == BUFFER else None

    @torch.no_grad()
    def run(
        self, progress: Hook = lambda done, total: None, stop: Callable[[], bool] = lambda: False
    ) -> None:
        """Draw the missing batches; if ``stop``, called after each step, is true, save and end.

        Raises:
            Interrupted: if ``stop`` returned True.
            UserError: if a file is damaged or cannot be written, or a chain starts at NaN or Inf.
        """
        for number in range(self.settings.batches):
            if not self.folder.file(batch_name(number)).is_file():
                try:
                    self._run_batch(number, progress, stop)
                except Interrupted as stopped:
                    done = number * self.length + stopped.step
                    raise Interrupted(done, self.total) from None
            progress((number + 1) * self.length, self.total)

    @torch.no_grad()
    def seconds_per_step(self, steps: int) -> float:
        """Seconds of a step of one chain: the median over ``steps`` of the first batch, without the
        first step, which is slower. Nothing is saved, and the samples do not depend on it.

        Raises:
            UserError: as `run`.
        """
        assert self.entry is not None
        c, shape, times = self._labels(0), self._shape(0), list[float]()
        sampler = self.entry.build(self.model, c, self.config)
        run_chains(
            sampler,
            lambda: self._start(0, sampler, c),
            shape,
            min(steps, self.length),
            lambda step: self._generator(0, step),
            Record(self.length, self._summary(sampler, c)),
            lambda step: times.append(time.perf_counter()),
        )
        return median([b - a for a, b in pairwise(times)] or [0.0]) / shape[0]

    def finished(self, number: int) -> dict[str, Tensor]:
        """Load the finished batch ``number``.

        It holds ``samples`` (B, C, H, W), ``finite`` (B,), ``died`` (B,) (the step at which a chain
        diverged, or -1), `energies`, and the tensors of its `Record`."""
        found = self.folder.load(batch_name(number))
        assert found is not None
        return found

    def energies(self, x: Tensor) -> dict[str, Tensor]:
        """``log_density`` (N,) of images on any device, and ``log_joint`` (N, C) if labels were
        trained, without guidance; empty for a plain denoiser."""
        model, level, size = self.model, clean_level(self.model), self.settings.batch_size
        if isinstance(model, GuidedDensityModel):
            energies, labelled = model.unguided_energies, True
        elif isinstance(model, EnergyModel):
            energies, labelled = model.energies, classifies(model)
        else:
            return {}
        with torch.no_grad():
            parts = [energies(p.to(self.device), level) for p in torch.split(x, size)]
        found = {"log_density": torch.cat([p.log_density.float().cpu() for p in parts])}
        if labelled:
            found["log_joint"] = torch.cat([p.log_joint().float().cpu() for p in parts])
        return found

    def _run_batch(self, number: int, progress: Hook, stop: Callable[[], bool]) -> None:
        c, shape, seconds = self._labels(number), self._shape(number), 0.0
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
                shape,
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
            lost = ~x.flatten(1).isfinite().all(1)  # diverged in `finish`
            died[lost.cpu() & (died < 0)] = chains.state.step
            lost = lost | (died >= 0).to(lost.device)
            x = torch.where(lost[:, None, None, None], chains.state.x, x)
            record.frame(x, chains.state.step, last=True)
        tensors = {"samples": x, "died": died, "finite": died < 0}
        tensors["seconds"] = torch.tensor(seconds, dtype=torch.float64)
        if c is not None:
            tensors["labels"] = c
        if self.entry is not None and self.entry.weighted:
            tensors["log_weight"] = chains.state.log_weight
        if estimates_level(self.model):
            tensors["level"] = level_reached(self.model, x, record.level)
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
        shape, config = self._shape(number), self.config
        return self.entry.start(self.model, sampler, config, shape, generator, c, train, mean)

    def _summary(self, sampler: Sampler[Any], c: Tensor | None) -> Callable[[State], Tensor] | None:
        """Function that returns the log-density of a state; None if chains sample no density."""
        model, level = self.model, noise_levels(sampler)[1]
        if (
            self.entry is None
            or self.entry.no_stationary_distribution
            or not isinstance(model, DensityModel)
        ):
            return None

        def summary(state: State) -> Tensor:
            known: Tensor | None = getattr(state, "log_density", None)
            return model.log_density(state.x, level, c) if known is None else known

        return summary

    def _choose_slots(self) -> Tensor:
        """Choose slots (N,) of the replay buffer; without a step, also set their labels."""
        buffer, count, labels = self.sources.buffer, self.settings.count, self.labels
        if buffer is None:
            raise UserError("chains start from the replay buffer: give that of the run")
        if self.entry is None:
            requested, size, what = count, len(buffer), "this replay buffer"
            if labels is not None:
                if not buffer.num_classes:
                    message = "this replay buffer has no labels: leave out --label"
                    raise UserError(message)
                requested, what = int(labels.bincount().max()), "a label"
                size //= buffer.num_classes
            if requested > size:
                raise UserError(
                    f"{requested} chains of {what} are requested, and it has {size}: take fewer"
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
        buffer, slots = self.sources.buffer, self._slots
        assert buffer is not None
        assert slots is not None
        return buffer.images[slots[self.settings.rows(number)]].to(self.device)

    def _shape(self, number: int) -> tuple[int, ...]:
        rows = self.settings.rows(number)
        return (rows.stop - rows.start, *self.settings.shape)

    def _labels(self, number: int) -> Tensor | None:
        labels = self.labels
        return None if labels is None else labels[self.settings.rows(number)].to(self.device)

    def _generator(self, number: int, step: int) -> torch.Generator:
        return keyed_generator(self.device, self.settings.seed, "sample", number, step)


def write_results(job: SamplingJob, run: str) -> dict[str, Any]:
    """Write all files of a finished ``job``, last ``sampling.json``, and return its content.

    ``run`` is the name of the run. A `UserError` is raised if a file cannot be written.
    """
    settings, held_out, entry = job.settings, job.sources.held_out, job.entry
    batches, first = _write_hdf5(job, run, job.folder.path / "samples.h5")

    def joined(name: str) -> Tensor | None:
        return torch.cat([b[name] for b in batches]) if name in batches[0] else None

    finite, died, far = (torch.cat([b[n] for b in batches]) for n in ("finite", "died", "far"))
    traces = means_of([batch["sums"] for batch in batches if "sums" in batch])
    diverged = [(k, int(died[k])) for k in torch.nonzero(died >= 0).flatten().tolist()]
    shares = zip(traces["acceptance"], traces["chains"], strict=True)
    accepted = [(share * chains, chains) for share, chains in shares if share is not None]
    acceptance = sum(a for a, _ in accepted) / sum(n for _, n in accepted) if accepted else None
    draws, every = [batch.get("draws") for batch in batches], max(1, job.length // MAX_DRAWS)
    real = None if held_out is None else job.energies(held_out).get("log_density")
    level, noise = joined("level"), None
    if level is not None:
        own = None if held_out is None else noise_level(job.model, held_out, settings.batch_size)
        noise = arrival(job.model, level[finite], own)
    weights, cautions = joined("log_weight"), list(job.cautions)
    weighted = None
    if weights is not None:
        names = class_names_of(job.model)
        weighted = importance_diagnostics(weights, finite, joined("labels"), names, job.last_level)
        cautions += importance_warnings(weighted)
    document: dict[str, Any] = {
        "run": run,
        "source": "buffer" if settings.start == BUFFER else "fresh",
        "settings": settings.model_dump(mode="json"),
        "model": None if job.model.card is None else job.model.card.model_dump(mode="json"),
        "samples": settings.count,
        "steps": len(traces["chains"]),
        "lost": [{"chain": chain, "step": step} for chain, step in diverged],
        "warnings": [*cautions, *_warnings(int(far.sum()), diverged, len(died), noise)],
        "diagnostics": {
            "start": {"meaning": job.assumption} if job.assumption else None,
            "acceptance": acceptance,
            "chains": chain_diagnostics(entry, draws, finite, every),
            "energies": energy_diagnostics(
                joined("log_density"), finite, real, job.sources.note, clean_level(job.model)
            ),
            "noise": noise,
            "importance": weighted,
        },
        "seconds": round(sum(float(batch["seconds"]) for batch in batches), 3),
        "traces": traces,
        "environment": environment(),
    }
    document["files"] = ["samples.h5", *_plot(job, first, joined("labels"), finite, traces)]
    job.folder.finish(document)
    return document


def _write_hdf5(job: SamplingJob, run: str, path: Path) -> tuple[list[dict[str, Tensor]], Tensor]:
    """Write ``samples.h5`` batch by batch; return the other tensors of each batch, with a mask
    ``far`` (B,) of `is_out_of_range`, and the first samples."""
    import h5py

    settings = job.settings
    total, (channels, height, width) = settings.count, settings.shape
    batches: list[dict[str, Tensor]] = []
    first: list[Tensor] = []
    with replacing(path) as temporary, h5py.File(temporary, "w") as file:
        images = file.create_dataset("images", (total, height, width, channels), "uint8")
        samples = file.create_dataset("samples", (total, channels, height, width), "float32")
        for number in range(settings.batches):
            batch, rows = job.finished(number), settings.rows(number)
            x = batch.pop("samples").float()
            samples[rows] = x.numpy()
            levels = (x.clamp(0, 1) * 255).round().to(torch.uint8)
            images[rows] = rearrange(levels, "b c h w -> b h w c").numpy()
            if sum(map(len, first)) < ROWS * COLUMNS:
                first.append(x)
            batch.pop("frames", None)
            batches.append(batch | {"far": is_out_of_range(x)})
        for key in ("finite", "labels", "log_density", "log_joint", "log_weight"):
            if key in batches[0]:
                file[key] = torch.cat([batch[key] for batch in batches]).numpy()
        if "labels" in batches[0]:
            kind = h5py.string_dtype()
            file.create_dataset("class_names", data=class_names_of(job.model), dtype=kind)
        file.attrs["source"] = "buffer" if settings.start == BUFFER else "fresh"
        file.attrs["sampler"], file.attrs["settings"] = settings.sampler, settings.model_dump_json()
        file.attrs["seed"], file.attrs["run"] = settings.seed, run
    return batches, torch.cat(first)


def _warnings(
    far: int, diverged: list[tuple[int, int]], total: int, noise: dict[str, Any] | None
) -> list[str]:
    found = []
    if noise is not None and 2 * noise["arrived"] < noise["samples"]:
        found.append(f"these samples are not images: {describe_arrival(noise)}")
    if far:
        found.append(
            f"{far} samples have pixels below {0.5 - FAR:g} or above {0.5 + FAR:g}, far outside "
            "[0, 1], as happens if a model was trained too little or for other noise, or steps are "
            "too long"
        )
    if diverged:
        steps = ", ".join(f"{chain} at step {step}" for chain, step in diverged[:8])
        more = f" and {len(diverged) - 8} more" if len(diverged) > 8 else ""
        rest = "none is left" if len(diverged) == total else "the others are not affected"
        found.append(
            f"{len(diverged)} of {total} chains diverged to NaN or Inf (chain {steps}{more}); "
            f"{rest}, and `finite` in samples.h5 marks them: smaller steps may help"
        )
    return found


# --- plots ---------------------------------------------------------------------------------------


def _plot(
    job: SamplingJob,
    images: Tensor,
    labels: Tensor | None,
    finite: Tensor,
    traces: dict[str, list[Any]],
) -> list[str]:
    """Plot the first samples, and the path of the first chains if recorded; return file names."""
    folder, settings, how = job.folder.path, job.settings, job.settings.guidance
    steps, batch = len(traces["chains"]), job.finished(0)
    steps_text = f", {steps} steps from {settings.start}" if steps else ""
    guided = "" if how is None else f", guided by {how.guidance} at {how.scale:g}"
    title = f"{settings.sampler}{steps_text}{guided}, seed {settings.seed}"
    _plot_samples(images, labels, class_names_of(job.model), finite, folder / "samples.png", title)
    if "frames" not in batch:
        return ["samples.png"]
    frames, moments = batch["frames"].float() / 255, batch["moments"].tolist()
    _plot_path(frames, moments, traces["sigma"], folder / "path.png", title)
    _animate_path(frames, folder / "path.gif")
    return ["samples.png", "path.png", "path.gif"]


def _plot_samples(
    images: Tensor,
    labels: Tensor | None,
    class_names: Sequence[str],
    finite: Tensor,
    path: Path,
    title: str,
) -> None:
    """Plot the first samples ``images`` (M, C, H, W) in a grid, with a row for each class.

    ``labels`` and ``finite`` (N,) are for all samples; diverged samples are framed.
    """
    own = [] if labels is None else labels[: len(images)].tolist()
    classes = sorted(set(own))[:ROWS]
    names = [shown_name(class_names[c]) for c in classes]
    if len(classes) > 1:
        rows = [[i for i, label in enumerate(own) if label == c][:COLUMNS] for c in classes]
    else:
        count = min(len(images), ROWS * COLUMNS)
        wide = min(2 * COLUMNS, math.ceil(math.sqrt(count)))
        rows = [list(range(at, min(at + wide, count))) for at in range(0, count, wide)]
        title, names = title + "".join(f", class {name}" for name in names), []
    framed = {(r, k) for r, row in enumerate(rows) for k, i in enumerate(row) if not finite[i]}
    shown, total = sum(map(len, rows)), len(finite)
    note = title if shown == total else f"{title}: {shown} of {total:,}"
    _save_rows([[images[i] for i in row] for row in rows], path, note, names, framed=framed)


def _plot_path(
    frames: Tensor, moments: Sequence[int], sigmas: Sequence[float | None], path: Path, title: str
) -> None:
    """Plot some chains, one in each row, at some of their steps.

    ``frames`` (K, S, C, H, W) are the images at steps ``moments`` (K,), the last one the finished
    samples; ``sigmas`` are the mean noise levels of each step, or None.
    """
    chosen = sorted({round(k) for k in np.linspace(0, len(frames) - 1, MOMENTS)})
    below = []
    for k in chosen:
        step, last = moments[k], k == len(frames) - 1
        sigma = sigmas[step - 1] if 0 < step <= len(sigmas) and not last else None
        level = "" if sigma is None else f"\n{255 * sigma:.3g}/255" if sigma < 10 else "\n> 10"
        below.append(f"{'end' if last else f'step {step}' if step else 'start'}{level}")
    note = "; below: mean noise level" if any(s is not None for s in sigmas) else ""
    _save_rows(frames[chosen, :CHAINS].unbind(dim=1), path, f"{title}{note}", below=below)


def _animate_path(frames: Tensor, path: Path) -> None:
    """Write the path of chains (K, S, C, H, W) as a GIF; its last frame stays longer."""
    side = math.ceil(math.sqrt(frames.shape[1]))
    first, *rest = (Image.fromarray(_mosaic(torch.split(frame, side))) for frame in frames)
    buffer = io.BytesIO()
    times = [90] * len(rest) + [2000]  # ms
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=times, loop=0, disposal=1)
    write_atomically(path, buffer.getvalue())


Rows = Sequence[Sequence[Tensor] | Tensor]  # rows of images (C, H, W) in [0, 1]


def _mosaic(rows: Rows, framed: Collection[tuple[int, int]] = ()) -> NDArray[np.uint8]:
    """Grid of images, (H', W', 3) uint8; small ones are enlarged, ``framed`` ones orange-framed."""
    height, width = rows[0][0].shape[-2:]
    times, gap = max(1, math.ceil(64 / max(height, width))), 3
    shape = len(rows), max(map(len, rows)), 3, times * height + 2 * gap, times * width + 2 * gap
    cells = torch.full(shape, 255, dtype=torch.uint8)
    for r, row in enumerate(rows):
        for k, image in enumerate(row):
            if (r, k) in framed:
                cells[r, k] = torch.tensor([213, 94, 0])[:, None, None]
            levels = (image.clamp(0, 1) * 255).round()
            large = repeat(levels, "c h w -> c (h i) (w j)", i=times, j=times)
            cells[r, k, :, gap:-gap, gap:-gap] = large
    mosaic: NDArray[np.uint8] = rearrange(cells, "r k c h w -> (r h) (k w) c").numpy()
    return mosaic


def _save_rows(
    images: Rows,
    path: Path,
    title: str,
    names: Sequence[str] = (),
    below: Sequence[str] = (),
    framed: Collection[tuple[int, int]] = (),
) -> None:
    """Plot rows of images, with a title above, names at the left, and text below the columns."""
    mosaic = _mosaic(images, framed)
    tall, wide = (side / DPI for side in mosaic.shape[:2])
    left, head, foot = 0.12 + 0.075 * max(map(len, names), default=0), 0.3, 0.42 if below else 0.08
    width, height = max(left + wide + 0.1, 0.2 + 0.072 * len(title)), head + tall + foot
    figure = new_figure(width, height)
    axes = figure.add_axes((left / width, foot / height, wide / width, tall / height))
    axes.imshow(mosaic, interpolation="nearest", aspect="auto")
    axes.spines[:].set_visible(False)
    for place, texts, side, size in (
        (axes.set_yticks, names, mosaic.shape[0], 8),
        (axes.set_xticks, below, mosaic.shape[1], 6.5),
    ):
        ticks = [(k + 0.5) * side / len(texts) for k in range(len(texts))]
        place(ticks, list(texts), fontsize=size)
    axes.tick_params(length=0, colors=GRAY, labelcolor="black", pad=2)
    figure.text(0.1 / width, 1 - 0.15 / height, title, fontsize=8.5, va="center")
    save_figure(figure, path)
