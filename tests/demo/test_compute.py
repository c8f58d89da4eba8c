"""What the demo computes, against the closed form of a mixture and direct calls of the model."""

import numpy as np
import pytest
import torch
from ebmkit_tests.support.sampling_runs import SHAPE, mixture, small_network
from PIL import Image

from ebmkit import UserError
from ebmkit.demo import compute
from ebmkit.models import create_denoiser


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return small_network(tmp_path_factory.mktemp("runs") / "small")


def test_adversarial_gradient_is_the_difference_of_the_denoisers():
    """CDN eq. 9 at the lowest level that the mixture takes, in float64 up to rounding."""
    model = mixture().double()
    x = torch.rand(SHAPE, dtype=torch.float64)
    found = compute.attack(model, x, 1, 0.5).gradient
    sigma = compute.clean_level(model) or 1e-3
    difference = model.posterior_mean(x[None], sigma, 1) - model.posterior_mean(x[None], sigma)
    torch.testing.assert_close(found, difference[0] / sigma**2, rtol=1e-6, atol=1e-6)


def test_attack_reaches_the_label_and_stays_in_its_ball():
    model = mixture()
    dark = torch.full(SHAPE, 0.3)
    found = compute.attack(model, dark, 1, epsilon=1.0)
    assert found.before < np.log(0.5) < found.after  # 4 x 4 pixels: the means are 1.6 apart
    assert float((found.image - dark).norm()) <= 1.0 + 1e-5
    still = compute.attack(model, dark, 1, epsilon=0.0)
    assert torch.equal(still.image, dark)
    assert still.before == still.after


def test_denoisers_equal_those_of_the_mixture():
    """The noise is the difference of the noisy image, unclipped in the middle of the range."""
    model = mixture()
    x, sigma = torch.full(SHAPE, 0.5), 0.05
    found = compute.denoise(model, x, sigma, c=0)
    y = found.noisy[None]
    for image, c in ((found.plain, None), (found.by_label, 0)):
        torch.testing.assert_close(image, model.posterior_mean(y, sigma, c)[0], rtol=0, atol=1e-5)
    assert found.sigma is None  # the mixture is given the level
    assert len(found.psnr) == 3


def test_blind_model_estimates_the_level(network):
    found = compute.denoise(network, torch.rand(1, 8, 8), 0.1)
    assert found.sigma is not None
    assert found.by_label is None


def test_classes_are_those_of_the_model(network):
    x = torch.rand(1, 8, 8)
    found = compute.classify(network, x)
    torch.testing.assert_close(found.log_posterior, network.logits(x[None]).log_softmax(1)[0])
    assert found.log_density == pytest.approx(float(network.log_density(x[None])), rel=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (20, 30), (5, 6), (3, 100)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_image_of_any_size_becomes_one_of_the_training_size(network, size, mode):
    image = Image.new(mode, size, 51 if mode == "L" else (51, 51, 51))
    x = compute.fit_image(network, image)
    torch.testing.assert_close(x, torch.full((1, 8, 8), 0.2))


def test_image_of_the_training_size_is_unchanged(network):
    pixels = np.random.default_rng(0).integers(256, size=(8, 8), dtype=np.uint8)
    x = compute.fit_image(network, Image.fromarray(pixels))
    assert torch.equal((255 * x[0]).round().to(torch.uint8), torch.from_numpy(pixels))


def test_image_of_a_denoiser_keeps_its_shape():
    model = create_denoiser("dncnn", in_channels=3)
    assert compute.fit_image(model, Image.new("RGB", (40, 30))).shape == (3, 30, 40)
    long = 2 * compute.LARGEST
    assert compute.fit_image(model, Image.new("L", (long, 20))).shape == (3, 10, compute.LARGEST)


def test_samples_have_the_label():
    """The mean of the dark class is 0.3 and of the bright one 0.7, at a deviation of 0.1."""
    model = mixture()
    for c, mean in ((0, 0.3), (1, 0.7)):
        drawn = compute.sample(compute.guide(model, None, 1.0), c, count=4)
        assert drawn.shape == (4, *SHAPE)
        assert float(drawn.mean()) == pytest.approx(mean, abs=0.1)  # 64 entries: four errors 0.05


def test_samples_follow_the_seed_and_report_their_steps(network, monkeypatch):
    monkeypatch.setattr(compute, "SAMPLING_STEPS", 5)
    steps = []
    guided = compute.guide(network, None, 1.0)
    first = compute.sample(guided, 1, 2, 0, lambda done, total: steps.append((done, total)))
    assert torch.equal(first, compute.sample(guided, 1, 2, 0))
    assert steps == [(n, 5) for n in range(1, 6)]


def test_model_without_labels_needs_a_guide(tmp_path):
    plain = small_network(tmp_path, num_classes=0)
    with pytest.raises(UserError, match="give a classifier by --guide"):
        compute.guide(plain, None, 1.0)
