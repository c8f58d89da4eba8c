"""Accuracy, likelihood and calibration, against exact posteriors and torchmetrics."""

import pytest
import torch
from ebmkit_tests.support.mixture_world import Drawn
from torch.distributions import MultivariateNormal

from ebmkit.evaluation import evaluate
from ebmkit.evaluation.calibration import calibration_error, reliability
from ebmkit.evaluation.suite import noisy_batches


def exact_posterior(mixture, y, sigma):
    """p(c|y) of the mixture by ``torch.distributions``."""
    covariance = mixture._axes @ torch.diag_embed(mixture._variances) @ mixture._axes.mT
    covariance = (covariance + covariance.mT) / 2 + sigma**2 * torch.eye(16)
    own = MultivariateNormal(mixture.means.flatten(1), covariance)
    log = own.log_prob(y.flatten(1)[:, None]) + torch.tensor([0.5, 0.3, 0.2]).log()
    return log.softmax(1)


def run(model, images, folder, suite="classify", **options):
    return evaluate(model, images, [suite], folder, plots=False, **options)[suite].document


def test_accuracy_and_likelihood_match_bayes_rule(mixture, mixture_samples, tmp_path):
    document = run(mixture, mixture_samples, tmp_path, noise_levels=[0, 50 / 255])
    assert len(document["against_noise"]) == 2
    for level in document["against_noise"]:
        (batch,) = noisy_batches(mixture_samples, level["sigma"], 0, len(mixture_samples))
        posterior = exact_posterior(mixture, batch.y, level["sigma"])
        right = posterior.argmax(1) == mixture_samples.labels
        assert level["accuracy"]["value"] == pytest.approx(float(right.double().mean()))
        nll = -posterior[torch.arange(len(mixture_samples)), mixture_samples.labels].log().mean()
        assert level["nll"]["value"] == pytest.approx(float(nll), abs=1e-3)
        # the exact model is calibrated, within Monte-Carlo error
        confidence = posterior.max(1).values
        error = (confidence * (1 - confidence)).sum().sqrt() / len(mixture_samples)
        assert abs(level["accuracy"]["value"] - float(confidence.mean())) < 3 * error
    clean, noisy = (level["accuracy"]["value"] for level in document["against_noise"])
    assert document["accuracy"] == clean > noisy + 0.1


def test_confusion_matrix_is_consistent_with_class_accuracies(mixture, mixture_samples, tmp_path):
    document = run(mixture, mixture_samples, tmp_path)
    matrix = torch.tensor(document["confusion"])
    assert matrix.sum(1).tolist() == torch.bincount(mixture_samples.labels).tolist()
    assert float(matrix.trace() / matrix.sum()) == pytest.approx(document["accuracy"])
    shares = [e["value"] for e in document["per_class"].values()]
    assert shares == pytest.approx((matrix.diag() / matrix.sum(1)).tolist())
    assert list(document["per_class"]) == ["left", "right", "both"]
    predicted = exact_posterior(mixture, mixture_samples.images, 0).argmax(1)
    assert int(matrix[0, 2]) == int(((mixture_samples.labels == 0) & (predicted == 2)).sum())


def test_a_class_without_images_has_no_accuracy(mixture, mixture_samples, tmp_path):
    own = mixture_samples.labels < 2
    document = run(
        mixture, Drawn(mixture_samples.images[own], mixture_samples.labels[own]), tmp_path
    )
    assert document["per_class"]["both"] == {"value": None, "low": None, "high": None, "count": 0}


def test_calibration_error_equals_torchmetrics():
    from torchmetrics.functional.classification import multiclass_calibration_error

    logits, labels = 3 * torch.randn(500, 10), torch.randint(10, (500,))
    probabilities = logits.softmax(1)
    confidence, predicted = probabilities.max(1)
    found = calibration_error(confidence, predicted == labels)
    expected = multiclass_calibration_error(probabilities, labels, 10, n_bins=15)
    assert found.value == pytest.approx(float(expected), abs=1e-6)
    assert found.low < found.value


def test_full_confidence_belongs_to_the_last_bin():
    confidence = torch.tensor([1.0, 1.0, 0.99, 0.0])
    right = torch.tensor([True, False, True, False])
    rows = reliability(confidence, right)
    assert [row["count"] for row in rows] == [1, *[0] * 13, 3]
    assert rows[-1]["accuracy"]["value"] == pytest.approx(2 / 3)
    # |2 - 2.99| / 4: within a bin, over- and underconfidence of images cancel
    assert calibration_error(confidence, right).value == pytest.approx(0.99 / 4)


def test_brier_score_and_calibration_of_the_exact_model(mixture, mixture_samples, tmp_path):
    document = run(mixture, mixture_samples, tmp_path, "calibration")
    for level, sigma in zip(document["levels"], (0, 25 / 255), strict=True):
        (batch,) = noisy_batches(mixture_samples, sigma, 0, len(mixture_samples))
        posterior = exact_posterior(mixture, batch.y, sigma)
        one_hot = torch.nn.functional.one_hot(mixture_samples.labels, 3)
        expected = (posterior - one_hot).square().sum(1).mean()
        assert level["brier"]["value"] == pytest.approx(float(expected), abs=1e-4)
        assert level["ece"]["low"] < 0.02  # the exact model is calibrated
    assert document["ece"] == document["levels"][0]["ece"]["value"]
