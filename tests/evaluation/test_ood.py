"""Suite ``ood``: detection measures, image sets, scores against closed forms, files, errors."""

import json
import math
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from ebmkit_tests.support.mixture_world import Drawn
from ebmkit_tests.support.two_processes import run_shared
from PIL import Image
from rich.console import Console
from scipy.stats import norm

from ebmkit import Gaussian, UserError, evaluation
from ebmkit.data import load_dataset
from ebmkit.evaluation import tables
from ebmkit.evaluation.ood import (
    GENERATED,
    OOD,
    OodConfig,
    _warnings,
    detection,
    find_set,
    known_scores,
    partners,
    scores_of,
    standard_sets,
)
from ebmkit.evaluation.suite import EvaluationContext
from ebmkit.models.config import create_denoiser

pytestmark = pytest.mark.usefixtures("few_resamples")


def normal(count, mean=0.0, seed=0):
    return mean + torch.randn(count, generator=torch.Generator().manual_seed(seed)).double()


def test_equal_distributions_have_auroc_one_half():
    """The standard error is that of a Mann-Whitney statistic, sqrt((n + m + 1)/12nm)."""
    n, m = 1000, 3000
    found = detection(normal(n, seed=1), normal(m, seed=2))
    error = math.sqrt((n + m + 1) / (12 * n * m))
    assert found["auroc"].value == pytest.approx(0.5, abs=4 * error)
    assert found["auroc"].low < 0.5 < found["auroc"].high
    width = found["auroc"].high - found["auroc"].low
    assert width == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert found["fpr95"].value == pytest.approx(0.95, abs=0.04)
    assert found["aupr_in"].value == pytest.approx(n / (n + m), abs=0.04)
    assert found["aupr_out"].value == pytest.approx(m / (n + m), abs=0.04)


@pytest.mark.parametrize("apart", [0.5, 2.0])
def test_detection_of_two_gaussians_matches_closed_form(apart):
    """AUROC = Phi(d'/sqrt 2), FPR95 = Phi(1.645 - d'); its error includes that of the threshold."""
    n = 4000
    found = detection(normal(n, apart, 1), normal(n, 0, 2))
    area, at = norm.cdf(apart / math.sqrt(2)), norm.ppf(0.05)
    assert found["auroc"].value == pytest.approx(area, abs=4 * 0.5 / math.sqrt(n))
    assert found["auroc"].low < area < found["auroc"].high
    passed, slope = norm.sf(at + apart), norm.pdf(at + apart) / norm.pdf(at)
    error = math.sqrt((passed * (1 - passed) + slope**2 * 0.05 * 0.95) / n)
    assert found["fpr95"].value == pytest.approx(passed, abs=4 * error)
    width = found["fpr95"].high - found["fpr95"].low
    assert 0.5 < width / (3.92 * error) < 2  # the bootstrap of a quantile is noisy
    # negated scores, sets swapped
    swapped = detection(-normal(4000, 0, 2), -normal(4000, apart, 1))
    assert swapped["auroc"].value == pytest.approx(found["auroc"].value)
    assert swapped["aupr_in"].value == pytest.approx(found["aupr_out"].value)


def test_ties_count_half_and_share_a_threshold():
    inside, outside = torch.tensor([2.0, 1.0, 1.0]), torch.tensor([1.0, 0.0])
    found = detection(inside, outside)
    pairs = [(u > v) + 0.5 * (u == v) for u in inside for v in outside]
    assert found["auroc"].value == pytest.approx(float(sum(pairs)) / 6)
    assert found["fpr95"].value == 0.5  # 95 % of 3 includes the ones, and one of two outside is 1
    # threshold 2: precision 1 for a third; threshold 1: 3/4 for the rest
    assert found["aupr_in"].value == pytest.approx(1 / 3 + 2 / 3 * 3 / 4)
    same = detection(torch.ones(5), torch.ones(7))
    assert (same["auroc"].value, same["fpr95"].value) == (0.5, 1)


def test_intervals_of_perfect_detection_stay_within_0_and_1():
    found = detection(torch.arange(50) + 100.0, torch.arange(60.0))
    for name in ("auroc", "aupr_in", "aupr_out"):
        assert (found[name].value, found[name].low, found[name].high) == (1, 1, 1)
    assert found["fpr95"].document() == {"value": 0, "low": 0, "high": 0, "count": 110}


QUICK = {"sigmas": ["0.1"], "draws": 2}


def evaluate(model, images, folder, settings=QUICK, **options):
    options = {"plots": False, "options": {"ood": settings}} | options
    return evaluation.evaluate(model, images, ["ood"], folder, **options)["ood"]


def all_images(images, size=4):
    return torch.cat([x for x, _ in images.batches(size)])


def test_scores_of_a_gaussian_match_closed_form():
    """s(y) = -(y - m)/(v + sigma^2) gives the residual and the noise level as sums of squares."""
    variance, sigma = 0.04, 0.1
    model = Gaussian(torch.full((1, 4, 4), 0.5, dtype=torch.float64), variance).eval()
    x = torch.rand(5, 1, 4, 4, dtype=torch.float64)
    found = scores_of(model, x, [sigma], draws=100, seed=3)
    square = (x - 0.5).flatten(1).square().sum(1)
    density = -0.5 * square / variance - 8 * math.log(2 * math.pi * variance)
    assert torch.allclose(found["log-density"], density)
    assert torch.allclose(found["gradient"], -square.sqrt() / variance)
    noisy = variance + sigma**2
    # E||eps - sigma (u + sigma eps)/w||^2 = d (v/w)^2 + sigma^2 |u|^2/w^2, w = v + sigma^2
    residual = (variance / noisy) ** 2 + sigma**2 * square / noisy**2 / 16
    assert torch.allclose(found["residual-25.5"], -residual, rtol=0.1)  # 100 draws of 16 values
    level = sigma**2 * (square + 16 * sigma**2) / noisy**2 / 16
    assert torch.allclose(found["noise-level-25.5"], -level.log().abs(), atol=0.1)
    mean = -0.5 * (square + 16 * sigma**2) / noisy - 8 * math.log(2 * math.pi * noisy)
    assert torch.allclose(found["noisy-density-25.5"], mean, atol=0.5)
    again = scores_of(model, x[2:3], [sigma], draws=100, seed=3)
    # noise of an image does not depend on its batch
    assert torch.allclose(again["residual-25.5"], found["residual-25.5"][2:3])


def test_auroc_of_the_exact_log_density(tmp_path, monkeypatch):
    """A Gaussian against a wider one: |x - m|^2 is chi-square, so the AUROC follows from F."""
    from scipy.stats import f

    images = [
        (0.5 + s * torch.randn(1500, 1, 2, 2, generator=torch.Generator().manual_seed(k)))
        for k, s in ((1, 0.05), (2, 0.08))
    ]
    model = Gaussian(torch.full((1, 2, 2), 0.5), 0.05**2).eval()
    other = Drawn(images[1], None, name="wide")
    from ebmkit.evaluation import ood

    monkeypatch.setattr(ood, "find_set", lambda *a: ood.OODSet("wide", "wide", other))
    document = evaluate(model, Drawn(images[0], None), tmp_path).document
    found = document["sets"]["wide"]["scores"]["log-density"]["auroc"]
    exact = f.cdf((0.08 / 0.05) ** 2, 4, 4)  # P(inside < outside) for scaled chi-squares
    assert found["low"] < exact < found["high"]
    assert found["value"] == pytest.approx(exact, abs=4 * 0.5 / math.sqrt(1500))
    assert norm.cdf(0) < found["low"]
    energy = document["energy"]
    gap = energy["wide"]["value"] - energy["in"]["value"]
    assert gap == pytest.approx(0.5 * 4 * ((0.08 / 0.05) ** 2 - 1), abs=0.4)  # 4 standard errors


def test_generated_sets_match_their_definition_and_depend_only_on_seed(random_images):
    for name in GENERATED:
        found = find_set(name, random_images, None, 0).images
        whole = all_images(found, 30)
        assert torch.equal(whole, all_images(found, 7))
        assert torch.equal(all_images(found.first(5)), whole[:5]) or name == "interpolations"
        assert whole.shape == random_images.images.shape
        assert whole.min() >= 0
        assert whole.max() <= 1
        again = all_images(find_set(name, random_images, None, 1).images)
        assert torch.equal(again, whole) == (name in ("interpolations", "inverted"))
    assert torch.equal(
        all_images(find_set("inverted", random_images, None, 0).images), 1 - random_images.images
    )
    constant = all_images(find_set("constant", random_images, None, 0).images)
    assert torch.equal(constant.amax((2, 3)), constant.amin((2, 3)))
    shuffled = all_images(find_set("shuffled", random_images, None, 0).images).flatten(1)
    assert torch.equal(shuffled.sort(1)[0], random_images.images.flatten(1).sort(1)[0])
    gaussian = all_images(
        find_set("gaussian", Drawn(random_images.images * 0.2 + 0.4, None), None, 0).images
    )
    expected = (random_images.images * 0.2 + 0.4).flatten(1)
    assert torch.allclose(gaussian.flatten(1).mean(1), expected.mean(1), atol=4 * 0.058 / 8)


def test_interpolations_are_means_of_two_classes(random_images):
    """Of images sorted by class, partners are in another class; the last pairs with the first."""
    labels = torch.tensor([0] * 12 + [1] * 10 + [2] * 8)
    sorted_ = Drawn(random_images.images, labels)
    other = partners(labels, 30)
    assert all(labels[i] != labels[k] for i, k in enumerate(other))
    assert (other[0], other[12], other[29]) == (12, 22, 0)
    made = all_images(find_set("interpolations", sorted_, None, 0).images, 4)
    assert torch.allclose(made, (random_images.images + random_images.images[other]) / 2)
    assert partners(None, 3) == [1, 2, 0]
    with pytest.raises(UserError, match="all 30 are of one"):
        find_set("interpolations", Drawn(random_images.images, torch.zeros(30).long()), None, 0)


def test_images_of_folders_and_files_are_resized_and_cropped(random_images, tmp_path):
    """A wide colour image: height scaled to 8, centre crop, luma weights for gray."""
    folder = tmp_path / "colours"
    (folder / "inside").mkdir(parents=True)
    red = np.zeros((16, 40, 3), np.uint8)
    red[:, :6, 1] = 255  # yellow outside the centre crop
    red[..., 0] = 255
    Image.fromarray(red).save(folder / "a.png")
    Image.fromarray(np.full((8, 8), 100, np.uint8)).save(folder / "inside" / "b.png")
    found = find_set(str(folder), random_images, None, 0)
    assert (found.name, len(found.images)) == ("colours", 2)
    x = all_images(found.images)
    assert x.shape == (2, 1, 8, 8)
    assert torch.allclose(x[0], torch.tensor(76 / 255))  # 0.299 of 255
    assert torch.allclose(x[1], torch.tensor(100 / 255))
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["images"] = np.stack([red[:16, 12:28]] * 40)
    found = find_set(str(tmp_path / "f.h5"), random_images, None, 0)
    assert len(found.images) == 30  # at most the number of in-distribution images
    assert torch.allclose(all_images(found.images), torch.tensor(76 / 255))
    colour = Drawn(torch.rand(3, 3, 8, 8), None)
    gray = all_images(find_set(str(folder / "inside"), colour, None, 0).images)
    assert torch.allclose(gray, torch.full((1, 3, 8, 8), 100 / 255))


@pytest.mark.slow
def test_folders_of_the_same_name_are_two_sets(network, random_images, tmp_path):
    paths = [tmp_path / place / "in" for place in ("a", "b")]
    for path in paths:
        path.mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(path / "black.png")
    settings = QUICK | {"sets": [str(path) for path in paths]}
    document = evaluate(network, random_images, tmp_path / "e", settings).document
    assert list(document["sets"]) == ["in-2", "in-3"]
    assert list(document["energy"]) == ["in", "in-2", "in-3"]


def test_images_of_different_sizes_are_refused(network, tmp_path):
    for side in (8, 9):
        Image.fromarray(np.zeros((side, 8), np.uint8)).save(tmp_path / f"{side}.png")
    pictures = load_dataset("pictures", tmp_path, "test")
    for suite in ("ood", "generation"):
        with pytest.raises(UserError, match="images of one size, and those of 'pictures' differ"):
            evaluation.parse_suites(suite, network, pictures)


def test_cifar100_is_a_standard_set_for_cifar10_if_available(random_images, tmp_path):
    cifar = replace(random_images, name="cifar10")
    assert standard_sets(cifar, tmp_path) == list(GENERATED[:4])
    with h5py.File(tmp_path / "cifar100-test.h5", "w") as file:
        file["images"] = np.full((50, 32, 32, 3), 7, np.uint8)
        file["labels"] = np.zeros(50, int)
    assert standard_sets(cifar, tmp_path)[0] == "cifar100"
    like = Drawn(torch.rand(20, 3, 32, 32), None, name="cifar10")
    found = find_set("cifar100", like, tmp_path, 0).images
    assert torch.allclose(all_images(found), torch.full((20, 3, 32, 32), 7 / 255))
    assert standard_sets(random_images, tmp_path) == list(GENERATED)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("intrpolations", "did you mean 'interpolations'"),
        ("/nowhere/at/all", "no folder or HDF5 file '/nowhere/at/all'"),
        ("nothing.h5", "no folder or HDF5 file"),
        ("cifar100", "cifar100"),
        ("digits", "is the evaluated data set"),
    ],
)
def test_missing_sets_are_refused_before_evaluation(name, words, network, random_images, tmp_path):
    images = replace(random_images, name="digits")
    folder = tmp_path / "evaluation"
    with pytest.raises(UserError, match=words):
        evaluate(network, images, folder, {"sets": [name]}, data_dir=tmp_path)
    assert not folder.exists()


def test_scores_depend_on_what_the_model_provides(network):
    assert len(known_scores(network, [0.1, 0.2])) == 3 + 2 * 3
    network.card.classifies = False
    assert "confidence" not in known_scores(network, [])
    network.card.sigma_range = None
    (line,) = _warnings(network, OodConfig())
    assert "residual and noise-level mean little" in line
    denoiser = create_denoiser("dncnn", in_channels=1).eval()
    assert list(known_scores(denoiser, [0.1])) == ["residual-25.5", "noise-level-25.5"]
    found = scores_of(denoiser, torch.rand(2, 1, 8, 8), [0.1], 1)
    assert list(found) == ["residual-25.5", "noise-level-25.5"]


@pytest.mark.slow
def test_json_figures_table_and_progress(network, random_images, tmp_path):
    settings = QUICK | {"sets": ["interpolations", "uniform"]}
    result = evaluate(network, random_images, tmp_path, settings, plots=True)
    document = json.loads((tmp_path / "ood.json").read_text())
    assert document == result.document
    assert list(document["sets"]) == ["interpolations", "uniform"]
    assert document["pictures"] == ["ood-examples.png", "ood-histograms.png", "ood.png"]
    for histogram in document["histograms"].values():
        assert sum(histogram["in"]) == 30
        assert all(sum(counts) == 30 for counts in histogram["sets"].values())
    assert any("only 30 images" in line for line in document["warnings"])
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(*tables({"ood": result}))
    console.file.close()
    text = console.export_text()
    assert "noisy-density-25.5" in text
    assert "…" not in text
    advanced = []
    context = EvaluationContext(network, random_images, advance=advanced.append)
    context.options = {OodConfig: OodConfig(sets=("uniform", "auto"), sigmas=(0.1,), draws=1)}
    context.left = OOD.passes(context) * 30
    with torch.no_grad():
        OOD.run(context)
    assert sum(advanced) == (1 + len(GENERATED)) * 30
    assert context.left == 0


@pytest.mark.slow
def test_two_processes_and_other_batch_sizes_agree(network, random_images):
    options = {OodConfig: OodConfig(sets=("interpolations", "uniform"), sigmas=(0.1,), draws=1)}
    with torch.no_grad():
        alone = OOD.run(EvaluationContext(network, random_images, options=options, batch_size=30))
    for found in run_shared(
        OOD.run, EvaluationContext(network, random_images, options=options, batch_size=7)
    ):
        for name, own in alone["sets"].items():
            for score, measures in own["scores"].items():
                value = found["sets"][name]["scores"][score]["auroc"]["value"]
                assert value == pytest.approx(measures["auroc"]["value"], abs=0.01)


@pytest.mark.slow
def test_infinite_scores_have_no_measures_and_give_warning(network, random_images, tmp_path):
    class Broken(type(network)):
        def forward(self, y, sigma=None):
            energies = super().forward(y, sigma)
            bright = y.flatten(1).mean(1) > 0.8  # some of the constant images
            return energies._replace(
                log_density=torch.where(bright, torch.inf, energies.log_density)
            )

    network.__class__ = Broken
    document = evaluate(network, random_images, tmp_path, QUICK | {"sets": ["constant"]}).document
    scores = document["sets"]["constant"]["scores"]
    assert scores["log-density"] is None
    assert scores["confidence"] is not None
    assert any("log-density" in w and "NaN or Inf" in w for w in document["warnings"])
