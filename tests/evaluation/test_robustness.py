"""The suite robustness: what it writes, whether its figures are right, and what makes it doubt."""

import json
import math

import pytest
import torch
from ebmkit_tests.support.mixture_world import SIDE, Drawn, near_the_plane, two_gaussians
from rich.console import Console

from ebmkit import EnergyModel, UserError, evaluation, plots
from ebmkit.energy import Energies
from ebmkit.evaluation import attacks, parse_options
from ebmkit.evaluation.robustness import (
    ROBUSTNESS,
    compare_attacks,
    most_informative_epsilon,
    plot_comparison,
)
from ebmkit.evaluation.suite import EvaluationContext

QUICK = {
    "steps": 5,
    "restarts": 1,
    "eot": 2,
    "draws": 4,
    "linf": ["5/255", 0.04],
    "l2": [0.05, "0.1"],
}
QUICK |= {"noise_levels": [0, 0.02], "sigma": "0.02"}


@pytest.fixture
def plane():
    model = two_gaussians()
    x, labels, distances = near_the_plane(model, 40)
    labels[:4] = 1 - labels[:4]  # wrong without an attack
    return model, Drawn(x, labels, class_names=("below", "above")), distances


def evaluate(model, images, folder, settings=QUICK, **options):
    options = {"plots": False, "options": {"robustness": settings}} | options
    return evaluation.evaluate(model, images, ["robustness"], folder, **options)["robustness"]


def values(curve):
    return [estimate["value"] for estimate in curve]


def test_curves_are_shares_of_images_farther_from_the_boundary(plane, tmp_path):
    """The defence direct exactly: 40 images of known distance, 4 of which are wrong anyway."""
    model, images, distances = plane
    result = evaluate(model, images, tmp_path, plots=True)
    document = json.loads(result.path.read_text())
    assert document == result.document
    right = torch.arange(40) >= 4
    for norm, distance in distances.items():
        expected = [
            int((right & (distance > epsilon)).sum()) / 40 for epsilon in document["epsilons"][norm]
        ]
        assert values(document["curves"][norm]["direct"]) == expected
        assert expected[0] == 0.9
        assert expected[-1] < 0.6
        first, second = document["map"][norm]
        assert (first["sigma"], second["sigma"]) == (0, 0.02)
        assert first["accuracy"] == document["curves"][norm]["direct"]
        assert second["accuracy"] == document["curves"][norm]["noise"]  # sigma is that level
        for kind in ("direct", "noise"):
            check = document["checks"][norm][kind]
            assert check["gray"]["accuracy"]["value"] == 0
            assert check["few_steps"]["value"] >= check["pgd"]["value"]
            assert check["random_noise"]["value"] > check["pgd"]["value"]
    assert document["epsilons"] == {"linf": [0, 5 / 255, 0.04], "l2": [0, 0.05, 0.1]}
    assert document["checks"]["l2"]["direct"]["gray"]["epsilon"] == SIDE / 2
    assert document["options"]["steps"] == 5
    assert document["chance"] == 0.5
    assert document["warnings"] == []
    assert {path.stem for path in tmp_path.glob("*.png")} == {"robustness", "robustness-map"}


def test_refinement_gets_a_curve_for_each_number_of_steps(plane, tmp_path):
    """JEM's protocol. Stable steps keep the plane where it is, so curves agree with direct's.

    Chains make noise of 0.01 and all images within it of the plane unsure: there are none.
    """
    model, images, distances = plane
    clear = ((distances["linf"][:, None] - torch.tensor([0, 5 / 255, 0.04])).abs() > 0.003).all(1)
    few = Drawn(images.images[clear], images.labels[clear], class_names=images.class_names)
    settings = QUICK | {"defences": ["direct", "refine"], "noise_levels": [0], "norms": ["linf"]}
    settings |= {"refine_steps": [0, 1, 2], "refine_step_size": 0.004, "refine_noise": "0.001"}
    document = evaluate(model, few, tmp_path, settings).document
    curves = document["curves"]["linf"]
    assert list(curves) == ["direct", "refine-0", "refine-1", "refine-2"]
    assert document["defences"]["refine-2"]["moved"] > document["defences"]["refine-1"]["moved"] > 0
    assert all(values(curve) == values(curves["direct"]) for curve in curves.values())
    assert len(set(values(curves["direct"]))) == 3
    assert document["warnings"] == []
    settings |= {"refine_step_size": 0.25, "refine_steps": [1], "checks": False}  # JEM's
    (warning,) = evaluate(model, few, tmp_path, settings).document["warnings"]
    assert "refine-1 moves images by" in warning
    assert "too large" in warning


def test_the_same_seed_gives_the_same_in_any_batches(plane, tmp_path, monkeypatch):
    monkeypatch.setattr("ebmkit.evaluation.robustness.VALUES_PER_STEP", 1)
    model, images, _ = plane
    settings = QUICK | {"steps": 2, "stepsize": 0.2}  # far from converged: starts matter
    settings |= {"norms": ["l2"], "noise_levels": [0], "images": 20}
    documents = [
        evaluate(model, images, tmp_path, settings, seed=seed, batch_size=size).document
        for seed, size in ((0, 40), (0, 3), (1, 40))
    ]
    measured = [(d["curves"], d["map"], d["checks"]) for d in documents]
    assert measured[0] == measured[1]
    assert measured[0] != measured[2]


def test_progress_ends_where_it_said(plane, tmp_path):
    model, images, _ = plane
    told = []
    config = parse_options({"robustness": QUICK | {"images": 9}}, ["robustness"])
    setting = EvaluationContext(model, images, options=config, batch_size=2, advance=told.append)
    setting.left = total = ROBUSTNESS.passes(setting) * len(images)
    with torch.no_grad():
        ROBUSTNESS.run(setting)
    assert sum(told) == total
    assert setting.left == 0
    assert len([count for count in told if count]) >= 2 * 2 * 3  # each round of bisection moves it


def test_few_images_are_attacked_and_that_is_said(plane, tmp_path):
    model, images, _ = plane
    settings = QUICK | {"images": 10, "norms": ["l2"], "defences": ["direct"], "noise_levels": [0]}
    result = evaluate(model, images, tmp_path, settings, plots=True)
    document = result.document
    assert (document["images"], document["of"]) == (10, 40)
    assert list(document["curves"]) == ["l2"]
    assert document["map"] == {"l2": []}
    assert [path.name for path in tmp_path.glob("*.png")] == ["robustness.png"]
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(ROBUSTNESS.table(document))
    console.file.close()
    text = console.export_text()
    assert "10 of 40 images" in text
    assert "60.0 (31 to 83)" in text  # 4 of 10 are wrong: Wilson's interval
    assert "gray ball" in text


@pytest.mark.parametrize("count", [2, 4])
def test_the_table_fits_eighty_columns(count):
    names = ["direct", "noise", "denoise", "denoise+noise"][-count:]
    one = {"value": 1.0, "low": 0.949, "high": 1.0}
    curve = {name: [one, one] for name in names}
    checks = {
        name: {"epsilon": 8 / 255 * (1 + (name == "noise")), "autoattack": one}
        | {"gray": {"epsilon": 0.5, "accuracy": one}}
        for name in names
    }
    document = {
        "suite": "robustness", "dataset": "cifar10", "split": "test", "images": 200, "of": 10000,
        "warnings": [], "defences": dict.fromkeys(names), "epsilons": {"linf": [0, 8 / 255]},
        "curves": {"linf": curve}, "checks": {"linf": checks},
    }  # fmt: skip
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(ROBUSTNESS.table(document))
    console.file.close()
    lines = console.export_text().splitlines()
    assert all(name in lines[2] for name in names)  # no header is cut
    assert sum("100.0" in line for line in lines) == (4 if count == 2 else 5)
    assert ("100.0 (95 to 100)" in "".join(lines)) == (count == 2)
    assert ("robustness.json" in "".join(lines)) == (count == 4)
    second = [line.split() for line in lines if "16/255" in line]
    assert [row.count("-") for row in second] == ([] if count == 2 else [3])  # noise alone


class Steps(EnergyModel):
    """The label of a plane, by probabilities that are flat but for a jump: no gradient anywhere."""

    num_classes = 2
    noise_conditional = True

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, y, sigma=None):
        logits = self.model(y, sigma).logits
        height = 10 * torch.sign(logits[:, 1] - logits[:, 0])
        return Energies(torch.stack([-height, height], 1), logits.logsumexp(1))


class Steep(Steps):
    """The same label, so confident that float32 has no gradient left."""

    def forward(self, y, sigma=None):
        logits = self.model(y, sigma).logits
        return Energies(1e5 * logits, logits.logsumexp(1))


@pytest.mark.parametrize("mask", [Steps, Steep])
def test_masked_gradients_are_told(mask, tmp_path):
    """Images 0.3 from the plane in l_inf, and in l2 four deviations of the widest random start.

    On this grid both are as robust. In the gray ball PGD crosses the plane, but for the mask.
    """
    model = two_gaussians()
    labels = torch.arange(20) % 2
    towards = torch.sign(model.means[1] - model.means[0])
    x = 0.5 + 0.3 * towards * (2 * labels - 1)[:, None, None, None]
    images = Drawn(x, labels, class_names=("below", "above"))
    settings = QUICK | {"defences": ["direct"], "noise_levels": [0], "norms": ["linf"]}
    settings |= {"linf": [0.1, 0.25]}
    honest = evaluate(model, images, tmp_path, settings).document
    masked = evaluate(mask(model), images, tmp_path, settings).document
    assert values(honest["curves"]["linf"]["direct"]) == [1, 1, 1]
    assert honest["checks"]["linf"]["direct"]["gray"]["accuracy"]["value"] == 0
    assert honest["warnings"] == []
    assert values(masked["curves"]["linf"]["direct"]) == [1, 1, 1]
    (warning,) = masked["warnings"]
    assert warning.startswith("direct, l_inf: at 127.5/255 every image can be turned gray")
    assert "the accuracy is at most 50.0%, but it is 100.0% under PGD" in warning


def test_a_weaker_attack_that_breaks_more_is_told():
    smallest = torch.ones(100)
    broken = torch.arange(100) < 30

    def doubts(**others):
        return compare_attacks("l2", 0.5, smallest, {"pgd": broken, **others})

    lucky = doubts(few_steps=broken.roll(3), one_step=broken & False, random_noise=broken.roll(-4))
    assert lucky[1] == []  # 3 against 3, 0 against 30, 4 against 4
    assert lucky[0]["one_step"].value == 1
    more = torch.arange(100) < 40
    masked = doubts(few_steps=more, one_step=more.roll(5), random_noise=broken)
    assert len(masked[1]) == 1  # 10 against 0, but 15 against 5 at 2 %
    assert "PGD of a quarter of the steps at 0.5 breaks 10 images that PGD does not" in masked[1][0]
    stronger = doubts(autoattack=more)
    assert stronger[0]["gap"] == 0.1
    assert "at 0.5 is 60.0% under AutoAttack and 70.0% under PGD" in stronger[1][0]
    assert doubts(autoattack=torch.arange(100) < 34)[1] == []


def test_checks_are_made_where_half_of_the_images_are_left():
    smallest = torch.tensor([0, 0, 0.1, 0.2, 0.4, math.inf])
    assert most_informative_epsilon(smallest, [0, 0.1, 0.2, 0.4]) == 0.2  # 3, 2, 1 of 4 are left
    assert most_informative_epsilon(torch.tensor([math.inf] * 3), [0, 0.1, 0.2]) == 0.2
    assert most_informative_epsilon(torch.zeros(3), [0, 0.1]) is None


def test_a_model_that_is_always_wrong_has_a_document(plane, tmp_path):
    model, images, _ = plane
    images = Drawn(images.images[4:], 1 - images.labels[4:], class_names=images.class_names)
    settings = QUICK | {"noise_levels": [0], "defences": ["direct"]}
    document = evaluate(model, images, tmp_path, settings).document
    assert values(document["curves"]["l2"]["direct"]) == [0, 0, 0]
    assert document["checks"]["l2"]["direct"]["epsilon"] is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"linf": [8]}, "did you mean 8/255"),
        ({"l2": ["far"]}, "'far' is not a noise level|'far'"),
        ({"l2": [-1]}, "of 0 or more"),
        (
            {"defences": ["denoising"]},
            "'direct', 'noise', 'denoise', 'denoise\\+noise' or 'refine'",
        ),
        ({"steps": 0}, "steps = 0 is not legal"),
        ({"norm": ["l2"]}, "did you mean 'norms'"),
        ({"defences": []}, "defences"),
    ],
)
def test_illegal_settings_are_told(settings, words):
    with pytest.raises(UserError, match=words):
        parse_options({"robustness": settings}, ["robustness"])


def test_strengths_are_read_as_people_write_them():
    options = parse_options(
        {"robustness": {"linf": ["8/255", 0.5], "l2": [2, "1.5", 0]}}, ["robustness"]
    )
    (config,) = options.values()
    assert config.linf == (0, 8 / 255, 0.5)
    assert config.l2 == (0, 1.5, 2)


def test_a_missing_autoattack_is_told_before_any_attack(plane, tmp_path, monkeypatch):
    model, images, _ = plane
    monkeypatch.setattr(attacks, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="autoattack"):
        evaluate(model, images, tmp_path, QUICK | {"autoattack": True})
    assert not list(tmp_path.glob("*.json"))


def test_models_are_compared_and_missing_ones_named(plane, tmp_path, monkeypatch):
    model, images, _ = plane
    settings = QUICK | {"noise_levels": [0], "checks": False, "steps": 1}
    document = evaluate(model, images, tmp_path, settings).document
    drawn = []
    save = plots.save_figure
    monkeypatch.setattr(
        plots, "save_figure", lambda figure, *a, **k: (drawn.append(figure), save(figure, *a, **k))
    )
    paper = {"JEM": {"linf": [(0.0, 0.9), (4 / 255, 0.5)]}}
    plot_comparison({"ours": document, "JEM": None}, tmp_path / "compare.png", paper)
    plot_comparison({"JEM": None}, tmp_path / "none.png")
    assert (tmp_path / "compare.png").stat().st_size > 5000
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels[0].startswith("ours (mixture test, 40 images")
    assert {"JEM: not run", "JEM, paper", "chance"} <= set(labels)
    left = drawn[0].axes[0].get_lines()[0]
    assert left.get_xdata().tolist() == pytest.approx([0, 5, 0.04 * 255])
    assert left.get_ydata()[0] == 90
