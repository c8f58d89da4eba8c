"""Pictures of the suite ood: AUROC by set and score, histograms of scores, examples of the sets."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
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

__all__ = ["auroc_map", "examples", "histograms"]

LOOKS = ((BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (PURPLE, ":"), (SKY, "-"), ("black", "--"))
COLUMNS = 3


def auroc_map(document: dict[str, Any], path: Path) -> None:
    """AUROC of every set (row) by every score (column); 50 % is a score that knows nothing.

    Args:
        document: of the suite ood.
        path: the PNG file.
    """
    sets, scores = document["sets"], list(document["scores"])
    values = np.array(
        [
            [
                np.nan if s["scores"][k] is None else 100 * s["scores"][k]["auroc"]["value"]
                for k in scores
            ]
            for s in sets.values()
        ]
    )
    width, height = 3.2 + 0.72 * len(scores), 2.3 + 0.42 * len(sets)
    figure = new_figure(width, height, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for (i, k), value in np.ndenumerate(values):
        text = "-" if np.isnan(value) else f"{value:.1f}"
        colour = "black" if np.isnan(value) or value > 50 else "white"
        axes.text(k, i, text, ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(scores)), scores, rotation=35, ha="right", fontsize=8)
    axes.set_yticks(range(len(sets)), list(sets), fontsize=8)
    axes.set(xlabel="score", ylabel="set out of distribution")
    figure.colorbar(image, ax=axes, label="AUROC (%)")
    figure.suptitle(f"In distribution: {images_of(document)}", fontsize=10)
    save_figure(figure, path)


def histograms(document: dict[str, Any], path: Path) -> None:
    """One panel per score: its distribution in, filled, and on every set, as lines.

    Args:
        document: of the suite ood.
        path: the PNG file.
    """
    scores, sets = document["scores"], list(document["sets"])
    rows = -(-len(scores) // COLUMNS)
    columns = min(COLUMNS, len(scores))
    figure = new_figure(0.5 + 3.3 * columns, 1.4 + 2.35 * rows, layout="constrained")
    for number, (name, found) in enumerate(document["histograms"].items()):
        axes = figure.add_subplot(rows, columns, number + 1)
        edges = np.array(found["edges"])
        if len(edges):
            axes.stairs(_shares(found["in"]), edges, fill=True, color=GRAY, alpha=0.55, label="in")
            for look, own in zip(itertools.cycle(LOOKS), sets):
                axes.stairs(
                    _shares(found["sets"][own]), edges, color=look[0], ls=look[1], lw=1.3, label=own
                )
        axes.set_title(name, fontsize=10)
        axes.set_xlabel(scores[name], fontsize=7.5)
        axes.tick_params(labelsize=7)
        axes.locator_params(axis="x", nbins=5)
        axes.margins(x=0.01)
    figure.supylabel("share of the images (%)", fontsize=9)
    figure.suptitle(
        f"Scores, higher is in distribution: {images_of(document)}\n"
        "(outer bins hold all that is beyond)",
        fontsize=10,
    )
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    save_figure(figure, path)


def examples(shown: Mapping[str, Sequence[Tensor]], document: dict[str, Any], path: Path) -> None:
    """The first images of each set, a row each, with the mean energy where there is one.

    Args:
        shown: by set (``in`` first) a few images (C, H, W).
        document: of the suite ood.
        path: the PNG file.
    """
    columns = max(len(images) for images in shown.values())
    figure = new_figure(1.7 + 0.75 * columns, 0.6 + 0.8 * len(shown))
    grid = figure.add_gridspec(
        len(shown),
        columns,
        left=1.6 / figure.get_figwidth(),
        right=0.99,
        bottom=0.02,
        top=1 - 0.45 / figure.get_figheight(),
        wspace=0.06,
        hspace=0.06,
    )
    energies = document.get("energy", {})
    for i, (name, images) in enumerate(shown.items()):
        for k, image in enumerate(images):
            axes = figure.add_subplot(grid[i, k])
            show_image(axes, image, "", "")
            if k == 0:
                value = energies.get(name, {}).get("value")
                told = "" if value is None else f"\nenergy {value:.4g}"
                axes.set_ylabel(
                    f"{name}{told}", rotation=0, ha="right", va="center", fontsize=8, labelpad=6
                )
    figure.suptitle(f"In distribution, and out of it: {images_of(document)}", fontsize=10)
    save_figure(figure, path)


def _shares(counts: Sequence[int]) -> np.ndarray:
    return 100 * np.array(counts) / max(1, sum(counts))
