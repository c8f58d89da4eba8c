"""Suite ``corruptions``: formulas, published constants and measures."""

import json
import math

import numpy as np
import pytest
import torch
from ebmkit_tests.support.mixture_world import Drawn
from ebmkit_tests.support.two_processes import run_shared
from PIL import Image
from rich.console import Console
from sklearn.datasets import load_sample_image
from torchvision.transforms.v2.functional import gaussian_blur

from ebmkit import UserError, plots
from ebmkit.evaluation import EvaluationContext, evaluate, tables
from ebmkit.evaluation.corruptions import (
    CORRUPTIONS,
    CORRUPTIONS_SUITE,
    CorruptionsConfig,
    confidence_slope,
    constants_for,
    corrupt,
)
from ebmkit.evaluation.statistics import Estimate
from ebmkit.metrics import psnr
from ebmkit.models.denoisers import DirectDenoiser


@pytest.fixture(scope="module")
def photo():
    """A real photograph, (1, 3, 224, 224)."""
    pixels = torch.from_numpy(load_sample_image("flower.jpg").copy())
    return pixels[100:324, 200:424].movedim(-1, 0)[None].float() / 255


@pytest.fixture(scope="module")
def small(photo):
    """The photograph at 32x32."""
    return torch.nn.functional.avg_pool2d(photo, 7)


FLAT = torch.full((1, 1, 300, 300), 0.4)
VALUES = FLAT.numel()


def assert_moments(found, mean, variance):
    """Compare mean and variance within 5 standard errors of approximately normal noise."""
    assert float(found.mean()) == pytest.approx(mean, abs=5 * math.sqrt(variance / VALUES))
    assert float(found.var()) == pytest.approx(variance, rel=5 * math.sqrt(2 / VALUES))


@pytest.mark.parametrize("photons", [500, 75])
def test_poisson_noise_counts_photons(photons):
    found = corrupt(FLAT, "poisson", photons)
    assert_moments(found, 0.4, 0.4 / photons)
    counts = found * photons
    assert torch.allclose(counts, counts.round(), atol=1e-3)


def test_speckle_deviation_is_proportional_to_brightness():
    for value in (0.4, 0.2):
        found = corrupt(torch.full_like(FLAT, value), "speckle", 0.2)
        assert_moments(found, value, (0.2 * value) ** 2)
    assert not corrupt(torch.zeros(1, 1, 9, 9), "speckle", 0.2).any()


def test_salt_and_pepper_replaces_requested_share_of_values():
    found = corrupt(FLAT, "salt-and-pepper", 0.07)
    for colour in (0, 1):
        share = float((found == colour).double().mean())
        assert share == pytest.approx(0.035, abs=5 * math.sqrt(0.035 / VALUES))
    assert set(found.unique().tolist()) == {0.0, FLAT[0, 0, 0, 0].item(), 1.0}
    # channels of a colour image are replaced independently, as by scikit-image's random_noise
    colour = corrupt(FLAT.expand(-1, 3, -1, -1), "salt-and-pepper", 0.07)
    assert float((colour == 0.4).all(dim=1).double().mean()) == pytest.approx(0.93**3, abs=0.01)


def test_blur_is_gaussian(photo):
    """torchvision reflects at borders and `corrupt` replicates; the interiors agree."""
    found = corrupt(photo, "blur", 2.0)
    expected = gaussian_blur(photo, 17, 2.0)
    assert torch.allclose(found[..., 8:-8, 8:-8], expected[..., 8:-8, 8:-8], atol=1e-5)
    assert not torch.allclose(found, photo, atol=0.05)


def test_contrast_shrinks_towards_the_mean_of_each_channel(small):
    found = corrupt(small, "contrast", 0.3)
    assert torch.allclose(found.mean((2, 3)), small.mean((2, 3)), atol=1e-6)
    assert torch.allclose(found.std((2, 3)), 0.3 * small.std((2, 3)), atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_equals_pillow(small, channels, tmp_path):
    x = small[:, :channels]
    pixels = (255 * x[0]).round().byte().movedim(0, -1).numpy()
    Image.fromarray(pixels.squeeze()).save(tmp_path / "a.jpg", quality=40)
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.mode == {1: "L", 3: "RGB"}[channels]
        read = np.asarray(image)
    found = (255 * corrupt(x, "jpeg", 40)[0]).movedim(0, -1).squeeze(-1)
    assert np.array_equal(found.round().byte().numpy(), read)
    assert not np.array_equal(read, pixels.squeeze())


def test_jpeg_of_two_channels_is_refused():
    with pytest.raises(UserError, match="JPEG holds 1 or 3 channels, not 2"):
        corrupt(torch.rand(1, 2, 8, 8), "jpeg", 40)


@pytest.mark.parametrize(
    ("name", "least", "tolerance"),
    [
        ("poisson", 1e8, 1e-3),
        ("speckle", 0, 0),
        ("salt-and-pepper", 0, 0),
        ("blur", 0, 0),
        ("contrast", 1, 1e-6),
        ("jpeg", 100, 2 / 255),
    ],
)
def test_weakest_corruption_leaves_image_unchanged(small, name, least, tolerance):
    gray = small[:, :1]  # JPEG halves the resolution of colours at any quality
    assert torch.allclose(corrupt(gray, name, least), gray, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_psnr_decreases_with_strength(name, small, photo):
    for kind, x in {"cifar": small, "imagenet": photo}.items():
        assert constants_for((x.shape[-2], x.shape[-1])) == kind
        values = []
        for strength in range(1, 6):
            found = corrupt(x, name, getattr(CORRUPTIONS[name], kind)[strength - 1])
            assert found.min() >= 0
            assert found.max() <= 1
            values.append(float(psnr(found, x)))
        assert values == sorted(values, reverse=True)
        assert values[0] > values[-1] + 1


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruption_of_an_image_depends_on_seed_and_its_number(name, small):
    images = torch.cat([small, small.flip(-1), small, small.flip(-2)])
    constant = CORRUPTIONS[name].cifar[4]
    whole = corrupt(images, name, constant, seed=4)
    parts = [corrupt(images[i : i + 1], name, constant, 4, first=i) for i in range(4)]
    assert torch.equal(whole, torch.cat(parts))
    if name in ("poisson", "speckle", "salt-and-pepper"):  # the others are deterministic
        assert not torch.equal(whole[0], whole[2])
        assert not torch.equal(whole, corrupt(images, name, constant, seed=5))


def run_suite(context, **options):
    context.options = {CorruptionsConfig: CorruptionsConfig(**options)}
    with torch.no_grad():
        return CORRUPTIONS_SUITE.run(context)


def numbers(value):
    if isinstance(value, dict):
        return [n for v in value.values() for n in numbers(v)]
    if isinstance(value, list):
        return [n for v in value for n in numbers(v)]
    return [value] if isinstance(value, (int, float)) else []


def test_rows_match_model_on_corrupted_images(network, random_images):
    found = run_suite(EvaluationContext(network, random_images, seed=3), strengths=[2, 5])
    assert list(found["corruptions"]) == list(CORRUPTIONS)
    x, labels, errors, rows = random_images.images, random_images.labels, [], [found["clean"]]
    for name, one in found["corruptions"].items():
        for strength, row in zip((2, 5), one["rows"], strict=True):
            constant = CORRUPTIONS[name].cifar[strength - 1]
            assert (row["strength"], row["constant"]) == (strength, constant)
            y = corrupt(x, name, constant, seed=3)
            confidence, predicted = network.logits(y).softmax(1).max(1)
            right = (predicted == labels).double()
            clean = network.denoise_blind(y)[0].clamp(0, 1)
            expected = {
                "accuracy": right,
                "confidence": confidence,
                "gap": confidence - right,
                "psnr_corrupted": psnr(y, x),
                "psnr": psnr(clean, x),
                "gain": psnr(clean, x) - psnr(y, x),
                "estimated_sigma": network.estimate_sigma(y),
                "rmse": (y - x).square().mean((1, 2, 3)).sqrt(),
            }
            for measure, values in expected.items():
                if name == "salt-and-pepper" and measure in ("psnr_corrupted", "psnr", "gain"):
                    values = values[psnr(y, x).isfinite()]  # PSNR of unchanged images is infinite
                    assert row[measure]["count"] == len(values)
                average = float(values.double().mean())
                assert row[measure]["value"] == pytest.approx(average, rel=1e-4, abs=1e-6)
            errors.append(1 - row["accuracy"]["value"])
            rows.append(row)
    mean = sum(errors) / len(errors)
    clean_error = 1 - found["clean"]["accuracy"]["value"]
    assert found["mean_corruption_error"]["value"] == pytest.approx(mean)
    assert found["mean_error_increase"]["value"] == pytest.approx(mean - clean_error)
    accuracy, confidence = ([row[m]["value"] for row in rows] for m in ("accuracy", "confidence"))
    a = torch.tensor([[v, 1.0] for v in accuracy], dtype=torch.float64)
    line = torch.linalg.lstsq(a, torch.tensor(confidence, dtype=torch.float64)[:, None]).solution
    assert found["confidence_slope"] == pytest.approx(float(line[0]), rel=1e-6)


def test_unchanged_images_have_no_psnr(network):
    """Salt-and-pepper noise of 1 % leaves about half of the images of 64 pixels unchanged."""
    images = Drawn(torch.rand(30, 1, 8, 8), torch.arange(30) % 3)
    row = run_suite(
        EvaluationContext(network, images), corruptions=["salt-and-pepper"], strengths=[1]
    )
    (row,) = row["corruptions"]["salt-and-pepper"]["rows"]
    assert 3 < row["psnr_corrupted"]["count"] < 27  # 1 - 0.99^64 = 47 % are changed
    assert row["psnr"]["count"] == row["gain"]["count"] == row["psnr_corrupted"]["count"]
    assert row["psnr"]["value"] is not None
    assert row["accuracy"]["count"] == 30
    clean = run_suite(EvaluationContext(network, images), corruptions=["blur"], strengths=[1])[
        "clean"
    ]
    assert clean["psnr_corrupted"]["value"] is None
    assert clean["psnr"]["count"] == 30  # effect of denoising on clean images


@pytest.mark.slow
def test_batch_size_and_processes_change_only_rounding(network, random_images):
    options = {"strengths": [5], "corruptions": ["poisson", "salt-and-pepper", "jpeg"]}
    context = EvaluationContext(network, random_images, batch_size=7)
    found = run_suite(context, **options)
    shared = run_shared(CORRUPTIONS_SUITE.run, context)
    assert shared == [found, found]
    whole = run_suite(EvaluationContext(network, random_images), **options)
    # the batch size changes the order of sums in float32 convolutions
    assert numbers(found) == pytest.approx(numbers(whole), rel=1e-3, abs=1e-4)


def test_direct_denoiser_is_measured_without_accuracy(random_images):
    model = DirectDenoiser(Identity(), in_channels=1).eval()
    found = run_suite(EvaluationContext(model, random_images), strengths=[3])
    assert "mean_corruption_error" not in found
    assert found["warnings"] == []
    for one in found["corruptions"].values():
        (row,) = one["rows"]
        assert "accuracy" not in row
        assert row["psnr"]["value"] == pytest.approx(row["psnr_corrupted"]["value"])
        assert row["gain"]["value"] == pytest.approx(0, abs=1e-5)


class Identity(torch.nn.Module):
    def forward(self, y, sigma=None):
        return y


def test_noise_conditional_model_only_classifies(mixture, mixture_samples):
    found = run_suite(
        EvaluationContext(mixture, mixture_samples.first(50)),
        corruptions=["blur"],
        strengths=[1, 5],
    )
    (warning,) = found["warnings"]
    assert "cannot estimate it" in warning
    mild, strong = found["corruptions"]["blur"]["rows"]
    assert "psnr" not in strong
    assert mild["accuracy"]["value"] >= strong["accuracy"]["value"]
    with pytest.raises(UserError, match="leave out the suite corruptions"):
        CORRUPTIONS_SUITE.check(mixture, Drawn(mixture_samples.images, None))


def test_data_with_other_classes_have_no_accuracy(network, random_images):
    other = Drawn(random_images.images, random_images.labels % 2, class_names=("a", "b"))
    found = run_suite(EvaluationContext(network, other), corruptions=["blur"], strengths=[1])
    assert "accuracy" not in found["clean"]
    assert any("does not have the 3 classes" in line for line in found["warnings"])


def test_nan_outputs_give_warning(network, random_images):
    next(network.parameters()).fill_(float("nan"))
    found = run_suite(
        EvaluationContext(network, Drawn(random_images.images, None)),
        corruptions=["blur"],
        strengths=[1],
    )
    assert any("NaN or Inf on 30 images" in line for line in found["warnings"])
    (row,) = found["corruptions"]["blur"]["rows"]
    assert row["psnr"]["value"] is None


def test_confidence_slope_of_calibrated_and_constant_confidence(random_images):
    def rows(pairs):
        both = ({"accuracy": a, "confidence": c} for a, c in pairs)
        return [{name: Estimate(v, v, v, 1) for name, v in row.items()} for row in both]

    assert confidence_slope(rows([(0.9, 0.8), (0.5, 0.4), (0.1, 0.0)])) == pytest.approx(1)
    assert confidence_slope(rows([(0.9, 0.8), (0.5, 0.8), (0.1, 0.8)])) == pytest.approx(0)
    assert confidence_slope(rows([(0.9, 0.8), (0.9, 0.4)])) is None


@pytest.mark.slow
def test_json_figures_table_and_progress(network, random_images, tmp_path):
    few = {"strengths": [1, 5], "corruptions": ["blur", "salt-and-pepper"]}
    results = evaluate(
        network, random_images, ["corruptions"], tmp_path, limit=6, options={"corruptions": few}
    )
    document = json.loads((tmp_path / "corruptions.json").read_text())
    assert document["options"]["constants"] == "auto"
    assert document["constants"] == "cifar"
    assert list(document["corruptions"]) == few["corruptions"]
    pictures = {path.stem for path in tmp_path.glob("*.png")}
    assert pictures == {"corruptions", "corruptions-psnr", "corruptions-examples"}
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(*tables(results))
    console.file.close()
    text = console.export_text()
    assert "salt-and-pepper" in text
    assert "mean error" in text
    assert "…" not in text
    advanced = []
    context = EvaluationContext(network, random_images, advance=advanced.append)
    context.options = {
        CorruptionsConfig: CorruptionsConfig(strengths=(1, 1), corruptions=("blur", "jpeg"))
    }
    context.left = CORRUPTIONS_SUITE.passes(context) * 30
    with torch.no_grad():
        CORRUPTIONS_SUITE.run(context)
    assert sum(advanced) == 3 * 30
    assert context.left == 0


def test_plots_span_measured_strengths(network, random_images, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, *a, **k: figures.append(figure))
    few = {"strengths": [1, 4], "corruptions": ["blur", "jpeg"]}
    results = evaluate(
        network, random_images, ["corruptions"], tmp_path, limit=6, options={"corruptions": few}
    )
    document = results["corruptions"].document
    first, second, _ = figures
    for figure, ticks in ((first, ["clean", "1", "4"]), (second, ["1", "4"])):
        axes = figure.axes[0]
        assert [label.get_text() for label in axes.get_xticklabels()] == ticks
        assert axes.get_xlim() == pytest.approx((-0.3, len(ticks) - 0.7))
        assert "images" in figure.get_suptitle()
    points = first.axes[-1].collections[1].get_offsets().tolist()  # jpeg: confidence, accuracy
    rows = document["corruptions"]["jpeg"]["rows"]
    expected = [[100 * row[n]["value"] for n in ("confidence", "accuracy")] for row in rows]
    assert points == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"corruptions": ["fog"]}, "fog"),
        ({"corruptions": ["specle"]}, "did you mean 'speckle'"),
        ({"strengths": [6]}, "less than or equal to 5"),
        ({"strengths": []}, "at least 1 item"),
    ],
)
def test_illegal_settings_are_refused(options, words, network, random_images, tmp_path):
    with pytest.raises(UserError, match=words):
        evaluate(
            network, random_images, ["corruptions"], tmp_path, options={"corruptions": options}
        )


def test_images_of_two_channels_are_refused(network):
    with pytest.raises(UserError, match="has 2 channels"):
        CORRUPTIONS_SUITE.check(network, Drawn(torch.rand(3, 2, 8, 8), None))
