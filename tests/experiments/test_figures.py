"""Files of a figure, and reuse of its stored result."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ebmkit.experiments import SCALES, ExperimentRuns, figures, reproduce
from ebmkit.experiments.report import VariantResult
from ebmkit.experiments.tables import ROWS

RESULT = Path(__file__).parents[2] / "docs" / "results" / "fig1.json"


@pytest.fixture
def runs(tmp_path):
    return ExperimentRuns(tmp_path, SCALES["cpu"])


@pytest.mark.slow
def test_figure_1_is_computed_once_and_reports_constants_and_command(runs, monkeypatch):
    """A second call draws the stored result; another seed computes it again."""
    calls = []

    def computed(scale, seed, progress):
        calls.append((scale, seed))
        return json.loads(RESULT.read_text())

    monkeypatch.setattr(figures, "figure1", computed)
    paths = reproduce("fig1", runs)
    drawn = []
    monkeypatch.setattr(figures, "draw_figure1", lambda document, path: drawn.append(document))
    reproduce("fig1", runs)
    assert drawn == [json.loads((runs.out / "fig1.json").read_text())]
    text = paths[0].read_text()
    assert "b_gen = 5, b_dis = 1, v_gen = 20, v_dis = 100" in text
    assert "command: `ebmkit reproduce fig1 --scale cpu`" in text
    assert {path.name for path in paths} == {"fig1.md", "fig1.json", "fig1.png"}
    assert (runs.out / "fig1.png").stat().st_size > 10_000
    assert calls == [("cpu", 0)]
    runs.seeds = (1,)
    reproduce("fig1", runs)
    assert calls == [("cpu", 0), ("cpu", 1)]


def attacked(row, smallest):
    """Result of ``row`` by seed: the smallest strengths that break its images."""
    document = {"robustness": {"epsilons": {"linf": [0.0, 1 / 255, 2 / 255]}}}
    values = {
        seed: {"robustness": {"linf/direct": torch.tensor(own, dtype=torch.float64)}}
        for seed, own in smallest.items()
    }
    return VariantResult(ROWS[row], document, image_values=values)


def test_orderings_under_attack_are_tested_by_image_and_seed():
    """The first network withstands 1/255 on 60 of 100 images more, in each of three seeds."""
    strong = {seed: [2 / 255] * (80 + seed) + [0.0] * (20 - seed) for seed in range(3)}
    weak = {seed: [2 / 255] * (20 + seed) + [1 / 255] * (80 - seed) for seed in range(3)}
    found = figures._orderings([attacked("resnet18", weak), attacked("joint", strong)])
    assert [round(255 * one["epsilon"]) for one in found] == [0, 1, 2]
    clean, one, two = found
    assert (clean["better"], clean["worse"]) == ("joint", "resnet18")
    assert clean["ours"] == pytest.approx(-19)
    assert one["ours"] == pytest.approx(60)
    assert (clean["verdict"], one["verdict"], two["verdict"]) == ("reversed", "holds", "open")
    assert one["images"] == 100
    assert one["seeds"] == [0, 1, 2]
    damaged = replace(attacked("joint", strong), image_values={0: {}})
    assert figures._orderings([attacked("resnet18", weak), damaged]) == []
