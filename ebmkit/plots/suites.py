"""Pictures of what the suites classify, denoise and calibration find."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from ebmkit.metrics import psnr
from ebmkit.noise import in_255ths
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
from ebmkit.terminal import shown_name

if TYPE_CHECKING:
    pass

__all__ = [
    "DenoisedLevel",
    "accuracy_against_noise",
    "confusion_matrix",
    "denoising_grid",
    "psnr_bars",
    "reliability_diagram",
]


class DenoisedLevel(NamedTuple):
    """Images at one noise level: ``shown`` maps a short name to images (B, C, H, W), sigma in image
    units."""

    sigma: float
    shown: dict[str, Tensor]


def denoising_grid(
    clean: Tensor, levels: Sequence[DenoisedLevel], path: Path, note: str = ""
) -> None:
    """One row per image: the clean one, then at each level what is shown, with its PSNR below.

    Args:
        clean: (B, C, H, W) in [0, 1].
        levels: images of the same shape; clipped for display, PSNR is of what is given.
        path: the PNG file.
        note: a line below the pictures.
    """
    rows = len(clean)
    columns = 1 + sum(len(level.shown) for level in levels)
    # one column per picture, with a narrow empty one before each level
    widths = [1.0]
    for level in levels:
        widths += [0.16] + [1.0] * len(level.shown)
    height, width = clean.shape[-2:]
    cell, label = 1.15, 0.24
    tall = min(2.5, max(0.4, height / width)) * cell
    figure = new_figure(cell * (columns + 0.16 * len(levels)) + 0.2, rows * (tall + label) + 0.72)
    grid = figure.add_gridspec(
        rows,
        len(widths),
        width_ratios=widths,
        left=0.01,
        right=0.99,
        bottom=0.46 / figure.get_figheight(),
        top=1 - 0.46 / figure.get_figheight(),
        wspace=0.06,
        hspace=label / tall * 1.15,
    )
    for i in range(rows):
        show_image(figure.add_subplot(grid[i, 0]), clean[i], "", "clean" if i == 0 else "")
        column = 1
        for level in levels:
            column += 1
            for k, (name, images) in enumerate(level.shown.items()):
                axes = figure.add_subplot(grid[i, column])
                value = float(psnr(images[i : i + 1], clean[i : i + 1]))
                show_image(axes, images[i], f"{value:.1f} dB", name if i == 0 else "")
                if i == 0 and k == 0:
                    left = axes.get_position().x0
                    top = 1 - 0.13 / figure.get_figheight()
                    text = f"$\\sigma$ = {in_255ths(level.sigma)}/255"
                    figure.text(left, top, text, fontsize=9, weight="bold", va="center")
                column += 1
    figure.text(0.01, 0.1 / figure.get_figheight(), note, fontsize=8)
    save_figure(figure, path)


def accuracy_against_noise(levels: Sequence[dict[str, Any]], path: Path, chance: float) -> None:
    """Accuracy (with its 95 % interval) against the noise level.

    Args:
        levels: entries ``{"sigma": s, "accuracy": {"value", "low", "high"}}``.
        path: the PNG file.
        chance: accuracy of guessing, 0..1.
    """
    figure = new_figure(5.2, 3.6, layout="constrained")
    axes = figure.add_subplot()
    x = [255 * level["sigma"] for level in levels]
    y, low, high = (
        [100 * level["accuracy"][k] for level in levels] for k in ("value", "low", "high")
    )
    axes.fill_between(x, low, high, color=BLUE, alpha=0.2, lw=0, label="95 % interval")
    axes.plot(x, y, "o-", color=BLUE, ms=4, label="accuracy")
    axes.axhline(100 * chance, color=GRAY, ls=":", label="chance")
    axes.set(xlabel="noise level sigma (1/255)", ylabel="accuracy (%)", ylim=(0, 102))
    axes.set_title("Accuracy against noise")
    axes.legend(frameon=False)
    save_figure(figure, path)


def confusion_matrix(counts: Sequence[Sequence[int]], names: Sequence[str], path: Path) -> None:
    """How many images of each true class (row) were taken for which (column).

    Args:
        counts: (C, C); colours show the share of the row.
        names: of the classes.
        path: the PNG file.
    """
    matrix, names = np.asarray(counts), [shown_name(name) for name in names]
    share = matrix / np.maximum(1, matrix.sum(1, keepdims=True))
    side = 1.6 + 0.46 * len(names)
    figure = new_figure(side + 0.9, side, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(100 * share, cmap="cividis", vmin=0, vmax=100)
    for i, j in np.ndindex(*matrix.shape):
        if matrix[i, j]:
            colour = "black" if share[i, j] > 0.5 else "white"
            axes.text(j, i, str(matrix[i, j]), ha="center", va="center", color=colour, fontsize=7)
    slanted = max(len(name) for name in names) > 2
    axes.set_xticks(
        range(len(names)), names, rotation=45 if slanted else 0, ha="right" if slanted else "center"
    )
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_title("Confusion matrix: number of images")
    figure.colorbar(image, ax=axes, label="share of the true class (%)", shrink=0.8)
    save_figure(figure, path)


def reliability_diagram(levels: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy against confidence, and how many images have it; one panel per noise level.

    Args:
        levels: entries with ``sigma``, ``ece`` and ``bins``, as in ``calibration.json``.
        path: the PNG file.
    """
    figure = new_figure(4.3 * len(levels), 4.8, layout="constrained")
    grid = figure.add_gridspec(2, len(levels), height_ratios=(3, 1))
    for i, level in enumerate(levels):
        top, bottom = figure.add_subplot(grid[0, i]), figure.add_subplot(grid[1, i])
        bins = level["bins"]
        full = [b for b in bins if b["count"]]
        top.plot([0, 100], [0, 100], ls=":", color=GRAY, label="calibrated")
        accuracy = np.array([b["accuracy"]["value"] for b in full]) * 100
        low = np.array([b["accuracy"]["low"] for b in full]) * 100
        high = np.array([b["accuracy"]["high"] for b in full]) * 100
        top.errorbar(
            [100 * b["confidence"] for b in full],
            accuracy,
            yerr=np.maximum(0, [accuracy - low, high - accuracy]),
            fmt="o",
            color=BLUE,
            ms=4.5,
            elinewidth=0.8,
            capsize=2,
            label="model, 95 % interval",
        )
        where = f"sigma {in_255ths(level['sigma'])}/255" if level["sigma"] else "clean images"
        top.set_title(f"Calibration, {where}: ECE {100 * level['ece']['value']:.2f} %", fontsize=10)
        top.set(ylabel="accuracy (%)", xlim=(0, 101), ylim=(0, 102))
        middles = [50 * (b["low"] + b["high"]) for b in bins]
        bottom.bar(middles, [b["count"] for b in bins], width=90 / len(bins), color=SKY)
        bottom.set(
            xlabel="confidence (%)", ylabel="images", yscale="log", xlim=(0, 101), ylim=(0.8, None)
        )
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    save_figure(figure, path)


def psnr_bars(denoisers: dict[str, dict[str, Any]], path: Path) -> None:
    """PSNR of each denoiser at each noise level, with 95 % intervals.

    Args:
        denoisers: name -> ``{"about": text, "psnr": {"25": {"value", "low", "high"}}}``.
        path: the PNG file.
    """
    figure = new_figure(7.2, 3.9, layout="constrained")
    axes = figure.add_subplot()
    keys = list(next(iter(denoisers.values()))["psnr"])
    width = 0.82 / len(denoisers)
    looks = zip(
        (GRAY, SKY, BLUE, GREEN, ORANGE, PURPLE), ("", "", "", "//", "\\\\", ".."), strict=True
    )
    known = [e for d in denoisers.values() for e in d["psnr"].values() if e["value"] is not None]
    for i, ((_, denoiser), (colour, hatch)) in enumerate(
        zip(denoisers.items(), looks, strict=False)
    ):
        for k, key in enumerate(keys):
            estimate = denoiser["psnr"][key]
            if estimate["value"] is None:
                continue
            at, value = k + (i - (len(denoisers) - 1) / 2) * width, estimate["value"]
            label = denoiser["about"] if k == 0 else None
            axes.bar(
                at,
                value,
                0.92 * width,
                color=colour,
                hatch=hatch,
                edgecolor="white",
                lw=0,
                label=label,
            )
            top = value
            if estimate["low"] is not None:
                top = estimate["high"]
                axes.errorbar(
                    at,
                    value,
                    [[value - estimate["low"]], [top - value]],
                    color="black",
                    lw=0.8,
                    capsize=1.5,
                )
            axes.annotate(
                f"{value:.1f}",
                (at, top),
                (0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=6.5,
            )
    axes.set_xticks(range(len(keys)), [f"{key}/255" for key in keys])
    axes.set(xlabel="noise level sigma", ylabel="PSNR (dB), mean over images")
    if known:
        lowest = min(e["value"] for e in known)
        highest = max(e["value"] for e in known)
        axes.set_ylim(min(0, lowest), highest * 1.1)
    axes.set_title("Denoising")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=7.5)
    save_figure(figure, path)
