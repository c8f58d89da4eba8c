"""Estimated noise levels: calibration, bound, and warnings; against closed forms."""

import json
import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ebmkit
from ebmkit import Energies, EnergyModel
from ebmkit.blind import calibrated, fit_calibration, noise_bound, reliability_warnings
from ebmkit.card import ModelCard
from ebmkit.data.imagesets import ImageSet
from ebmkit.inference import denoise_image
from ebmkit.metrics import psnr
from ebmkit.training import loop, resolve, setup
from ebmkit.training.loop import assemble

VARIANCE = 0.004
LEVELS = np.geomspace(1 / 255, 100 / 255, 60)


class BlindGaussian(EnergyModel):
    """Independent pixels of mean 1/2, whose variance, noise included, is that of the image.

    The score -(y - 1/2) / (v + sigma^2) is exact for many pixels, and the raw estimate is
    sqrt(v + sigma^2).
    """

    def forward(self, y, sigma=None):
        total = (y - 0.5).square().flatten(1)
        log_density = -total.sum(1) / (2 * total.mean(1).detach())
        return Energies(y.new_zeros(len(y), 0), log_density)


def images(count=40, side=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 0.5 + math.sqrt(VARIANCE) * torch.randn(count, 1, side, side, generator=generator)


def image_set():
    return ImageSet((255 * images()).round().clamp(0, 255).byte())


def gaussian(**card):
    model = BlindGaussian()
    model.card = ModelCard(sigma_range=(1 / 255, 100 / 255), steps=1000, channels=1, **card)
    return model


@pytest.fixture(scope="module")
def fitted():
    model = gaussian(image_size=(16, 16))
    setup.calibrate_sigma(model, image_set(), model.card)
    return model


def noisy(x, sigma, seed=1):
    return x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


def test_calibration_inverts_the_raw_estimate():
    raw = np.sqrt(VARIANCE + LEVELS**2)
    card = ModelCard(sigma_calibration=fit_calibration(raw, LEVELS))
    for sigma in (15 / 255, 25 / 255, 50 / 255, 75 / 255):
        level = torch.tensor([math.sqrt(VARIANCE + sigma**2)])
        found = float(calibrated(level, torch.rand(1, 1, 1, 4), card))
        assert found == pytest.approx(sigma, rel=0.1)


def test_calibrated_levels_increase_and_keep_their_factor_outside_the_points():
    points = [(0.1, 0.02), (0.2, 0.1), (0.4, 0.36)]
    card, y = ModelCard(sigma_calibration=points), torch.rand(1, 1, 1, 4)
    raw = torch.tensor([0.05, 0.1, 0.2, 0.4, 0.8])
    expected = torch.tensor([0.01, 0.02, 0.1, 0.36, 0.72])
    torch.testing.assert_close(calibrated(raw, y, card), expected)
    middle = calibrated(torch.tensor([math.sqrt(0.1 * 0.2)]), y, card)
    assert float(middle) == pytest.approx(math.sqrt(0.02 * 0.1))
    assert bool((calibrated(torch.logspace(-4, 4, 99), y, card).diff() > 0).all())
    for old in (None, ModelCard()):
        assert calibrated(raw, y, old) is raw


def test_scores_at_another_image_size_are_bounded_but_not_calibrated():
    """A raw estimate from a score depends on the image size, one from a denoiser does not."""
    card = ModelCard(sigma_calibration=[(0.1, 0.02), (0.4, 0.36)], image_size=(8, 8))
    raw, wild = torch.tensor([0.1]), torch.tensor([9.0])
    small, large = (noisy(torch.zeros(1, 1, n, n), 0.3) for n in (8, 32))
    assert float(calibrated(raw, small, card)) == pytest.approx(0.02)
    assert float(calibrated(raw, large, card)) == pytest.approx(0.1)
    assert float(calibrated(raw, large, card, by_score=False)) == pytest.approx(0.02)
    assert 0.3 < float(calibrated(wild, large, card)) < 0.36  # the bound


def test_estimates_that_are_nan_or_equal_give_a_loadable_card():
    assert fit_calibration([1.0, math.nan], [0.1, 0.2]) == []
    assert fit_calibration([], []) == []
    points = fit_calibration([0.3] * 40, np.linspace(0.1, 0.2, 40))
    assert len(points) == 1
    stored = ModelCard(sigma_calibration=points).model_dump(mode="json")
    assert ModelCard.model_validate(json.loads(json.dumps(stored))).sigma_calibration == points
    with pytest.raises(ValueError, match="must increase"):
        ModelCard(sigma_calibration=[(0.2, 0.1), (0.1, 0.2)])


@pytest.mark.parametrize("side", [8, 32])
def test_the_noise_level_is_within_the_bound_of_the_finest_details(side):
    x = torch.linspace(0, 1, side).expand(2000, 1, side, side)
    bound = noise_bound(noisy(x, 0.1))
    assert float((bound > 0.1).float().mean()) > 0.99
    assert float(bound.mean()) < 0.1 * (1.01 + 3 * math.sqrt(9 / 8) / (side - 1))
    assert noise_bound(torch.rand(2, 1, 1, 8)) is None


def test_calibrated_blind_denoising_is_near_the_exact_one_at_every_level(fitted):
    x = images(seed=3)
    flat = psnr(gaussian().denoise_blind(noisy(x, 10 / 255))[0], x).mean()
    assert flat < psnr(noisy(x, 10 / 255), x).mean()  # without calibration, below the input
    for k in (10, 15, 25, 50, 75):
        sigma = k / 255
        y = noisy(x, sigma)
        exact = 0.5 + VARIANCE / (VARIANCE + sigma**2) * (y - 0.5)
        blind = fitted.denoise_blind(y)[0]
        best, own, noise = (float(psnr(z, x).mean()) for z in (exact, blind, y))
        assert own > max(best - 0.3, noise)


def test_calibration_is_deterministic_and_uses_no_global_random_numbers(fitted):
    model, before = gaussian(image_size=(16, 16)), torch.random.get_rng_state()
    data = image_set()
    setup.calibrate_sigma(model, data, model.card)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.card.sigma_calibration == fitted.card.sigma_calibration
    for changes in ({"steps": 10}, {"sigma_range": None}):
        card = model.card.model_copy(update={"sigma_calibration": [], **changes})
        setup.calibrate_sigma(model, data, card)
        assert card.sigma_calibration == []


def test_no_warning_for_images_like_those_of_training(fitted):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in (15, 25, 50, 75):
            y = noisy(images(8, seed=4), k / 255)
            fitted.denoise(y)
            assert denoise_image(fitted, y[0]).warnings == ()


def test_every_reason_of_an_unreliable_result_is_named(fitted):
    y = noisy(torch.full((1, 1, 16, 16), 0.5), 0.2)
    card = fitted.card

    def reasons(clean, sigma, y=y, by_score=True):
        return reliability_warnings(card, y, clean, torch.tensor([sigma]), by_score)

    half = torch.full_like(y, 0.5)
    assert reasons(half, 0.2) == []
    (low,) = reasons(y, card.sigma_calibration[0][1], by_score=False)
    assert "does not tell levels below" in low
    outside, _ = reasons(half, 0.001)
    assert "0.255/255 is outside the range" in outside
    assert "1/255 to 100/255" in outside
    assert outside.endswith("give sigma if you know it, or use a model trained on such images")
    (much,) = reasons(half, 0.35)
    assert "worse than the input" in much
    ramp = torch.linspace(-0.2, 0.2, 16).expand_as(y)
    (content,) = reasons(y - ramp, 0.2, by_score=False)  # what it removes is a part of the image
    assert "not white noise" in content
    large = torch.full((1, 1, 32, 32), 0.5)
    (size,) = reasons(large, 0.2, noisy(large, 0.2))
    assert "32x32" in size
    assert "16x16" in size
    assert reasons(large, 0.2, noisy(large, 0.2), by_score=False) == []
    assert reliability_warnings(None, y, half + 9, torch.tensor([9.0]), True) == []


def test_python_calls_warn_of_an_image_unlike_those_of_training(fitted):
    smooth = torch.linspace(-0.5, 1.5, 16).expand(1, 1, 16, 16)  # all structure, little noise
    y = noisy(smooth, 10 / 255)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        clean = fitted.denoise(y)
    assert [str(own.message) for own in shown] == list(denoise_image(fitted, y[0]).warnings)
    assert any("worse than the input" in text for text in denoise_image(fitted, y[0]).warnings)
    fast = ebmkit.optimize(fitted)
    with warnings.catch_warnings(record=True) as again:
        warnings.simplefilter("always")
        torch.testing.assert_close(fast.denoise(y), clean)
    assert len(again) == len(shown)
    # the bound keeps the error near the noise; the raw estimate makes the image flat
    assert float(psnr(clean, smooth)) > float(psnr(gaussian().denoise_blind(y)[0], smooth)) + 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted.denoise(y, 10 / 255)


def small_run(**layers):
    config = resolve(
        {
            "backbone": "gradresnet10",
            "model": {"backbone": {"width": 8}},
            "steps": 2,
            "device": "cpu",
            "streams": {"classify": {"batch_size": 8}, "denoise": {"batch_size": 8}},
        },
        layers,
    )
    return assemble(config)


@pytest.mark.parametrize("held_out", [0, 16])
def test_training_ends_with_a_calibration_and_the_same_weights(monkeypatch, held_out):
    plain = small_run(validation_images=held_out).fit()
    assert plain.card.sigma_calibration == []  # shorter than MIN_STEPS
    monkeypatch.setattr(setup, "MIN_STEPS", 1)
    monkeypatch.setattr(loop, "warn_if_at_chance", lambda *a: None)
    monkeypatch.setattr(setup, "CALIBRATION_IMAGES", 6)
    trainer = small_run(validation_images=held_out)
    used, fit = [], setup.fit_calibration
    monkeypatch.setattr(setup, "fit_calibration", lambda *a: used.append(a) or fit(*a))
    model = trainer.fit()
    assert len(used[0][0]) == 6 * setup.CALIBRATION_LEVELS
    assert 1 < len(model.card.sigma_calibration) <= 16
    for name, value in model.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name


def test_a_run_that_a_callback_ends_is_calibrated_too(monkeypatch):
    monkeypatch.setattr(setup, "MIN_STEPS", 1)
    monkeypatch.setattr(setup, "CALIBRATION_IMAGES", 6)
    trainer = small_run(validation_images=0, steps=3)
    trainer.callbacks = [SimpleNamespace(on_step=lambda own: own.step == 2 and own.stop())]
    assert len(trainer.fit().card.sigma_calibration) > 1
    trainer.save()  # as after Ctrl-C: the weights will change
    assert (trainer.step, trainer.card.sigma_calibration) == (2, [])


@pytest.mark.slow
def test_blind_denoising_by_the_quick_starts_model(shared, tmp_path):
    """At no noise level below the clipped input, near "sigma given", with warnings of photos."""
    from PIL import Image

    from ebmkit.data import load_dataset
    from ebmkit.evaluation import evaluate

    model = quick_start().eval().requires_grad_(False)
    test = load_dataset("digits", None, "test")
    sigmas = [k / 255 for k in (5, 10, 15, 25, 50, 75)]
    found = evaluate(model, test, ["denoise"], tmp_path, plots=False, sigmas=sigmas)
    denoisers = found["denoise"].document["denoisers"]
    blind, clipped, given = (
        {k: e["value"] for k, e in denoisers[name]["psnr"].items()}
        for name in ("blind", "clipped", "unconditional")
    )
    for key in blind:
        assert blind[key] >= clipped[key], key
    for key in ("25", "50"):
        assert blind[key] > given[key] - 0.3
    for path in sorted((shared / "data/denoise/Set12").glob("*.png"))[:3]:
        image = torch.from_numpy(np.asarray(Image.open(path)) / 255).float()[None, :96, :96]
        for k in (5, 25, 50):
            denoised = denoise_image(model, noisy(image, k / 255))
            assert any("worse than the input" in text for text in denoised.warnings)


def quick_start():
    return assemble(resolve({"device": "cpu"})).fit()
