"""Suite ``generation``: measures, names of extractors and measures, refused input."""

import json
import urllib.error
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from ebmkit_tests.support.mixture_world import Drawn
from ebmkit_tests.support.two_processes import run_shared
from rich.console import Console

from ebmkit import GaussianMixture, ModelCard, UserError, evaluation
from ebmkit.data import load_dataset
from ebmkit.evaluation import features, tables
from ebmkit.evaluation.generation import GENERATION, GenerationConfig
from ebmkit.evaluation.suite import EvaluationContext
from ebmkit.models import GradResNetConfig, ModelConfig, load, save_model
from ebmkit.sampling.jobs.chains import JobFolder
from ebmkit.sampling.jobs.job import SamplingJob, write_results
from ebmkit.sampling.jobs.settings import make_settings


@pytest.fixture
def digits():
    return load_dataset("digits", None, "test")


@pytest.fixture
def classifier_run(tmp_path):
    """A classifier's run folder with random weights; its accuracy does not matter here."""
    folder = tmp_path / "judge"
    folder.mkdir()
    config = ModelConfig(
        backbone=GradResNetConfig(width=8), in_channels=1, num_classes=10, reference_size=(8, 8)
    )
    card = ModelCard(dataset="digits", objective="ce", channels=1, classifies=True)
    save_model(folder, config.build(), config, card)
    return folder


def write(path, images, finite=None, labels=None, **attributes):
    with h5py.File(path, "w") as file:
        file["images"] = images.permute(0, 2, 3, 1).numpy()
        file["finite"] = np.ones(len(images), bool) if finite is None else finite
        if labels is not None:
            file["labels"] = labels.numpy()
        file.attrs.update({"source": "fresh", "sampler": "sgld", "seed": 3} | attributes)
    return path


def evaluate(model, images, folder, settings, **options):
    options = {"plots": False, "options": {"generation": settings}} | options
    return evaluation.evaluate(model, images, ["generation"], folder, **options)["generation"]


@pytest.mark.slow
def test_training_images_as_samples_reach_the_floor(network, digits, classifier_run, tmp_path):
    """Training images have the measures of the floor, which uses the same images.

    Repeated black images do not. Three samples have NaN or Inf and are skipped.
    """
    train = load_dataset("digits", None, "train").first(200)
    finite = np.arange(203) >= 3
    images = torch.cat([torch.zeros(3, 1, 8, 8, dtype=torch.uint8), train.images])
    labels = torch.cat([torch.zeros(3, dtype=torch.int64), train.labels])
    made = {"run": "somewhere", "settings": json.dumps({"steps": 5}), "filter": "p > 0.9"}
    path = write(tmp_path / "samples.h5", images, finite, labels, **made)
    settings = {"samples": str(path), "extractor": str(classifier_run)}
    result = evaluate(network, digits, tmp_path / "e", settings, plots=True)
    document = json.loads(result.path.read_text())
    assert document == result.document
    samples = document["samples"]
    assert (samples["count"], samples["left_out"], samples["source"]) == (200, 3, "fresh")
    assert (samples["filter"], samples["settings"]) == ("p > 0.9", {"steps": 5})
    assert (document["floor"]["of"], document["floor"]["count"]) == ("train images", 200)
    names = ["FD", "KD", "score", "precision", "recall"]
    assert list(document["measures"]) == [f"classifier-{name}" for name in names]
    for name, found in document["measures"].items():
        floor = document["floor"][name]  # same images in other batches, in float32
        for end in ("value", "low", "high"):
            assert found[end] == pytest.approx(floor[end], rel=1e-4, abs=1e-6)
        assert found["low"] < found["value"] < found["high"]
    own = load(classifier_run)
    exact = (own.logits(digits.floats()).argmax(1) == digits.labels).double().mean()
    assert document["extractor"]["accuracy"]["value"] == pytest.approx(float(exact))
    shown = (own.logits(train.floats()).argmax(1) == train.labels).double().mean()
    assert document["labels"]["accuracy"]["value"] == pytest.approx(float(shown))
    assert len(document["labels"]["classes"]) == 10
    assert all(0.7 < c["diversity"] < 1.4 for c in document["labels"]["classes"])
    for entry in document["labels"]["classes"]:  # the floor uses the same images
        assert entry["frechet"]["value"] == pytest.approx(entry["floor"]["frechet"], rel=1e-3)
        assert entry["count"] == entry["floor"]["count"]
        assert entry["count"] == int((train.labels == entry["label"]).sum())
    x = train.images
    ends = ((x <= 1) | (x >= 254)).double().mean()
    assert document["saturation"]["ends"]["samples"]["value"] == pytest.approx(float(ends))
    made, known = network.energy(train.floats()).double(), network.energy(digits.floats()).double()
    means = torch.stack([known[digits.labels == c].mean() for c in train.labels])
    gap = float((made - means).mean())
    assert document["energy_gap"]["energy"]["value"] == pytest.approx(gap, abs=1e-5)
    assert document["energy_gap"]["joint_energy"] is None  # the network has other labels
    assert document["pictures"] == ["generation-classes.png", "generation.png"]
    few, skipped = document["warnings"]
    assert "biased upwards" in few
    assert skipped == "3 of 203 samples have NaN or Inf and are skipped"
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(*tables({"generation": result}))
    console.file.close()
    text = " ".join(console.export_text().split())
    assert "samples: 200, fresh, 3 with NaN or Inf skipped, filter: p > 0.9" in text
    assert "digits test, 360 images" in text
    assert "run judge" in text
    assert "E(x) gap, nats" in text
    assert "black or white" in text
    assert "…" not in text

    one = write(tmp_path / "one.h5", torch.zeros(200, 1, 8, 8, dtype=torch.uint8), source="buffer")
    settings["samples"] = str(one)
    collapsed = evaluate(network, digits, tmp_path / "e", settings).document
    assert collapsed["samples"]["source"] == "buffer"
    assert collapsed["labels"] is None
    measures = {name: found["value"] for name, found in collapsed["measures"].items()}
    assert measures["classifier-recall"] == 0
    assert measures["classifier-score"] == pytest.approx(1)
    floor = collapsed["floor"]
    assert measures["classifier-FD"] > 10 * floor["classifier-FD"]["value"]
    assert measures["classifier-KD"] > floor["classifier-KD"]["high"]


def test_extractor_equal_to_model_gives_warning_and_floor_is_half_reference(
    classifier_run, tmp_path
):
    images = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    path = write(tmp_path / "s.h5", (255 * images).byte())
    settings = {"samples": str(path), "extractor": str(classifier_run)}
    found = evaluate(load(classifier_run), Drawn(images, None), tmp_path, settings).document
    assert any("not independent" in line for line in found["warnings"])
    assert found["floor"]["of"].startswith("half of the reference")
    assert found["floor"]["count"] == 30
    assert found["extractor"]["accuracy"] is None


@pytest.mark.slow
def test_two_processes_agree_and_progress_reaches_the_end(
    network, digits, classifier_run, tmp_path
):
    path = write(tmp_path / "s.h5", digits.images[:100], labels=digits.labels[:100])
    config = GenerationConfig(samples=path, extractor=str(classifier_run))
    advanced = []
    context = EvaluationContext(
        network, digits, options={GenerationConfig: config}, advance=advanced.append, batch_size=50
    )
    context.left = GENERATION.passes(context) * len(digits)
    with torch.no_grad():
        alone = GENERATION.run(context)
    assert (sum(advanced), context.left) == (3 * 360, 0)
    for found in run_shared(GENERATION.run, replace(context, left=0, advance=lambda count: None)):
        for name, measure in alone["measures"].items():
            assert found["measures"][name]["value"] == pytest.approx(measure["value"], abs=1e-6)
        assert found["labels"]["accuracy"] == alone["labels"]["accuracy"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"samples": None}, "ebmkit sample RUN --out DIR.*--set generation.samples=FILE.h5"),
        ({"samples": "nowhere.h5"}, "there is no file 'nowhere.h5'"),
        ({"samples": "wide.h5"}, "holds images of 9x8x1 and 'digits' of 8x8x1"),
        ({"samples": "broken.h5"}, "all of 5 samples have NaN or Inf"),
        ({"samples": "anyones.h5"}, "does not say where its samples come from"),
        ({"samples": "few.h5"}, "more than 3 samples"),
        ({"extractor": "nowhere"}, "no run folder or pretrained model 'nowhere'"),
        ({"weights": "w.pth"}, "leave it out for a run"),
    ],
)
def test_illegal_settings_and_samples_are_refused(
    change, words, network, digits, classifier_run, tmp_path
):
    images = digits.images[:5]
    write(tmp_path / "right.h5", images)
    write(tmp_path / "few.h5", images[:2])
    write(tmp_path / "wide.h5", torch.zeros(5, 1, 9, 8, dtype=torch.uint8))
    write(tmp_path / "broken.h5", images, np.zeros(5, bool))
    with h5py.File(write(tmp_path / "anyones.h5", images), "a") as file:
        del file.attrs["source"]
    settings = {"samples": "right.h5", "extractor": str(classifier_run)} | change
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        with pytest.raises(UserError, match=words):
            evaluate(network, digits, tmp_path / "e", settings)


def test_missing_inception_error_names_alternatives(network, digits, tmp_path, monkeypatch):
    settings = {"samples": str(write(tmp_path / "s.h5", digits.images[:5]))}
    monkeypatch.setattr(features, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"ebmkit-vision\[generation\].*generation.extractor=RUN"):
        evaluate(network, digits, tmp_path / "e", settings)
    monkeypatch.setattr(features, "find_spec", lambda name: True)
    (tmp_path / "w.pth").write_bytes(b"no weights")
    for name, words in (("w.pth", "does not hold the weights"), ("none.pth", "there is no file")):
        with pytest.raises(UserError, match=words):
            evaluate(network, digits, tmp_path / "e", settings | {"weights": str(tmp_path / name)})


@pytest.mark.slow
def test_failed_download_of_weights_error_names_setting(network, digits, tmp_path, monkeypatch):
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    def offline(*arguments, **options):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(inception, "load_state_dict_from_url", offline)
    settings = {"samples": str(write(tmp_path / "s.h5", digits.images[:5]))}
    with pytest.raises(UserError, match=r"cannot be fetched \(no route.*generation.weights=PATH"):
        evaluate(network, digits, tmp_path / "e", settings)


@pytest.mark.slow
def test_inception_loads_weights_from_a_file(tmp_path, monkeypatch):
    """Random weights, since tests do not download the published ones; gray becomes colour."""
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    kind = inception.FeatureExtractorInceptionV3
    with monkeypatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(kind, "load_state_dict", lambda self, state: None)
        network = kind("inception-v3-compat", ["2048", "logits_unbiased"])
    torch.save(network.state_dict(), tmp_path / "w.pth")
    own = features.inception(tmp_path / "w.pth", torch.device("cpu"))
    assert list(own.names.values()) == ["FID", "KID", "IS", "precision", "recall"]
    pixels = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    found = own.extract(pixels / 255)
    expected = network(pixels.repeat(1, 3, 1, 1))
    assert found["features"].shape == (2, 2048)
    assert torch.allclose(found["features"], expected[0], rtol=1e-4, atol=1e-6)
    assert torch.allclose(found["logits"], expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [None, "ais"])
def test_samples_of_a_noise_conditional_energy_have_the_measures_of_exact_ones(
    sampler, digits, classifier_run, tmp_path
):
    """A mixture of a Gaussian per digit, by default from noise of 40, and by AIS."""
    train = load_dataset("digits", None, "train")
    own = [train.floats()[train.labels == c].double() for c in range(10)]
    spread = 0.003 * torch.eye(64, dtype=torch.float64)
    covariances = torch.stack([torch.cov(x.flatten(1).T) + spread for x in own])
    model = GaussianMixture(torch.stack([x.mean(0) for x in own]), covariances).float()
    names, size = list(train.class_names), (8, 8)
    model.card = ModelCard(
        image_size=size, channels=1, class_names=names, sigma_range=(0.001, 40.0), classifies=True
    )
    settings = make_settings(model, sampler, count=300, batch_size=300, label="all")
    assert settings.sampler == (sampler or "heun")
    folder = JobFolder(tmp_path / "own")
    folder.begin(settings)
    job = SamplingJob(model, settings, folder)
    job.run()
    write_results(job, "mixture")
    exact, c = model.sample(3000, torch.Generator().manual_seed(1))
    exact = torch.cat([exact[c == k][:30] for k in range(10)]).clamp(0, 1)
    (tmp_path / "exact").mkdir()
    labels = torch.arange(10).repeat_interleave(30)
    write(tmp_path / "exact" / "samples.h5", (255 * exact).round().byte(), labels=labels)
    found = []
    for name in ("own", "exact"):
        path = str(tmp_path / name / "samples.h5")
        made = {"samples": path, "extractor": str(classifier_run)}
        document = evaluate(model, digits, tmp_path / f"evaluation-{name}", made).document
        found.append([document["measures"]["classifier-FD"], *document["energy_gap"].values()])
    for one, other in zip(*found, strict=True):  # intervals of 95 %
        assert one["low"] < other["high"]
        assert other["low"] < one["high"]
