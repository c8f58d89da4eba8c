"""A table as a picture: ours beside the paper's, one panel per figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ebmkit.plots.common import (
    BLUE,
    GRAY,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    new_figure,
    save_figure,
)

__all__ = ["beyond_training", "compare_with_paper"]

PANELS = {
    "accuracy": "accuracy, %",
    "15": "PSNR, dB, at sigma 15/255",
    "25": "PSNR, dB, at sigma 25/255",
    "50": "PSNR, dB, at sigma 50/255",
}


def compare_with_paper(report: dict[str, Any], path: Path) -> None:
    """One line per row of the table: a dot with its 95 % interval for ours, a cross for the paper.

    Args:
        report: as `ebmkit.experiments.report.document` makes it.
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
            ours, paper = row["ours"].get(metric), row["paper"].get(metric)
            if paper is not None:
                axis.plot(paper, place, "x", color=ORANGE, markersize=6)
            if ours is not None and ours["value"] is not None:
                axis.plot(ours["value"], place, "o", color=BLUE, markersize=5)
                if ours.get("low") is not None:
                    axis.plot(
                        [ours["low"], ours["high"]], [place, place], color=BLUE, linewidth=1.5
                    )
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


def beyond_training(report: dict[str, Any], path: Path, trained: float = 100.0) -> None:
    """PSNR against the noise level, a line per row; ``trained``, in 255ths, is where training ends.

    Args:
        report: of ``claims``, as `ebmkit.experiments.report.document` makes it.
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
