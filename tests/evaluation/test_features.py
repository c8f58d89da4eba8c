"""Distances of samples from real images, against closed forms, scipy and torchmetrics."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from ebmkit import UserError
from ebmkit.evaluation.features import (
    frechet_distance,
    inception_score,
    kernel_distance,
    mean_distance,
    precision_recall,
)
from ebmkit.evaluation.statistics import jackknife


class IdentityFeatures(nn.Module):
    """An identity feature extractor for torchmetrics."""

    num_features = 6

    def forward(self, x):
        return x


def draws(count, dim=6, seed=0, mean=0.0, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    mixing = torch.linspace(0.5, 1.5, dim)
    return mean + spread * mixing * torch.randn(count, dim, generator=g, dtype=torch.float64)


def test_frechet_distance_of_gaussians_matches_closed_form():
    """Sum of squared differences of means and standard deviations; 2 % is 3 standard errors."""
    a, b = draws(200_000, 3, 1), draws(200_000, 3, 2, mean=0.5, spread=1.4)
    deviations = torch.linspace(0.5, 1.5, 3)
    exact = 3 * 0.5**2 + float((0.4 * deviations).square().sum())
    assert frechet_distance(a, b) == pytest.approx(exact, rel=0.02)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


IGNORE_TORCHMETRICS_WARNINGS = pytest.mark.filterwarnings(
    "ignore:Metric .* will save all extracted features", "ignore:std.*degrees of freedom"
)


@pytest.mark.parametrize("count", [50, 5])
def test_frechet_distance_agrees_with_scipy_and_torchmetrics(count):
    """Also for singular covariances, from 5 draws in 6 dimensions."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    a, b = draws(count, seed=1), draws(count, seed=2, mean=0.3) @ torch.eye(6).double().roll(1, 0)
    found = frechet_distance(a, b)
    metric = FrechetInceptionDistance(feature=IdentityFeatures()).set_dtype(torch.float64)
    metric.update(b, real=True)
    metric.update(a, real=False)
    # eigenvalues of 0 are rounded to 1e-16, and their square roots to 1e-8
    assert found == pytest.approx(float(metric.compute()), abs=1e-6)
    s, t = (np.cov(x.numpy().T) for x in (a, b))
    root = scipy.linalg.sqrtm(s @ t + 1e-14 * np.eye(6)).real
    by_scipy = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * root)
    assert found == pytest.approx(float(by_scipy), abs=1e-5)


@IGNORE_TORCHMETRICS_WARNINGS
def test_kernel_distance_is_unbiased_and_equals_torchmetrics():
    from torchmetrics.image.kid import KernelInceptionDistance

    a, b = draws(9, seed=1), draws(9, seed=2, mean=0.4)
    metric = KernelInceptionDistance(feature=IdentityFeatures(), subsets=1, subset_size=9)
    metric.set_dtype(torch.float64)
    metric.update(b, real=True)
    metric.update(a, real=False)
    assert kernel_distance(a, b).value == pytest.approx(float(metric.compute()[0]), rel=1e-6)
    found = [kernel_distance(draws(40, seed=k), draws(40, seed=1000 + k)).value for k in range(300)]
    mean, error = np.mean(found), np.std(found) / math.sqrt(300)
    assert abs(mean) < 4 * error
    assert min(found) < 0
    apart = kernel_distance(draws(2001, seed=1), draws(2001, seed=2, mean=0.3))
    assert 0 < apart.low < apart.value < apart.high


def test_precision_and_recall_of_constructed_sets():
    real = draws(300, 2, 1)
    same = precision_recall(real, real)
    assert [e.value for e in same] == [1, 1]
    far = precision_recall(real + 100, real)
    assert [e.value for e in far] == [0, 0]
    modes = torch.cat([draws(150, 2, 1), draws(150, 2, 2) + 100])  # samples cover one of two
    one = precision_recall(draws(300, 2, 3), modes[torch.randperm(300)])
    assert one[0].value > 0.8
    assert one[1].value == pytest.approx(0.5, abs=0.05)
    with pytest.raises(UserError, match="more than 3 samples"):
        precision_recall(real[:3], real)


def test_radius_of_precision_is_distance_to_third_neighbour():
    """Real points at 0, 1, 2, 3: the radius is 3 at 0 and 3, and 2 at 1 and 2."""
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    samples = torch.tensor([[-3.01], [-2.9], [5.9], [6.1]])
    assert precision_recall(samples, real)[0].value == 0.5


@IGNORE_TORCHMETRICS_WARNINGS
def test_inception_score_is_one_to_number_of_classes_and_equals_torchmetrics():
    from torchmetrics.image.inception import InceptionScore

    assert inception_score(torch.ones(10, 4)) == pytest.approx(1)
    assert inception_score(1000 * torch.eye(4).repeat(5, 1)) == pytest.approx(4)
    logits = draws(200, 6, 1)
    metric = InceptionScore(feature=IdentityFeatures(), splits=1).set_dtype(torch.float64)
    metric.update(logits)
    assert inception_score(logits) == pytest.approx(float(metric.compute()[0]), rel=1e-6)


def test_jackknife_of_a_difference_of_means():
    """Variances of both means add up; the quantile of Student's t with 9 degrees is 2.262."""
    a, b = draws(5000, 1, 1), draws(3000, 1, 2, mean=1.0)
    found = jackknife(lambda x, y: float(x.mean() - y.mean()), a, b)
    error = math.sqrt(float(a.var()) / 5000 + float(b.var()) / 3000)
    assert found.value == pytest.approx(float(a.mean() - b.mean()))
    # the standard error is estimated from 20 groups
    assert (found.high - found.low) / 2 == pytest.approx(2.262 * error, rel=0.6)
    few = jackknife(lambda x: float(x.mean()), a[:10])
    assert math.isnan(few.low)


def test_mean_distance():
    points = torch.tensor([[0.0, 0], [3, 4], [0, 0]])
    assert mean_distance(points) == pytest.approx(10 / 3)
    assert math.isnan(mean_distance(points[:1]))
