"""Learning curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ebmkit.plots.common import BLUE, ORANGE, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["learning_curves"]


def learning_curves(metrics: Sequence[dict[str, Any]], path: Path) -> None:
    """Each loss and measure in a panel of its own, against the step.

    Args:
        metrics: rows of ``metrics.jsonl``, with ``step``, ``kind`` ("train" or "validation") and
            numbers. Nothing is drawn if there are none.
        path: the PNG file.
    """
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
    values: list[float] = []
    for kind, colour in (("train", BLUE), ("validation", ORANGE)):
        rows = [
            r for r in metrics if r.get("kind") == kind and isinstance(r.get(name), (int, float))
        ]
        rows = [r for r in rows if math.isfinite(r[name])]
        if not rows:
            continue
        step = np.array([r["step"] for r in rows])
        value = np.array([r[name] for r in rows], dtype=float)
        value *= 100 if name.startswith("accuracy") else 1
        values += value.tolist()
        if kind == "validation":
            axes.plot(step, value, "o-", color=colour, ms=3, lw=1.2, label="held-out")
        elif name == "lr" or len(rows) < 20:
            axes.plot(step, value, color=colour, lw=1.2, label="training")
        else:
            axes.plot(step, value, color=colour, lw=0.6, alpha=0.3)
            axes.plot(step, _smooth(value), color=colour, lw=1.4, label="training, smoothed")
    if (
        values
        and min(values) > 0
        and max(values) > 8 * min(values)
        and not name.startswith(("accuracy", "psnr", "lr"))
    ):
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
    half = max(1, len(values) // 30)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    first, end = np.maximum(0, at - half), np.minimum(len(values), at + half + 1)
    means: NDArray[np.float64] = (sums[end] - sums[first]) / (end - first)
    return means
