"""Pictures of the suite generation: samples beside real images, and what is known by class."""

from __future__ import annotations

from collections.abc import Sequence
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
    new_figure,
    save_figure,
    show_image,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
    """What is known of each class: recognised, Frechet distance, diversity, saturation, energy gap.

    Args:
        document: of the suite generation, with labels.
        path: the PNG file.
    """
    classes = document["labels"]["classes"]
    gaps = [c["energy_gap"] for c in classes]
    panels = 4 + all(gap is not None and gap["energy"]["value"] is not None for gap in gaps)
    figure = new_figure(max(6.6, 1.6 + 0.62 * len(classes)), 0.7 + 1.75 * panels, "constrained")
    total = document["labels"]["accuracy"]
    figure.suptitle(
        f"Samples recognised as the label asked for: {total['value']:.1%} "
        f"({total['low']:.1%} to {total['high']:.1%}) of {total['count']}; lines: real images",
        fontsize=9,
    )
    rows = [figure.add_subplot(panels, 1, row + 1) for row in range(panels)]
    _bars(rows[0], [c["accuracy"] for c in classes], BLUE, 100)
    rows[0].set(ylabel="recognised (%)", ylim=(0, 104))
    _bars(rows[1], [c["frechet"] for c in classes], PURPLE)
    _lines(rows[1], [c["floor"]["frechet"] for c in classes])
    rows[1].set(ylabel=document["names"]["frechet"])
    rows[1].set_ylim(bottom=0)
    _bars(rows[2], [_spread(c) for c in classes], GREEN, hatch="//")
    rows[2].axhline(1, color=GRAY, ls=":", lw=1)
    rows[2].set(ylabel="diversity")
    colour = "colour" if classes[0]["saturation"]["colour"] else "ends"
    found = [c["saturation"][colour] for c in classes]
    _bars(rows[3], [f["samples"] for f in found], ORANGE, 100)
    _lines(rows[3], [100 * f["real"]["value"] if f["real"]["count"] else None for f in found])
    rows[3].set(ylabel="saturation (%)" if colour == "colour" else "black or white (%)")
    if panels > 4:
        _bars(rows[4], [gap["energy"] for gap in gaps], SKY)
        rows[4].axhline(0, color=GRAY, ls=":", lw=1)
        rows[4].set(ylabel="E(x) gap (nats)")
    slanted = len(classes) > 10
    for axes in rows:
        axes.set_xticks(range(len(classes)), [c["name"] for c in classes])
        axes.tick_params(labelsize=8)
        axes.tick_params("x", rotation=30 if slanted else 0)
        axes.grid(axis="y", alpha=0.25, lw=0.5)
    save_figure(figure, path)


def _bars(
    axes: Axes,
    estimates: Sequence[dict[str, Any]],
    colour: str,
    scale: float = 1,
    hatch: str | None = None,
) -> None:
    """Values with their 95 % intervals, where they are known."""
    values = [scale * (e["value"] or 0.0) for e in estimates]
    axes.bar(range(len(values)), values, color=colour, alpha=0.75, width=0.7, hatch=hatch)
    known = [(k, e) for k, e in enumerate(estimates) if e["low"] is not None]
    ends = [
        [scale * max(0.0, e["value"] - e["low"]) for _, e in known],
        [scale * max(0.0, e["high"] - e["value"]) for _, e in known],
    ]
    places, tops = [k for k, _ in known], [scale * e["value"] for _, e in known]
    axes.errorbar(places, tops, ends, fmt="none", ecolor="black", capsize=2, lw=1)


def _lines(axes: Axes, values: Sequence[float | None]) -> None:
    """A short line across each bar, at what real images have."""
    known = [(k, value) for k, value in enumerate(values) if value is not None]
    places, heights = [k for k, _ in known], [value for _, value in known]
    left, right = [k - 0.42 for k in places], [k + 0.42 for k in places]
    axes.hlines(heights, left, right, color="black", lw=1.4)


def _spread(entry: dict[str, Any]) -> dict[str, Any]:
    low, high = entry["diversity_interval"]
    return {"value": entry["diversity"], "low": low, "high": high}
