"""PSNR, SSIM and denoisers, against independent formulas and exact posteriors."""

import math

import numpy as np
import pytest
import torch
from ebmkit_tests.support.mixture_world import Drawn, make_mixture

from ebmkit import GaussianMixture, plots
from ebmkit.evaluation import evaluate
from ebmkit.evaluation.denoise import plot_images, plot_psnr, ssim, ssim_window
from ebmkit.evaluation.suite import noisy_batches

SIGMA = 25 / 255


class DoubledSigma(GaussianMixture):
    """The exact model at twice the given sigma."""

    def forward(self, y, sigma=None):
        return super().forward(y, None if sigma is None else 2 * sigma)


def measure(model, images, folder, **options):
    return evaluate(model, images, ["denoise"], folder, plots=False, **options)["denoise"].document


def noisy(images, sigma=SIGMA):
    (batch,) = noisy_batches(images, sigma, 0, len(images))
    return batch.y


def test_psnr_of_one_image_matches_independent_formulas(mixture, mixture_samples, tmp_path):
    from torchmetrics.functional.image import peak_signal_noise_ratio

    one = mixture_samples.first(1)
    document = measure(mixture, one, tmp_path, sigmas=[SIGMA])
    y = noisy(one)
    clipped = mixture.denoise(y, SIGMA).clamp(0, 1)
    expected = peak_signal_noise_ratio(clipped, one.images, data_range=1.0)
    assert document["psnr"]["25"] == pytest.approx(float(expected), abs=1e-4)
    error = (y.double() - one.images).numpy()
    assert document["psnr_noisy"]["25"] == pytest.approx(
        -10 * np.log10((error**2).mean()), abs=1e-4
    )


def test_noisy_input_has_the_psnr_of_its_sigma(mixture, mixture_samples, tmp_path):
    document = measure(mixture, mixture_samples, tmp_path)
    d = mixture_samples.images[0].numel()
    # -10 log10 of chi^2_d / d has mean -10 / ln 10 (digamma(d/2) - log(d/2)) and standard deviation
    # 10 / ln 10 sqrt(trigamma(d/2))
    bias = -10 / math.log(10) * (torch.digamma(torch.tensor(d / 2.0)).item() - math.log(d / 2))
    deviation = 10 / math.log(10) * torch.polygamma(1, torch.tensor(d / 2.0)).item() ** 0.5
    for key, value in document["psnr_noisy"].items():
        expected = -20 * math.log10(float(key) / 255) + bias
        assert value == pytest.approx(expected, abs=4 * deviation / len(mixture_samples) ** 0.5)


def test_the_noisy_input_is_not_clipped(mixture, tmp_path):
    black = Drawn(torch.zeros(200, 1, 4, 4), None)
    document = measure(mixture, black, tmp_path, sigmas=[SIGMA])
    # clipping would halve the error and add 3 dB
    assert document["psnr_noisy"]["25"] == pytest.approx(-20 * math.log10(SIGMA), abs=0.5)
    clipped = document["denoisers"]["clipped"]["gain"]["25"]["value"]
    assert clipped == pytest.approx(10 * math.log10(2), abs=0.5)


def test_exact_model_reaches_psnr_of_posterior_mean_and_wrong_sigma_does_not(
    mixture, mixture_samples, tmp_path
):
    exact = measure(mixture, mixture_samples, tmp_path / "exact")
    wrong = measure(make_mixture(DoubledSigma), mixture_samples, tmp_path / "wrong")
    for key in ("15", "25", "50"):
        sigma = float(key) / 255
        mean = mixture.posterior_mean(noisy(mixture_samples, sigma), sigma).clamp(0, 1)
        errors = (mean - mixture_samples.images).square().flatten(1).mean(1)
        assert exact["psnr"][key] == pytest.approx(float(-10 * errors.log10().mean()), abs=1e-3)
        assert exact["psnr"][key] > wrong["psnr"][key] + 0.3
        assert exact["psnr"][key] > exact["psnr_noisy"][key] + 1


def test_true_label_gives_higher_psnr_than_predicted_label_and_none(
    mixture, mixture_samples, tmp_path
):
    document = measure(mixture, mixture_samples, tmp_path)
    d = document["denoisers"]
    for key in ("25", "50"):
        true, predicted, plain = (
            d[name]["psnr"][key]["value"]
            for name in ("conditional_true", "conditional_predicted", "unconditional")
        )
        assert true > plain + 0.05
        assert true > predicted
    predicted = mixture.logits(noisy(mixture_samples, 50 / 255), 50 / 255).argmax(1)
    share = float((predicted == mixture_samples.labels).double().mean())
    assert document["predicted_labels"]["50"]["value"] == pytest.approx(share)


def test_gain_is_paired_with_the_noisy_input(mixture, mixture_samples, tmp_path):
    document = measure(mixture, mixture_samples, tmp_path)
    row = document["denoisers"]["unconditional"]
    expected = document["psnr"]["50"] - document["psnr_noisy"]["50"]
    assert row["gain"]["50"]["value"] == pytest.approx(expected, abs=1e-6)
    assert row["gain"]["50"]["low"] > 0


def test_only_blind_models_estimate_sigma(
    mixture, mixture_samples, network, random_images, tmp_path
):
    conditional = measure(mixture, mixture_samples, tmp_path / "told")
    assert "blind" not in conditional["denoisers"]
    assert conditional["estimated_sigma"] == {}
    document = measure(network, random_images, tmp_path / "blind", sigmas=[SIGMA])
    y = noisy(random_images)
    clean = network.denoise_blind(y)[0].clamp(0, 1)
    errors = (clean - random_images.images).square().flatten(1).mean(1)
    expected = float(-10 * errors.log10().mean())
    assert document["denoisers"]["blind"]["psnr"]["25"]["value"] == pytest.approx(
        expected, abs=1e-3
    )
    sigma = network.estimate_sigma(y)
    found = document["estimated_sigma"]["25"]
    assert found["true"] == SIGMA
    assert found["value"] == pytest.approx(float(sigma.mean()), rel=1e-4)
    assert found["std"] == pytest.approx(float(sigma.std()), rel=1e-4)


def test_without_labels_there_is_no_conditional_denoiser(
    mixture, mixture_samples, network, tmp_path
):
    nameless = Drawn(mixture_samples.images, None)
    names = measure(mixture, nameless, tmp_path / "data")["denoisers"]
    assert "conditional_true" not in names
    assert "conditional_predicted" in names  # predicted labels need no labels in the data
    others = Drawn(
        mixture_samples.images, mixture_samples.labels, class_names=("of", "another", "data", "set")
    )
    assert "conditional_true" not in measure(mixture, others, tmp_path / "others")["denoisers"]
    network.card.classifies = False
    images = Drawn(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0]))
    names = measure(network, images, tmp_path / "model")["denoisers"]
    assert set(names) == {"noisy", "clipped", "unconditional", "blind"}


def gaussian_ssim(a, b, side, deviation):
    """SSIM of two gray images by eq. 13 of Wang et al. in NumPy, with reflected borders."""
    at = np.arange(side) - side // 2
    line = np.exp(-(at**2) / (2 * deviation**2))
    window = np.outer(line, line) / line.sum() ** 2
    pad = side // 2
    windows = [
        np.lib.stride_tricks.sliding_window_view(np.pad(image, pad, mode="reflect"), window.shape)
        for image in (a, b)
    ]
    mean = [(w * window).sum((2, 3)) for w in windows]
    var = [(w**2 * window).sum((2, 3)) - m**2 for w, m in zip(windows, mean, strict=True)]
    cov = (windows[0] * windows[1] * window).sum((2, 3)) - mean[0] * mean[1]
    top = (2 * mean[0] * mean[1] + 0.01**2) * (2 * cov + 0.03**2)
    return (top / ((mean[0] ** 2 + mean[1] ** 2 + 0.01**2) * (var[0] + var[1] + 0.03**2))).mean()


@pytest.mark.parametrize(("size", "side"), [((32, 32), 11), ((8, 8), 7), ((8, 20), 7), ((4, 9), 3)])
def test_ssim_uses_reported_window(size, side):
    a, b = torch.rand(2, 1, 1, *size, dtype=torch.float64)
    window = ssim_window(size)
    assert window == {"side": side, "deviation": 1.5 * side / 11}
    expected = gaussian_ssim(a[0, 0].numpy(), b[0, 0].numpy(), **window)
    assert float(ssim(a, b)) == pytest.approx(expected, abs=1e-9)
    assert float(ssim(a, a)) == pytest.approx(1)


def other_warnings(document):
    return [line for line in document["warnings"] if "below the clipped input" not in line]


def test_blind_denoising_below_the_input_gives_warning(network, random_images, tmp_path):
    document = measure(network, random_images, tmp_path)
    worse = [line for line in document["warnings"] if "below the clipped input" in line]
    psnr = {
        name: document["denoisers"][name]["psnr"]["25"]["value"] for name in ("blind", "clipped")
    }
    assert psnr["blind"] < psnr["clipped"]  # an untrained network
    assert f"at 25/255: {psnr['blind']:.2f} dB" in worse[1]
    assert len(worse) == 3


def test_sigma_outside_trained_range_gives_warning(network, random_images, tmp_path):
    network.card.sigma_range = (1 / 255, 30 / 255)
    (line,) = other_warnings(measure(network, random_images.first(3), tmp_path))
    assert "50/255 is outside the range" in line
    network.card.sigma_range = None
    (line,) = other_warnings(measure(network, random_images.first(3), tmp_path))
    assert "not trained to denoise" in line


def test_published_denoiser_of_unknown_range_gives_no_warning(network, random_images, tmp_path):
    network.card.sigma_range, network.card.published_denoiser = None, True
    assert other_warnings(measure(network, random_images.first(3), tmp_path)) == []


def test_sigmas_are_a_setting_of_the_suite(network, random_images, tmp_path):
    document = measure(network, random_images, tmp_path, options={"denoise": {"sigmas": ["7/255"]}})
    assert list(document["psnr"]) == ["7"]


def test_infinite_psnr_is_null_and_gives_warning(mixture, tmp_path):
    class Oracle(type(mixture)):
        def forward(self, y, sigma=None):  # the score is -y / sigma^2
            energies = super().forward(y, sigma)
            return energies._replace(log_density=-0.5 * (y / sigma).square().sum((1, 2, 3)))

    black = Drawn(torch.zeros(3, 1, 4, 4), None)
    document = measure(make_mixture(Oracle), black, tmp_path, sigmas=[0.25])
    # D(y) = y - sigma^2 y / sigma^2 is exactly 0, since sigma is a power of two
    assert list(document["psnr"].values()) == [None]
    assert any("NaN or Inf on 3 images" in line for line in document["warnings"])


@pytest.fixture
def figures(monkeypatch):
    """Figures passed to `save_figure`, which does not save them."""
    found = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, *a, **k: found.append(figure))
    return found


def texts(figure):
    return [t.get_text() for t in figure.findobj(match=lambda a: hasattr(a, "get_text"))]


def test_denoising_grid_prints_psnr_of_each_image(figures, tmp_path):
    clean = torch.rand(2, 3, 8, 8)
    levels = {25 / 255: {"noisy": clean + 0.1, "better": clean + 0.01}}
    plot_images(clean, levels, tmp_path / "grid.png", "a note")
    shown = texts(figures[0])
    assert shown.count("20.0 dB") == 2
    assert shown.count("40.0 dB") == 2
    assert "$\\sigma$ = 25/255" in shown
    assert "a note" in shown
    shown_image = figures[0].axes[0].images[0]
    assert shown_image.get_interpolation() == "nearest"
    assert np.allclose(shown_image.get_array(), clean[0].movedim(0, -1))


def test_psnr_bars_show_values_and_skip_missing_ones(figures, tmp_path):
    estimate = {"value": 30.04, "low": 29.0, "high": 31.0}
    unknown = {"value": None, "low": None, "high": None}
    denoisers = {
        "noisy": {"about": "noisy input", "psnr": {"25": {**estimate, "value": 20.15}}},
        "blind": {"about": "blind", "psnr": {"25": estimate}},
        "failed": {"about": "failed", "psnr": {"25": unknown}},
    }
    denoisers["noisy"]["psnr"]["25"]["low"] = denoisers["noisy"]["psnr"]["25"]["high"] = None
    plot_psnr(denoisers, tmp_path / "bars.png")
    assert {"20.1", "30.0", "25/255"} <= set(texts(figures[0]))
    assert [round(bar.get_height(), 2) for bar in figures[0].axes[0].patches] == [20.15, 30.04]
