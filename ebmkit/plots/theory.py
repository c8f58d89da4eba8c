"""Figure 1: the paper's two panels from its constants, and real families, computed and measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ebmkit.plots.common import BLUE, GRAY, ORANGE, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_figure1"]

COLUMNS = 3
STYLES = (
    ("generative", "gen", BLUE, "-", "o"),
    ("discriminative", "dis", ORANGE, "--", "s"),
)


def draw_figure1(document: dict[str, Any], path: Path) -> None:
    """Draw a document of `ebmkit.experiments.theory.figure1`.

    Every panel shows the excess error E[KL(p(c|x) || p_theta(c|x))] in nats against the number of
    training samples. The paper's panels draw b + v/n, as its caption does; those of real families
    b + v/(2n), equation (4), with a point and its 95 % interval per measured size. Hollow points
    are means over fewer than 99 % of the training sets: the others have no fit.

    Args:
        document: of `ebmkit.experiments.theory.figure1`.
        path: the PNG file.
    """
    panels = len(document["paper"]) + len(document["settings"])
    rows = -(-panels // COLUMNS)
    figure = new_figure(4.1 * COLUMNS, 3.5 * rows + 0.5, layout="constrained")
    figure.suptitle(
        "Excess error of labels against the number of training samples: the paper's curves, and "
        "real families (lines: b + v/2n; points: measured, 95 %)",
        fontsize=11,
    )
    figure.supxlabel(
        "Dotted: the bias b.  Vertical line: where the curves of a family cross.  Hollow points: "
        "means over the training sets that have a fit, fewer than 99 % of them.",
        fontsize=9,
    )
    axes = [figure.add_subplot(rows, COLUMNS, i + 1) for i in range(panels)]
    for panel, curve in zip(axes, document["paper"], strict=False):
        _paper(panel, curve)
    for panel, setting in zip(axes[len(document["paper"]) :], document["settings"], strict=True):
        _family(panel, setting)
    for panel in axes:
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.grid(alpha=0.25, lw=0.5)
        panel.set_xlabel("training samples n", fontsize=8.5)
        panel.set_ylabel("excess error (nats)", fontsize=8.5)
        panel.tick_params(which="both", labelsize=8)
        panel.legend(frameon=False, fontsize=7.5, loc="upper right")
    save_figure(figure, path)


def _paper(axes: Axes, curve: dict[str, Any]) -> None:
    """One of the paper's panels: b + v/n."""
    n = np.geomspace(1, 1e5, 200)
    for name, short, colour, line, _ in STYLES:
        bias, variance = curve[f"b_{short}"], curve[f"v_{short}"]
        label = f"{name}: {bias:g} + {variance:g}/n"
        axes.plot(n, bias + variance / n, line, color=colour, lw=1.6, label=label)
    axes.set_title(f"{curve['title']}\nb + v/n, as in its caption", fontsize=9)


def _family(axes: Axes, setting: dict[str, Any]) -> None:
    """A real family: b + v/2n, and measured points."""
    sizes = [p["n"] for row in setting["measured"].values() for p in row]
    n = np.geomspace(min(sizes) / 1.3, max(sizes) * 1.3, 200)
    for name, short, colour, line, marker in STYLES:
        bias, variance = setting[f"b_{short}"], setting[f"v_{short}"]
        label = f"{name}: b = {bias:.2g}, v = {variance:.3g}"
        axes.plot(n, bias + variance / (2 * n), line, color=colour, lw=1.4, label=label)
        for point in setting["measured"][name]:
            if point["excess"] is None or point["standard_error"] is None:
                continue
            whole = point["without_fit"] <= 0.01 * point["sets"]
            axes.errorbar(
                point["n"],
                point["excess"],
                1.96 * point["standard_error"],
                fmt=marker,
                ms=4,
                color=colour,
                mfc=colour if whole else "white",
                elinewidth=1,
                capsize=2,
            )
        if bias > 0:
            axes.axhline(bias, color=colour, lw=0.7, ls=":")
    if setting["crossing"] is not None and min(sizes) < setting["crossing"] < max(sizes):
        axes.axvline(setting["crossing"], ymax=0.78, color=GRAY, lw=0.8)
    kind = "well specified" if setting["well_specified"] else "misspecified"
    axes.set_title(
        f"{setting['title']}\n{kind}, {setting['parameters']} parameters, rank {setting['rank']}",
        fontsize=9,
    )
