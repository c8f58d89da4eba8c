"""Fits: softmax regression is exact; measured errors agree with the constants."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from sklearn.linear_model import LogisticRegression

from ebmkit.experiments.theory.families import (
    SETTINGS,
    ClassCovariances,
    NaiveBayes,
    Setting,
    SharedCovariance,
    Truth,
)
from ebmkit.experiments.theory.fits import (
    ExcessError,
    Point,
    discriminative,
    fit_bias,
    fit_variance,
    generative,
    measure,
    softmax_regression,
)

BY_NAME = {setting.name: setting for setting in SETTINGS}


def limits(setting, step=0.3):
    nodes = setting.truth.nodes(step)
    gen, dis = generative(setting.family, nodes), discriminative(setting.family, nodes)
    return gen, dis, setting.family.weights(setting.family.gaussians(dis.theta))


@pytest.mark.parametrize("name", [s.name for s in SETTINGS if s.truth.dim == 2])
def test_quadrature_grid_of_the_excess_error_is_fine_enough(name):
    """The error at the limit and away from it, against a finer and wider grid."""
    setting = BY_NAME[name]
    weights = setting.family.weights(generative_limit(setting))
    around = torch.stack([weights, 1.3 * weights, 0.7 * weights])
    assert (
        ExcessError(setting)(around) - ExcessError(setting, 0.08, 9.0)(around)
    ).abs().max() < 1e-7


def generative_limit(setting):
    nodes = setting.truth.nodes(0.3)
    return setting.family.gaussians(generative(setting.family, nodes).theta)


def test_excess_error_in_twenty_dimensions_matches_samples():
    setting = BY_NAME["many-parameters"]
    weights = torch.randn(1, 21, 2, dtype=torch.float64) / 4
    weights[0, 1, 0] += 2
    x, _ = setting.truth.sample(40_000)
    log_p = setting.truth.logits(x).log_softmax(1)
    log_q = (setting.family.features(x) @ weights[0]).log_softmax(1)
    each = (log_p.exp() * (log_p - log_q)).sum(1)
    spread = float(each.std()) / len(each) ** 0.5
    assert float(ExcessError(setting)(weights)[0]) == pytest.approx(
        float(each.mean()), abs=4 * spread
    )


@pytest.mark.slow
def test_measured_v_of_a_nonsingular_family_matches_the_constants():
    """n (excess - b) tends to v / 2: the number of parameters for the discriminative fit."""
    setting = BY_NAME["centred-means"]
    gen, dis, start = limits(setting)
    points = [measure(setting, n, 160, start) for n in (800, 1600, 3200)]
    for k, expansion in enumerate((gen, dis)):
        found = fit_variance([p[k] for p in points], expansion.bias)
        assert found.error < 0.12 * expansion.variance
        assert abs(found.value - expansion.variance) < 4 * found.error


def test_measured_misspecified_v_gen_is_the_one_with_drift():
    """Strongly correlated features and naive Bayes: equation (26) is rejected, v is not."""
    eye = torch.tensor([[1.0, 0.7], [0.7, 1.0]], dtype=torch.float64)
    truth = Truth(
        torch.tensor([[0.7, 0.5], [-0.7, -0.5]], dtype=torch.float64),
        eye.expand(2, 2, 2).contiguous(),
        torch.full((2,), 0.5, dtype=torch.float64),
        torch.arange(2),
    )
    setting = Setting("correlated", "", "", truth, NaiveBayes(2, 2), False, 25)
    gen, _, start = limits(setting)
    n = 400
    point = measure(setting, n, 1200, start)[0]
    found, error = 2 * n * (point.excess - gen.bias), 2 * n * point.error
    assert abs(found - gen.variance) < 4 * error
    assert found - gen.formula > 5 * error


def test_measured_errors_depend_on_the_seed_only():
    setting = BY_NAME["two-humps"]
    _, _, start = limits(setting)
    once, again, other = (measure(setting, 100, 20, start, seed) for seed in (3, 3, 4))
    assert once == again
    assert once != other


def test_sets_without_a_fit_are_counted_and_skipped():
    setting = BY_NAME["many-parameters"]
    gen, dis = measure(setting, 30, 40, torch.zeros(21, 2, dtype=torch.float64))
    assert gen.without == 0
    assert dis.without > 30  # 21 directions separate 30 samples nearly always
    alone, _ = measure(BY_NAME["two-humps"], 2, 40, torch.zeros(3, 2, dtype=torch.float64))
    assert alone.without == 40  # two samples have no pooled covariance


def test_least_squares_recovers_exact_expansions():
    exact = [Point(n, 100, 0, 0.02 + 3 / n + 40 / n**2, 1 / n) for n in (100, 200, 400, 800)]
    assert fit_bias(exact).value == pytest.approx(0.02, abs=1e-12)
    assert fit_variance(exact, 0.02).value == pytest.approx(6, abs=1e-9)
    alone = fit_variance([Point(100, 100, 0, 0.03, 1e-3), Point(200, 400, 0, 0.015, 2.5e-4)], 0.0)
    # 2 n e is 6 at both, with errors 0.2 and 0.1: the line's value at 1/n = 0 is 2 * b - a.
    assert alone.value == pytest.approx(6)
    assert alone.error == pytest.approx((4 * 0.1**2 + 0.2**2) ** 0.5)


@pytest.mark.parametrize("classes", [2, 3])
def test_softmax_regression_matches_scikit_learn(classes):
    labels = torch.arange(60) % classes
    x = torch.randn(60, 2, dtype=torch.float64)
    x = x + 0.8 * torch.randn(classes, 2, dtype=torch.float64)[labels]
    shares = torch.nn.functional.one_hot(labels, classes).double() / 60
    family = ClassCovariances(classes, 2)
    found = softmax_regression(family.features(x)[None], shares[None])
    peer = LogisticRegression(C=np.inf, tol=1e-12, max_iter=10_000, solver="newton-cg")
    peer.fit(family.features(x)[:, 1:].numpy(), labels.numpy())
    assert found.solved.all()
    probabilities = (family.features(x) @ found.weights[0]).softmax(1).numpy()
    assert np.allclose(
        probabilities, peer.predict_proba(family.features(x)[:, 1:].numpy()), atol=1e-6
    )


def test_small_sets_are_solved_exactly_if_not_separable():
    """Linear programming decides separability; both outcomes occur. Newton starts at random."""
    count, size = 100, 12
    x = torch.randn(count, size, 2, dtype=torch.float64)
    labels = torch.arange(size) % 2
    x[:, labels == 0, 0] += 1.6
    family = SharedCovariance(2, 2)
    shares = torch.nn.functional.one_hot(labels, 2).double().expand(count, size, 2) / size
    features = family.features(x)
    found = softmax_regression(features, shares, torch.randn(3, 2, dtype=torch.float64))
    signed = features * (1 - 2 * labels)[:, None]
    separable = [
        linprog([0, 0, 0], A_ub=-one.numpy(), b_ub=-np.ones(size), bounds=(None, None)).status == 0
        for one in signed
    ]
    assert 15 < sum(separable) < 85
    assert found.solved.tolist() == [not s for s in separable]
    solved = found.solved
    probabilities = (features @ found.weights).softmax(2)
    slopes = features.mT @ (probabilities / size - shares)
    assert slopes[solved].abs().max() < 1e-8
