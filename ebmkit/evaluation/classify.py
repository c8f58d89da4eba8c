r"""Suite ``classify``: accuracy, per class and against noise, and the likelihood of the labels.

The predicted label is :math:`\arg\max_c p(c \mid y)`. Accuracy is the share of images whose
predicted label is correct, NLL the mean of :math:`-\log p(c \mid y)` over images, in nats. Both are
computed on clean images and on noisy images :math:`y = x + \sigma\epsilon`, not clipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from rich.table import Table

from ebmkit import plots
from ebmkit.evaluation import statistics
from ebmkit.evaluation.suite import EvaluationContext, Suite, check_classifies, estimate_table
from ebmkit.noise import in_255ths
from ebmkit.terminal import shown_name

MAX_CONFUSION = 100
MAX_DRAWN = 20


def measure(context: EvaluationContext) -> dict[str, Any]:
    """Predict at every noise level; return the document."""
    names, classes = context.images.class_names, context.model.num_classes
    clean = context.predictions(0.0)
    levels = [(sigma, context.predictions(sigma)) for sigma in context.noise_levels]
    context.image_values |= {f"right/{in_255ths(s)}": noisy["right"] for s, noisy in levels}
    accuracy, nll = statistics.accuracy(clean["right"]), statistics.bounded_mean(clean["nll"])
    confusion = None
    if classes <= MAX_CONFUSION:
        pairs = torch.bincount(clean["labels"] * classes + clean["predicted"], minlength=classes**2)
        confusion = rearrange(pairs, "(true predicted) -> true predicted", true=classes).tolist()
    return {
        "sigmas": context.noise_levels,
        "accuracy": accuracy.value,
        "accuracy_interval": [accuracy.low, accuracy.high],
        "nll": nll.value,
        "nll_interval": [nll.low, nll.high],
        "per_class": {
            names[c] if names else str(c): statistics.accuracy(clean["right"][clean["labels"] == c])
            for c in range(classes)
        },
        "against_noise": [
            {
                "sigma": sigma,
                "accuracy": statistics.accuracy(noisy["right"]),
                "nll": statistics.bounded_mean(noisy["nll"]),
            }
            for sigma, noisy in levels
        ],
        "confusion": confusion,
        "warnings": _warnings(context),
    }


def _warnings(context: EvaluationContext) -> list[str]:
    card, names = context.model.card, list(context.images.class_names)
    if card is None or not card.class_names or not names or card.class_names == names:
        return []
    trained, own = next(p for p in zip(card.class_names, names, strict=True) if p[0] != p[1])
    return [
        f"class names of the data differ from those of the training data ({own!r} against "
        f"{trained!r}): accuracy compares classes by index"
    ]


def plot(context: EvaluationContext, document: dict[str, Any], folder: Path) -> None:
    """Write ``accuracy-against-noise.png`` and, for up to 20 classes, ``confusion.png``."""
    classes, levels = context.model.num_classes, document["against_noise"]
    figure = plots.new_figure(5.2, 3.6, layout="constrained")
    axes = figure.add_subplot()
    x, estimates = [255 * level["sigma"] for level in levels], [e["accuracy"] for e in levels]
    look = {"color": plots.BLUE, "marker": "o", "ms": 4, "label": "accuracy, 95 % interval"}
    plots.plot_estimates(axes, x, estimates, scale=100, **look)
    axes.axhline(100 / classes, color=plots.GRAY, ls=":", label="chance")
    plots.annotate(axes, "Accuracy against noise", plots.SIGMA, "accuracy (%)", ylim=(0, 102))
    axes.legend(frameon=False)
    plots.save_figure(figure, folder / "accuracy-against-noise.png")
    if classes <= MAX_DRAWN:
        names = list(document["per_class"])
        plot_confusion(document["confusion"], names, folder / "confusion.png")


def plot_confusion(counts: Sequence[Sequence[int]], names: Sequence[str], path: Path) -> None:
    """Plot a confusion matrix of ``counts`` (C, C) by true (row) and predicted class (column)."""
    matrix = np.asarray(counts)
    share = matrix / np.maximum(1, matrix.sum(1, keepdims=True))
    side = 1.6 + 0.46 * len(names)
    figure = plots.new_figure(side + 0.9, side, layout="constrained")
    axes = figure.add_subplot()
    shown = [shown_name(name) for name in names]
    image = plots.annotated_map(axes, 100 * share, shown, shown, matrix)
    axes.set_aspect("equal")
    plots.class_ticks(axes, names, size=10)
    plots.annotate(axes, "Confusion matrix: number of images", "predicted class", "true class")
    figure.colorbar(image, ax=axes, label="share of the true class (%)", shrink=0.8)
    plots.save_figure(figure, path)


def table(document: dict[str, Any]) -> Table:
    """Accuracy and NLL with their intervals, clean and noisy, and the worst class."""
    clean, *noisy = document["against_noise"]
    rows = [("accuracy", clean["accuracy"], "{:.2%}"), ("NLL (nats)", clean["nll"], "{:.4f}")]
    known = {name: e for name, e in document["per_class"].items() if e["count"]}
    if len(known) > 1:
        worst = min(known, key=lambda name: known[name]["value"])
        rows.append((f"worst class: {shown_name(worst)}", known[worst], "{:.2%}"))
    rows += [
        (f"accuracy at sigma {in_255ths(level['sigma'])}/255", level["accuracy"], "{:.2%}")
        for level in noisy
    ]
    return estimate_table(document, rows)


CLASSIFY = Suite(
    description="accuracy (all, per class, against noise), likelihood, confusion matrix",
    measure=measure,
    plot=plot,
    table=table,
    check=check_classifies,
    passes=lambda context: len(context.noise_levels) + 1,
    standard=True,
)
