"""Gaussians of the classes as a reference density, against the closed-form mixture."""

from __future__ import annotations

import pytest
import torch
from ebmkit_tests.support.preconditioned import Exact

import ebmkit
from ebmkit.analytic import GaussianMixture
from ebmkit.errors import UserError, validated
from ebmkit.models import MLPConfig, ModelConfig, PreconditionedModel, noise_conditional
from ebmkit.models.class_reference import FLOOR, ClassReference

SHAPE, STD = (3, 2, 1), 0.3


def labelled_images(count=300, classes=3):
    """Images of a labelled mixture with full covariances, and their labels; float64."""
    generator = torch.Generator().manual_seed(0)
    roots = 0.1 * torch.randn(classes, 6, 6, dtype=torch.float64, generator=generator)
    means = torch.rand(classes, *SHAPE, dtype=torch.float64, generator=generator)
    truth = GaussianMixture(means, roots @ roots.mT + 1e-3 * torch.eye(6), [0.5, 0.3, 0.2])
    return truth, *truth.sample(count, generator)


def fitted(rank, images, labels, floor=0.0):
    reference = ClassReference(3, SHAPE, rank).double()
    assert not reference.fitted
    reference.fit(images, labels, floor)
    assert reference.fitted
    return reference


@pytest.mark.parametrize(("rank", "floor"), [(6, 0.05), (2, 0.0), (9, 0.01)])
def test_it_is_the_mixture_of_the_moments_of_each_class(rank, floor):
    _, images, labels = labelled_images()
    reference = fitted(rank, images, labels, floor)
    means, covariances = [], []
    for c in range(3):
        x = images[labels == c].flatten(1)
        values, axes = torch.linalg.eigh(torch.cov(x.T))
        values[: max(0, 6 - rank)] = 0.0
        rest = (torch.cov(x.T).trace() - values.sum()) / 6
        covariances.append((axes * values) @ axes.T + (rest + floor**2) * torch.eye(6))
        means.append(x.mean(0).reshape(SHAPE))
    weights = torch.bincount(labels).tolist()
    expected = GaussianMixture(torch.stack(means), torch.stack(covariances), weights)
    y = torch.randn(7, *SHAPE, dtype=torch.float64)
    for sigma in (0.01, 0.3, 40.0):
        found = reference.log_joint(y, torch.full((7,), sigma, dtype=torch.float64))
        # the Gaussians are stored in float32
        torch.testing.assert_close(found, expected.log_joint(y, sigma), rtol=1e-4, atol=1e-3)
    x = expected.sample(200_000, torch.Generator().manual_seed(1))[0].flatten(1)
    mean, rows, rest = reference.moments()
    torch.testing.assert_close(mean, x.mean(0), rtol=0, atol=5e-3)
    covariance = rows.T @ rows + rest * torch.eye(6)
    torch.testing.assert_close(covariance, torch.cov(x.T), rtol=0, atol=2e-3)


def make_model(classes=3, **options):
    torch.manual_seed(0)
    return ModelConfig(
        backbone=MLPConfig(width=16, noise_conditional=True, kernel=1),
        head={"kind": "linear"},
        in_channels=3,
        num_classes=classes,
        input_mean=0.5,
        input_std=STD,
        preconditioned=True,
        reference_size=SHAPE[1:],
        reference_rank=6,
        **options,
    ).build()


def test_at_high_noise_density_labels_and_scores_are_the_gaussians():
    truth, images, labels = labelled_images(20_000)
    model = make_model().double()
    model.fit_reference(images.float(), labels)
    for p in model.parameters():  # as after training: nothing is 0
        torch.nn.init.normal_(p, std=0.3)
    generator = torch.Generator().manual_seed(1)
    for sigma, error in ((300 * STD, 2e-3), (30 * STD, 2e-2)):
        y = images[:9] + sigma * torch.randn(images[:9].shape, generator=generator).double()
        # at gamma = 1 the network adds the share (s / sigma)^2 of n
        torch.testing.assert_close(
            model.log_density(y, sigma), truth.log_density(y, sigma), rtol=0, atol=error
        )
        found, expected = model.score(y, sigma), truth.score(y, sigma)
        torch.testing.assert_close(sigma * found, sigma * expected, rtol=0, atol=error)
    quiet = make_model().double()
    with torch.no_grad():
        for p in quiet.network.parameters():
            p.zero_()
    quiet.fit_reference(images.float(), labels)
    y = images[:500] + 2 * torch.randn(500, *SHAPE, dtype=torch.float64, generator=generator)
    found, expected = quiet(y, 2.0).log_posterior().exp(), truth(y, 2.0).log_posterior().exp()
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03)
    assert (expected.max(1).values > 0.6).any()


def test_at_low_noise_the_network_classifies():
    _, images, labels = labelled_images()
    model = make_model(sigma_min=1e-4)
    model.fit_reference(images.float(), labels)
    y, sigma = images.float(), torch.full((300,), 1e-4)
    network = model.network((y - 0.5) / STD, sigma).logits
    torch.testing.assert_close(model(y, 1e-4).logits, network, rtol=0, atol=1e-3)
    assert float(model.reference.log_joint(y, sigma).std(1).max()) > 10


class Residual(Exact):
    """The network with which a model with ``reference`` is ``truth``, up to a factor."""

    def __init__(self, truth, reference):
        super().__init__(truth, torch.full(SHAPE, 0.5, dtype=torch.float64), STD)
        self.reference = reference

    def forward(self, u, sigma=None):
        tau = (sigma**2 + STD**2).sqrt()
        y = 0.5 + tau[:, None, None, None] * u
        own, reference = self.truth(y, sigma), self.reference.log_joint(y, sigma).logsumexp(1)
        n = own.log_density - reference + 3.0
        return own._replace(log_density=n * (tau / STD) ** 3 * sigma / tau)


def test_the_constant_is_that_of_a_density():
    """As the moments agree, nothing but the floor of the Gaussians is between p and q."""
    truth, images, labels = labelled_images(2000)
    reference = fitted(6, images, labels, FLOOR * STD)
    model = PreconditionedModel(Residual(truth, reference), 0.5, STD, reference=reference).double()
    model.anchor(images, 3.0, labels, torch.Generator().manual_seed(2))
    assert 0 < float(model.constant_error) < 5e-3
    for level in (0.05, 0.5, 3.0):
        found = model.normalized_log_density(images[:9], torch.tensor(level))
        expected = truth.normalized_log_density(images[:9], torch.tensor(level))
        torch.testing.assert_close(found, expected, rtol=0, atol=float(model.constant_error))


@pytest.mark.parametrize("rank", [0, 1])
def test_the_constant_contains_the_difference_of_the_covariances(rank, monkeypatch):
    """Two large variances, of which the Gaussian has none, or one. At 5 standard deviations of the
    data the divergence is 0.020 and 0.011 nats to second order."""
    monkeypatch.setattr(noise_conditional, "ANCHOR_DRAWS", 200_000)
    scale = torch.tensor([6.0, 6.0, 1e-3, 1e-3, 1e-3, 1e-3], dtype=torch.float64)
    half = torch.full((1, *SHAPE), 0.5, dtype=torch.float64)
    truth = GaussianMixture(half, torch.diag(STD**2 * scale)[None], labels=[0])
    images = truth.sample(1000, torch.Generator().manual_seed(0))[0]
    network, reference = Exact(truth, half[0], STD, 3.0), None
    if rank:
        reference = ClassReference(1, SHAPE, rank).double()
        reference.fit(images, None, 0.0)
        network = Residual(truth, reference)
    model = PreconditionedModel(network, 0.5, STD, reference=reference).double()
    model.anchor(images, 5 * STD, None, torch.Generator().manual_seed(1))
    found = model.normalized_log_density(images[:5], 0.1)
    expected = truth.normalized_log_density(images[:5], 0.1)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.004)


def test_training_fits_the_gaussians_and_saves_them(tmp_path):
    noise = {"kind": "log-uniform", "min": "0.01", "max": "40/1"}
    options = {
        "model.preconditioned": True,
        "model.reference_rank": 20,
        "model.backbone.kernel": 1,
        "width": 8,
        "streams": {"denoise": {"noise": noise, "batch_size": 4}, "classify": {"batch_size": 4}},
        "validation_images": 4,
        "optimizer.ema": 0.9,
    }
    ebmkit.train(
        "mlp-sigma", "digits", "ce+dsm+tsm", head="linear", steps=1, out=tmp_path / "run",
        progress=False, **options,
    )  # fmt: skip
    model = ebmkit.load(tmp_path / "run")
    assert model.normalized
    assert model.reference.fitted
    test = ebmkit.data.load_dataset("digits", split="test")
    y, labels = (torch.cat(parts) for parts in zip(*test.batches(500), strict=True))
    y = y + 0.3 * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    # the Gaussians alone: 94 % (quadratic discriminant analysis); guessing: 10 %
    assert (model(y, 0.3).logits.argmax(1) == labels).float().mean() > 0.85
    with pytest.raises(UserError, match=r"\(1, 9, 8\).*reference_rank=0"):
        model.log_density(torch.zeros(2, 1, 9, 8), 0.3)


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="for preconditioned models"):
        validated(ModelConfig, {"reference_rank": 3}, "model")
    _, images, labels = labelled_images()
    with pytest.raises(UserError, match="2 of 3 classes"):
        ClassReference(3, SHAPE, 2).fit(images[labels < 2], labels[labels < 2], 0.1)
    with pytest.raises(UserError, match="1 image"):
        ClassReference(1, SHAPE, 2).fit(images[:1], None, 0.1)
