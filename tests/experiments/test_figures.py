"""Files of a figure, and reuse of its stored result."""

import json
from pathlib import Path

import pytest

from ebmkit.experiments import SCALES, ExperimentRuns, figures, reproduce

RESULT = Path(__file__).parents[2] / "docs" / "results" / "fig1.json"


@pytest.fixture
def runs(tmp_path):
    return ExperimentRuns(tmp_path, SCALES["cpu"])


@pytest.mark.slow
def test_figure_1_is_computed_once_and_reports_constants_and_command(runs, monkeypatch):
    """A second call draws the stored result; another seed computes it again."""
    calls = []

    def computed(scale, seed):
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
