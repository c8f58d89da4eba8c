"""Distances of samples from real images and measures of class-conditional samples.

Compared with closed forms, identities, scipy and torchmetrics.
"""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from ebmkit_tests.support.mixture_world import Drawn
from torch import nn

from ebmkit import GaussianMixture, UserError
from ebmkit.evaluation.features import (
    Extractor,
    FeatureColumns,
    classifier_of,
    energy_gap,
    frechet_distance,
    inception_score,
    kernel_distance,
    mean_distance,
    measure_guided,
    pixel_columns,
    precision_recall,
)
from ebmkit.evaluation.statistics import jackknife
from ebmkit.models import create_model


class IdentityFeatures(nn.Module):
    """An identity feature extractor for torchmetrics."""

    num_features = 6

    def forward(self, x):
        return x


def draws(count, dim=6, seed=0, mean=0.0, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    mixing = torch.linspace(0.5, 1.5, dim)
    return mean + spread * mixing * torch.randn(count, dim, generator=g, dtype=torch.float64)


def test_frechet_distance_of_gaussians_matches_closed_form():
    """Sum of squared differences of means and standard deviations; 2 % is 3 standard errors."""
    a, b = draws(200_000, 3, 1), draws(200_000, 3, 2, mean=0.5, spread=1.4)
    deviations = torch.linspace(0.5, 1.5, 3)
    exact = 3 * 0.5**2 + float((0.4 * deviations).square().sum())
    assert frechet_distance(a, b) == pytest.approx(exact, rel=0.02)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


IGNORE_TORCHMETRICS_WARNINGS = pytest.mark.filterwarnings(
    "ignore:Metric .* will save all extracted features", "ignore:std.*degrees of freedom"
)


@pytest.mark.parametrize("count", [50, 5])
def test_frechet_distance_agrees_with_scipy_and_torchmetrics(count):
    """Also for singular covariances, from 5 draws in 6 dimensions."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    a, b = draws(count, seed=1), draws(count, seed=2, mean=0.3) @ torch.eye(6).double().roll(1, 0)
    found = frechet_distance(a, b)
    metric = FrechetInceptionDistance(feature=IdentityFeatures()).set_dtype(torch.float64)
    metric.update(b, real=True)
    metric.update(a, real=False)
    # eigenvalues of 0 are rounded to 1e-16, and their square roots to 1e-8
    assert found == pytest.approx(float(metric.compute()), abs=1e-6)
    s, t = (np.cov(x.numpy().T) for x in (a, b))
    root = scipy.linalg.sqrtm(s @ t + 1e-14 * np.eye(6)).real
    by_scipy = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * root)
    assert found == pytest.approx(float(by_scipy), abs=1e-5)


@IGNORE_TORCHMETRICS_WARNINGS
def test_kernel_distance_is_unbiased_and_equals_torchmetrics():
    from torchmetrics.image.kid import KernelInceptionDistance

    a, b = draws(9, seed=1), draws(9, seed=2, mean=0.4)
    metric = KernelInceptionDistance(feature=IdentityFeatures(), subsets=1, subset_size=9)
    metric.set_dtype(torch.float64)
    metric.update(b, real=True)
    metric.update(a, real=False)
    assert kernel_distance(a, b).value == pytest.approx(float(metric.compute()[0]), rel=1e-6)
    found = [kernel_distance(draws(40, seed=k), draws(40, seed=1000 + k)).value for k in range(100)]
    mean, error = np.mean(found), np.std(found) / math.sqrt(100)
    assert abs(mean) < 4 * error
    assert min(found) < 0
    apart = kernel_distance(draws(2001, seed=1), draws(2001, seed=2, mean=0.3))
    assert 0 < apart.low < apart.value < apart.high


def test_precision_and_recall_of_constructed_sets():
    real = draws(300, 2, 1)
    same = precision_recall(real, real)
    assert [e.value for e in same] == [1, 1]
    far = precision_recall(real + 100, real)
    assert [e.value for e in far] == [0, 0]
    modes = torch.cat([draws(150, 2, 1), draws(150, 2, 2) + 100])  # samples cover one of two
    one = precision_recall(draws(300, 2, 3), modes[torch.randperm(300)])
    assert one[0].value > 0.8
    assert one[1].value == pytest.approx(0.5, abs=0.05)
    with pytest.raises(UserError, match="more than 3 samples"):
        precision_recall(real[:3], real)


def test_radius_of_precision_is_distance_to_third_neighbour():
    """Real points at 0, 1, 2, 3: the radius is 3 at 0 and 3, and 2 at 1 and 2."""
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    samples = torch.tensor([[-3.01], [-2.9], [5.9], [6.1]])
    assert precision_recall(samples, real)[0].value == 0.5


@IGNORE_TORCHMETRICS_WARNINGS
def test_inception_score_is_one_to_number_of_classes_and_equals_torchmetrics():
    from torchmetrics.image.inception import InceptionScore

    assert inception_score(torch.ones(10, 4)) == pytest.approx(1)
    assert inception_score(1000 * torch.eye(4).repeat(5, 1)) == pytest.approx(4)
    logits = draws(200, 6, 1)
    metric = InceptionScore(feature=IdentityFeatures(), splits=1).set_dtype(torch.float64)
    metric.update(logits)
    assert inception_score(logits) == pytest.approx(float(metric.compute()[0]), rel=1e-6)


def test_jackknife_of_a_difference_of_means():
    """Variances of both means add up; the quantile of Student's t with 9 degrees is 2.262."""
    a, b = draws(5000, 1, 1), draws(3000, 1, 2, mean=1.0)
    found = jackknife(lambda x, y: float(x.mean() - y.mean()), a, b)
    error = math.sqrt(float(a.var()) / 5000 + float(b.var()) / 3000)
    assert found.value == pytest.approx(float(a.mean() - b.mean()))
    # the standard error is estimated from 20 groups
    assert (found.high - found.low) / 2 == pytest.approx(2.262 * error, rel=0.6)
    few = jackknife(lambda x: float(x.mean()), a[:10])
    assert math.isnan(few.low)


def test_mean_distance():
    points = torch.tensor([[0.0, 0], [3, 4], [0, 0]])
    assert mean_distance(points) == pytest.approx(10 / 3)
    assert math.isnan(mean_distance(points[:1]))


NAMES = {"frechet": "FD", "kernel": "KD"}


def pixel_extractor(model):
    """An extractor with pixels as features and the logits of ``model``."""

    def extract(x):
        return {"features": x.flatten(1), "logits": model.logits(x, 0.0)}

    return Extractor("classifier", "exact", NAMES, extract, model)


@pytest.fixture
def model_and_images():
    """Three classes of 4x4 gray images, 40 images of each, rounded to 255ths."""
    means = torch.full((3, 1, 4, 4), 0.4)
    means[1], means[2] = 0.5, 0.6
    model = GaussianMixture(means, 0.003)
    noise = torch.randn(120, 1, 4, 4, generator=torch.Generator().manual_seed(4))
    labels = torch.arange(120) % 3
    x = (255 * (means[labels] + 0.003**0.5 * noise)).round() / 255
    assert 2 / 255 < x.min() < x.max() < 253 / 255
    return model, Drawn(x, labels, class_names=tuple("abc"))


def test_real_images_as_samples_have_zero_distance_and_zero_gap(model_and_images):
    model, real = model_and_images
    found = measure_guided(
        real.images, real.labels, real, pixel_extractor(model), model, batch_size=50
    )
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    exact = (model.logits(real.images, 0.0).argmax(1) == real.labels).double().mean()
    assert found["accuracy"]["value"] == pytest.approx(float(exact))
    for entry in (found, *found["classes"]):
        assert entry["frechet"]["value"] == pytest.approx(0, abs=1e-9)
        assert entry["kernel"]["value"] < 0  # the unbiased estimate for equal sets
        for gap in entry["energy_gap"].values():
            assert gap["value"] == pytest.approx(0, abs=1e-6)
            assert gap["low"] < 0 < gap["high"]
        assert entry["saturation"]["ends"]["samples"]["value"] == 0
        assert entry["saturation"]["colour"] is None
    for entry in found["classes"]:
        assert (entry["count"], entry["real_count"], entry["diversity"]) == (40, 40, 1)
        assert entry["floor"]["count"] == 20
        assert entry["floor"]["frechet"] > 0
    assert [entry["name"] for entry in found["classes"]] == ["a", "b", "c"]
    assert found["means"]["diversity"] == 1


def test_each_class_is_compared_with_its_own_images(model_and_images):
    """Samples of the next class: distant in each class, but not over all classes."""
    model, real = model_and_images
    wrong = (real.labels + 1) % 3
    found = measure_guided(
        real.images, wrong, real, pixel_extractor(model), model, others=real, by_image=True
    )
    assert found["frechet"]["value"] == pytest.approx(0, abs=1e-9)
    assert found["accuracy"]["value"] < 0.1
    values = found["by_image"]
    assert values["accuracy"] == (model.logits(real.images, 0.0).argmax(1) == wrong).tolist()
    assert np.mean(values["ends"]) == pytest.approx(found["saturation"]["ends"]["samples"]["value"])
    assert len(values["energy"]) == len(wrong)
    shift = 16 * 0.1**2  # squared distance between means of neighbouring classes
    # a mean of 40 has standard error sqrt(0.003 / 40) in each of 16 pixels, in both sets
    error = 2 * (shift**0.5) * (2 * 0.003 / 40) ** 0.5
    for entry in found["classes"][1:]:
        assert entry["frechet"]["value"] == pytest.approx(shift, abs=0.03 + 4 * error)
        assert entry["frechet"]["low"] < entry["frechet"]["value"] < entry["frechet"]["high"]
    # the floor uses ``others``, here the same images
    assert all(e["floor"]["frechet"] == pytest.approx(0, abs=1e-9) for e in found["classes"])
    # the log-odds raise E(x, y) of the wrong label; E(x) differs only by the order of summation
    gap = found["energy_gap"]
    assert gap["joint_energy"]["low"] > 10
    assert abs(gap["energy"]["value"]) < 1e-4


def test_saturation_of_constructed_images():
    """Share of black and white values, and HSV saturation against ``colorsys``."""
    import colorsys

    x = torch.rand(2, 3, 5, 4, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    x[1, :, :, :2] = torch.tensor([0.0, 1 / 255])
    x[1, :, :, 2:] = torch.tensor([1.0, 254 / 255])
    x[0, :, 0] = 2 / 255
    x[0, :, 1] = 253 / 255
    found = pixel_columns(x)
    assert found["ends"].tolist() == [0, 1]
    by_hand = [
        np.mean([colorsys.rgb_to_hsv(*pixel)[1] for pixel in image.flatten(1).T.tolist()])
        for image in x
    ]
    assert found["colour"].tolist() == pytest.approx(by_hand, abs=1e-6)
    assert pixel_columns(torch.zeros(1, 3, 2, 2))["colour"].item() == 0
    assert pixel_columns(torch.tensor([1.0, 0, 0]).reshape(1, 3, 1, 1))["colour"].item() == 1


def test_energy_gap_is_welch_interval_weighted_by_labels_of_samples():
    g = torch.Generator().manual_seed(1)
    made, known = torch.randn(30, generator=g) - 2, 3 * torch.randn(50, generator=g)
    ones, others = torch.ones(30).long(), torch.ones(50).long()
    gap = energy_gap(
        FeatureColumns({"energy": made}, ones), FeatureColumns({"energy": known}, others)
    )
    test = scipy.stats.ttest_ind(made.double(), known.double(), equal_var=False)
    interval = test.confidence_interval(0.95)
    assert gap["joint_energy"] is None
    assert gap["energy"].value == pytest.approx(float(made.mean() - known.mean()), abs=1e-6)
    assert (gap["energy"].low, gap["energy"].high) == pytest.approx(tuple(interval), rel=1e-6)
    assert (
        energy_gap(FeatureColumns({"energy": made}, None), FeatureColumns({"energy": known}, None))
        == gap
    )
    # classes at -10 and 10: samples of the first have no gap, though the mean of all images is 0
    real = FeatureColumns({"energy": torch.tensor([-11.0, -9, 9, 11])}, torch.tensor([0, 0, 1, 1]))
    first = FeatureColumns({"energy": torch.tensor([-10.0, -10])}, torch.tensor([0, 0]))
    assert energy_gap(first, real)["energy"].value == 0
    none = FeatureColumns({"energy": torch.tensor([1.0])}, torch.tensor([2]))
    assert math.isnan(energy_gap(none, real)["energy"].value)


def test_intervals_of_energy_gap_cover_the_truth(model_and_images):
    """At most 22 of 200 intervals miss: the expected 10 and 4 standard errors."""
    g = torch.Generator().manual_seed(3)
    missed = 0
    for _ in range(200):
        labels = torch.arange(30) % 3
        real = FeatureColumns({"energy": labels + torch.randn(30, generator=g)}, labels)
        few = labels[:12]
        made = FeatureColumns({"energy": few - 0.5 + 2 * torch.randn(12, generator=g)}, few)
        gap = energy_gap(made, real)["energy"]
        missed += not gap.low < -0.5 < gap.high
    assert missed <= 22


def test_undefined_measures_of_few_samples_are_null(model_and_images):
    model, real = model_and_images
    labels = torch.tensor([0, 1, 1])
    found = measure_guided(real.images[[0, 1, 4]], labels, real, pixel_extractor(model), model)
    one, two = found["classes"]
    assert (one["count"], one["frechet"]["value"], one["diversity"]) == (1, None, None)
    assert one["energy_gap"]["energy"]["value"] is not None
    assert one["energy_gap"]["energy"]["low"] is None
    assert two["frechet"]["value"] > 0
    assert two["frechet"]["low"] is None
    assert two["floor"]["count"] == 2
    assert found["means"]["frechet"] == two["frechet"]["value"]
    assert found["real_count"] == 80  # of the labels of the samples
    json.dumps(found, allow_nan=False)


def test_float_samples_are_rounded_to_8_bits(model_and_images):
    model, real = model_and_images
    floats = real.images + 0.4 / 255
    bytes_ = (255 * real.images).round().byte()
    extractor = pixel_extractor(model)
    a, b = (measure_guided(x, real.labels, real, extractor, model) for x in (floats, bytes_))
    assert a == b


def test_missing_labels_or_model_omit_only_their_measures(model_and_images):
    model, real = model_and_images
    unknown = replace(pixel_extractor(model), model=None)
    found = measure_guided(real.images, None, replace(real, labels=None), unknown)
    assert (found["accuracy"], found["classes"], found["energy_gap"]) == (None, None, None)
    assert found["frechet"]["value"] == pytest.approx(0, abs=1e-9)
    labelled = measure_guided(real.images, real.labels, real, unknown)
    assert labelled["accuracy"] is None
    assert len(labelled["classes"]) == 3


def test_network_as_extractor_and_no_joint_gap_with_other_labels(random_images):
    classifier, other = (
        create_model("gradresnet18", num_classes=c, in_channels=1, width=8, image_size=8).eval()
        for c in (3, 5)
    )
    found = measure_guided(
        random_images.images,
        random_images.labels,
        random_images,
        classifier_of(classifier, "judge"),
        other,
    )
    with torch.no_grad():
        rounded = (255 * random_images.images).round() / 255
        right = (classifier.logits(rounded).argmax(1) == random_images.labels).double().mean()
        gap = other.energy(rounded).mean() - other.energy(random_images.images).mean()
    assert found["accuracy"]["value"] == pytest.approx(float(right))
    assert found["energy_gap"]["joint_energy"] is None
    assert found["energy_gap"]["energy"]["value"] == pytest.approx(float(gap), abs=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"samples": torch.rand(2, 1, 5, 4)}, r"\(1, 5, 4\) cannot be compared with .*\(1, 4, 4\)"),
        ({"samples": torch.rand(2, 4)}, r"must be \(N, C, H, W\)"),
        ({"samples": torch.full((2, 1, 4, 4), torch.nan)}, "2 of 2 samples have NaN or Inf"),
        ({"labels": torch.tensor([0])}, "2 samples need 2 labels"),
        ({"labels": torch.tensor([0, 7])}, "no image of label 7"),
        ({"real": "unlabelled"}, "has none: compare with a labelled"),
    ],
)
def test_incompatible_input_is_refused(change, words, model_and_images):
    model, real = model_and_images
    given = {"samples": real.images[:2], "labels": real.labels[:2], "real": real} | change
    if given["real"] == "unlabelled":
        given["real"] = replace(real, labels=None)
    with pytest.raises(UserError, match=words):
        measure_guided(**given, extractor=pixel_extractor(model))
