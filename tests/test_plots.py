"""Plots show the given values, need no pyplot, and report paths that cannot be written."""

import sys

import matplotlib
import numpy as np
import pytest
from PIL import Image

from ebmkit import UserError, plots
from ebmkit.training.metrics import learning_curves


@pytest.fixture
def figures(monkeypatch):
    """Figures passed to `save_figure`, which still saves them."""
    found = []
    save = plots.save_figure

    def record(figure, path, *a, **k):
        save(figure, path, *a, **k)
        with Image.open(path) as image:
            image.verify()
        found.append(figure)

    monkeypatch.setattr(plots, "save_figure", record)
    return found


def texts(figure):
    return [t.get_text() for t in figure.findobj(match=lambda a: hasattr(a, "get_text"))]


def test_learning_curves_draw_each_measure_once(figures, tmp_path):
    rows = [
        {"step": i, "kind": "train", "ce": 2.0, "lr": 1e-3, "images_per_s": 9} for i in range(40)
    ]
    rows += [{"step": 20, "kind": "validation", "ce": 1.5, "accuracy": 0.5, "psnr_25": 27.0}]
    rows += [{"step": 39, "kind": "validation", "ce": float("nan"), "accuracy": 0.75}]
    learning_curves(rows, tmp_path / "curves.png")
    panels = {axes.get_title(): axes for axes in figures[0].axes}
    assert list(panels) == [
        "loss ce (nats)", "accuracy (%)", "PSNR at sigma 25/255 (dB)", "learning rate",
    ]  # fmt: skip
    (accuracy,) = panels["accuracy (%)"].lines
    assert accuracy.get_xydata().tolist() == [[20, 50], [39, 75]]
    raw, smoothed, held_out = panels["loss ce (nats)"].lines
    assert len(raw.get_ydata()) == 40
    assert np.allclose(smoothed.get_ydata(), 2)
    assert held_out.get_xydata().tolist() == [[20, 1.5]]  # NaN is skipped
    learning_curves([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_path_that_cannot_be_written_is_refused(tmp_path):
    rows = [{"step": 1, "kind": "train", "ce": 2.0}]
    with pytest.raises(UserError, match="cannot write"):
        learning_curves(rows, tmp_path / "absent" / "curves.png")


def test_figures_are_written_without_pyplot(tmp_path, monkeypatch):
    """A figure is written although pyplot, which looks for a display, cannot be imported."""
    monkeypatch.delattr(matplotlib, "pyplot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    row = {"step": 1, "kind": "train", "ce": 2.0}
    learning_curves([row], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_bars_stay_within_limits(tmp_path):
    """An outlier does not extend the axis: it is cut, marked by carets and labelled."""
    axes = plots.new_figure(3, 3).add_subplot()
    normal, outlier = {"value": 2, "low": 1.5, "high": 2.5}, {"value": 30, "low": -35, "high": 95}
    unknown = {"value": None, "low": None, "high": None}
    assert not plots.bars_within(axes, [0, 1], [normal, unknown], (-2, 5), fmt="o")
    assert axes.get_lines()[0].get_xydata().tolist() == [[0, 2]]
    assert plots.bars_within(axes, [0, 1], [normal, outlier], (-2, 5), fmt="o")
    assert axes.get_ylim()[0] > -3
    assert axes.get_ylim()[1] < 6
    assert "30" in texts(axes)
    carets = [line.get_marker() for line in axes.get_lines() if line.get_marker() in (6, 7)]
    assert carets == [7, 6]


def test_titles_name_the_images():
    document = {"dataset": "cifar10", "split": "test", "images": 200}
    assert plots.images_of(document) == "cifar10 test, 200 images"
    assert plots.images_of(document, 1) == "cifar10 test, 1 image"
