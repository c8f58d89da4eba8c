"""Samples in a grid, the path of chains as a strip and an animation, restored pictures."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ebmkit.plots.common import DPI, GRAY, image_grid, new_figure, save_figure, show_image
from ebmkit.storage import write_atomically
from ebmkit.terminal import shown_name

__all__ = ["Panel", "Sampled", "path_animation", "path_strip", "restorations", "sample_grid"]

ROWS, COLUMNS = 20, 10
"""Of the grid, at the most: of classes, and of samples of a class."""

CELL = 64
"""Pixels that the side of an image takes, at the least."""

MOMENTS = 10
"""Columns of the strip."""

FRAME_MS, LAST_MS = 90, 2000

LOST = (213, 94, 0)
"""The frame of chains that left the finite numbers, orange."""


class Sampled(NamedTuple):
    """Samples (N, C, H, W), labels (N,) or None, names of all classes, and which are finite."""

    images: Tensor
    labels: Tensor | None
    class_names: Sequence[str]
    finite: Tensor


class Panel(NamedTuple):
    """A picture of `restorations`: the image (C, H, W), and what is written above and below."""

    image: Tensor
    above: str
    below: str


def sample_grid(sampled: Sampled, path: Path, title: str, total: int) -> None:
    """Samples side by side; of several classes, a row for each.

    Args:
        sampled: the first samples.
        path: the PNG file.
        title: above them.
        total: how many there are in all.
    """
    labels = sampled.labels
    names: list[str] = []
    classes = [] if labels is None else sorted(set(labels.tolist()))[:ROWS]
    if labels is not None and len(classes) > 1:
        rows = [torch.nonzero(labels == c).flatten().tolist()[:COLUMNS] for c in classes]
        names = [shown_name(sampled.class_names[c]) for c in classes]
    else:
        count = min(len(sampled.images), ROWS * COLUMNS)
        wide = min(2 * COLUMNS, math.ceil(math.sqrt(count)))
        rows = [list(range(at, min(at + wide, count))) for at in range(0, count, wide)]
        if labels is not None:
            title = f"{title}, class {shown_name(sampled.class_names[int(labels[0])])}"
    mosaic = _mosaic([[sampled.images[i] for i in row] for row in rows], _lost(sampled, rows))
    shown = sum(map(len, rows))
    note = title if shown == total else f"{title}: {shown} of {total:,}"
    _save_mosaic(mosaic, path, note, names)


def path_strip(
    frames: Tensor,
    moments: Sequence[int],
    sigmas: Sequence[float | None],
    path: Path,
    title: str,
    chains: int = 6,
) -> None:
    """Some chains, one in each row, at moments of their way.

    Args:
        frames: (K, S, C, H, W) uint8.
        moments: the K steps; the last frame is of the finished samples.
        sigmas: mean noise level of each step, None where it has none.
        path: the PNG file.
        title: above.
        chains: how many at the most.
    """
    chosen = sorted({round(k) for k in np.linspace(0, len(frames) - 1, MOMENTS)})
    kept = frames[chosen, :chains].float() / 255
    images = [[kept[k, s] for k in range(len(chosen))] for s in range(kept.shape[1])]
    below = []
    for k in chosen:
        step = moments[k]
        sigma = sigmas[step - 1] if 0 < step <= len(sigmas) else None
        last = k == len(frames) - 1
        text = "end" if last else "start" if step == 0 else f"step {step}"
        below.append(text if sigma is None or last else f"{text}\n{_level(sigma)}")
    note = "; below: mean noise level" if any(s is not None for s in sigmas) else ""
    _save_mosaic(_mosaic(images), path, f"{title}{note}", below=below)


def path_animation(frames: Tensor, path: Path) -> None:
    """The chains' way as an animated GIF, in a square of chains; the end stays for a while.

    Args:
        frames: (K, S, C, H, W) uint8.
        path: the GIF file.
    """
    side = math.ceil(math.sqrt(frames.shape[1]))
    pictures = []
    for frame in frames.float() / 255:
        rows = [list(frame[at : at + side]) for at in range(0, len(frame), side)]
        pictures.append(Image.fromarray(_mosaic(rows)))
    buffer = io.BytesIO()
    times = [FRAME_MS] * (len(pictures) - 1) + [LAST_MS]
    first, *rest = pictures
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=times, loop=0, disposal=1)
    write_atomically(path, buffer.getvalue())


def restorations(rows: Sequence[Sequence[Panel]], path: Path, title: str) -> None:
    """One picture in each row: as it was, what was measured, baselines, and restored.

    Args:
        rows: of equal length, and images of equal size.
        path: the PNG file.
        title: above.
    """
    shape = (rows[0][0].image.shape[-2], rows[0][0].image.shape[-1])
    figure, axes = image_grid(len(rows), len(rows[0]), shape, head=0.55)
    for i, row in enumerate(rows):
        for k, panel in enumerate(row):
            show_image(axes[i][k], panel.image, panel.below, panel.above if i == 0 else "")
    height = figure.get_figheight()
    figure.text(0.008, 1 - 0.14 / height, title, fontsize=9, weight="bold", va="center")
    save_figure(figure, path)


def _level(sigma: float) -> str:
    return f"{255 * sigma:.3g}/255" if sigma < 10 else "> 10"


def _lost(sampled: Sampled, rows: list[list[int]]) -> set[tuple[int, int]]:
    found = enumerate(rows)
    return {(r, k) for r, row in found for k, i in enumerate(row) if not bool(sampled.finite[i])}


def _mosaic(
    rows: Sequence[Sequence[Tensor]], marked: set[tuple[int, int]] | None = None
) -> NDArray[np.uint8]:
    """Images (C, H, W) in [0, 1] beside each other, (H', W', 3) uint8, small ones enlarged."""
    height, width = rows[0][0].shape[-2:]
    times = max(1, math.ceil(CELL / max(height, width)))
    gap = 4
    tall, wide = height * times + gap, width * times + gap
    columns = max(map(len, rows))
    whole = np.full((len(rows) * tall + gap, columns * wide + gap, 3), 255, dtype=np.uint8)
    for r, row in enumerate(rows):
        for k, image in enumerate(row):
            levels = (image.detach().clamp(0, 1).cpu().movedim(0, -1) * 255).round().numpy()
            pixels = np.broadcast_to(levels.astype(np.uint8), (height, width, 3))
            large = pixels.repeat(times, 0).repeat(times, 1)
            top, left = gap + r * tall, gap + k * wide
            if marked and (r, k) in marked:
                whole[top - gap : top + tall, left - gap : left + wide] = LOST
            whole[top : top + height * times, left : left + width * times] = large
    return whole


def _save_mosaic(
    mosaic: NDArray[np.uint8],
    path: Path,
    title: str,
    names: Sequence[str] = (),
    below: Sequence[str] = (),
) -> None:
    """``mosaic`` pixel for pixel, a title above, names beside its rows, text below its columns."""
    tall, wide = (side / DPI for side in mosaic.shape[:2])
    left = 0.12 + 0.075 * max(map(len, names), default=0)
    head, foot = 0.3, 0.42 if below else 0.08
    width = max(left + wide + 0.1, 0.2 + 0.072 * len(title))
    height = head + tall + foot
    figure = new_figure(width, height)
    axes = figure.add_axes((left / width, foot / height, wide / width, tall / height))
    axes.imshow(mosaic, interpolation="nearest", aspect="auto")
    for side in axes.spines.values():
        side.set_visible(False)
    rows, columns = max(1, len(names)), max(1, len(below))
    ticks = [(r + 0.5) * mosaic.shape[0] / rows for r in range(len(names))]
    axes.set_yticks(ticks, list(names), fontsize=8)
    ticks = [(k + 0.5) * mosaic.shape[1] / columns for k in range(len(below))]
    axes.set_xticks(ticks, list(below), fontsize=6.5)
    axes.tick_params(length=0, colors=GRAY, labelcolor="black", pad=2)
    figure.text(0.1 / width, 1 - 0.15 / height, title, fontsize=8.5, va="center")
    save_figure(figure, path)
