r"""How well one score tells images of two kinds apart: those in and those out of distribution.

With scores u of images in and v of images out, higher meaning "in", and a threshold t,

.. math:: \mathrm{TPR}(t) = P(u \ge t), \qquad \mathrm{FPR}(t) = P(v \ge t),

- ``auroc``: the area under TPR against FPR, :math:`P(u > v) + \tfrac12 P(u = v)`; 1/2 for a score
  that knows nothing, less for one that takes out for in;
- ``aupr_in``: average precision with the images in as positives, :math:`\sum_t \Delta\mathrm{TPR}\,
  \frac{n\,\mathrm{TPR}}{n\,\mathrm{TPR} + m\,\mathrm{FPR}}`; ``aupr_out``: with those out as
  positives, by -score. Both depend on the numbers n and m: knowing nothing gives n/(n + m) and
  m/(n + m);
- ``fpr95``: the share of images out that are taken for in at the highest threshold at which at
  least 95 % of those in are; 0 is best.

Values are scikit-learn's. Intervals are of the basic bootstrap (`ebmkit.evaluation.statistics`),
kept within [0, 1], with the images in and the images out resampled apart.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ebmkit.evaluation.statistics import LEVEL, Estimate

__all__ = ["METRICS", "detection"]

METRICS = {"auroc": "AUROC", "aupr_in": "AUPR in", "aupr_out": "AUPR out", "fpr95": "FPR95"}
"""By name, what tables call them."""

TPR = 0.95

Counts = NDArray[np.float64]


def detection(
    inside: Tensor, outside: Tensor, seed: int = 0, resamples: int = 400
) -> dict[str, Estimate]:
    """`METRICS` of finite scores ``inside`` (n,) and ``outside`` (m,), with 95 % intervals.

    Args:
        inside: of images in distribution.
        outside: of images out of it.
        seed: of the bootstrap.
        resamples: how many.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

    u, v = (scores.double().cpu().numpy() for scores in (inside, outside))
    scores = np.concatenate([u, v])
    is_in = np.arange(len(scores)) < len(u)
    fpr, tpr, _ = roc_curve(is_in, scores, drop_intermediate=False)
    values = {
        "auroc": float(roc_auc_score(is_in, scores)),
        "aupr_in": float(average_precision_score(is_in, scores)),
        "aupr_out": float(average_precision_score(~is_in, -scores)),
        "fpr95": float(fpr[np.argmax(tpr >= TPR - 1e-12)]),
    }
    place = np.unique(scores, return_inverse=True)[1]
    rng = np.random.default_rng(seed)
    draws = [
        _of_counts(
            *(_resampled(part, int(place.max()) + 1, rng) for part in np.split(place, [len(u)]))
        )
        for _ in range(resamples)
    ]
    tops, bottoms = np.quantile(draws, [(1 + LEVEL) / 2, (1 - LEVEL) / 2], axis=0)

    def within(end: float) -> float:
        return min(1.0, max(0.0, float(end)))

    return {
        name: Estimate(value, within(2 * value - top), within(2 * value - bottom), len(scores))
        for (name, value), top, bottom in zip(values.items(), tops, bottoms, strict=True)
    }


def _resampled(place: NDArray[np.intp], levels: int, rng: np.random.Generator) -> Counts:
    """How often each level of the score is drawn, of those at ``place`` (n,) with repeats."""
    drawn = place[rng.integers(0, len(place), len(place))]
    return np.bincount(drawn, minlength=levels).astype(np.float64)


def _of_counts(inside: Counts, outside: Counts) -> list[float]:
    """`METRICS` where level k of the score, from low to high, has so many images in and out."""
    n, m = inside.sum(), outside.sum()
    below = outside.cumsum() - outside
    auroc = float(inside @ (below + outside / 2)) / (n * m)
    hits, misses = inside[::-1].cumsum(), outside[::-1].cumsum()
    first = int(np.argmax(hits >= TPR * n - 1e-9))
    return [
        auroc,
        _average_precision(inside[::-1], outside[::-1]),
        _average_precision(outside, inside),
        float(misses[first] / m),
    ]


def _average_precision(positive: Counts, negative: Counts) -> float:
    """Over thresholds from the first level to the last."""
    hits, taken = positive.cumsum(), (positive + negative).cumsum()
    precision = hits / np.maximum(taken, 1)
    return float(positive @ precision / positive.sum())
