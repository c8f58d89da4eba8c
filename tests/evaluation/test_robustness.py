"""Suite ``robustness``: curves against known distances, files, and gradient-masking checks."""

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
    """A linear classifier, 40 images (4 with wrong labels) and their distances to the boundary."""
    model = two_gaussians()
    x, labels, distances = near_the_plane(model, 40)
    labels[:4] = 1 - labels[:4]  # misclassified without an attack
    return model, Drawn(x, labels, class_names=("below", "above")), distances


def evaluate(model, images, folder, settings=QUICK, **options):
    options = {"plots": False, "options": {"robustness": settings}} | options
    return evaluation.evaluate(model, images, ["robustness"], folder, **options)["robustness"]


def values(curve):
    return [estimate["value"] for estimate in curve]


def test_curves_are_shares_of_images_farther_from_the_boundary(plane, tmp_path):
    """Exact for ``direct``: 40 images of known distance, 4 misclassified without an attack."""
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
        # sigma equals this noise level
        assert second["accuracy"] == document["curves"][norm]["noise"]
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


@pytest.mark.slow
def test_refinement_has_a_curve_for_each_number_of_steps(plane, tmp_path):
    """JEM's protocol. Stable steps do not move the boundary, so curves equal that of ``direct``.

    The noise of the chains matters only near the boundary; images within 0.003 of a strength are
    excluded.
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


def test_results_depend_on_seed_and_not_on_batch_size(plane, tmp_path, monkeypatch):
    monkeypatch.setattr("ebmkit.evaluation.robustness.VALUES_PER_STEP", 1)
    model, images, _ = plane
    settings = QUICK | {"steps": 2, "stepsize": 0.2}  # far from convergence, so starts matter
    settings |= {"norms": ["l2"], "noise_levels": [0], "images": 20}
    documents = [
        evaluate(model, images, tmp_path, settings, seed=seed, batch_size=size).document
        for seed, size in ((0, 40), (0, 3), (1, 40))
    ]
    measured = [(d["curves"], d["map"], d["checks"]) for d in documents]
    assert measured[0] == measured[1]
    assert measured[0] != measured[2]


def test_progress_reaches_announced_total(plane, tmp_path):
    model, images, _ = plane
    advanced = []
    config = parse_options({"robustness": QUICK | {"images": 9}}, ["robustness"])
    context = EvaluationContext(
        model, images, options=config, batch_size=2, advance=advanced.append
    )
    context.left = total = ROBUSTNESS.passes(context) * len(images)
    with torch.no_grad():
        ROBUSTNESS.run(context)
    assert sum(advanced) == total
    assert context.left == 0
    # every round of bisection advances it
    assert len([count for count in advanced if count]) >= 2 * 2 * 3


def test_limited_number_of_images_is_reported(plane, tmp_path):
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
    # only noise is checked at 16/255
    assert [row.count("-") for row in second] == ([] if count == 2 else [3])


class PiecewiseConstant(EnergyModel):
    """The labels of ``model`` with piecewise constant logits, whose gradients are 0."""

    num_classes = 2
    noise_conditional = True

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, y, sigma=None):
        logits = self.model(y, sigma).logits
        height = 10 * torch.sign(logits[:, 1] - logits[:, 0])
        return Energies(torch.stack([-height, height], 1), logits.logsumexp(1))


class Saturated(PiecewiseConstant):
    """The same labels with a softmax that is saturated in float32, so gradients are 0."""

    def forward(self, y, sigma=None):
        logits = self.model(y, sigma).logits
        return Energies(1e5 * logits, logits.logsumexp(1))


@pytest.mark.parametrize("mask", [PiecewiseConstant, Saturated])
def test_masked_gradients_give_warning(mask, tmp_path):
    """Images have l_inf distance 0.3 to the boundary, beyond the grid and the random starts.

    In l2 the distance is four standard deviations of the largest random start. Attacks on the grid
    fail with and without masking. In the ball that contains gray, PGD crosses the boundary unless
    gradients are masked.
    """
    model = two_gaussians()
    labels = torch.arange(20) % 2
    towards = torch.sign(model.means[1] - model.means[0])
    x = 0.5 + 0.3 * towards * (2 * labels - 1)[:, None, None, None]
    images = Drawn(x, labels, class_names=("below", "above"))
    settings = QUICK | {"defences": ["direct"], "noise_levels": [0], "norms": ["linf"]}
    settings |= {"linf": [0.1, 0.25]}
    unmasked = evaluate(model, images, tmp_path, settings).document
    masked = evaluate(mask(model), images, tmp_path, settings).document
    assert values(unmasked["curves"]["linf"]["direct"]) == [1, 1, 1]
    assert unmasked["checks"]["linf"]["direct"]["gray"]["accuracy"]["value"] == 0
    assert unmasked["warnings"] == []
    assert values(masked["curves"]["linf"]["direct"]) == [1, 1, 1]
    (warning,) = masked["warnings"]
    assert warning.startswith("direct, l_inf: at 127.5/255 every image can be turned gray")
    assert "the accuracy is at most 50.0%, but it is 100.0% under PGD" in warning


def test_weaker_attack_that_succeeds_more_often_gives_warning():
    smallest = torch.ones(100)
    broken = torch.arange(100) < 30

    def compare(**others):
        return compare_attacks("l2", 0.5, smallest, {"pgd": broken, **others})

    similar = compare(
        few_steps=broken.roll(3), one_step=broken & False, random_noise=broken.roll(-4)
    )
    assert similar[1] == []  # images that only one attack breaks: 3 to 3, 0 to 30, 4 to 4
    assert similar[0]["one_step"].value == 1
    more = torch.arange(100) < 40
    masked = compare(few_steps=more, one_step=more.roll(5), random_noise=broken)
    assert len(masked[1]) == 1  # 10 to 0 is significant, 15 to 5 (p = 2 %) is not
    assert "PGD of a quarter of the steps at 0.5 breaks 10 images that PGD does not" in masked[1][0]
    stronger = compare(autoattack=more)
    assert stronger[0]["gap"] == 0.1
    assert "at 0.5 is 60.0% under AutoAttack and 70.0% under PGD" in stronger[1][0]
    assert compare(autoattack=torch.arange(100) < 34)[1] == []


def test_checks_use_epsilon_that_half_of_the_images_survive():
    smallest = torch.tensor([0, 0, 0.1, 0.2, 0.4, math.inf])
    assert most_informative_epsilon(smallest, [0, 0.1, 0.2, 0.4]) == 0.2  # 3, 2 and 1 of 4 survive
    assert most_informative_epsilon(torch.tensor([math.inf] * 3), [0, 0.1, 0.2]) == 0.2
    assert most_informative_epsilon(torch.zeros(3), [0, 0.1]) is None


def test_model_that_is_always_wrong_has_zero_accuracy_and_no_checks(plane, tmp_path):
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
def test_illegal_settings_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        parse_options({"robustness": settings}, ["robustness"])


def test_epsilons_are_parsed_sorted_and_include_zero():
    options = parse_options(
        {"robustness": {"linf": ["8/255", 0.5], "l2": [2, "1.5", 0]}}, ["robustness"]
    )
    (config,) = options.values()
    assert config.linf == (0, 8 / 255, 0.5)
    assert config.l2 == (0, 1.5, 2)


def test_missing_autoattack_is_refused_before_any_attack(plane, tmp_path, monkeypatch):
    model, images, _ = plane
    monkeypatch.setattr(attacks, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="autoattack"):
        evaluate(model, images, tmp_path, QUICK | {"autoattack": True})
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.slow
def test_comparison_plots_models_and_names_missing_ones(plane, tmp_path, monkeypatch):
    model, images, _ = plane
    settings = QUICK | {"noise_levels": [0], "checks": False, "steps": 1}
    document = evaluate(model, images, tmp_path, settings).document
    figures = []
    save = plots.save_figure
    monkeypatch.setattr(
        plots,
        "save_figure",
        lambda figure, *a, **k: (figures.append(figure), save(figure, *a, **k)),
    )
    paper = {"JEM": {"linf": [(0.0, 0.9), (4 / 255, 0.5)]}}
    plot_comparison({"ours": document, "JEM": None}, tmp_path / "compare.png", paper)
    plot_comparison({"JEM": None}, tmp_path / "none.png")
    assert (tmp_path / "compare.png").stat().st_size > 5000
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels[0].startswith("ours (mixture test, 40 images")
    assert {"JEM: not run", "JEM, paper", "chance"} <= set(labels)
    left = figures[0].axes[0].get_lines()[0]
    assert left.get_xdata().tolist() == pytest.approx([0, 5, 0.04 * 255])
    assert left.get_ydata()[0] == 90
