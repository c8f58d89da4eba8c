"""What pictures share: colours, figures without global state, files written in one move.

Figures need no display and leave nothing behind. Colours are Okabe and Ito's, which colour-blind
readers tell apart; series also differ by marker or hatching.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ebmkit.storage import write_atomically
from ebmkit.terminal import clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

__all__ = [
    "BLUE",
    "GRAY",
    "GREEN",
    "ORANGE",
    "PURPLE",
    "SKY",
    "annotated_map",
    "bars_within",
    "images_of",
    "legend_below",
    "new_figure",
    "plot_estimates",
    "row_label",
    "save_figure",
    "shared_legend",
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


def plot_estimates(
    axes: Axes,
    x: Sequence[float] | NDArray[np.float64],
    estimates: Sequence[Mapping[str, Any]],
    scale: float = 1,
    **look: Any,
) -> None:
    """A line through values, within the band of their 95 % intervals; those without are left out.

    Args:
        axes: where to draw.
        x: positions.
        estimates: one for each, with ``value``, ``low`` and ``high``, any of which may be None.
        scale: what they are multiplied with.
        look: ``color``, label and so on of ``Axes.plot``.
    """
    known = [(at, e) for at, e in zip(x, estimates, strict=True) if e["value"] is not None]
    axes.plot([at for at, _ in known], [scale * e["value"] for _, e in known], **look)
    bounded = [(at, e) for at, e in known if e["low"] is not None]
    places = [at for at, _ in bounded]
    low, high = ([scale * e[end] for _, e in bounded] for end in ("low", "high"))
    if len(places) == 1:  # a band would have no width
        axes.vlines(places, low, high, color=look["color"], lw=1.2)
    axes.fill_between(places, low, high, color=look["color"], alpha=0.15, lw=0)


def annotated_map(
    axes: Axes,
    values: NDArray[np.float64],
    columns: Sequence[str],
    rows: Sequence[str],
    form: str,
) -> AxesImage:
    """A map of percentages (rows, columns) with the number in each cell; a dash for nan."""
    image = axes.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for (i, k), value in np.ndenumerate(values):
        unknown = bool(np.isnan(value))
        look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8}
        colour = "black" if unknown or value > 50 else "white"
        axes.text(k, i, "-" if unknown else form.format(value), color=colour, **look)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    return image


def row_label(axes: Axes, text: str) -> None:
    """``text`` on the left of the first image of a row."""
    place: dict[str, Any] = {"rotation": 0, "ha": "right", "va": "center", "labelpad": 6}
    axes.set_ylabel(clean(text), fontsize=8, **place)


def shared_legend(figure: Figure, columns: int) -> None:
    """One legend for all panels, below them: that of the first."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": columns}
    figure.legend(handles, labels, frameon=False, fontsize=8, **place)


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
