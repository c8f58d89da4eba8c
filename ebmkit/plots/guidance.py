"""Ways to guide, side by side: images of each, and what was measured of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ebmkit.plots.common import BLUE, GRAY, ORANGE, new_figure, save_figure, show_image

__all__ = ["compare_ways", "samples_of_ways"]


def samples_of_ways(ways: Sequence[tuple[str, str, Tensor]], path: Path) -> None:
    """One row of images per way, one column per wanted label.

    Args:
        ways: name, what it is, and images uint8 (n, C, H, W), in the order of labels.
        path: the PNG file.
    """
    columns = max(len(images) for _, _, images in ways)
    cell, left = 0.42, 4.0
    figure = new_figure(left + cell * columns + 0.1, cell * len(ways) + 0.35)
    width, height = figure.get_size_inches()
    for row, (name, description, images) in enumerate(ways):
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


def compare_ways(ways: Sequence[dict[str, Any]], path: Path) -> None:
    """Recognised, distance by class, diversity, saturation and energy gap of each way.

    Args:
        ways: entries of the report, none of them stopped.
        path: the PNG file.
    """
    figure = new_figure(14.0, 0.25 * len(ways) + 1.4, layout="constrained")
    axes = figure.subplots(1, 5, sharey=True)
    places = list(range(len(ways)))
    for at, way in zip(places, ways, strict=True):
        seen, means, gap = way["accuracy"], way["means"], way["energy_gap"]
        if seen is not None:
            axes[0].plot([seen["low"], seen["high"]], [at, at], color=BLUE, linewidth=1.5)
            axes[0].plot(seen["value"], at, "o", color=BLUE, markersize=4)
        axes[1].plot(means["frechet"], at, "o", color=BLUE, markersize=4)
        axes[1].plot(means["floor"], at, "|", color=ORANGE, markersize=9)
        axes[2].plot(means["diversity"], at, "o", color=BLUE, markersize=4)
        ends = way["saturation"]["ends"]
        for kind, look in (("samples", "o"), ("real", "|")):
            value = ends[kind]["value"] if isinstance(ends[kind], dict) else ends[kind]
            color = BLUE if kind == "samples" else ORANGE
            axes[3].plot(value, at, look, color=color, markersize=4 if look == "o" else 9)
        if gap is not None and gap["energy"]["value"] is not None:
            axes[4].plot(gap["energy"]["value"], at, "o", color=BLUE, markersize=4)
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
    axes[0].set_yticks(places, [way["name"] for way in ways], fontsize=7)
    axes[0].invert_yaxis()
    save_figure(figure, path)
