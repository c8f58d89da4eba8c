r"""Suite ``calibration``: calibration error, Brier score and negative log-likelihood.

With the confidences :math:`\hat p_i = \max_c p(c \mid y_i)` in 15 bins of equal width, the
top-label expected calibration error is

.. math::
    \mathrm{ECE} = \sum_{b} \frac{n_b}{n} \bigl|\mathrm{acc}_b - \mathrm{conf}_b\bigr|
                 = \frac1n \sum_b \Bigl|\sum_{i \in b} (1[\hat c_i = c_i] - \hat p_i)\Bigr|

(Guo et al., arXiv 1706.04599, eq. 3); a confidence of exactly 1 belongs to the last bin. The Brier
score is the mean of :math:`\sum_k (p(k \mid y) - 1[k = c])^2`, between 0 and 2; NLL is in nats. All
metrics are computed on clean images and on noisy images at 25/255.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor

from ebmkit import plots
from ebmkit.evaluation import statistics
from ebmkit.evaluation.statistics import Estimate
from ebmkit.evaluation.suite import EvaluationContext, Suite, check_classifies, estimate_table
from ebmkit.noise import in_255ths

BINS = 15
NOISY = 25 / 255
MEASURES = {"ece": "ECE", "brier": "Brier score", "nll": "NLL (nats)"}


def calibration_error(
    confidence: Tensor, right: Tensor, bins: int = BINS, seed: int = 0
) -> Estimate:
    """Top-label expected calibration error with a bootstrap interval.

    Args:
        confidence: (N,) probability of the predicted label.
        right: (N,) bool, whether the predicted label is correct.
        bins: number of bins of equal width.
        seed: random seed of the bootstrap.
    """
    index = _bin_of(confidence, bins)
    gap = right.double().numpy() - confidence.double().numpy()

    def error(images: NDArray[np.intp]) -> float:
        sums = np.bincount(index[images], weights=gap[images], minlength=bins)
        return float(np.abs(sums).sum() / len(images))

    return statistics.bootstrap(error, len(confidence), seed, lowest=0.0)


def reliability(confidence: Tensor, right: Tensor, bins: int = BINS) -> list[dict[str, Any]]:
    """By bin: edges ``low`` and ``high``, ``count``, mean ``confidence`` and ``accuracy``."""
    index = _bin_of(confidence, bins)
    found = []
    for b in range(bins):
        own = torch.from_numpy(index == b)
        known = bool(own.any())
        found.append(
            {
                "low": b / bins,
                "high": (b + 1) / bins,
                "count": int(own.sum()),
                "confidence": float(confidence[own].numpy().mean()) if known else None,
                "accuracy": statistics.accuracy(right[own]).document() if known else None,
            }
        )
    return found


def _bin_of(confidence: Tensor, bins: int) -> NDArray[np.intp]:
    edges = np.linspace(0, 1, bins + 1)
    found: NDArray[np.intp] = np.digitize(confidence.double().numpy(), edges[1:-1])
    return found


def measure(context: EvaluationContext) -> dict[str, Any]:
    """Measure calibration on clean and noisy images; return the document."""
    levels: list[dict[str, Any]] = []
    for sigma in (0.0, NOISY):
        found = context.predictions(sigma)
        levels.append(
            {
                "sigma": sigma,
                "ece": calibration_error(found["confidence"], found["right"], seed=context.seed),
                "brier": statistics.bounded_mean(found["brier"]),
                "nll": statistics.bounded_mean(found["nll"]),
                "bins": reliability(found["confidence"], found["right"]),
            }
        )
    document = {"sigmas": [0.0, NOISY], "levels": levels}
    for name in MEASURES:
        clean = levels[0][name]
        document |= {name: clean.value, f"{name}_interval": [clean.low, clean.high]}
    return document


def plot(context: EvaluationContext, document: dict[str, Any], folder: Path) -> None:
    """Write ``reliability.png``: accuracy against confidence, and a histogram of confidence."""
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


def table(document: dict[str, Any]) -> Table:
    """ECE, Brier score and NLL with their intervals, clean and noisy."""
    rows = []
    for level in document["levels"]:
        where = f" at sigma {in_255ths(level['sigma'])}/255" if level["sigma"] else ""
        rows += [(label + where, level[name], "{:.4f}") for name, label in MEASURES.items()]
    return estimate_table(document, rows)


CALIBRATION = Suite(
    description="calibration error, Brier score and likelihood, clean and at 25/255; "
    "reliability diagram",
    measure=measure,
    plot=plot,
    table=table,
    check=check_classifies,
    passes=lambda context: 2,
    standard=True,
)
