"""The experiment ``guidance``: methods, networks, stored images and report."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from ebmkit.card import ModelCard
from ebmkit.evaluation.features import classifier_of
from ebmkit.experiments import EXPERIMENTS, SCALES, ExperimentRuns, write
from ebmkit.experiments.guidance import (
    AMOUNTS,
    BY_IMAGE,
    METHODS,
    NETWORKS,
    ORDERINGS,
    GuidanceMethod,
    ImageDrawer,
    _Study,
    compare_orderings,
    images_folder,
    measure_methods,
    run_guidance,
)
from ebmkit.guidance import make_guidance
from ebmkit.models import create_denoiser, create_model
from ebmkit.randomness import keyed_generator
from ebmkit.storage import FolderLocked
from ebmkit.training.config import differences, merge

pytestmark = pytest.mark.usefixtures("count_cost_roughly")

NAMES = {row.name for row in NETWORKS}


def test_every_method_has_valid_settings_and_known_networks():
    assert len({method.name for method in METHODS}) == len(METHODS)
    for method in METHODS:
        assert {method.base, method.guide or method.base} <= NAMES
        if method.settings:
            make_guidance(**method.settings)
    for amount in AMOUNTS.values():
        assert set(amount.networks) <= NAMES
        assert set(amount.methods) <= {method.name for method in METHODS}


@pytest.mark.parametrize("scale", SCALES)
def test_every_network_has_a_configuration_at_every_scale(scale):
    runs = ExperimentRuns(Path("out"), SCALES[scale])
    joint = "ce+dsm-mean" if scale in ("full", "cpu-cdn") else "ce+dsm"  # the recipe's
    for row in NETWORKS:
        config = runs.config(row)
        assert config.objective == row.layer.get("objective", joint), row.name
        if row.name.startswith("robust-0") or row.name == "robust-1":
            assert config.terms.adv.eps == float(row.name.removeprefix("robust-"))


NOISY = {"model.noise_conditional": True, "streams.classify.noise.kind": "diffusion"}
DIFFUSION = {"terms.ddpm.class_dropout": 0.1}
AT_FULL = {  # network -> published recipe, and what differs from it
    "diffusion": ("cifar10-ddpm", DIFFUSION | {"model.backbone.class_conditional": True}),
    "own-diffusion": (
        "cifar10-ddpm",
        DIFFUSION
        | {
            "backbone": "gradresnet18",
            "model.backbone.norm": "scale",
            "model.noise_conditional": True,
        },
    ),
    "judge": ("cifar10-robust", {"backbone": "wideresnet28-10", "objective": "ce"}),
    "plain": ("cifar10-robust", {"objective": "ce"}),
    "robust-0.25": ("cifar10-robust", {"terms.adv.eps": 0.25}),
    "robust-0.5": ("cifar10-robust", {}),
    "robust-1": ("cifar10-robust", {"terms.adv.eps": 1.0}),
    "robust-dsm": (
        "cifar10-robust",
        {"objective": "adv+dsm", "head": "linear-quadratic", "model.head.bias": False},
    ),
    "joint": ("cdn-cifar10", {}),
    "jem": ("jem", {}),
    "of-time": ("cifar10-robust", NOISY | {"objective": "ce"}),
    "kawar": (
        "cifar10-robust",
        NOISY
        | {
            "terms.adv.eps": 0.25,
            "terms.adv.early_stop": True,
            "terms.adv.variance_preserving": True,
        },
    ),
}


def test_networks_at_full_scale_are_the_published_recipes_with_the_named_differences():
    runs = ExperimentRuns(Path("out"), SCALES["full"])
    found = {
        row.name: (
            runs.scale.recipe_of(row),
            {key: own for key, (_, own) in runs.differences(row).items()},
        )
        for row in NETWORKS
    }
    assert found == AT_FULL


@pytest.mark.parametrize("scale", ["cpu", "cpu-cdn"])
def test_plain_and_robust_classifiers_differ_in_the_attack_alone(scale):
    runs = ExperimentRuns(Path("out"), SCALES[scale])
    by_name = {row.name: runs.config(row).model_dump(mode="json") for row in NETWORKS}
    found = differences(by_name["plain"], by_name["robust-0.5"])
    assert {key for key in found if not key.startswith("terms.adv.")} == {"objective"}


@pytest.mark.parametrize("scale", SCALES)
def test_networks_that_only_classify_have_logit_energies_and_others_the_paper_s_head(scale):
    """RCG eq. 2.32-2.38 and JEM: logits with biases; CDN eq. 10-12 and section 3.2: none."""
    runs = ExperimentRuns(Path("out"), SCALES[scale])
    only_classify = {"judge", "plain", "robust-0.25", "robust-0.5", "robust-1", "of-time", "kawar"}
    for row in NETWORKS:
        config = runs.config(row)
        logits = row.name in only_classify | {"jem"}
        expected = ("logit", True) if logits else ("linear-quadratic", False)
        assert (config.head, config.model.head.bias) == expected, row.name
    assert {"joint", "robust-dsm", "own-diffusion", "diffusion"} < NAMES - only_classify


def test_radius_of_kawar_s_classifier_is_half_a_unit_of_x_t():
    """x_t = sqrt(abar) (2 x - 1) + noise has twice the lengths of sqrt(abar) y, which eps has."""
    kawar = {row.name: row for row in NETWORKS}["kawar"]
    for scale in SCALES.values():
        own = ExperimentRuns(Path("out"), scale).config(kawar).terms.adv
        assert own.variance_preserving
        assert (2 * own.eps, own.norm) == (0.5, "l2")


def test_networks_share_no_folder_with_other_experiments():
    """Experiments may share --out, and "joint" of table 1 is another network than the guide."""
    every = [variant for one in EXPERIMENTS.values() for variant in one.variants]
    others = {variant.folder for variant in every if variant.family != "guidance"}
    assert "joint" in others
    assert not others & {row.folder for row in NETWORKS}


def test_scales_are_multiplied_unless_they_are_fixed():
    assert GuidanceMethod("w", "", "g", {"scale": 4.0}).times(5).settings["scale"] == 20
    assert GuidanceMethod("w", "", "g", {"scale": 1.0}, fixed=True).times(5).settings["scale"] == 1
    assert GuidanceMethod("w", "").times(5).settings == {}


def test_only_smoke_changes_the_thesis_s_settings_of_pgd():
    by_name = {method.name: method for method in METHODS}
    for scale, n in {"smoke": 10, "cpu": 100, "full": 100}.items():
        for name in ("pgd", "pgd clipped"):
            own = by_name[name].with_options(AMOUNTS[scale].options)
            assert own.settings["options"] == {"n": n, "gamma": 0.005}
            assert own.settings["view"] == "x_t"
        assert by_name["dual"].with_options(AMOUNTS[scale].options) == by_name["dual"]


def test_the_thesis_s_methods_are_drawn_unclipped_and_clipped():
    for method in METHODS:
        assert method.clip == method.name.endswith(" clipped")
        if method.group == "thesis" and not method.clip:
            twin = replace(method, name=f"{method.name} clipped", clip=True)
            assert METHODS[METHODS.index(method) + 1] == twin


@pytest.fixture
def drawer(tmp_path):
    torch.manual_seed(0)
    diffusion = create_denoiser("unet", 1, width=8, multipliers=(1, 1), blocks=1)
    diffusion.card = ModelCard(
        image_size=(8, 8), channels=1, sigma_range=diffusion.schedule.sigma_range
    )
    guide = create_model("gradresnet18", 3, 1, head="logit", image_size=8, width=8)
    models = {"diffusion": diffusion, "guide": guide}
    for model in models.values():
        model.eval().requires_grad_(False)
    return ImageDrawer(tmp_path, models.__getitem__, lambda name: f"{name} 1", 3, 2, 0, None)


GUIDED = GuidanceMethod("guided", "", "guide", {"guidance": "energy", "scale": 4.0, "view": "x_t"})


def test_methods_have_equal_starts_and_scale_0_is_unguided(drawer):
    plain = drawer.draw(GuidanceMethod("unguided", ""), 3)
    zero = GuidanceMethod("zero", "", "guide", GUIDED.settings | {"scale": 0.0})
    assert torch.equal(drawer.draw(zero, 3), plain)
    assert not torch.equal(drawer.draw(GUIDED, 3), plain)
    assert drawer.labels.tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("classifier", marks=pytest.mark.slow),
        "energy",
        pytest.param("pgd", marks=pytest.mark.slow),
    ],
)
def test_methods_of_the_thesis_are_algorithms_6_and_8(drawer, name):
    """By hand in x_t, clean images in [-1, 1]: no clipping, steps of 0.01, autograd's gradients."""
    diffusion, guide = drawer.models("diffusion"), drawer.models("guide")
    low, _ = diffusion.schedule.sigma_range
    diffusion.card = diffusion.card.model_copy(update={"sigma_range": (low, 0.3)})  # few values end
    own = next(method for method in METHODS if method.name == name)  # out of range
    method = replace(own, guide="guide", eta=0.0).with_options({"pgd": {"n": 4}}).times(50)
    c, scale, schedule = drawer.labels, method.settings["scale"], diffusion.schedule
    times = [t for t in schedule.timesteps(20) if schedule.sigma(t) <= 0.3]
    assert len(times) == 3

    def gradient(x, energy):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            logits = guide.energies((x + 1) / 2).logits
            value = logits if energy else logits.log_softmax(1)
            (found,) = torch.autograd.grad(value[range(len(c)), c].sum(), x)
        return found

    def length(x):
        return x.flatten(1).norm(dim=1)[:, None, None, None]

    key = keyed_generator("cpu", 0, "guidance", 0, 0)
    y = 0.5 + schedule.sigma(times[0]) * torch.randn(len(c), 1, 8, 8, generator=key)
    x = (2 * y - 1) * schedule.abar(times[0]) ** 0.5
    for t, lower in itertools.pairwise((*times, -1)):
        abar, after = schedule.abar(t), schedule.abar(lower)
        y = (x / abar**0.5 + 1) / 2
        sigma = (1 - abar) ** 0.5 / abar**0.5 / 2
        with torch.no_grad():
            eps = (y - diffusion.denoise(y, sigma)) / sigma
        at, g = x, (1 - abar) ** 0.5
        if name == "pgd":
            g = t / 1000
            for _ in range(4):
                step = gradient(at, True)
                at = at + 0.01 * step / length(step)
        eps = eps - g * scale * gradient(at, name != "classifier")
        x0 = (x - (1 - abar) ** 0.5 * eps) / abar**0.5
        x = after**0.5 * x0 + (1 - after) ** 0.5 * eps
    expected = ((x + 1) / 2).clamp(0, 1)
    assert 0.2 < ((expected > 0) & (expected < 1)).float().mean() < 0.95
    torch.testing.assert_close(drawer.draw(method, 20), expected, atol=2e-5, rtol=0)
    clipped = drawer.draw(replace(method, clip=True), 20)
    assert (clipped - expected).abs().max() > 0.01


def test_images_stored_before_clipping_was_a_setting_are_read_as_clipped(drawer, tmp_path):
    clipped = replace(GUIDED, clip=True)
    first = drawer.stored(clipped, 2)
    with h5py.File(tmp_path / "guided.h5", "r+") as file:
        settings = json.loads(file.attrs["settings"])
        del settings["clip"]
        file.attrs["settings"] = json.dumps(settings)
        file.attrs["seconds"] = 1234.0
    assert drawer.stored(clipped, 2).seconds == 1234
    redrawn = drawer.stored(GUIDED, 2)
    assert redrawn.seconds != 1234
    assert not torch.equal(redrawn.images, first.images)


def test_energies_by_class_are_of_training_images(tmp_path, monkeypatch):
    """RCG figure 4.12: means of -logsumexp of the logits over the training images of a class."""
    plain = next(row for row in NETWORKS if row.name == "plain")
    runs = ExperimentRuns(tmp_path, SCALES["smoke"])
    study = _Study(runs, AMOUNTS["smoke"], [plain], runs.images(plain, "train"))
    torch.manual_seed(0)
    study._loaded["plain"] = create_model("gradresnet18", 10, 1, head="logit", width=8).eval()
    monkeypatch.setattr(_Study, "_digest", lambda self, name: "1")
    found = study.classes()["networks"]["plain"]
    train = runs.images(plain, "train")
    with torch.no_grad():
        logits = study._loaded["plain"].energies(train.images / 255).logits
    for label in range(10):
        own = logits[train.labels == label]
        assert found["images"][label] == len(own)
        assert found["energy"][label] == pytest.approx(-float(own.logsumexp(1).mean()), rel=1e-4)
    study._loaded.clear()
    assert study.classes()["networks"]["plain"] == found  # stored


def test_stored_images_are_redrawn_for_other_steps_weights_or_damage(drawer, tmp_path, monkeypatch):
    first = drawer.stored(GUIDED, 2)
    draw, calls = ImageDrawer.draw, []

    def counted(self, *arguments, **named):
        calls.append(arguments)
        return draw(self, *arguments, **named)

    monkeypatch.setattr(ImageDrawer, "draw", counted)
    again = drawer.stored(GUIDED, 2)
    assert not calls
    assert torch.equal(first.images, again.images)
    assert again.seconds == first.seconds
    drawer.stored(GUIDED, 3)
    assert len(calls) == 1
    drawer.digests = lambda name: f"{name} 2"
    drawer.stored(GUIDED, 3)
    assert len(calls) == 2
    (tmp_path / "guided.h5").write_bytes(b"cut short")
    drawer.stored(GUIDED, 3)
    assert len(calls) == 3


def test_images_stored_with_earlier_setting_names_are_read(drawer, tmp_path, monkeypatch):
    first = drawer.stored(GUIDED, 2)
    with h5py.File(tmp_path / "guided.h5", "r+") as file:
        settings = json.loads(file.attrs["settings"])
        own = settings["guidance"]
        own |= {"view": "shrunk", "through": own.pop("backpropagate"), "late": own.pop("start")}
        file.attrs["settings"] = json.dumps(settings)
    monkeypatch.setattr(ImageDrawer, "draw", None)
    assert torch.equal(drawer.stored(GUIDED, 2).images, first.images)


# --- seeds and orderings -------------------------------------------------------------------------


def random_study(runs, train, networks=("diffusion", "judge", "robust-1"), methods=None):
    """A study of untrained networks, different for each seed."""
    amount = replace(
        AMOUNTS["smoke"], per_class=2, steps=2, real=60, methods=methods or ("unguided", "energy")
    )
    trained = [row for row in NETWORKS if row.name in networks]
    study = _Study(runs, amount, trained, train)
    torch.manual_seed(runs.seed)
    diffusion = create_denoiser("unet", 1, width=8, multipliers=(1, 1), blocks=1)
    diffusion.card = ModelCard(
        image_size=(8, 8), channels=1, sigma_range=diffusion.schedule.sigma_range
    )
    study._loaded["diffusion"] = diffusion
    for name in ("judge", "robust-1"):
        study._loaded[name] = create_model("gradresnet10", 10, 1, head="logit", width=8)
    for model in study._loaded.values():
        model.eval().requires_grad_(False)
    study._classifier = classifier_of(study._loaded["judge"], "judge")
    study._digest = study.drawing.digests = lambda name: f"{name} {runs.seed}"
    return study


@pytest.fixture(scope="module")
def two_seeds(tmp_path_factory):
    """Runs of two seeds, their training images and `measure_methods` of random networks."""
    runs = ExperimentRuns(tmp_path_factory.mktemp("guidance"), SCALES["smoke"], seeds=(0, 1))
    train = runs.images(NETWORKS[0], "train").first(200)
    return runs, train, measure_methods([random_study(own, train) for own in runs.each_seed()])


def test_methods_are_drawn_and_measured_with_each_seed(two_seeds):
    runs, _, (documents, values) = two_seeds
    for document in documents:
        name = document["name"]
        files = [runs.out / "guidance" / folder / f"{name}.h5" for folder in ("", "seed-1")]
        seeds = [h5py.File(path).attrs["seed"] for path in files]
        assert seeds == [0, 1]
        assert document["missing_seeds"] == {}
        assert document["by_seed"]["0"] != document["by_seed"]["1"]
        assert document["accuracy"] == document["by_seed"]["0"]["recognised"]
        for seed, figures in document["by_seed"].items():
            own = values[name][int(seed)]
            assert {len(column) for column in own.values()} == {20}
            assert figures["recognised"]["value"] == pytest.approx(np.mean(own["accuracy"]))
            assert figures["saturated"] == pytest.approx(100 * np.mean(own["ends"]))
        json.dumps(document, allow_nan=False)
        assert "by_image" not in document
    assert [document["name"] for document in documents] == ["unguided", "energy"]
    gaps = [document["by_seed"]["1"]["gap"] for document in documents]
    energies = [np.mean(values[document["name"]][1]["energy"]) for document in documents]
    assert gaps[1] - gaps[0] == pytest.approx(energies[1] - energies[0], abs=1e-5)


def test_metrics_without_values_by_image_are_measured_again_from_the_images(two_seeds, monkeypatch):
    runs, train, (_, values) = two_seeds
    path = runs.out / "guidance" / "energy.json"
    stored = json.loads(path.read_text())
    del stored["key"]["by_image"], stored["found"]["by_image"]
    path.write_text(json.dumps(stored))
    monkeypatch.setattr(ImageDrawer, "draw", None)
    _, again = measure_methods([random_study(runs, train)])
    own, before = again["energy"][0], values["energy"][0]
    assert (own["accuracy"], own["ends"]) == (before["accuracy"], before["ends"])
    assert own["energy"] == pytest.approx(before["energy"], abs=1e-5)
    assert json.loads(path.read_text())["found"]["by_image"] == own


def test_seed_whose_network_is_not_trained_or_whose_chains_diverge_is_missing(
    tmp_path, two_seeds, monkeypatch
):
    runs = replace(two_seeds[0], out=tmp_path)
    first, second = runs.each_seed()
    studies = [
        random_study(first, two_seeds[1], methods=("unguided",)),
        random_study(second, two_seeds[1], ("judge", "robust-1"), methods=("unguided",)),
    ]
    ((document,), values) = measure_methods(studies)
    assert document["missing_seeds"] == {"1": "not trained: diffusion"}
    assert values["unguided"].keys() == {0}
    studies[1].names.add("diffusion")
    with torch.no_grad():
        studies[1]._loaded["diffusion"].network.conv_out.bias.fill_(float("nan"))
    ((document,), _) = measure_methods(studies)
    assert "NaN or Inf" in document["missing_seeds"]["1"]


def test_images_that_another_process_draws_are_waited_for(two_seeds, monkeypatch):
    """`ExperimentRuns.share` tries again; the report must not say that the method stopped."""
    runs, train, _ = two_seeds
    study = random_study(runs.at(1), train)

    def drawn_elsewhere(method, steps):
        raise FolderLocked("another process draws it")

    monkeypatch.setattr(study.drawing, "stored", drawn_elsewhere)
    with pytest.raises(FolderLocked):
        study.measured(study.methods()[0])


def test_earlier_images_of_another_seed_stay_where_they_are(tmp_path, two_seeds):
    for path in (two_seeds[0].out / "guidance" / "seed-1").glob("*.h5"):
        (tmp_path / "guidance").mkdir(exist_ok=True)
        (tmp_path / "guidance" / path.name).write_bytes(path.read_bytes())
    runs = replace(two_seeds[0], out=tmp_path)
    folders = [images_folder(own) for own in runs.each_seed()]
    assert folders == [tmp_path / "guidance" / "seed-0", tmp_path / "guidance"]


def test_orderings_compare_known_methods_by_values_of_images():
    names = {method.name for method in METHODS}
    assert len({(a, b, metric) for a, b, metric, _ in ORDERINGS}) == len(ORDERINGS)
    for greater, smaller, metric, source in ORDERINGS:
        assert {greater, smaller} <= names
        assert metric in BY_IMAGE
        assert source


def values_of(seeds, recognised, ends=0.1, energy=0.0, images=200):
    """Values by image with the share ``recognised``, in another order for each seed."""
    return {
        seed: {
            "accuracy": np.roll(np.arange(images) < recognised * images, 7 * seed).tolist(),
            "ends": (ends + 0.01 * np.sin(np.arange(images) + seed)).tolist(),
            "energy": (energy + np.sin(np.arange(images) + seed)).tolist(),
        }
        for seed in seeds
    }


def test_orderings_are_tested_by_images_from_the_same_noise():
    """Saturation varies by 0.7 points over images, its paired differences by nothing."""
    found = compare_orderings(
        {
            "unguided": values_of((0, 1, 2), 0.1, ends=0.10),
            "accumulated": values_of((2, 1, 5), 0.6, ends=0.101),
            "accumulated 0.5": values_of((1, 2), 0.8),
            "sigmoid 500": values_of((1, 2), 0.5, energy=-2.0),
            "dual": values_of((1, 2), 0.5, energy=-1.5),
            "step": values_of((1,), 0.5, ends=0.2),
            "step clipped": values_of((1,), 0.5, ends=0.1),
            "energy": values_of((1, 2), 0.5),
            "pgd": values_of((1, 2), 0.5),
            "classifier": values_of((7,), 0.5),
            "of-time": {7: {"ends": [0.1]}},  # the evaluation classifier has other classes
        }
    )
    by_pair = {(one["greater"], one["smaller"], one["metric"]): one for one in found}
    own = by_pair["accumulated", "unguided", "saturated"]
    assert own["seeds"] == [2, 1]
    assert own["images"] == 200
    assert own["ours"] == pytest.approx(0.1)
    verdicts = {pair: one["verdict"] for pair, one in by_pair.items()}
    assert verdicts == {
        ("accumulated", "unguided", "recognised"): "holds",
        ("accumulated", "unguided", "saturated"): "holds",
        ("accumulated", "accumulated 0.5", "recognised"): "reversed",
        ("dual", "sigmoid 500", "gap"): "holds",
        ("energy", "sigmoid 500", "saturated"): "open",
        ("energy", "pgd", "saturated"): "open",
        ("step", "step clipped", "saturated"): "open (one seed)",
    }
    nan = values_of((1, 2), 0.5)
    nan[1]["energy"][3] = None  # as stored
    assert not compare_orderings({"dual": nan, "sigmoid 500": nan})


@pytest.mark.slow
def test_two_seeds_are_trained_drawn_and_reported(tmp_path):
    smoke, steps = SCALES["smoke"], {"steps": 4}
    tasks = {task: merge(smoke.by_task.get(task, {}), steps) for task in smoke.by_task}
    layer = {**smoke.layer, "guidance": merge(smoke.layer["guidance"], steps)}
    scale = replace(smoke, size="cpu", layer=layer, by_task=tasks)  # size smoke has no orderings
    runs = ExperimentRuns(tmp_path, scale, seeds=(0, 1))
    amount = replace(
        AMOUNTS["smoke"],
        per_class=5,
        steps=5,
        path={"step": 500},
        grid={"images": 20, "steps": 2},
        path_images=20,
        networks=("diffusion", "judge", "robust-1"),
        methods=("unguided", "classifier", "energy", "energy clipped"),
    )
    report = run_guidance(runs, (), amount)
    paths = write("guidance", EXPERIMENTS["guidance"], report, tmp_path)
    document = json.loads((tmp_path / "guidance.json").read_text())
    assert [(o["greater"], o["smaller"]) for o in document["orderings"]] == [
        ("classifier", "unguided"),
        ("energy", "classifier"),
        ("energy", "energy clipped"),
    ]
    assert all((o["seeds"], o["images"]) == ([0, 1], 50) for o in document["orderings"])
    text = paths[0].read_text()
    (row,) = [line for line in text.splitlines() if line.startswith("| energy clipped |")]
    assert row.count("±") == 7  # all figures, and the distance of real images
    assert "### Orderings of the thesis" in text
    assert sorted(path.name for path in (tmp_path / "guidance" / "seed-1").glob("*.h5")) == [
        "classifier.h5", "energy-clipped.h5", "energy.h5", "unguided.h5",
    ]  # fmt: skip
