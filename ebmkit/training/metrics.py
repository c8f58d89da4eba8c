"""Metrics of a run: validation, ``metrics.jsonl`` and learning curves.

Every validation uses the same noise. Adversarial objectives are evaluated under their training
attack, from the same starting points. ``metrics.jsonl`` has one JSON object per line and only
grows. A killed process may leave an incomplete last line: a resumed run truncates the file after
the last row that belongs to its checkpoint, and writes the later rows again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ebmkit.data import AnyImages, Batch, Stream, StreamConfig
from ebmkit.data.schedule import Stage
from ebmkit.distributed import DistributedContext
from ebmkit.energy import EnergyModel
from ebmkit.metrics import predict, psnr
from ebmkit.objectives import TrainingLoss
from ebmkit.storage.atomic import writing
from ebmkit.storage.manifest import Entry
from ebmkit.storage.reading import MIB, read_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LARGEST = 1024 * MIB
"""Maximum size of ``metrics.jsonl`` in bytes; about 5 million rows."""

BATCH, SIGMA = 100, 25 / 255
"""Maximum batch size of validation, and the noise level of ``psnr_25``."""

LINEAR = ("accuracy", "psnr", "lr")
"""Prefixes of metrics that are never drawn on a logarithmic scale."""

TITLES = {
    "accuracy": "accuracy (%)",
    "accuracy_attacked": "accuracy under the attack of training (%)",
    "ce": "loss ce (nats)",
    "lr": "learning rate",
    "grad_norm": "norm of the gradient",
}


@dataclass
class Validation:
    """Evaluates the model of a loss on held-out images, in equal batches divided among processes.

    Images are whole, except in streams whose crop size changes during the run: these use centre
    crops of the current training size. All processes get the same means.
    """

    loss: TrainingLoss  # with the model to evaluate, without objectives that need negatives
    images: AnyImages  # held-out images
    noise: dict[str, StreamConfig]
    """Stream -> its training configuration; its noise law applies, its augmentation does not."""
    classifies: bool  # whether accuracy is meaningful
    device: torch.device
    world: DistributedContext

    def __post_init__(self) -> None:
        matching = [term.name for term in self.loss.terms if term.objective.needs_score]
        self.denoise_stream = self.loss.stream_of[matching[0]] if matching else None
        self.steps = math.ceil(len(self.images) / BATCH)
        size = math.ceil(len(self.images) / self.steps)
        self.streams = {}
        for name, training in self.noise.items():
            config = StreamConfig(batch_size=size, noise=training.noise)
            self.streams[name] = Stream(self.images, config, f"validation-{name}", 0, self.device)

    @torch.no_grad()
    def __call__(self, stage: Stage | None = None) -> dict[str, float]:
        """Means over the images: each term by name, and if they apply ``accuracy``,
        ``accuracy_attacked`` (under the training attack) and ``psnr_25``.

        The model must be in evaluation mode. Without a ``stage`` of the run, images are whole.
        """
        crops = {n: s.crop_size for n, s in stage.spans.items()} if stage else {}
        crops = {n: side for n, side in crops.items() if n in self.noise and self.noise[n].phases}
        totals: dict[str, float] = {}
        preparations = self.loss.preparations(validating=True)
        for step in range(self.world.rank, self.steps, self.world.size):
            batches = {n: next(s.batches(step, step + 1)) for n, s in self.streams.items()}
            batches = {n: _middle(batch, crops.get(n)) for n, batch in batches.items()}
            batches = self.loss.prepared(preparations, batches, step)
            for name, value in self._measure(batches).items():
                totals[name] = totals.get(name, 0.0) + value / self.steps
        everyone = self.world.gather(totals)
        names = next(own for own in everyone if own)
        return {name: sum(own.get(name, 0.0) for own in everyone) for name in names}

    def _measure(self, batches: dict[str, Batch]) -> dict[str, float]:
        model = self.loss.model
        row = {name: float(mean) for name, mean in self.loss(batches).parts.items()}
        if self.classifies:
            batch = next(iter(batches.values()))
            assert batch.labels is not None
            assert isinstance(model, EnergyModel)
            right = predict(model.logits(batch.x)).eq(batch.labels)
            row["accuracy"] = float(right.float().mean())
            for own in batches.values():
                for column in (c for name, c in own.extra.items() if name.endswith(".attacked")):
                    assert own.labels is not None
                    label = predict(model.logits(column, own.sigma))
                    row.setdefault("accuracy_attacked", float(label.eq(own.labels).float().mean()))
        if self.denoise_stream is not None:
            batch = batches[self.denoise_stream]
            clean = model.denoise(batch.x + SIGMA * batch.eps, SIGMA)
            row["psnr_25"] = float(psnr(clean.clamp(0, 1), batch.x).mean())
        return row


def _middle(batch: Batch, side: int | None) -> Batch:
    """Crop the images of a batch to their central square of ``side`` pixels."""
    if side is None:
        return batch
    top, left = ((n - side) // 2 for n in batch.x.shape[-2:])
    cut = ..., slice(top, top + side), slice(left, left + side)
    return batch._replace(x=batch.x[cut], y=batch.y[cut], eps=batch.eps[cut])


class MetricsLog:
    """Append-only log at ``path``, which need not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._size, self._hash = 0, hashlib.sha256()
        self._known = False

    def append(self, row: dict[str, Any]) -> None:
        """Append ``row``, or raise a `UserError`."""
        self._look()
        line = as_lines([row])
        with writing(self.path), self.path.open("ab") as file:
            file.write(line)
        self._size += len(line)
        self._hash.update(line)

    def content(self) -> bytes:
        """All bytes of the log; empty if there is no file.

        Raises:
            UserError: if it is not a regular file, or larger than `LARGEST`.
        """
        return read_bytes(self.path, LARGEST) if os.path.lexists(self.path) else b""

    def rows(self) -> list[dict[str, Any]]:
        """The rows before the first incomplete one."""
        return [row for row, _ in whole_rows(self.content())]

    def up_to(self, step: int) -> bytes:
        """The bytes of the complete rows up to ``step``."""
        content = self.content()
        rows = itertools.takewhile(lambda own: own[0]["step"] <= step, whole_rows(content))
        return content[: max((end for _, end in rows), default=0)]

    def entry(self) -> Entry:
        """Flush the log to disk and return its manifest entry."""
        self._look()
        if self._size:
            with writing(self.path), self.path.open("rb") as file:
                os.fsync(file.fileno())
        return Entry(self._size, self._hash.hexdigest(), grows=True)

    def _look(self) -> None:
        if not self._known:
            content = self.content()
            self._size, self._hash = len(content), hashlib.sha256(content)
            self._known = True


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    """Encode rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def whole_rows(content: bytes) -> list[tuple[dict[str, Any], int]]:
    """The rows in ``content`` before the first incomplete one, each with the offset of its end."""
    found: list[tuple[dict[str, Any], int]] = []
    end = 0
    for line in content.splitlines(keepends=True):
        end += len(line)
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not (line.endswith(b"\n") and isinstance(row, dict) and type(row.get("step")) is int):
            break
        found.append((row, end))
    return found


def metric_names(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the losses and metrics in rows of ``metrics.jsonl``, losses first."""
    names = [k for row in rows for k, v in row.items() if isinstance(v, (int, float))]
    names = [k for k in dict.fromkeys(names) if k not in ("step", "images_per_s")]
    last = ("accuracy", "psnr", "grad_norm", "lr")
    return sorted(
        names, key=lambda k: next((i for i, n in enumerate(last, 1) if k.startswith(n)), 0)
    )


def metric_title(name: str) -> str:
    """Title of the plot of metric ``name``, with its unit."""
    psnr_title = f"PSNR at sigma {name[5:]}/255 (dB)"
    return psnr_title if name.startswith("psnr") else TITLES.get(name, f"loss {name}")


def metric_series(
    rows: Sequence[dict[str, Any]], name: str, kind: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and values (n,) of metric ``name`` in rows of ``kind`` train or validation, without
    NaN and Inf; accuracies in %."""
    own = [(r["step"], r.get(name)) for r in rows if r.get("kind") == kind]
    found = [(s, v) for s, v in own if isinstance(v, (int, float)) and math.isfinite(v)]
    step, value = np.array(found, dtype=float).reshape(-1, 2).T
    return step, value * (100 if name.startswith("accuracy") else 1)


def needs_log_scale(name: str, values: Sequence[float]) -> bool:
    """Whether metric ``name`` is plotted on a logarithmic scale."""
    return bool(values) and max(values) > 8 * min(values) > 0 and not name.startswith(LINEAR)


def learning_curves(metrics: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot each loss and metric in rows of ``metrics.jsonl`` by step, as PNG at ``path``.

    Nothing is written if there are none.
    """
    from ebmkit.plots import new_figure, save_figure

    names = metric_names(metrics)
    if not names:
        return
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = new_figure(4.0 * columns, 2.9 * rows, layout="constrained")
    figure.suptitle("Learning curves", fontsize=11)
    for i, name in enumerate(names):
        _curve(figure.add_subplot(rows, columns, i + 1), metrics, name)
    save_figure(figure, path)


def _curve(axes: Axes, metrics: Sequence[dict[str, Any]], name: str) -> None:
    """One panel of the learning curves."""
    from ebmkit.plots import BLUE, ORANGE

    values: list[float] = []
    for kind, colour in (("train", BLUE), ("validation", ORANGE)):
        step, value = metric_series(metrics, name, kind)
        if not len(step):
            continue
        values += value.tolist()
        if kind == "validation":
            axes.plot(step, value, "o-", color=colour, ms=3, lw=1.2, label="held-out")
        elif name == "lr" or len(step) < 20:
            axes.plot(step, value, color=colour, lw=1.2, label="training")
        else:
            axes.plot(step, value, color=colour, lw=0.6, alpha=0.3)
            axes.plot(step, running_mean(value), color=colour, lw=1.4, label="training, smoothed")
    if needs_log_scale(name, values):
        axes.set_yscale("log")
    axes.set_title(metric_title(name), fontsize=10)
    axes.set_xlabel("step")
    axes.legend(frameon=False, fontsize=7.5)
    axes.grid(alpha=0.25, lw=0.5)


def running_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Running mean over a fifteenth of the values, centred, one-sided at the ends."""
    window = np.ones(2 * max(1, len(values) // 30) + 1)
    counts = np.convolve(np.ones_like(values), window, "same")
    return np.convolve(values, window, "same") / counts
