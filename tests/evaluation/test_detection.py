"""Measures of detection: against closed forms, a definition by counting, and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from ebmkit.evaluation.detection import _of_counts, detection


def normal(count, mean=0.0, seed=0):
    return mean + torch.randn(count, generator=torch.Generator().manual_seed(seed)).double()


def test_equal_distributions_cannot_be_told_apart():
    """AUROC 1/2, with the standard error of a Mann-Whitney statistic, sqrt((n + m + 1)/12nm)."""
    n, m = 1000, 3000
    found = detection(normal(n, seed=1), normal(m, seed=2))
    error = math.sqrt((n + m + 1) / (12 * n * m))
    assert found["auroc"].value == pytest.approx(0.5, abs=4 * error)
    assert found["auroc"].low < 0.5 < found["auroc"].high
    width = found["auroc"].high - found["auroc"].low
    assert width == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert found["fpr95"].value == pytest.approx(0.95, abs=0.04)
    assert found["aupr_in"].value == pytest.approx(n / (n + m), abs=0.04)
    assert found["aupr_out"].value == pytest.approx(m / (n + m), abs=0.04)


@pytest.mark.parametrize("apart", [0.5, 2.0])
def test_two_gaussians(apart):
    """AUROC = Phi(d'/sqrt 2), and FPR95 = Phi(1.645 - d') with the error of its threshold, too."""
    n = 4000
    found = detection(normal(n, apart, 1), normal(n, 0, 2))
    area, at = norm.cdf(apart / math.sqrt(2)), norm.ppf(0.05)
    assert found["auroc"].value == pytest.approx(area, abs=4 * 0.5 / math.sqrt(n))
    assert found["auroc"].low < area < found["auroc"].high
    passed, slope = norm.sf(at + apart), norm.pdf(at + apart) / norm.pdf(at)
    error = math.sqrt((passed * (1 - passed) + slope**2 * 0.05 * 0.95) / n)
    assert found["fpr95"].value == pytest.approx(passed, abs=4 * error)
    width = found["fpr95"].high - found["fpr95"].low
    assert 0.5 < width / (3.92 * error) < 2  # a bootstrap of a quantile, whose own error is large
    swapped = detection(-normal(4000, 0, 2), -normal(4000, apart, 1))  # by -score, out for in
    assert swapped["auroc"].value == pytest.approx(found["auroc"].value)
    assert swapped["aupr_in"].value == pytest.approx(found["aupr_out"].value)


def test_ties_count_half_and_thresholds_take_them_together():
    inside, outside = torch.tensor([2.0, 1.0, 1.0]), torch.tensor([1.0, 0.0])
    found = detection(inside, outside)
    pairs = [(u > v) + 0.5 * (u == v) for u in inside for v in outside]
    assert found["auroc"].value == pytest.approx(float(sum(pairs)) / 6)
    assert found["fpr95"].value == 0.5  # 95 % of 3 takes all ones, and one of two out with them
    # at 2: precision 1 for a third; at 1: 3 of 4 for the rest
    assert found["aupr_in"].value == pytest.approx(1 / 3 + 2 / 3 * 3 / 4)
    same = detection(torch.ones(5), torch.ones(7))
    assert (same["auroc"].value, same["fpr95"].value) == (0.5, 1)


def test_resampling_counts_as_scikit_learn_does():
    """The formulas by counts, on numbers with ties, are the measures of the whole sample."""
    inside, outside = (normal(200, m, s).mul(4).round() for m, s in ((0.7, 1), (0, 2)))
    scores = torch.cat([inside, outside]).numpy()
    place = np.unique(scores, return_inverse=True)[1]
    top = int(place.max()) + 1
    counts = [np.bincount(p, minlength=top).astype(float) for p in np.split(place, [200])]
    expected = [estimate.value for estimate in detection(inside, outside).values()]
    assert _of_counts(*counts) == pytest.approx(expected, abs=1e-12)


def test_a_perfect_score_has_no_interval_beyond_one():
    found = detection(torch.arange(50) + 100.0, torch.arange(60.0))
    for name in ("auroc", "aupr_in", "aupr_out"):
        assert (found[name].value, found[name].low, found[name].high) == (1, 1, 1)
    assert found["fpr95"].document() == {"value": 0, "low": 0, "high": 0, "count": 110}
