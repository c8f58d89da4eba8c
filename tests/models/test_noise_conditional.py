"""Noise-conditional energies that are normalised at every noise level."""

from __future__ import annotations

import pytest
import torch
from ebmkit_tests.support.preconditioned import Exact

import ebmkit
from ebmkit.analytic import Gaussian, GaussianMixture
from ebmkit.card import ModelCard
from ebmkit.data import load_dataset
from ebmkit.errors import UserError, validated
from ebmkit.models import MLPConfig, ModelConfig, PreconditionedModel
from ebmkit.objectives import TrainingLoss, parse_objective
from ebmkit.training.setup import normalize

MEAN, STD = (0.4, 0.5, 0.6), 0.2


def make_model(seed=0, **options):
    torch.manual_seed(seed)
    config = ModelConfig(
        backbone=MLPConfig(width=16, noise_conditional=True),
        head={"kind": "linear"},
        in_channels=3,
        num_classes=3,
        input_mean=MEAN,
        input_std=STD,
        preconditioned=True,
        **options,
    )
    model = config.build().double()
    for p in model.parameters():  # as after training: nothing is 0
        torch.nn.init.normal_(p, std=0.3)
    return model


def points(count=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 1, 1, dtype=torch.float64, generator=generator)


def test_far_above_the_data_density_and_score_are_the_gaussians():
    model, sigma = make_model(), 1e6 * STD
    y = points() + sigma * torch.randn(6, 3, 1, 1, dtype=torch.float64)
    mean = torch.tensor(MEAN, dtype=torch.float64).reshape(3, 1, 1)
    exact = Gaussian(mean, STD**2)
    # the network adds a share s / sigma = 1e-6 of n, which is of order 1, and of its gradient
    assert torch.allclose(model.log_density(y, sigma), exact.log_density(y, sigma), atol=1e-4)
    assert torch.allclose(sigma * model.score(y, sigma), sigma * exact.score(y, sigma), atol=1e-4)


def test_at_the_start_the_density_is_the_gaussians_at_every_level():
    model = ModelConfig(
        backbone=MLPConfig(width=16, noise_conditional=True),
        head={"kind": "linear"},
        in_channels=3,
        num_classes=3,
        input_mean=MEAN,
        input_std=STD,
        preconditioned=True,
    ).build()
    exact = Gaussian(torch.tensor(MEAN).reshape(3, 1, 1), STD**2)
    y, sigma = points().float(), torch.tensor([0.002, 0.1, 0.3, 1.0, 10.0, 40.0])
    assert torch.allclose(model.log_density(y, sigma), exact.log_density(y, sigma), rtol=1e-5)


def test_without_sigma_it_is_the_lowest_level():
    model, y = make_model(sigma_min=0.01), points()
    for sigma in (0.01, 0.0, 0.005):  # lower levels, too
        assert torch.equal(model.log_density(y), model.log_density(y, sigma))
    assert not torch.equal(model.log_density(y), model.log_density(y, 0.02))


@pytest.mark.parametrize(("sigma", "error"), [(40.0, 1e-3), (5.0, 4e-3)])
def test_the_constant_is_that_of_a_density(sigma, error):
    """The remaining error is of 2000 random images and their noise. At sigma = 5, the mean of the
    residual alone would be wrong by KL = 0.011, mostly as the mean is not that of the data."""
    generator = torch.Generator().manual_seed(3)
    means = torch.tensor([[0.2, 0.1, 0.4], [0.9, 1.1, 1.3], [1.0, 0.0, 0.5]], dtype=torch.float64)
    truth = GaussianMixture(means[..., None, None], 0.01, [0.6, 0.3, 0.1], labels=[0, 1, 1])
    images, labels = truth.sample(2000, generator)
    mean = torch.zeros(3, 1, 1, dtype=torch.float64)
    model = PreconditionedModel(Exact(truth, mean, 0.5, 3.0).double(), (0.0, 0.0, 0.0), 0.5)
    assert not model.normalized
    with pytest.raises(UserError, match=r"tsm.*denoising_likelihood"):
        model.normalized_log_density(images[:2], 0.1)
    model.anchor(images, sigma, labels, generator)
    assert model.normalized
    assert 1e-6 < float(model.constant_error) < error
    for level in (0.01, 0.3, 5.0):
        found = model.normalized_log_density(images[:9], torch.tensor(level))
        expected = truth.normalized_log_density(images[:9], torch.tensor(level))
        torch.testing.assert_close(found, expected, rtol=0, atol=error)
    found = model.normalized_log_density(images[:9], 0.1, labels[:9])
    expected = truth.normalized_log_density(images[:9], 0.1, labels[:9])
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)  # shares of 2000 labels
    with pytest.raises(UserError, match="too low to normalise"):
        model.anchor(images, 2.0)
    with pytest.raises(UserError, match="1 image"):
        model.anchor(images[:1], 40.0)
    loss = TrainingLoss(model, parse_objective("ce+dsm"))
    normalize(loss, model, None, ModelCard(sigma_range=(0.01, 40.0)))
    assert not model.normalized  # dsm alone does not tie the levels, whatever the weights were


def test_noise_levels_outside_the_training_have_no_normalised_density():
    model = make_model()
    model.constant_error.fill_(0.01)
    model.card = ModelCard(sigma_range=(0.002, 40.0))
    model.normalized_log_density(points())
    for sigma in (41.5, 0.001, torch.tensor([0.1, 50.0] * 3)):
        with pytest.raises(UserError, match="outside the range"):
            model.normalized_log_density(points(), sigma)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"backbone": MLPConfig()}, "takes sigma"),
        ({"head": {"kind": "logit"}}, "--head linear"),
        ({"input_std": (0.1, 0.2, 0.3)}, "one number"),
    ],
)
def test_unsuitable_components_are_refused(fields, sentence):
    config = {
        "backbone": MLPConfig(noise_conditional=True),
        "head": {"kind": "linear"},
        "in_channels": 3,
        "preconditioned": True,
    }
    with pytest.raises(UserError, match=sentence):
        validated(ModelConfig, config | fields, "model")


def train(tmp_path, objective, highest="40/1"):
    """A run of one step; the constant is fixed at its end."""
    noise = {"kind": "log-uniform", "min": "0.01", "max": highest}
    options = {
        "model.preconditioned": True,
        "model.backbone.kernel": 1,
        "width": 8,
        "streams": {"denoise": {"noise": noise, "batch_size": 4}, "classify": {"batch_size": 4}},
        "validation_images": 4,
    }
    ebmkit.train(
        "mlp-sigma", "digits", objective, head="linear", steps=1, out=tmp_path / "run",
        progress=False, **options,
    )  # fmt: skip
    return ebmkit.load(tmp_path / "run")


def test_training_normalises_and_saves_the_constant(tmp_path):
    model = train(tmp_path, "ce+dsm+tsm")
    images = load_dataset("digits", split="train")
    pixels = torch.cat([x for x, _ in images.spread(2000).batches(500)])
    assert model.normalized
    assert model.card.log_density_error == pytest.approx(float(model.constant_error))
    assert model.card.log_density_error < 0.01
    assert model.sigma_min == pytest.approx(0.01)
    assert float(model.mean) == pytest.approx(float(pixels.mean()), abs=0.01)
    assert model.std == pytest.approx(float(pixels.std()), abs=0.01)
    # after one step the density is nearly the Gaussian's
    exact = Gaussian(model.mean.reshape(1, 1, 1).expand(1, 8, 8), model.std**2 + 4)
    y = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = model.normalized_log_density(y, 2.0)
    assert torch.allclose(found, exact.log_density(y), atol=1.0)
    labels = torch.bincount(torch.cat([c for _, c in images.spread(1000).batches(500)]))
    torch.testing.assert_close(model.label_shares, labels / labels.sum(), atol=1e-6, rtol=0)


def test_without_an_objective_that_ties_the_levels_there_is_no_constant(tmp_path):
    model = train(tmp_path, "ce+dsm")
    assert not model.normalized
    assert model.card.log_density_error is None


def test_training_to_low_noise_only_says_that_the_density_is_not_normalised(tmp_path):
    with pytest.warns(UserWarning, match="not normalised"):
        model = train(tmp_path, "ce+dsm+diffclf", "1/1")
    assert not model.normalized
