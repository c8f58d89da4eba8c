"""Pictures of what the suite shift finds."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ebmkit.plots.common import (
    BLUE,
    GRAY,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    images_of,
    new_figure,
    save_figure,
    show_image,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["accuracy_and_confidence", "corrupted_examples", "psnr_against_strength"]

COLUMNS = 3
LAST = 5.0
"""Width of the last panel with its legend, inches."""

LOOKS = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (PURPLE, "D"), (SKY, "v"), (GRAY, "P"))


def accuracy_and_confidence(document: dict[str, Any], path: Path, chance: float) -> None:
    """Accuracy and mean confidence against the strength, one panel per corruption; then one by the
    other, a point for each corruption and strength.

    Args:
        document: of the suite shift.
        path: the PNG file.
        chance: accuracy of guessing, 0..1.
    """
    figure, panels, last = _panels(document, "Accuracy and confidence under corruption", last=True)
    ticks: list[str | int] = ["clean", *_strengths(document)]
    for axes, found in zip(panels, document["corruptions"].values(), strict=True):
        rows = [{**document["clean"], "strength": "clean"}, *found["rows"]]
        _line(axes, rows, ticks, "accuracy", BLUE, "o-", "accuracy", 100)
        _line(axes, rows, ticks, "confidence", ORANGE, "s--", "mean confidence", 100)
        axes.axhline(100 * chance, color=GRAY, ls=":", lw=1, label="chance")
        axes.set_ylim(0, 104)
    assert last is not None
    _one_by_the_other(last, document)
    _finish(figure, panels, ticks, "accuracy, confidence (%)", path)


def _one_by_the_other(axes: Axes, document: dict[str, Any]) -> None:
    """Accuracy against mean confidence, larger points for higher strengths."""
    axes.plot([0, 100], [0, 100], ls=":", color=GRAY, lw=1)
    for (name, found), (colour, marker) in zip(
        document["corruptions"].items(), itertools.cycle(LOOKS)
    ):
        rows = found["rows"]
        axes.scatter(
            [100 * row["confidence"]["value"] for row in rows],
            [100 * row["accuracy"]["value"] for row in rows],
            s=[8 + 9 * row["strength"] for row in rows],
            color=colour,
            marker=marker,
            alpha=0.8,
            lw=0,
            label=name,
        )
    clean = document["clean"]
    x, y = ([100 * clean[name]["value"]] for name in ("confidence", "accuracy"))
    axes.scatter(x, y, s=90, color="black", marker="*", label="clean", zorder=3)
    axes.set(xlim=(0, 102), ylim=(0, 102), xlabel="mean confidence (%)", ylabel="accuracy (%)")
    axes.set_box_aspect(1)
    slope = document["confidence_slope"]
    told = "undefined" if slope is None else f"{slope:.2f}"
    axes.set_title(f"Slope of confidence on accuracy: {told}", fontsize=10)
    axes.legend(
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        frameon=False,
        fontsize=8,
        title="larger:\nstronger",
    )


def psnr_against_strength(document: dict[str, Any], path: Path) -> None:
    """PSNR of the corrupted and of the denoised images against the strength.

    Args:
        document: of the suite shift.
        path: the PNG file.
    """
    figure, panels, _ = _panels(document, "Denoising corrupted images, noise level estimated")
    ticks = _strengths(document)
    for axes, found in zip(panels, document["corruptions"].values(), strict=True):
        _line(axes, found["rows"], ticks, "psnr_corrupted", GRAY, "o-", "corrupted")
        if "psnr" in document["clean"]:
            _line(axes, found["rows"], ticks, "psnr", GREEN, "s--", "denoised")
    _finish(figure, panels, ticks, "PSNR (dB), mean over changed images", path)


def corrupted_examples(
    clean: Tensor,
    shown: Mapping[str, Sequence[Tensor]],
    document: dict[str, Any],
    path: Path,
) -> None:
    """One image under every corruption (row) at every strength (column), with the constant used.

    Args:
        clean: (C, H, W) in [0, 1].
        shown: by corruption the corrupted images, of the same shape.
        document: of the suite shift.
        path: the PNG file.
    """
    corruptions = document["corruptions"]
    columns = 1 + max(len(images) for images in shown.values())
    cell, label = 1.25, 0.24
    tall = min(2.5, max(0.4, clean.shape[-2] / clean.shape[-1])) * cell
    height = len(shown) * (tall + label) + 0.7
    figure = new_figure(cell * columns + 1.35, height)
    grid = figure.add_gridspec(
        len(shown),
        columns,
        left=1.3 / figure.get_figwidth(),
        right=0.99,
        bottom=0.26 / height,
        top=1 - 0.5 / height,
        wspace=0.06,
        hspace=label / tall * 1.2,
    )
    for i, (name, images) in enumerate(shown.items()):
        axes = figure.add_subplot(grid[i, 0])
        show_image(axes, clean, "", "clean" if i == 0 else "")
        axes.set_ylabel(
            f"{name}\n({corruptions[name]['unit']})",
            rotation=0,
            ha="right",
            va="center",
            fontsize=8,
            labelpad=6,
        )
        for k, (image, row) in enumerate(zip(images, corruptions[name]["rows"], strict=True)):
            above = f"strength {row['strength']}" if i == 0 else ""
            axes = figure.add_subplot(grid[i, k + 1])
            show_image(axes, image, f"{row['constant']:g}", above)
    title = f"Corruptions and their constants: {images_of(document, 1)}"
    figure.text(0.02, 1 - 0.14 / height, title, fontsize=10, weight="bold", va="center")
    save_figure(figure, path)


def _strengths(document: dict[str, Any]) -> list[int]:
    """Those measured, the same for all corruptions."""
    return [row["strength"] for row in next(iter(document["corruptions"].values()))["rows"]]


def _panels(
    document: dict[str, Any], title: str, last: bool = False
) -> tuple[Figure, list[Axes], Axes | None]:
    """A panel for each corruption, titled by its name; and, if wanted, a ``last`` one beside."""
    names = list(document["corruptions"])
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    wide = 2.6 * columns + LAST * last
    height = max(1.2 + 2.15 * rows, 4.2 if last else 0)
    figure = new_figure(0.9 + wide, height, layout="constrained")
    ratios = [2.6] * columns + [LAST] * last
    grid = figure.add_gridspec(rows, len(ratios), width_ratios=ratios)
    panels: list[Axes] = []
    for i, name in enumerate(names):
        shared = panels[0] if panels else None
        axes = figure.add_subplot(grid[i // columns, i % columns], sharey=shared)
        axes.tick_params(labelleft=i % columns == 0)
        axes.set_title(name, fontsize=10)
        axes.grid(axis="y", color=GRAY, alpha=0.25, lw=0.6)
        panels.append(axes)
    figure.suptitle(f"{title}: {images_of(document)}", fontsize=11)
    return figure, panels, figure.add_subplot(grid[:, -1]) if last else None


def _line(
    axes: Axes,
    rows: Sequence[dict[str, Any]],
    ticks: Sequence[str | int],
    name: str,
    colour: str,
    look: str,
    label: str,
    factor: float = 1,
) -> None:
    """A measure with its 95 % interval against the strength; rows without it are left out."""
    known = [row for row in rows if row[name]["value"] is not None]
    x = [ticks.index(row["strength"]) for row in known]
    axes.plot(
        x, [factor * row[name]["value"] for row in known], look, color=colour, ms=4, label=label
    )
    bounded = [row for row in known if row[name]["low"] is not None]
    at = [ticks.index(row["strength"]) for row in bounded]
    low, high = ([factor * row[name][end] for row in bounded] for end in ("low", "high"))
    if len(at) == 1:  # a band would have no width
        axes.vlines(at, low, high, color=colour, lw=1.2)
    axes.fill_between(at, low, high, color=colour, alpha=0.18, lw=0)


def _finish(
    figure: Figure, panels: Sequence[Axes], ticks: Sequence[str | int], y: str, path: Path
) -> None:
    for axes in panels:
        axes.set_xlim(-0.3, len(ticks) - 0.7)
        axes.set_xticks(range(len(ticks)), [str(tick) for tick in ticks])
        axes.set_xlabel("strength", labelpad=1)
    figure.supylabel(y, fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    save_figure(figure, path)
