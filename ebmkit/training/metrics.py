"""``metrics.jsonl``, one JSON object per line, which only grows, and its plot: learning curves.

A process that is killed may leave a last line cut short. A resumed run cuts the file after the last
row that its checkpoint knows, to the byte, and writes the later ones again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ebmkit.storage.atomic import writing
from ebmkit.storage.manifest import Entry
from ebmkit.storage.reading import MIB, read_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LARGEST = 1024 * MIB
"""Bytes: some 5 million rows."""

LINEAR = ("accuracy", "psnr", "lr")
"""Beginnings of the names of measures that are never drawn on a logarithmic scale."""


class MetricsLog:
    """The file at ``path``, appended to.

    Args:
        path: of the file, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._size, self._hash = 0, hashlib.sha256()
        self._known = False

    def append(self, row: dict[str, Any]) -> None:
        """Write ``row`` at the end.

        Raises:
            UserError: if it cannot be written.
        """
        self._look()
        line = as_lines([row])
        with writing(self.path), self.path.open("ab") as file:
            file.write(line)
        self._size += len(line)
        self._hash.update(line)

    def content(self) -> bytes:
        """All bytes; none if there is no file.

        Raises:
            UserError: if it is something else than a file, or larger than any run makes it.
        """
        if not os.path.lexists(self.path):
            return b""
        return read_bytes(self.path, LARGEST)

    def rows(self) -> list[dict[str, Any]]:
        """Its rows, up to the first that is not whole."""
        return [row for row, _ in whole_rows(self.content())]

    def up_to(self, step: int) -> bytes:
        """The bytes of the rows up to ``step``, as far as they are whole."""
        content = self.content()
        rows = itertools.takewhile(lambda own: own[0]["step"] <= step, whole_rows(content))
        return content[: max((end for _, end in rows), default=0)]

    def after(self, step: int) -> list[dict[str, Any]]:
        """The rows after ``step``."""
        return [row for row in self.rows() if row["step"] > step]

    def entry(self) -> Entry:
        """What is written so far, brought to the disk.

        Raises:
            UserError: if the disk fails.
        """
        self._look()
        if self._size:
            with writing(self.path), self.path.open("rb") as file:
                os.fsync(file.fileno())
        return Entry(self._size, self._hash.hexdigest(), grows=True)

    def look_again(self) -> None:
        """The file was changed from outside."""
        self._known = False

    def _look(self) -> None:
        if not self._known:
            content = self.content()
            self._size, self._hash = len(content), hashlib.sha256(content)
            self._known = True


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    """Rows as they are written."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def whole_rows(content: bytes) -> list[tuple[dict[str, Any], int]]:
    """The rows in ``content`` and where each ends, up to the first that is not whole."""
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


def learning_curves(metrics: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw each loss and measure in rows of ``metrics.jsonl`` against the step, as PNG at ``path``.

    Nothing is drawn if there are none.
    """
    from ebmkit.plots import new_figure, save_figure

    names = [k for row in metrics for k, v in row.items() if isinstance(v, (int, float))]
    names = [k for k in dict.fromkeys(names) if k not in ("step", "images_per_s")]
    last = ("accuracy", "psnr", "grad_norm", "lr")
    names.sort(key=lambda k: next((i for i, n in enumerate(last, 1) if k.startswith(n)), 0))
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
        own = [(r["step"], r.get(name)) for r in metrics if r.get("kind") == kind]
        rows = [(s, v) for s, v in own if isinstance(v, (int, float)) and math.isfinite(v)]
        if not rows:
            continue
        step, value = np.array(rows, dtype=float).T
        value *= 100 if name.startswith("accuracy") else 1
        values += value.tolist()
        if kind == "validation":
            axes.plot(step, value, "o-", color=colour, ms=3, lw=1.2, label="held-out")
        elif name == "lr" or len(rows) < 20:
            axes.plot(step, value, color=colour, lw=1.2, label="training")
        else:
            axes.plot(step, value, color=colour, lw=0.6, alpha=0.3)
            axes.plot(step, _smooth(value), color=colour, lw=1.4, label="training, smoothed")
    if values and max(values) > 8 * min(values) > 0 and not name.startswith(LINEAR):
        axes.set_yscale("log")
    titles = {
        "accuracy": "accuracy (%)",
        "accuracy_attacked": "accuracy under the attack of training (%)",
        "ce": "loss ce (nats)",
        "lr": "learning rate",
        "grad_norm": "norm of the gradient",
    }
    title = titles.get(name, f"loss {name}")
    if name.startswith("psnr"):
        title = f"PSNR at sigma {name[5:]}/255 (dB)"
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step")
    axes.legend(frameon=False, fontsize=7.5)
    axes.grid(alpha=0.25, lw=0.5)


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Running mean over a fifteenth of the values, centred, one-sided at the ends."""
    window = np.ones(2 * max(1, len(values) // 30) + 1)
    counts = np.convolve(np.ones_like(values), window, "same")
    return np.convolve(values, window, "same") / counts
