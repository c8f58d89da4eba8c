"""The report of experiment ``guidance``, from committed results and small documents."""

import json
from pathlib import Path

import pytest
import torch

from ebmkit.data import ImageSet
from ebmkit.experiments.guidance_report import (
    STATED,
    _pooled,
    energies_by_class,
    guidance_text,
    overview,
)
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
