"""Families against the closed-form mixture, scikit-learn, and their own likelihood."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from torch.func import grad

from ebmkit.analytic import GaussianMixture
from ebmkit.experiments.theory.families import (
    CentredMeans,
    ClassCovariances,
    NaiveBayes,
    SharedCovariance,
    moments,
)
from ebmkit.experiments.theory.regression import softmax_regression

FAMILIES = [SharedCovariance(3, 2), ClassCovariances(3, 2), NaiveBayes(3, 2), CentredMeans(3, 2)]
NAMES = [type(family).__name__ for family in FAMILIES]


def data(count=90, classes=3, dim=2, overlap=1.0):
    labels = torch.arange(count) % classes
    x = torch.randn(count, dim, dtype=torch.float64) * overlap
    x = x + 0.8 * torch.randn(classes, dim, dtype=torch.float64)[labels]
    return x, labels, torch.nn.functional.one_hot(labels, classes).double() / count


@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
def test_fit_maximises_the_likelihood(family):
    x, _, shares = data()
    shares = shares * torch.rand(90, 1, dtype=torch.float64)  # unequal classes
    shares = shares / shares.sum()
    theta = family.parameters(family.fit(moments(x, shares)))

    def likelihood(t):
        return (shares * family.log_joint(t, x)).sum()

    assert len(theta) == family.num_parameters
    assert grad(likelihood)(theta).abs().max() < 1e-12
    best = likelihood(theta)
    for _ in range(20):
        assert likelihood(theta + 1e-2 * torch.randn_like(theta)) < best


@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
def test_joint_density_is_that_of_the_mixture_and_gives_the_logits(family):
    x, _, shares = data()
    model = family.fit(moments(x, shares))
    theta = family.parameters(model)
    mixture = GaussianMixture(model.means, model.covariances, model.log_prior.exp())
    assert torch.allclose(family.log_joint(theta, x), mixture(x).log_joint())
    logits = family.features(x) @ family.weights(model)
    assert torch.allclose(logits.log_softmax(1), mixture(x).logits.log_softmax(1))
    for part, again in zip(model, family.gaussians(theta), strict=True):
        assert torch.allclose(part, again)


@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
def test_every_softmax_regression_is_the_conditional_of_a_member(family):
    x, _, _ = data()
    features = family.features(x)
    weights = torch.randn(features.shape[1], 3, dtype=torch.float64)
    theta = family.parameters(family.member(weights))
    found = family.log_joint(theta, x).log_softmax(1)
    assert torch.allclose(found, (features @ weights).log_softmax(1))


def test_shared_covariance_is_discriminant_analysis():
    x, labels, shares = data()
    family = SharedCovariance(3, 2)
    peer = LinearDiscriminantAnalysis(solver="lsqr").fit(x.numpy(), labels.numpy())
    logits = family.features(x) @ family.weights(family.fit(moments(x, shares)))
    assert np.allclose(logits.softmax(1).numpy(), peer.predict_proba(x.numpy()), atol=1e-10)


@pytest.mark.parametrize("classes", [2, 3])
def test_softmax_regression_is_that_of_scikit_learn(classes):
    x, labels, shares = data(60, classes)
    family = ClassCovariances(classes, 2)
    found = softmax_regression(family.features(x)[None], shares[None])
    peer = LogisticRegression(C=np.inf, tol=1e-12, max_iter=10_000, solver="newton-cg")
    peer.fit(family.features(x)[:, 1:].numpy(), labels.numpy())
    assert found.solved.all()
    probabilities = (family.features(x) @ found.weights[0]).softmax(1).numpy()
    assert np.allclose(
        probabilities, peer.predict_proba(family.features(x)[:, 1:].numpy()), atol=1e-6
    )


def test_many_small_sets_are_solved_exactly_where_they_are_not_separable():
    """Separability by linear programming; both outcomes must occur, whatever Newton starts at."""
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
