"""What pictures share: colours, figures without global state, files written in one move.

Figures need no display and leave nothing behind. Colours are Okabe and Ito's, which colour-blind
readers tell apart; series also differ by marker or hatching.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from ebmkit.storage import write_atomically
from ebmkit.terminal import clean

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
    "bars_within",
    "images_of",
    "legend_below",
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
        axes.set_xlabel(clean(below), fontsize=7.5, labelpad=2)
    if above:
        axes.set_title(clean(above), fontsize=8.5, pad=3)
    for side in axes.spines.values():
        side.set(linewidth=0.4, color=GRAY)


def images_of(document: dict[str, Any], count: int | None = None) -> str:
    """Data set, split and number of images for a title, as in "cifar10 test, 200 images".

    Args:
        document: of a suite.
        count: how many are shown, if not all that were measured.
    """
    count = document["images"] if count is None else count
    where = f"{document['dataset']} {document['split']}".strip()
    return f"{where}, {count} image{'' if count == 1 else 's'}"


def bars_within(
    axes: Axes,
    x: Sequence[float],
    estimates: Sequence[dict[str, Any]],
    limits: tuple[float, float],
    **look: Any,
) -> bool:
    """Values with their 95 % intervals, kept within ``limits``.

    A caret at a limit says that an interval goes on beyond it. A value beyond is drawn there, with
    its number.

    Args:
        axes: where to draw.
        x: positions.
        estimates: one for each, with ``value``, ``low`` and ``high``, any of which may be None.
        limits: the lowest and the highest value drawn.
        look: colour, marker and so on of ``Axes.errorbar``.

    Returns:
        Whether an interval was cut.
    """
    low, high = limits
    known = [(at, e) for at, e in zip(x, estimates, strict=True) if e["value"] is not None]
    values, below, above = [], [], []
    cut = False
    for at, estimate in known:
        value = min(max(estimate["value"], low), high)
        bounded = estimate["low"] is not None and estimate["high"] is not None
        ends = (estimate["low"], estimate["high"]) if bounded else (value, value)
        values.append(value)
        below.append(max(0.0, value - max(low, ends[0])))
        above.append(max(0.0, min(high, ends[1]) - value))
        for beyond, limit, caret in ((ends[0] < low, low, 7), (ends[1] > high, high, 6)):
            if beyond:
                cut = True
                axes.plot([at], [limit], marker=caret, color=look.get("color"), ms=6, ls="")
        if value != estimate["value"]:
            axes.annotate(
                f"{estimate['value']:.3g}",
                (at, value),
                (4, 0),
                textcoords="offset points",
                rotation=90,
                va="bottom" if value == low else "top",
                fontsize=7,
            )
    axes.errorbar([at for at, _ in known], values, [below, above], capsize=2, **look)
    return cut


def legend_below(axes: Axes, columns: int = 1) -> None:
    """The legend of ``axes``, below them; for figures with the layout "constrained"."""
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.15),
        ncols=columns,
        frameon=False,
        fontsize=8,
    )


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = None) -> Figure:
    """An empty figure of ``width`` x ``height`` inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=DPI, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write ``figure`` as a PNG file, in one move."""
    from matplotlib.text import Text

    buffer = io.BytesIO()
    try:
        figure.savefig(buffer, format="png")
    except ValueError:  # a name with dollar signs, taken for mathematics
        for text in figure.findobj(Text):
            text.set_parse_math(False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())
