"""Suite ``diffusion-path``: accuracy and energies of an exact model, and refused settings."""

import json
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from ebmkit_tests.support.mixture_world import Drawn
from ebmkit_tests.support.two_processes import run_shared
from rich.console import Console

from ebmkit import GaussianMixture, ModelCard, UserError, create_model, evaluation
from ebmkit.evaluation import tables
from ebmkit.evaluation.diffusion_path import (
    DIFFUSION_PATH,
    VIEWS,
    DiffusionPathConfig,
    class_statistics,
    energy_statistics,
    views_at,
)
from ebmkit.evaluation.suite import EvaluationContext, noisy_batches
from ebmkit.models import GradResNetConfig, HeadConfig, ModelConfig, save_model
from ebmkit.models.heads import LogitEnergy, energy_source
from ebmkit.noise import make_schedule


class Blind(GaussianMixture):
    """The density of clean images at any sigma."""

    noise_conditional = False

    def forward(self, y, sigma=None):
        return super().forward(y)


@pytest.fixture
def distant_means():
    """Means of two distant classes of 2x2 images; the exact accuracy is a Gaussian integral."""
    return torch.stack([torch.full((1, 2, 2), 0.35), torch.full((1, 2, 2), 0.65)])


def samples_of(mixture, count=400):
    x, labels = mixture.sample(count, torch.Generator().manual_seed(5))
    return Drawn(x, labels, class_names=tuple("ab"))


def evaluate(model, images, folder, settings=(), **options):
    options = {"plots": False, "options": {"diffusion-path": dict(settings)}} | options
    return evaluation.evaluate(model, images, ["diffusion-path"], folder, **options)[
        "diffusion-path"
    ]


def test_views_match_forward_process_of_diffusion_model():
    """Against the forward process in the coordinates of the diffusion model."""
    schedule = make_schedule("cosine")
    g = torch.Generator().manual_seed(0)
    x, eps = torch.rand(3, 1, 4, 4, generator=g), torch.randn(3, 1, 4, 4, generator=g)
    for t in (0, 300, 900):
        abar, sigma = schedule.abar(t), schedule.sigma(t)
        found = views_at(schedule, t, x, x + sigma * eps)
        u = abar**0.5 * (2 * x - 1) + (1 - abar) ** 0.5 * eps
        # float32 rounding of images of size sigma (30 at t = 900) before scaling
        assert torch.allclose(found["timestep"][0], (u + 1) / 2, atol=1e-5)
        assert found["timestep"][1] == pytest.approx((1 - abar) ** 0.5 / 2)
        assert torch.allclose(found["dark"][0], abar**0.5 * x)
        assert torch.allclose(found["faded"][0], (abar**0.5 * (2 * x - 1) + 1) / 2, atol=1e-6)
        assert (found["image"][1], found["dark"][1], found["faded"][1]) == (sigma, 0, 0)
    assert found.keys() == VIEWS.keys()


def test_accuracy_along_path_matches_exact_posterior(distant_means, tmp_path):
    """The Bayes classifier of two isotropic classes is a half-space, with error Phi(-d/2s).

    The noise-conditional model classifies images in image units by the exact posterior. The blind
    model has the same half-space, also for x_t, since x_t contracts to gray, on the boundary.
    """
    variance, half = 0.01, 0.15 * 2.0  # half the distance of the means, sqrt(4) * 0.15
    normal = torch.distributions.Normal(0.0, 1.0)
    images = samples_of(GaussianMixture(distant_means, variance), 2000)
    for kind, view in ((GaussianMixture, "image"), (Blind, "timestep"), (Blind, "image")):
        found = evaluate(kind(distant_means, variance), images, tmp_path, {"step": 250}).document
        for row in found["models"]["this run"]["path"][view]:
            deviation = (variance + row["sigma"] ** 2) ** 0.5
            exact = float(normal.cdf(torch.tensor(half / deviation)))
            got = row["accuracy"]
            error = max(1e-3, (exact * (1 - exact) / 2000) ** 0.5)
            assert got["value"] == pytest.approx(exact, abs=4 * error)
    last = found["models"]["this run"]["path"]["image"][-1]
    assert last["accuracy"]["low"] < 0.52
    assert found["models"]["this run"]["chance_from"]["image"] in (750, 999)
    assert found["models"]["this run"]["clean"]["accuracy"]["value"] > 0.99
    assert found["timesteps"] == [0, 250, 500, 750, 999]


def test_image_view_equals_suite_classify_at_the_same_noise(network, random_images, tmp_path):
    schedule = make_schedule("linear", 100)
    sigmas = [schedule.sigma(t) for t in (0, 40, 80)]
    path = evaluate(
        network, random_images, tmp_path, {"steps": 100, "step": 40, "until": 80}
    ).document
    other = evaluation.evaluate(
        network, random_images, ["classify"], tmp_path, noise_levels=sigmas, plots=False
    )["classify"].document
    found = path["models"]["this run"]
    against = {level["sigma"]: level["accuracy"] for level in other["against_noise"]}
    assert path["sigmas"] == sigmas
    assert found["clean"]["accuracy"] == against[0.0]
    for row in found["path"]["image"]:
        assert row["accuracy"] == against[row["sigma"]]


def test_energies_match_mixture_on_directly_computed_views(distant_means, tmp_path):
    mixture = GaussianMixture(distant_means, 0.02, weights=[0.7, 0.3])
    images = samples_of(mixture, 60)
    document = evaluate(mixture, images, tmp_path, {"step": 400, "until": 400}, seed=3).document
    found, schedule = document["models"]["this run"], make_schedule("linear")
    assert found["reading"] == "model"
    (batch,) = noisy_batches(images, schedule.sigma(400), 3)
    abar = schedule.abar(400)
    shown = {
        "timestep": (abar**0.5 * (batch.y - 0.5) + 0.5, (1 - abar) ** 0.5 / 2),
        "image": (batch.y, schedule.sigma(400)),
        "dark": (abar**0.5 * batch.x, None),
        "faded": (abar**0.5 * (batch.x - 0.5) + 0.5, None),
    }
    for view, (y, sigma) in shown.items():
        row = found["path"][view][1]
        energy = mixture.energy(y, sigma)
        joint = -mixture.log_joint(y, sigma).gather(1, images.labels[:, None])
        assert row["energy"]["value"] == pytest.approx(float(energy.mean()), rel=1e-4)
        assert row["energy"]["std"] == pytest.approx(float(energy.std()), rel=1e-4)
        assert row["joint_energy"]["value"] == pytest.approx(float(joint.mean()), rel=1e-4)
    energy = mixture.energy(images.images)
    for label, entry in enumerate(found["classes"]):
        own = energy[images.labels == label]
        assert (entry["label"], entry["name"]) == (label, "ab"[label])
        assert entry["energy"]["count"] == len(own)
        assert entry["energy"]["value"] == pytest.approx(float(own.mean()), rel=1e-4)
        assert entry["energy"]["std"] == pytest.approx(float(own.std()), rel=1e-4)


def test_energy_is_from_logits_if_no_objective_trained_the_density(network, random_images):
    """-logsumexp and -logit for ``ce`` alone, the model's density if an objective trained it."""
    y = random_images.images
    for objective, reading in (("ce", "logits"), ("ce+dsm", "model"), ("published", "model")):
        network.card = ModelCard(objective=objective, channels=1, classifies=True)
        assert energy_source(network) == reading
    network.card = ModelCard(objective="2*ce", channels=1, classifies=True)
    assert LogitEnergy.of(network, "model") is network
    found, logits = LogitEnergy.of(network).energies(y), network.logits(y)
    energy, own = -logits.logsumexp(1), -logits.gather(1, random_images.labels[:, None])
    measured = energy_statistics(found, random_images.labels)
    assert measured["energy"]["value"] == pytest.approx(float(energy.double().mean()), abs=1e-6)
    assert measured["joint_energy"]["value"] == pytest.approx(float(own.double().mean()), abs=1e-5)


def test_labels_are_predicted_correctly_at_large_energies(distant_means):
    """Energies of 1e6 in float32 do not resolve log p(c|y); `log_posterior` does."""
    y = distant_means + 300.0
    model = GaussianMixture(distant_means, 0.05)
    found = model.energies(y, 0.0)
    assert found.log_density.max() < -1e6
    assert torch.equal(found.log_posterior().argmax(1), model.logits(y).argmax(1))


@pytest.fixture
def runs(tmp_path):
    """Two run folders of the same name with random weights; one has JEM's head."""
    folders = []
    for place, kind in (("one", "logit"), ("two", "linear-quadratic")):
        folder = tmp_path / place / "beside"
        folder.mkdir(parents=True)
        config = ModelConfig(
            backbone=GradResNetConfig(width=8),
            head=HeadConfig(kind=kind),
            in_channels=1,
            num_classes=3,
            reference_size=(8, 8),
        )
        card = ModelCard(dataset="m", objective="ce", channels=1, classifies=True)
        save_model(folder, config.build(), config, card)
        folders.append(str(folder))
    return folders


def write(path, images, labels=None):
    with h5py.File(path, "w") as file:
        file["images"] = (255 * images).round().byte().permute(0, 2, 3, 1).numpy()
        if labels is not None:
            file["labels"] = np.asarray(labels)
        file.attrs.update({"source": "fresh", "sampler": "ddim", "seed": 3})
    return str(path)


@pytest.mark.slow
def test_other_runs_and_samples_are_measured_and_plotted(network, random_images, runs, tmp_path):
    quantised = replace(random_images, images=(255 * random_images.images).round() / 255)
    samples = write(tmp_path / "s.h5", random_images.images, random_images.labels)
    settings = {"step": 500, "beside": runs, "samples": samples, "schedule": "cosine"}
    result = evaluate(network, quantised, tmp_path / "e", settings, plots=True)
    document = json.loads(result.path.read_text())
    assert document == result.document
    assert list(document["models"]) == ["this run", "beside", "beside-2"]
    readings = [found["reading"] for found in document["models"].values()]
    assert readings == ["model", "logits", "logits"]
    for found in document["models"].values():
        # samples equal to the data have the energies of the data
        for measure in ("energy", "joint_energy"):
            assert found["samples"][measure] == pytest.approx(found["clean"][measure], rel=1e-4)
        for sampled, own in zip(found["samples"]["classes"], found["classes"], strict=True):
            assert sampled["energy"] == pytest.approx(own["energy"], rel=1e-4)
    assert document["files"]["sampler"] == "ddim"
    assert document["pictures"] == [
        "class-energies.png", "diffusion-energies.png", "diffusion-path.png",
    ]  # fmt: skip
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(*tables({"diffusion-path": result}))
    console.file.close()
    text = console.export_text()
    assert "…" not in text
    assert f"{document['models']['beside-2']['clean']['accuracy']['value']:.1%}" in text
    assert "chance from" in text

    unlabelled = write(tmp_path / "u.h5", random_images.images[:7])
    found = evaluate(network, quantised, tmp_path / "e", {"step": 999, "samples": unlabelled})
    assert found.document["models"]["this run"]["samples"].keys() == {"energy"}


@pytest.mark.slow
def test_two_processes_agree_and_progress_reaches_the_end(network, random_images, tmp_path):
    path = write(tmp_path / "s.h5", random_images.images[:11], random_images.labels[:11])
    options = {DiffusionPathConfig: DiffusionPathConfig(step=300, until=300, samples=path)}
    advanced = []
    context = EvaluationContext(
        network, random_images, options=options, advance=advanced.append, batch_size=7
    )
    context.left = DIFFUSION_PATH.passes(context) * len(random_images)
    with torch.no_grad():
        alone = DIFFUSION_PATH.run(context)
    assert (sum(advanced), context.left) == (4 * 30, 0)
    quiet = replace(context, left=0, advance=lambda count: None)
    for found in run_shared(DIFFUSION_PATH.run, quiet):
        assert found == alone


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"until": 1000}, "until 1000 is out of range: with diffusion-path.steps 1000 it is 0 to"),
        ({"schedule": "sine"}, "schedule"),
        ({"step": 0}, "step"),
        ({"beside": ["nowhere"]}, "no run folder or pretrained model 'nowhere'"),
        ({"beside": ["four"]}, "'four' has 4 classes and the evaluated model 3"),
        ({"samples": "nowhere.h5"}, "diffusion-path.samples: there is no file 'nowhere.h5'"),
        ({"samples": "fourth.h5"}, "has label 3, and this model has labels 0 to 2"),
    ],
)
def test_illegal_settings_are_refused(change, words, network, random_images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "four").mkdir()
    config = ModelConfig(backbone=GradResNetConfig(width=8), in_channels=1, num_classes=4)
    card = ModelCard(objective="ce", channels=1, classifies=True)
    save_model(tmp_path / "four", config.build(), config, card)
    write("fourth.h5", random_images.images[:2], [0, 3])
    with pytest.raises(UserError, match=words):
        evaluate(network, random_images, tmp_path / "e", change)


def test_models_without_labels_have_only_an_energy(random_images):
    model = create_model("gradresnet18", num_classes=0, in_channels=1, width=8, image_size=8)
    model.eval().requires_grad_(False)
    found = model.energies(random_images.images, 0.0)
    measured = energy_statistics(found, random_images.labels)
    assert measured.keys() == {"energy"}
    energy = float(model.energy(random_images.images).double().mean())
    assert measured["energy"]["value"] == pytest.approx(energy, abs=1e-6)
    with pytest.raises(UserError, match="cannot be computed from logits"):
        energy_source(model, "logits")
    first = found._replace(logits=found.logits[:1], log_density=found.log_density[:1])
    (entry,) = class_statistics(first, torch.zeros(1, dtype=torch.long))
    assert entry.keys() == {"label", "name", "energy"}
    assert (entry["name"], entry["energy"]["count"], entry["energy"]["std"]) == ("0", 1, None)
