"""The JSON document of figure 1, its table and its plot."""

import json

import pytest

from ebmkit.errors import UserError
from ebmkit.experiments.theory import figure as module
from ebmkit.experiments.theory.figure import draw_figure1, figure1, markdown, rows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def document():
    """Two settings at the smoke scale; fits of one of them always exist."""
    patch = pytest.MonkeyPatch()
    chosen = tuple(s for s in module.SETTINGS if s.name in ("naive-bayes", "centred-means"))
    patch.setattr(module, "SETTINGS", chosen)
    progress = []
    found = figure1("smoke", 0, lambda done, total: progress.append((done, total)))
    patch.undo()
    assert progress == [(k, 18) for k in range(1, 19)]
    return found


def test_document_is_json_and_describes_the_settings(document):
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    naive, centred = document["settings"]
    assert [(c["b_gen"], c["b_dis"], c["v_gen"], c["v_dis"]) for c in document["paper"]] == [
        (5, 1, 20, 100),
        (1, 1, 100, 10000),
    ]
    assert (centred["parameters"], centred["rank"]) == (6, 6)
    assert (centred["b_gen"], centred["b_dis"], centred["crossing"]) == (0, 0, None)
    assert (naive["parameters"], naive["rank"], naive["b_dis"]) == (7, 3, 0)
    at = naive["crossing"]
    assert naive["b_gen"] + naive["v_gen"] / (2 * at) == pytest.approx(naive["v_dis"] / (2 * at))


def test_rows_have_computed_and_measured_constants(document):
    table = rows(document)
    assert [row["estimator"] for row in table] == ["generative", "discriminative"] * 2
    for row in table:
        found = row["v_measured"]
        assert abs(found["value"] - row["v"]) < 4 * found["standard_error"]
        assert abs(row["b_measured"]["value"] - row["b"]) < 4 * row["b_measured"]["standard_error"]
        assert found["low"] < found["value"] < found["high"]
    text = markdown(document)
    assert text.count("\n") == 6
    assert "| Centred means, C = 3 | discriminative | 6 | 6 | 6.000 | 6.000 |" in text


def test_plot_is_drawn_with_a_missing_point(document, tmp_path):
    changed = json.loads(json.dumps(document))
    changed["settings"][0]["measured"]["generative"][0].update(excess=None, standard_error=None)
    draw_figure1(changed, tmp_path / "fig1.png")
    assert (tmp_path / "fig1.png").read_bytes().startswith(b"\x89PNG")


def test_unknown_scale_suggests_the_nearest():
    with pytest.raises(UserError, match="unknown scale 'cpus': did you mean 'cpu'"):
        figure1("cpus")
