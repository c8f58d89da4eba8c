r"""Suites ``classify`` and ``calibration``: labels, their likelihood, and their probabilities.

The predicted label is :math:`\hat c = \arg\max_c p(c \mid y)`. Accuracy is the share of images on
which it is the true one, NLL the mean of :math:`-\log p(c \mid y)` over images, in nats. The Brier
score is the mean of :math:`\sum_k (p(k \mid y) - 1[k = c])^2`, between 0 and 2.

With the confidence :math:`\hat p_i = \max_c p(c \mid y_i)` sorted into 15 bins of equal width, the
(top-label) expected calibration error is

.. math::
    \mathrm{ECE} = \sum_{b} \frac{n_b}{n} \bigl|\mathrm{acc}_b - \mathrm{conf}_b\bigr|
                 = \frac1n \sum_b \Bigl|\sum_{i \in b} (1[\hat c_i = c_i] - \hat p_i)\Bigr|

(Guo et al., arXiv 1706.04599, eq. 3); a confidence of exactly 1 belongs to the last bin.

``classify`` measures clean images and noisy ones, :math:`y = x + \sigma\epsilon`, not clipped;
``calibration`` the clean ones and those at 25/255.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor

from ebmkit import plots
from ebmkit.evaluation import statistics
from ebmkit.evaluation.statistics import Estimate
from ebmkit.evaluation.suite import EvaluationContext, Suite, check_classifies, estimate_table
from ebmkit.noise import in_255ths
from ebmkit.terminal import shown_name

MAX_CONFUSION = 100
MAX_DRAWN = 20
BINS = 15
NOISY = 25 / 255
MEASURES = {"ece": "ECE", "brier": "Brier score", "nll": "NLL (nats)"}


def _spelled_out(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    """Each as a number and, beside it, its interval."""
    found: dict[str, Any] = {}
    for name, e in estimates.items():
        found |= {name: e.value, f"{name}_interval": [e.low, e.high]}
    return found


def measure(context: EvaluationContext) -> dict[str, Any]:
    """Predict at every noise level; return the document."""
    names, classes = context.images.class_names, context.model.num_classes
    clean = context.predictions(0.0)
    estimates = [_estimates(context.predictions(sigma)) for sigma in context.noise_levels]
    confusion = None
    if classes <= MAX_CONFUSION:
        pairs = torch.bincount(clean["labels"] * classes + clean["predicted"], minlength=classes**2)
        confusion = rearrange(pairs, "(true predicted) -> true predicted", true=classes).tolist()
    return {
        "sigmas": context.noise_levels,
        **_spelled_out(estimates[0]),
        "per_class": {
            names[c] if names else str(c): statistics.accuracy(clean["right"][clean["labels"] == c])
            for c in range(classes)
        },
        "against_noise": [
            {"sigma": sigma, **own}
            for sigma, own in zip(context.noise_levels, estimates, strict=True)
        ],
        "confusion": confusion,
        "warnings": _warnings(context),
    }


def _estimates(found: Mapping[str, Tensor]) -> dict[str, Estimate]:
    return {"accuracy": statistics.accuracy(found["right"]), "nll": statistics.mean(found["nll"])}


def _warnings(context: EvaluationContext) -> list[str]:
    card, names = context.model.card, list(context.images.class_names)
    if card is None or not card.class_names or not names or card.class_names == names:
        return []
    trained, own = next(p for p in zip(card.class_names, names, strict=True) if p[0] != p[1])
    return [
        f"the classes of the data have other names than those trained on ({own!r} against "
        f"{trained!r}): accuracies take them as the same, by their order"
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
    """How many images of each true class (row) were taken for which (column); (C, C) counts."""
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
    """Accuracy and NLL with their intervals, clean and noisy."""
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


def calibration_error(confidence: Tensor, right: Tensor, seed: int = 0) -> Estimate:
    """Top-label expected calibration error, with a bootstrap interval.

    Args:
        confidence: (N,) probability of the predicted label.
        right: (N,) bool, whether it is the true one.
        seed: of the bootstrap.
    """
    index = _bin_of(confidence)
    gap = right.double().numpy() - confidence.double().numpy()

    def error(images: NDArray[np.intp]) -> float:
        sums = np.bincount(index[images], weights=gap[images], minlength=BINS)
        return float(np.abs(sums).sum() / len(images))

    return statistics.bootstrap(error, len(confidence), seed, lowest=0.0)


def reliability(confidence: Tensor, right: Tensor) -> list[dict[str, Any]]:
    """Of each bin: ``low``, ``high``, ``count``, mean ``confidence``, ``accuracy``."""
    index, found = _bin_of(confidence), []
    for b in range(BINS):
        own = torch.from_numpy(index == b)
        entry: dict[str, Any] = {"low": b / BINS, "high": (b + 1) / BINS, "count": int(own.sum())}
        entry |= {"confidence": None, "accuracy": None}
        if entry["count"]:
            entry["confidence"] = float(confidence[own].numpy().mean())
            entry["accuracy"] = statistics.accuracy(right[own]).document()
        found.append(entry)
    return found


def _bin_of(confidence: Tensor) -> NDArray[np.intp]:
    edges = np.linspace(0, 1, BINS + 1)
    found: NDArray[np.intp] = np.digitize(confidence.double().numpy(), edges[1:-1])
    return found


def measure_calibration(context: EvaluationContext) -> dict[str, Any]:
    """Calibration, clean and noisy; return the document."""
    levels: list[dict[str, Any]] = []
    for sigma in (0.0, NOISY):
        found = context.predictions(sigma)
        levels.append(
            {
                "sigma": sigma,
                "ece": calibration_error(found["confidence"], found["right"], seed=context.seed),
                "brier": statistics.mean(found["brier"]),
                "nll": statistics.mean(found["nll"]),
                "bins": reliability(found["confidence"], found["right"]),
            }
        )
    clean = _spelled_out({name: levels[0][name] for name in MEASURES})
    return {"sigmas": [0.0, NOISY], "levels": levels, **clean}


def plot_calibration(context: EvaluationContext, document: dict[str, Any], folder: Path) -> None:
    """Write ``reliability.png``: accuracy against confidence, and how many images have it."""
    levels = document["levels"]
    figure = plots.new_figure(4.3 * len(levels), 4.8, layout="constrained")
    grid = figure.add_gridspec(2, len(levels), height_ratios=(3, 1))
    for i, level in enumerate(levels):
        top, bottom = figure.add_subplot(grid[0, i]), figure.add_subplot(grid[1, i])
        bins = level["bins"]
        full = [b for b in bins if b["count"]]
        top.plot([0, 100], [0, 100], ls=":", color=plots.GRAY, label="calibrated")
        x, accuracies = [100 * b["confidence"] for b in full], [b["accuracy"] for b in full]
        look: dict[str, Any] = {"fmt": "o", "color": plots.BLUE, "ms": 4.5, "elinewidth": 0.8}
        label = "model, 95 % interval"
        plots.bars_within(top, x, accuracies, (0, 100), 100, label=label, **look)
        where = f"sigma {in_255ths(level['sigma'])}/255" if level["sigma"] else "clean images"
        top.set_title(f"Calibration, {where}: ECE {100 * level['ece']['value']:.2f} %", fontsize=10)
        top.set(ylabel="accuracy (%)", xlim=(0, 101), ylim=(0, 102))
        middles = [50 * (b["low"] + b["high"]) for b in bins]
        bottom.bar(middles, [b["count"] for b in bins], width=90 / len(bins), color=plots.SKY)
        limits = {"xlim": (0, 101), "ylim": (0.8, None)}
        bottom.set(xlabel="confidence (%)", ylabel="images", yscale="log", **limits)
    plots.save_figure(figure, folder / "reliability.png", legend=2)


def calibration_table(document: dict[str, Any]) -> Table:
    """ECE, Brier score and NLL with their intervals, clean and noisy."""
    rows = []
    for level in document["levels"]:
        where = f" at sigma {in_255ths(level['sigma'])}/255" if level["sigma"] else ""
        rows += [(label + where, level[name], "{:.4f}") for name, label in MEASURES.items()]
    return estimate_table(document, rows)


CALIBRATION = Suite(
    description="calibration error, Brier score and likelihood, clean and at 25/255; "
    "reliability diagram",
    measure=measure_calibration,
    plot=plot_calibration,
    table=calibration_table,
    check=check_classifies,
    passes=lambda context: 2,
    standard=True,
)
