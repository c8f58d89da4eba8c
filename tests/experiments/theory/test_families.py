"""Families against the closed-form mixture, scikit-learn, and the likelihood."""

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch.func import grad

from ebmkit.analytic import GaussianMixture
from ebmkit.experiments.theory.families import (
    CentredMeans,
    ClassCovariances,
    NaiveBayes,
    SharedCovariance,
    moments,
)

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
def test_joint_density_and_logits_match_the_mixture(family):
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


def test_shared_covariance_matches_linear_discriminant_analysis():
    x, labels, shares = data()
    family = SharedCovariance(3, 2)
    peer = LinearDiscriminantAnalysis(solver="lsqr").fit(x.numpy(), labels.numpy())
    logits = family.features(x) @ family.weights(family.fit(moments(x, shares)))
    assert np.allclose(logits.softmax(1).numpy(), peer.predict_proba(x.numpy()), atol=1e-10)
