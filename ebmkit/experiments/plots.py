"""The plots of experiments: tables beside the paper's, guidance methods, figure 1."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ebmkit.plots import (
    BLUE,
    GRAY,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    new_figure,
    save_figure,
    show_image,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


PSNR_PANELS = {level: f"PSNR, dB, at sigma {level}/255" for level in ("15", "25", "50")}
PANELS = {"accuracy": "accuracy, %", **PSNR_PANELS}

COLUMNS = 3
STYLES = (
    ("generative", "gen", BLUE, "-", "o"),
    ("discriminative", "dis", ORANGE, "--", "s"),
)
"""Of figure 1."""


def compare_with_paper(report: dict[str, Any], path: Path) -> None:
    """One line per row of the table: a dot with its 95 % interval for ours, a cross for the paper.

    Args:
        report: as `ebmkit.experiments.tables.table_document` makes it.
        path: the PNG file.
    """
    rows = report["rows"]
    panels = {
        metric: title
        for metric, title in PANELS.items()
        if any(metric in {**row["ours"], **row["paper"]} for row in rows)
    }
    figure = new_figure(2.9 * len(panels) + 2.6, 0.34 * len(rows) + 1.5, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    names = [
        f"{row['label']} ({row['task']})"
        + ("" if row["status"] == "done" else ", " + row["status"].partition(":")[0])
        for row in rows
    ]
    for axis, (metric, title) in zip(axes, panels.items(), strict=True):
        for place, row in enumerate(rows):
            _mark(axis, place, row["paper"].get(metric), "x", ORANGE, 6)
            _mark(axis, place, row["ours"].get(metric), size=5)
        axis.set_xlabel(title, fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", color=GRAY, alpha=0.3, linewidth=0.5)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].set_yticks(range(len(rows)), names)
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    axes[0].plot([], [], "o", color=BLUE, markersize=5, label=f"ours, scale {report['scale']}")
    axes[0].plot([], [], "x", color=ORANGE, markersize=6, label="the paper")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8
    )
    figure.suptitle(report["heading"], fontsize=10)
    save_figure(figure, path)


def _mark(
    axis: Axes, place: int, estimate: Any, look: str = "o", colour: str = BLUE, size: int = 4
) -> None:
    """A number, or an estimate with its interval, in the row ``place``; nothing for None."""
    found = estimate if isinstance(estimate, dict) else {"value": estimate}
    if found["value"] is not None:
        axis.plot(found["value"], place, look, color=colour, markersize=size)
        if found.get("low") is not None:
            axis.plot([found["low"], found["high"]], [place, place], color=colour, linewidth=1.5)


def _value(estimate: Any) -> Any:
    return estimate["value"] if isinstance(estimate, dict) else estimate


def beyond_training(report: dict[str, Any], path: Path, trained: float = 100.0) -> None:
    """PSNR against the noise level, a line per row; ``trained``, in 255ths, is where training ends.

    Args:
        report: of ``claims``, as `ebmkit.experiments.tables.table_document` makes it.
        path: the PNG file.
        trained: largest noise level of the denoising stream.
    """
    figure = new_figure(7.6, 4.2, layout="constrained")
    axes = figure.subplots()
    looks = [(c, m) for m in ("o", "s") for c in (BLUE, ORANGE, GREEN, PURPLE, SKY, GRAY)]
    done = [row for row in report["rows"] if row["status"] == "done"]
    for (colour, marker), row in zip(looks, done, strict=False):
        levels = sorted((key for key in row["ours"] if key.isdigit()), key=int)
        values = [row["ours"][key]["value"] for key in levels]
        axes.plot(
            [int(key) for key in levels],
            values,
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=1.2,
            label=row["label"],
        )
    axes.axvline(trained, color=GRAY, linestyle=":", linewidth=1)
    axes.annotate(
        "training ends",
        (trained, 1),
        xycoords=("data", "axes fraction"),
        fontsize=7.5,
        xytext=(3, -9),
        textcoords="offset points",
    )
    axes.set_xlabel("noise level sigma, in 255ths")
    axes.set_ylabel("PSNR, dB")
    axes.set_title("Denoising beyond the noise of training", fontsize=10)
    figure.legend(loc="outside right upper", fontsize=7.5)
    save_figure(figure, path)


def samples_of_methods(methods: Sequence[tuple[str, str, Tensor]], path: Path) -> None:
    """One row of images per method, one column per label.

    Args:
        methods: name, what it is, and images uint8 (n, C, H, W), in the order of labels.
        path: the PNG file.
    """
    columns = max(len(images) for _, _, images in methods)
    cell, left = 0.42, 4.0
    figure = new_figure(left + cell * columns + 0.1, cell * len(methods) + 0.35)
    width, height = figure.get_size_inches()
    for row, (name, description, images) in enumerate(methods):
        top = height - 0.3 - cell * (row + 1)
        figure.text(
            (left - 0.08) / width,
            (top + cell / 2) / height,
            f"{name}: {description}" if len(description) < 64 else f"{name}: {description[:62]}...",
            ha="right",
            va="center",
            fontsize=6.5,
        )
        for column, image in enumerate(images):
            place = (left + cell * column) / width, top / height
            axes = figure.add_axes((*place, 0.94 * cell / width, 0.94 * cell / height))
            show_image(axes, image.float() / 255, "", str(column) if row == 0 else "")
    save_figure(figure, path)


def compare_methods(methods: Sequence[dict[str, Any]], path: Path) -> None:
    """Recognised, distance by class, diversity, saturation and energy gap of each method.

    Args:
        methods: entries of the report, none of them stopped.
        path: the PNG file.
    """
    figure = new_figure(14.0, 0.25 * len(methods) + 1.4, layout="constrained")
    axes = figure.subplots(1, 5, sharey=True)
    places = list(range(len(methods)))
    for at, method in zip(places, methods, strict=True):
        means, gap = method["means"], method["energy_gap"]
        _mark(axes[0], at, method["accuracy"])
        _mark(axes[1], at, means["frechet"])
        _mark(axes[1], at, means["floor"], "|", ORANGE, 9)
        _mark(axes[2], at, means["diversity"])
        ends = method["saturation"]["ends"]
        _mark(axes[3], at, _value(ends["samples"]))
        _mark(axes[3], at, _value(ends["real"]), "|", ORANGE, 9)
        _mark(axes[4], at, _value(gap["energy"]) if gap else None)
    titles = (
        "recognised by the judge",
        "distance of a class (bar: real images)",
        "diversity (1: real images)",
        "saturated values (bar: real images)",
        "energy gap, nats (0: real images)",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set_xlabel(title, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(axis="y", color=GRAY, alpha=0.25, linewidth=0.5)
    axes[0].set_xlim(0, 1)
    axes[2].axvline(1, color=ORANGE, linewidth=0.8)
    axes[4].axvline(0, color=ORANGE, linewidth=0.8)
    axes[1].set_xlim(left=0)
    axes[0].set_yticks(places, [method["name"] for method in methods], fontsize=7)
    axes[0].invert_yaxis()
    save_figure(figure, path)


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
        panel.set(xscale="log", yscale="log")
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
