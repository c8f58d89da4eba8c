"""Pictures of the suite generation: samples beside real images, and what is known by class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ebmkit.pictures.common import (
    BLUE,
    GRAY,
    GREEN,
    new_figure,
    save_figure,
    show_image,
)

__all__ = ["by_class", "samples_beside_real"]

COLUMNS = 6


def samples_beside_real(
    samples: Sequence[Tensor],
    real: Sequence[Tensor],
    labels: Sequence[str],
    document: dict[str, Any],
    path: Path,
) -> None:
    """The first samples and the first images of the reference, with the measures above.

    Args:
        samples: each (C, H, W) in [0, 1].
        real: likewise.
        labels: names of the labels that were asked for, or empty.
        document: of the suite generation.
        path: the PNG file.
    """
    rows = -(-max(len(samples), len(real)) // COLUMNS)
    cell = 0.78
    width, height = 2 * COLUMNS * cell + 0.7, rows * cell + 1.5
    figure = new_figure(width, height)
    counts = document["samples"], document["images"]
    titles = (
        f"samples ({counts[0]['count']}, {counts[0]['source']})",
        f"{document['dataset']} {document['split']} ({counts[1]} images)",
    )
    for side, (images, title) in enumerate(zip((samples, real), titles, strict=True)):
        left = (0.15 + side * (COLUMNS * cell + 0.4)) / width
        grid = figure.add_gridspec(
            rows,
            COLUMNS,
            left=left,
            right=left + COLUMNS * cell / width,
            bottom=0.02,
            top=1 - 1.2 / height,
            wspace=0.05,
            hspace=0.3 if labels else 0.05,
        )
        for k, image in enumerate(images):
            axes = figure.add_subplot(grid[k // COLUMNS, k % COLUMNS])
            show_image(axes, image, "", "")
            if side == 0 and labels:
                axes.set_title(labels[k], fontsize=7, pad=1.5)
        figure.text(left, 1 - 0.95 / height, title, fontsize=9, weight="bold", va="center")
    names, floor = document["measures"], document["floor"]
    told = [
        f"{n} {found['value']:.3g} (real {floor[n]['value']:.3g})" for n, found in names.items()
    ]
    half = -(-len(told) // 2)
    for line, part in enumerate((told[:half], told[half:])):
        figure.text(
            0.15 / width, 1 - (0.2 + 0.24 * line) / height, ", ".join(part), fontsize=8, va="center"
        )
    save_figure(figure, path)


def by_class(document: dict[str, Any], path: Path) -> None:
    """Label accuracy, with its interval, and diversity of each class.

    Args:
        document: of the suite generation, with labels.
        path: the PNG file.
    """
    classes = document["labels"]["classes"]
    figure = new_figure(1.6 + 0.62 * len(classes), 4.8, layout="constrained")
    x = range(len(classes))
    upper = figure.add_subplot(2, 1, 1)
    accuracy = [c["accuracy"] for c in classes]
    values = [100 * a["value"] for a in accuracy]
    upper.bar(x, values, color=BLUE, alpha=0.75, width=0.7)
    ends = [
        [100 * (a["value"] - a["low"]) for a in accuracy],
        [100 * (a["high"] - a["value"]) for a in accuracy],
    ]
    upper.errorbar(x, values, ends, fmt="none", ecolor="black", capsize=2, lw=1)
    total = document["labels"]["accuracy"]
    upper.set(ylabel="recognised (%)", ylim=(0, 104))
    upper.set_title(
        f"Samples recognised as the label asked for: {total['value']:.1%} "
        f"({total['low']:.1%} to {total['high']:.1%}) of {total['count']}",
        fontsize=9,
    )
    lower = figure.add_subplot(2, 1, 2)
    spread = [c["diversity"] for c in classes]
    lower.bar(x, [d or 0 for d in spread], color=GREEN, alpha=0.75, width=0.7, hatch="//")
    lower.axhline(1, color=GRAY, ls=":", lw=1)
    lower.set(ylabel="diversity (real: 1)")
    for axes in (upper, lower):
        axes.set_xticks(x, [c["name"] for c in classes], rotation=30 if len(classes) > 10 else 0)
        axes.grid(axis="y", alpha=0.25, lw=0.5)
        axes.tick_params(labelsize=8)
    save_figure(figure, path)
