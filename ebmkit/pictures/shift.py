"""Pictures of what the suite shift finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ebmkit.pictures.common import (
    BLUE,
    GRAY,
    GREEN,
    ORANGE,
    new_figure,
    save_figure,
    show_image,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["accuracy_and_confidence", "corrupted_examples", "psnr_against_strength"]

COLUMNS = 3


def accuracy_and_confidence(document: dict[str, Any], path: Path, chance: float) -> None:
    """Accuracy and mean confidence against the strength, one panel per corruption; 0 is clean.

    Args:
        document: of the suite shift.
        path: the PNG file.
        chance: accuracy of guessing, 0..1.
    """
    figure, panels = _panels(document, "Accuracy and confidence under corruption")
    for axes, found in zip(panels, document["corruptions"].values(), strict=False):
        rows = [{**document["clean"], "strength": 0}, *found["rows"]]
        _line(axes, rows, "accuracy", BLUE, "o-", "accuracy", 100)
        _line(axes, rows, "confidence", ORANGE, "s--", "mean confidence", 100)
        axes.axhline(100 * chance, color=GRAY, ls=":", lw=1, label="chance")
        axes.set(ylim=(0, 104), xlim=(-0.3, 5.3), xticks=range(6))
        axes.set_xticklabels(["clean", *"12345"])
    _finish(figure, panels, "accuracy, confidence (%)", path)


def psnr_against_strength(document: dict[str, Any], path: Path) -> None:
    """PSNR of the corrupted and of the denoised images against the strength.

    Args:
        document: of the suite shift.
        path: the PNG file.
    """
    figure, panels = _panels(document, "Denoising corrupted images, noise level estimated")
    for axes, found in zip(panels, document["corruptions"].values(), strict=False):
        _line(axes, found["rows"], "psnr_corrupted", GRAY, "o-", "corrupted")
        if "psnr" in document["clean"]:
            _line(axes, found["rows"], "psnr", GREEN, "s--", "denoised")
        axes.set(xlim=(0.7, 5.3), xticks=range(1, 6))
    _finish(figure, panels, "PSNR (dB), mean over changed images", path)


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
    title = "Corruptions of one image, and their constants"
    figure.text(0.02, 1 - 0.14 / height, title, fontsize=10, weight="bold", va="center")
    save_figure(figure, path)


def _panels(document: dict[str, Any], title: str) -> tuple[Figure, list[Axes]]:
    """A panel for each corruption, titled by its name."""
    names = list(document["corruptions"])
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure = new_figure(0.9 + 2.6 * columns, 1.2 + 2.15 * rows, layout="constrained")
    panels = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    for axes, name in zip(panels, names, strict=False):
        axes.set_title(name, fontsize=10)
        axes.grid(axis="y", color=GRAY, alpha=0.25, lw=0.6)
    figure.suptitle(f"{title} ({document['images']} images)", fontsize=11)
    return figure, panels


def _line(
    axes: Axes,
    rows: Sequence[dict[str, Any]],
    name: str,
    colour: str,
    look: str,
    label: str,
    factor: float = 1,
) -> None:
    """A measure with its 95 % interval against the strength; rows without it are left out."""
    known = [row for row in rows if row[name]["value"] is not None]
    x = [row["strength"] for row in known]
    axes.plot(
        x, [factor * row[name]["value"] for row in known], look, color=colour, ms=4, label=label
    )
    bounded = [row for row in known if row[name]["low"] is not None]
    low, high = ([factor * row[name][end] for row in bounded] for end in ("low", "high"))
    axes.fill_between(
        [row["strength"] for row in bounded], low, high, color=colour, alpha=0.18, lw=0
    )


def _finish(figure: Figure, panels: Sequence[Axes], y: str, path: Path) -> None:
    for axes in panels:
        axes.set_xlabel("strength", labelpad=1)
    figure.supylabel(y, fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    save_figure(figure, path)
