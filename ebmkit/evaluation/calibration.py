r"""Suite ``calibration``: whether probabilities mean what they say.

With the confidence :math:`\hat p_i = \max_c p(c \mid y_i)` sorted into 15 bins of equal width, the
(top-label) expected calibration error is

.. math::
    \mathrm{ECE} = \sum_{b} \frac{n_b}{n} \bigl|\mathrm{acc}_b - \mathrm{conf}_b\bigr|
                 = \frac1n \sum_b \Bigl|\sum_{i \in b} (1[\hat c_i = c_i] - \hat p_i)\Bigr|

(Guo et al., arXiv 1706.04599, eq. 3); a confidence of exactly 1 belongs to the last bin. The Brier
score is the mean of :math:`\sum_k (p(k \mid y) - 1[k = c])^2`, between 0 and 2; NLL is in nats. All
are taken on the clean images and on noisy ones at 25/255.

``calibration.json`` holds, beside the common entries: ``ece``, ``brier``, ``nll`` of the clean
images, each with its ``_interval``; and ``levels``, one entry per noise level with the same
measures and ``bins``, the reliability diagram: for each bin its edges, number of images, mean
confidence and accuracy (null where it is empty).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ebmkit.evaluation import statistics
from ebmkit.evaluation.context import EvaluationContext, Predictions, Suite, check_classifies
from ebmkit.evaluation.statistics import Estimate
from ebmkit.evaluation.tables import interval, new_table, number
from ebmkit.noise import in_255ths

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["CALIBRATION", "calibration_error", "draw", "reliability", "run", "table"]

BINS = 15
NOISY = 25 / 255
MEASURES = {"ece": "ECE", "brier": "Brier score", "nll": "NLL (nats)"}


def calibration_error(
    confidence: Tensor, right: Tensor, bins: int = BINS, seed: int = 0
) -> Estimate:
    """Top-label expected calibration error, with a bootstrap interval.

    Args:
        confidence: (N,) probability of the predicted label.
        right: (N,) bool, whether it is the true one.
        bins: number of bins of equal width.
        seed: of the bootstrap.
    """
    index = _bin_of(confidence, bins)
    gap = right.double().numpy() - confidence.double().numpy()

    def error(images: NDArray[np.intp]) -> float:
        sums = np.bincount(index[images], weights=gap[images], minlength=bins)
        return float(np.abs(sums).sum() / len(images))

    return statistics.bootstrap(error, len(confidence), seed, lowest=0.0)


def reliability(confidence: Tensor, right: Tensor, bins: int = BINS) -> list[dict[str, Any]]:
    """Of each bin: ``low``, ``high``, ``count``, mean ``confidence``, ``accuracy``."""
    index = _bin_of(confidence, bins)
    rows = []
    for b in range(bins):
        own = index == b
        count = int(own.sum())
        rows.append(
            {
                "low": b / bins,
                "high": (b + 1) / bins,
                "count": count,
                "confidence": float(confidence.numpy()[own].mean()) if count else None,
                "accuracy": statistics.proportion(int(right.numpy()[own].sum()), count).document()
                if count
                else None,
            }
        )
    return rows


def run(setting: EvaluationContext) -> dict[str, Any]:
    """Measure; see the module's text for what is returned."""
    levels = [_level(setting.predictions(s), s, setting.seed) for s in (0.0, NOISY)]
    document: dict[str, Any] = {"sigmas": [0.0, NOISY], "levels": levels}
    for name in MEASURES:
        estimate = levels[0][name]
        document[name] = estimate["value"]
        document[f"{name}_interval"] = [estimate["low"], estimate["high"]]
    return document


def draw(setting: EvaluationContext, document: dict[str, Any], folder: Path) -> None:
    """Write ``reliability.png``."""
    from ebmkit import plots

    plots.reliability_diagram(document["levels"], folder / "reliability.png")


def table(document: dict[str, Any]) -> Table:
    """ECE, Brier score and NLL with their intervals, clean and noisy."""
    result = new_table(document, ("metric", "value", "95 % interval"))
    for level in document["levels"]:
        where = f" at sigma {in_255ths(level['sigma'])}/255" if level["sigma"] else ""
        for name, label in MEASURES.items():
            estimate = level[name]
            span = interval(estimate["low"], estimate["high"], "{:.4f}")
            result.add_row(label + where, number(estimate["value"], "{:.4f}"), span)
    return result


def _level(predictions: Predictions, sigma: float, seed: int) -> dict[str, Any]:
    error = calibration_error(predictions.confidence, predictions.right, seed=seed)
    return {
        "sigma": sigma,
        "ece": error.document(),
        "brier": statistics.mean(predictions.brier).document(),
        "nll": statistics.mean(predictions.nll).document(),
        "bins": reliability(predictions.confidence, predictions.right),
    }


def _bin_of(confidence: Tensor, bins: int) -> NDArray[np.intp]:
    edges = np.linspace(0, 1, bins + 1)
    found: NDArray[np.intp] = np.digitize(confidence.double().numpy(), edges[1:-1])
    return found


CALIBRATION = Suite(
    description="calibration error, Brier score and likelihood, clean and at 25/255; "
    "reliability diagram",
    check=check_classifies,
    passes=lambda setting: 2,
    run=run,
    draw=draw,
    table=table,
    standard=True,
)
