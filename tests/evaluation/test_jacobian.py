"""Suite ``jacobian``: eigenvalues and errors, against closed forms and direct computation."""

import json
from dataclasses import replace

import pytest
import torch
from ebmkit_tests.support.mixture_world import Drawn
from rich.console import Console

from ebmkit import Gaussian, UserError, evaluation
from ebmkit.evaluation import tables
from ebmkit.evaluation.jacobian import jacobian, magnification, spectrum
from ebmkit.evaluation.suite import noisy_batches
from ebmkit.models import DirectDenoiser
from ebmkit.plots import around_gray

SIGMA = 0.05


@pytest.fixture
def evaluate(tmp_path):
    """Run the suite; return its document and the names of its figures."""

    def run(model, data, plots=False, **options):
        results = evaluation.evaluate(
            model,
            data,
            ["jacobian"],
            tmp_path,
            options={"jacobian": {"sigma": SIGMA, **options}},
            plots=plots,
        )
        read = json.loads((tmp_path / "jacobian.json").read_text())
        assert read == results["jacobian"].document
        return read, {path.name for path in tmp_path.glob("*.png")}

    return run


def test_expected_error_of_a_gaussian_equals_its_measured_error(evaluate):
    variances = torch.logspace(-3.2, -2.2, 16)
    model = Gaussian(torch.full((1, 4, 4), 0.5), variances.diag()).eval()
    x, c = model.sample(20, torch.Generator().manual_seed(1))
    document, _ = evaluate(model, Drawn(x, c, class_names=("only",)), images=20)
    gains = (variances / (variances + SIGMA**2)).double()
    assert (document["images"], document["dimensions"]) == (20, 16)
    for one in document["per_image"]:
        assert one["trace"] == pytest.approx(float(gains.sum()), rel=1e-5)  # float32
        assert one["eigenvalues"] == pytest.approx(gains.flip(0).tolist(), abs=1e-5)
        assert one["above_half"] == int((gains > 0.5).sum())
        assert (one["negative"], one["converged"], one["predicted"]) == (0, True, "only")
        assert one["difference"] == pytest.approx(0, abs=1e-6)  # a single label has no information
    made = torch.tensor([10 ** (-one["psnr"] / 10) for one in document["per_image"]])
    expected = 10 ** (-document["per_image"][0]["expected_psnr"] / 10)
    # standard error of the mean error of 20 images of 16 values: about 8 %
    assert float(made.mean()) == pytest.approx(expected, rel=0.3)


def test_spectra_match_direct_computation_on_shared_noise(network, random_images, evaluate):
    document, pictures = evaluate(network, random_images, plots=True, images=2)
    assert pictures == {"jacobian.png", "spectrum.png"}
    ((_, y, *_),) = noisy_batches(random_images.first(2), SIGMA, batch_size=2)
    for i, one in enumerate(document["per_image"]):
        found = spectrum(jacobian(network, y[i], SIGMA), 3, 2)
        assert one["trace"] == pytest.approx(found.trace, rel=1e-4)
        expected = [float(f"{v:.6g}") for v in found.values]
        assert one["eigenvalues"] == pytest.approx(expected, abs=1e-4)
        assert [p["value"] for p in one["largest"]] == pytest.approx(expected[:3], abs=1e-4)
        removed = (network.denoise(y[i : i + 1], SIGMA) - y[i]).flatten().double()
        shares = (found.largest.vectors.flatten(1) @ removed).square() / removed.square().sum()
        shown = [p["noise"] for p in one["largest"]]
        assert shown == pytest.approx(shares.tolist(), abs=1e-3)
        assert one["label"] == random_images.class_names[int(random_images.labels[i])]
        assert 0 < one["asymmetry"] < 1e-5


def test_double_precision_does_not_change_dtype_of_model(network, random_images, evaluate):
    document, _ = evaluate(network, random_images, images=1, precision="double")
    assert document["precision"] == "fp64"
    assert document["per_image"][0]["asymmetry"] < 1e-12
    assert {p.dtype for p in network.parameters()} == {torch.float32}


@pytest.mark.slow
def test_images_and_models_without_labels(network, random_images, evaluate):
    network.card.classifies = False
    document, pictures = evaluate(network, Drawn(random_images.images, None), plots=True, images=1)
    assert not document["classes"]
    assert document["per_image"][0]["predicted"] is None
    assert "difference" not in document["per_image"][0]
    assert "jacobian.png" in pictures


@pytest.mark.slow
def test_unconverged_pairs_give_warning_and_paper_values_need_its_setting(
    mixture, mixture_samples, evaluate
):
    document, pictures = evaluate(
        mixture,
        mixture_samples,
        images=2,
        method="iterative",
        tolerance=1e-12,
        products=100,
        plots=True,
    )
    assert document["method"] == "iterative"
    assert "eigenvalues" not in document["per_image"][0]
    assert "spectrum.png" not in pictures
    (line,) = document["warnings"]
    assert "not all eigenpairs of 2 of 2 images converged" in line
    result = evaluation.Result("jacobian", document, None)
    text = printed(result)
    assert "2.71" not in text  # the paper's value, for other images
    assert "…" not in text
    document |= {"dataset": "cifar10", "sigma": 50 / 255}
    text = printed(result)
    assert "2.71" in text
    assert "paper: its network, figure 3: one CIFAR-10 image" in text
    assert "2.71" not in printed(replace(result, document={**document, "singular": True}))
    assert "2.71" not in printed(replace(result, document={**document, "sigma": 25 / 255}))


def printed(result):
    """The table of ``result`` in a terminal of 80 columns."""
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(*tables({"jacobian": result}))
    console.file.close()
    return console.export_text()


class ShiftAndHalve(torch.nn.Module):
    """A network that is not a gradient: it shifts columns cyclically and halves values."""

    def forward(self, y, sigma=None):
        return 0.5 * y.roll(1, -1)


def test_direct_denoiser_is_asymmetric(mixture_samples, evaluate):
    document, pictures = evaluate(
        DirectDenoiser(ShiftAndHalve()), mixture_samples, plots=True, images=1
    )
    one = document["per_image"][0]
    assert document["singular"]
    assert one["eigenvalues"] == pytest.approx([0.5] * 16)
    assert one["asymmetry"] == pytest.approx(2**0.5)  # J and J^T have no entry in common
    assert one["trace"] == 0
    assert one["expected_psnr"] is None
    assert "jacobian.png" in pictures


def test_direct_denoiser_of_large_images_is_refused(evaluate):
    large = Drawn(torch.rand(1, 1, 60, 60), None)
    with pytest.raises(UserError, match="images of 3600 values are too large"):
        evaluate(DirectDenoiser(ShiftAndHalve()), large)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sigma": "50"}, "did you mean 50/255"),
        ({"method": "exact"}, "method"),
        ({"largest": 16}, "of the 16 eigenvalues"),
    ],
)
def test_illegal_settings_are_refused(options, words, mixture, mixture_samples, evaluate):
    with pytest.raises(UserError, match=words):
        evaluate(mixture, mixture_samples, **options)


def test_magnification_is_the_largest_without_saturation():
    assert magnification(torch.full((100,), 1e-4)) == 500  # the paper's factor
    assert magnification(torch.full((100,), 0.0)) == 500
    for size in (0.0011, 0.013, 0.2, 3.0):
        image = size * torch.linspace(-1, 1, 1000).reshape(1, 20, 50)
        factor = magnification(image)
        shown = around_gray(image, factor)
        outside = ((shown < 0) | (shown > 1)).double().mean()
        assert outside <= 0.011
        assert factor < 500
        assert shown.max() > 0.5 + 0.5 / 2.6  # the next factor (x 2 or 2.5) saturates
    full = around_gray(torch.tensor([-2.0, 0, 1]))
    assert torch.allclose(full, torch.tensor([0, 0.5, 0.75]))
