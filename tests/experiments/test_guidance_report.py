"""The report of experiment ``guidance``, from committed results and small documents."""

import json
from pathlib import Path

import pytest
import torch

from ebmkit.data import ImageSet
from ebmkit.experiments.guidance_report import (
    STATED,
    SUMMARY,
    _pooled,
    compare_methods,
    energies_by_class,
    figures_of,
    guidance_text,
    overview,
)
from ebmkit.experiments.runs import read_data
from ebmkit.guidance import class_energies
from ebmkit.models import create_model

ROOT = Path(__file__).parents[2]


def committed(name):
    return json.loads((ROOT / "docs" / "results" / f"guidance-{name}.json").read_text())


def test_readme_has_the_table_of_the_committed_results():
    expected = "\n".join(overview(committed("cifar10")["ways"]))
    assert expected in (ROOT / "README.md").read_text(), f"README.md must contain:\n{expected}"


def test_overview_begins_with_the_thesis_s_settings_and_has_every_guide():
    ways = committed("cifar10")["ways"]
    names = [row.split(" | ")[0].removeprefix("| ") for row in overview(ways)[2:]]
    assert STATED[-5:] == ("step", "sigmoid 650", "sigmoid 500", "dual", "pgd")
    known = [name for name in STATED if any(way["name"] == name for way in ways)]
    assert names[: len(known) + 1] == [*known, "unguided"]
    assert {way["name"] for way in ways if way["group"] == "guides"} < set(names)


@pytest.mark.parametrize("name", ["cifar10", "digits"])
def test_committed_results_say_that_they_were_clipped(name):
    text = guidance_text(committed(name))
    assert "| unguided | no guidance: the label is not known |  | 0.8 | yes |" in text
    assert "drawn before corrections" in text


def test_saturation_is_beside_that_with_clipping():
    first = committed("cifar10")["ways"][4]
    ways = [first | {"clip": False}, first | {"name": "energy clipped", "clip": True}]
    amount = {"per_class": 1, "steps": 2, "strength": 1.0, "options": {"pgd": {"n": 10}}}
    report = EMPTY | {"ways": ways, "amount": amount}
    text = guidance_text(json.loads(json.dumps(report)))
    rows = [line for line in text.splitlines() if line.startswith("| energy")]
    assert [row.split(" | ")[4] for row in rows] == ["no", "yes"]
    assert "At this scale pgd has n = 10." in text


def test_cells_are_mean_and_deviation_over_seeds():
    first = committed("cifar10")["ways"][4]
    figures = figures_of(first)
    share = figures["recognised"]["value"]
    other = figures | {
        "recognised": {"value": share + 0.2, "low": 0.0, "high": 1.0},
        "saturated": figures["saturated"] + 2,
        "gap": figures["gap"] + 1,
        "diversity": None,
    }
    method = first | {"by_seed": {"0": figures, "2": other}, "missing_seeds": {"4": "NaN"}}
    amount = {"per_class": 1, "steps": 2, "strength": 1.0}
    one = first | {"by_seed": {"0": figures}, "missing_seeds": {}, "name": "one"}
    report = json.loads(json.dumps(EMPTY | {"ways": [method, one], "amount": amount}))
    text = guidance_text(report)
    rows = {line.split(" | ")[0]: line.split(" | ") for line in text.splitlines()}
    cells, alone = rows[f"| {first['name']}"], rows["| one"]
    assert cells[1].endswith(", 2 of 3 seeds")
    assert cells[5] == f"{100 * share + 10:.0f} ± 14"
    assert cells[7] == "-"
    saturated, real = figures["saturated"], figures["real"]
    assert cells[8] == f"{saturated + 1:.1f} ± 1.4 ({real:.1f})"
    assert cells[9] == f"{figures['gap'] + 0.5:+.2f} ± 0.71"
    assert "mean ± standard deviation over 2 seeds" in text
    assert "±" not in " ".join(alone)
    assert f"{100 * share:.0f} ({100 * first['accuracy']['low']:.0f} to " in alone[5]


@pytest.mark.slow
def test_methods_of_several_seeds_are_plotted(tmp_path):
    first = committed("cifar10")["ways"][4]
    figures = figures_of(first)
    method = first | {"by_seed": {"0": figures, "1": figures | {"gap": None}}}
    compare_methods([method, first], tmp_path / "ways.png")
    assert (tmp_path / "ways.png").read_bytes().startswith(b"\x89PNG")


def test_orderings_are_shown_with_their_source():
    one = {"greater": "step", "smaller": "energy", "metric": "saturated", "source": "4.5: strong"}
    one |= {"ours": 1.234, "seeds": [0, 1], "images": 120, "p_seeds": 0.01, "p_images": 0.02}
    text = guidance_text(EMPTY | {"orderings": [one | {"p": 0.03, "verdict": "holds"}]})
    assert "| step | energy | saturated | 4.5: strong | +1.23 | 0.030 | holds |" in text
    assert "over seeds, over generated images, and over both" in text
    assert "Orderings" not in guidance_text(EMPTY | {"orderings": []})


EMPTY = {
    "networks": [],
    "grid": None,
    "path": None,
    "ways": [],
    "amount": {},
    "dataset": "digits",
    "about": "a test",
    "notes": ["command: none"],
}


def test_report_without_results_has_its_notes():
    assert "command: none" in guidance_text(json.loads(json.dumps(EMPTY)))


def test_energies_of_all_classes_are_pooled_and_plotted(tmp_path):
    torch.manual_seed(0)
    model = create_model("gradresnet18", 3, 1, head="logit", width=8).eval()
    pixels = torch.randint(256, (30, 1, 8, 8), dtype=torch.uint8)
    found = class_energies(model, ImageSet(pixels, torch.arange(30) % 3)).model_dump()
    with torch.no_grad():
        energy = -model.energies(pixels / 255).logits.logsumexp(1).double()
    mean, std = _pooled(found)
    assert mean == pytest.approx(float(energy.mean()), rel=1e-5)
    assert std == pytest.approx(float(energy.std(correction=0)), rel=1e-3)
    classes = {"names": ["a", "b", "c"], "energy": "robust-1"}
    classes["networks"] = {"robust-1": found, "jem": {"stopped": "an energy is NaN or Inf"}}
    ways = [{"name": "dual", "energies_by_class": found}, {"name": "energy", "stopped": "NaN"}]
    energies_by_class({"classes": classes, "ways": ways}, tmp_path / "classes.png")
    assert (tmp_path / "classes.png").read_bytes().startswith(b"\x89PNG")


def test_short_plot_shows_methods_of_the_committed_results_and_of_the_study():
    """The names also select rows of ``benchmarks/guidance_sheet.py``."""
    names = [method["name"] for method in read_data("guidance.yaml")["methods"]]
    assert {*SUMMARY} <= {way["name"] for way in committed("cifar10")["ways"]} & {*names}
