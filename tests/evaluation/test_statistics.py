"""Confidence intervals agree with independent formulas and have their nominal coverage."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from ebmkit.evaluation import statistics
from ebmkit.evaluation.calibration import calibration_error

DRAWS = 400
SLACK = 4 * math.sqrt(0.95 * 0.05 / DRAWS)  # four standard errors of a coverage of 95 %


@pytest.mark.parametrize(("hits", "count"), [(0, 10), (7, 10), (10, 10), (963, 1000)])
def test_interval_of_a_proportion_is_wilson(hits, count):
    z, p = stats.norm.ppf(0.975), hits / count
    middle = (p + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(p * (1 - p) / count + z**2 / (4 * count**2))
    found = statistics.proportion(hits, count)
    assert (found.value, found.count) == (p, count)
    assert (found.low, found.high) == pytest.approx((middle - half, middle + half), abs=1e-12)


def test_interval_of_a_mean_is_student():
    values = torch.randn(37, dtype=torch.float64)
    expected = stats.ttest_1samp(values.numpy(), 0).confidence_interval(0.95)
    found = statistics.mean(values)
    assert found.value == pytest.approx(float(values.mean()))
    assert (found.low, found.high) == pytest.approx(tuple(expected))


def test_interval_of_an_nll_is_not_below_zero():
    """Student's interval of a mean of 40 values, one of them large, is; the bootstrap's is not."""
    values = torch.full((40,), 1e-3)
    values[0] = 5.0
    assert statistics.mean(values).low < 0
    found = statistics.bounded_mean(values)
    assert 1e-3 <= found.low <= found.value <= found.high <= 5
    assert found.value == pytest.approx(float(values.mean()))


def test_interval_of_a_bounded_mean_approximates_student_interval():
    values = torch.from_numpy(np.random.default_rng(0).normal(3, 2, 2000))
    found, expected = statistics.bounded_mean(values), statistics.mean(values)
    width = expected.high - expected.low
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.12 * width)
    for few in ([2.0], [], [1.0, float("inf")], [1.0, float("nan")]):
        assert np.isnan(statistics.bounded_mean(torch.tensor(few)).low)
    same = statistics.bounded_mean(torch.full((5,), 0.5))
    assert (same.low, same.high) == (0.5, 0.5)


def test_jackknife_interval_is_cut_at_the_lowest_value():
    values = torch.cat([torch.zeros(39), torch.ones(1)]).double()
    cut = statistics.jackknife(lambda x: float(x.mean()), values, lowest=0.0)
    whole = statistics.jackknife(lambda x: float(x.mean()), values)
    assert (cut.low, cut.high) == (0.0, whole.high)
    assert whole.low < 0


def test_intervals_have_nominal_coverage():
    rng = np.random.default_rng(0)
    accuracies = [statistics.proportion(int(k), 200) for k in rng.binomial(200, 0.9, DRAWS)]
    means = [statistics.mean(torch.from_numpy(v)) for v in rng.normal(3, 2, (DRAWS, 12))]
    for estimates, truth in [(accuracies, 0.9), (means, 3)]:
        covered = np.mean([e.low <= truth <= e.high for e in estimates])
        # coverage of a discrete count is not exactly 95 %
        assert covered == pytest.approx(0.95, abs=SLACK + 0.01)


def test_bootstrap_of_a_mean_approximates_student_interval():
    values = np.random.default_rng(0).normal(3, 2, 2000)
    found = statistics.bootstrap(lambda rows: float(values[rows].mean()), len(values), seed=1)
    expected = statistics.mean(torch.from_numpy(values))
    width = expected.high - expected.low
    # standard error of quantiles of 1000 resamples: about 4 % of the width
    assert found.low == pytest.approx(expected.low, abs=0.12 * width)
    assert found.high == pytest.approx(expected.high, abs=0.12 * width)


@pytest.mark.slow
def test_interval_of_a_calibration_error_covers_the_truth():
    rng = np.random.default_rng(0)
    covered = []
    for seed in range(40):
        confidence = 1 - 0.5 * rng.random(1000) ** 2
        right = rng.random(1000) < confidence - 0.05  # over-confident by 5 % everywhere
        found = calibration_error(torch.from_numpy(confidence), torch.from_numpy(right), seed=seed)
        covered.append(found.low <= 0.05 <= found.high)
    # asymptotic, of a biased statistic: coverage below 95 %; a percentile interval has 15 %
    assert np.mean(covered) > 0.85


def test_one_image_has_no_interval():
    found = statistics.mean(torch.tensor([2.0]))
    assert found.document() == {"value": 2.0, "low": None, "high": None, "count": 1}
    assert statistics.proportion(0, 0).document()["value"] is None
