"""What pictures share: colours, figures without global state, files written in one move.

Figures need no display and leave nothing behind. Colours are Okabe and Ito's, which colour-blind
readers tell apart; series also differ by marker or hatching.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from ebmkit.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "BLUE",
    "GRAY",
    "GREEN",
    "ORANGE",
    "PURPLE",
    "SKY",
    "new_figure",
    "save_figure",
    "show_image",
]

BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"
GRAY = "#888888"
DPI = 130


def show_image(axes: Axes, image: Tensor, below: str, above: str) -> None:
    """Show an image (C, H, W); small ones in crisp squares."""
    pixels = image.detach().clamp(0, 1).cpu().movedim(0, -1).numpy()
    way = "nearest" if max(pixels.shape) < 150 else "antialiased"
    axes.imshow(
        pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels,
        cmap="gray",
        vmin=0,
        vmax=1,
        interpolation=way,
    )
    axes.set_xticks([])
    axes.set_yticks([])
    if below:
        axes.set_xlabel(below, fontsize=7.5, labelpad=2)
    if above:
        axes.set_title(above, fontsize=8.5, pad=3)
    for side in axes.spines.values():
        side.set(linewidth=0.4, color=GRAY)


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = None) -> Figure:
    """An empty figure of ``width`` x ``height`` inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=DPI, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write ``figure`` as a PNG file, in one move."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())
