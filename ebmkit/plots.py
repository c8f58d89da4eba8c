"""Plotting tools: colours, figures without global state, atomic writing of files.

Figures need no display. The palette of Okabe and Ito is safe for colour-blind readers; series also
differ by marker or hatching.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from ebmkit.noise import in_255ths
from ebmkit.storage import write_atomically
from ebmkit.terminal import clean, shown_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"
GRAY = "#888888"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, GRAY)
DPI = 130
CUT = "the interval continues"
ANY = (-math.inf, math.inf)
"""No limits."""

SIGMA = "noise level sigma (1/255)"


def look(number: int) -> dict[str, Any]:
    """Colour, marker and line style of series ``number``; the first 66 are distinct."""
    k = number % 6
    styles = ("-", "--", "-.", ":", "-", "--")
    marker = "os^DvPX<>*p"[number % 11]
    return {"color": (*COLOURS[:5], "black")[k], "marker": marker, "ls": styles[k]}


def show_image(axes: Axes, image: Tensor, below: str, above: str) -> None:
    """Show an image (C, H, W); small images without interpolation."""
    pixels = rearrange(image.detach().clamp(0, 1).cpu(), "c h w -> h w c").numpy()
    way = "nearest" if max(pixels.shape) < 150 else "antialiased"
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation=way)
    axes.set(xticks=[], yticks=[])
    if below:
        axes.set_xlabel(clean(below), fontsize=7.5, labelpad=2)
    if above:
        axes.set_title(clean(above), fontsize=8.5, pad=3)
    for side in axes.spines.values():
        side.set(linewidth=0.4, color=GRAY)


def around_gray(image: Tensor, factor: float | None = None) -> Tensor:
    """Return 0.5 + ``factor`` * ``image``; by default, the largest entry is mapped to 0 or 1."""
    if factor is None:
        factor = 0.5 / max(float(image.abs().max()), 1e-30)
    return 0.5 + factor * image


def image_rows(
    rows: Sequence[Sequence[tuple[Tensor | None, str]]],
    heads: Sequence[str],
    path: Path,
    groups: Mapping[int, str] | None = None,
    title: str = "",
    note: str = "",
    names: Sequence[str] = (),
) -> None:
    """Write a grid of images.

    Args:
        rows: images (C, H, W) of one size, each with the text below it; None: no image. The first
            must not be None.
        heads: titles of the columns.
        path: PNG file.
        groups: text above a group of columns, by first column; a gap precedes each group.
        title: text above the images.
        note: text below the images.
        names: names of the rows.
    """
    groups, first = groups or {}, rows[0][0][0]
    assert first is not None
    widths = [width for k in range(len(heads)) for width in ([0.14, 1.0] if k in groups else [1.0])]
    cell, label, foot, head, side = 1.22, 0.27, 0.42, 0.75, 0.35 if names else 0.0  # inches
    high = min(2.5, max(0.4, first.shape[-2] / first.shape[-1])) * cell
    tall, wide = len(rows) * high + (len(rows) - 1) * label + head + foot, cell * sum(widths) * 1.04
    wide += 0.2 + side
    figure = new_figure(wide, tall)
    place = {"left": 0.008 + side / wide, "right": 0.992, "wspace": 0.05, "hspace": label / high}
    place |= {"bottom": foot / tall, "top": 1 - head / tall}
    layout = figure.add_gridspec(len(rows), len(widths), width_ratios=widths, **place)
    columns = [k for k, width in enumerate(widths) if width == 1.0]
    grid = [[figure.add_subplot(layout[i, k]) for k in columns] for i in range(len(rows))]
    for number, (axes, row) in enumerate(zip(grid, rows, strict=True)):
        for panel, (image, below), above in zip(axes, row, heads, strict=True):
            if image is None:
                panel.set_axis_off()
            else:
                show_image(panel, image, below, "" if number else above)
    for axes, name in zip(grid, names, strict=False):
        axes[0].set_ylabel(clean(name), fontsize=8)
    for column, text in groups.items():
        corner = grid[0][column].get_position()
        y = corner.y1 + (0.25 if heads[column] else 0.05) / tall
        figure.text(corner.x0, y, text, fontsize=9, weight="bold")
    figure.text(0.008, 1 - 0.16 / tall, title, fontsize=10, weight="bold", va="center")
    figure.text(0.008, 0.09 / tall, note, fontsize=7.5)
    save_figure(figure, path)


def sigma_label(sigma: float) -> str:
    """Text of a noise level (image units) for a title."""
    return f"$\\sigma$ = {in_255ths(sigma)}/255"


def images_of(document: dict[str, Any], count: int | None = None) -> str:
    """Title text with data set, split and number of images of a suite's ``document``, as in
    "cifar10 test, 200 images". ``count`` replaces the number of images."""
    count = document["images"] if count is None else count
    where = f"{document['dataset']} {document['split']}".strip()
    return f"{where}, {count} image{'' if count == 1 else 's'}"


def bars_within(
    axes: Axes,
    x: Sequence[float],
    estimates: Sequence[dict[str, Any]],
    limits: tuple[float, float],
    scale: float = 1,
    **look: Any,
) -> bool:
    """Plot values with 95 % intervals, clipped at ``limits``; return whether one was clipped.

    A caret at a limit marks an interval that continues beyond it. A value beyond a limit is drawn
    at the limit, with its number. Each estimate, one per entry of ``x``, has ``value``, ``low`` and
    ``high``, which may be None and are multiplied by ``scale``. ``look``: arguments of
    ``Axes.errorbar``.
    """
    low, high = limits
    known = [
        (at, *(math.nan if e[end] is None else e[end] for end in ("value", "low", "high")))
        for at, e in zip(x, estimates, strict=True)
        if e["value"] is not None
    ]
    places, *ends = np.array(known, dtype=float).reshape(-1, 4).T
    values, lows, highs = (scale * end for end in ends)
    shown, bottom, top = (np.clip(end, low, high) for end in (values, lows, highs))
    bars = [np.maximum(0, shown - bottom), np.maximum(0, top - shown)]
    axes.errorbar(places, shown, bars, capsize=2, **look)
    for beyond, limit, caret in ((lows < low, low, 7), (highs > high, high, 6)):
        if beyond.any():
            label = None if CUT in axes.get_legend_handles_labels()[1] else CUT
            mark: dict[str, Any] = {"marker": caret, "color": look.get("color"), "ms": 6, "ls": ""}
            axes.plot(places[beyond], np.full(beyond.sum(), limit), label=label, **mark)
    for at, value, y in zip(places, values, shown, strict=True):
        if value != y:
            text: dict[str, Any] = {"textcoords": "offset points", "rotation": 90, "fontsize": 7}
            text["va"] = "bottom" if y == low else "top"
            axes.annotate(f"{value:.3g}", (at, y), (4, 0), **text)
    return bool(((lows < low) | (highs > high)).any())


def plot_estimates(
    axes: Axes,
    x: Sequence[float] | NDArray[np.float64],
    estimates: Sequence[Mapping[str, Any]],
    scale: float = 1,
    **look: Any,
) -> None:
    """Plot a line through values, with a band of their 95 % intervals; missing ones are skipped.

    For ``estimates`` see `bars_within`; ``look`` are arguments of ``Axes.plot``, with ``color``.
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
    form: str | NDArray[np.int64],
) -> AxesImage:
    """Plot a heat map of percentages (rows, columns) with a text in each cell: the value in the
    format ``form``, or the entry of the array ``form`` (nothing for 0); a dash for NaN."""
    image = axes.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for (i, k), value in np.ndenumerate(values):
        unknown = bool(np.isnan(value))
        look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8}
        colour = "black" if unknown or value > 50 else "white"
        text = form.format(value) if isinstance(form, str) else f"{form[i, k] or ''}"
        axes.text(k, i, "-" if unknown else text, color=colour, **look)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    return image


def class_ticks(axes: Axes, names: Sequence[str], size: float = 8) -> None:
    """Label the x axis with class names, rotated if they are long."""
    slanted = max(map(len, names), default=0) > 2
    turn: dict[str, Any] = {"rotation": 45, "ha": "right"} if slanted else {}
    axes.set_xticks(range(len(names)), [shown_name(name) for name in names], fontsize=size, **turn)


def legend_below(axes: Axes, columns: int = 1) -> None:
    """Place the legend below ``axes``, in a figure with the layout "constrained"."""
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.15)}
    axes.legend(ncols=columns, frameon=False, fontsize=8, **place)


def annotate(axes: Axes, title: str, x: str = "", y: str = "", **settings: Any) -> None:
    """Set title and labels of ``axes``, and other ``settings`` of ``Axes.set``."""
    axes.set(xlabel=x, ylabel=y, **settings)
    axes.set_title(title, fontsize=10)


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = None) -> Figure:
    """Create an empty figure of ``width`` x ``height`` inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=DPI, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path, title: str = "", legend: int = 0) -> None:
    """Write ``figure`` to a PNG file, atomically, with ``title`` above all panels, and the legend
    of the first panel below them in ``legend`` columns (0: no legend)."""
    from matplotlib.text import Text

    if title:
        figure.suptitle(title, fontsize=10.5)
    if legend:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        place: dict[str, Any] = {"loc": "outside lower center", "ncols": legend}
        figure.legend(handles, labels, frameon=False, fontsize=8, **place)
    buffer = io.BytesIO()
    try:
        figure.savefig(buffer, format="png")
    except ValueError:  # a name with dollar signs, parsed as mathematics
        for text in figure.findobj(Text):
            text.set_parse_math(False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())
