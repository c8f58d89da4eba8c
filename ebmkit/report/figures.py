"""Line plots as inline SVG, whose colours follow the page.

matplotlib draws axes and lines. Its colours are replaced by CSS variables (``--muted``, ``--c0``)
and its fonts by that of the page, so a plot fits a light, a dark and a printed page. Title and
legend are HTML. The values of the lines come beside the SVG, to be shown under the pointer.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ebmkit.plots import new_figure

SIZE = (4.0, 2.5)
"""Width and height of a panel, inches."""

AXES = (0.125, 0.17, 0.86, 0.79)
"""Left and lower end, width and height of the axes, as fractions: the same in all panels."""

POINTS = 240
"""Maximum number of points of a line; of longer ones, every n-th is drawn."""

INK, MUTED = "#010203", "#040506"
COLOURS = tuple(f"#0708{number:02x}" for number in range(8))
"""Colours in the SVG that stand for the CSS variables ``--c0`` to ``--c7``."""

VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)"} | {
    colour: f"var(--c{number})" for number, colour in enumerate(COLOURS)
}

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ebmkit",
    "path.simplify": True,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "axes.linewidth": 0.6,
}


@dataclass(frozen=True)
class Line:
    """A line of a panel.

    Attributes:
        label: name in the legend; empty: a line without one.
        x: places (n,).
        y: values (n,), without NaN.
        low: lower ends of intervals, drawn as a band; NaN where there is none.
        high: upper ends.
        colour: number of the colour; None: muted.
        style: ``-``, ``--``, ``:``, or empty for points with error bars.
        marker: ``o`` or nothing.
        faint: whether the line is a background of another.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    colour: int | None = 0
    style: str = "-"
    marker: str = ""
    faint: bool = False


@dataclass(frozen=True)
class Panel:
    """A line plot: title, label of the x axis, lines, and their scales."""

    title: str
    x_label: str
    lines: list[Line]
    log: bool = False
    y_range: tuple[float | None, float | None] = (None, None)

    def figure(self) -> tuple[str, dict[str, Any]]:
        """The SVG, and the data for the pointer: geometry of the axes and values of the lines."""
        import matplotlib
        from matplotlib.ticker import LogLocator, NullLocator

        with matplotlib.rc_context(STYLE):
            figure = new_figure(*SIZE)
            axes = figure.add_axes(AXES)
            for line in self.lines:
                _draw(axes, line)
            if self.log:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_locator(NullLocator())
            axes.set_xlabel(self.x_label)
            axes.set_ylim(*self.y_range)
            axes.grid(color=MUTED, alpha=0.18, lw=0.5)
            file = io.StringIO()
            metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            figure.savefig(file, format="svg", transparent=True, metadata=metadata)
            box, span = axes.get_position(), (*axes.get_xlim(), *axes.get_ylim())
        data = {
            "box": [round(v, 4) for v in (box.x0, 1 - box.y1, box.width, box.height)],
            "range": [_short(v) for v in span],
            "x": self.x_label,
            "lines": [
                {
                    "label": line.label,
                    "colour": line.colour,
                    "x": [_short(v) for v in _thinned(line.x)],
                    "y": [_short(v) for v in _thinned(line.y)],
                }
                for line in self.lines
                if not line.faint and line.label
            ],
        }
        return _themed(file.getvalue(), self.title), data


def _draw(axes: Any, line: Line) -> None:
    colour = MUTED if line.colour is None else COLOURS[line.colour % len(COLOURS)]
    x, y = _thinned(line.x), _thinned(line.y)
    width, alpha = (0.7, 0.3) if line.faint else (1.5, 1.0)
    axes.plot(x, y, ls=line.style, marker=line.marker, ms=3.5, lw=width, color=colour, alpha=alpha)
    if line.low is not None and line.high is not None:
        low, high = _thinned(line.low), _thinned(line.high)
        if line.style:
            axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
        else:
            axes.vlines(x, low, high, color=colour, lw=0.9)


def _thinned(values: Sequence[float]) -> list[float]:
    """Every n-th of ``values``, and the last, at most `POINTS` in all."""
    step = math.ceil(len(values) / POINTS)
    kept = list(values[:: max(1, step)])
    return kept if step < 2 or (len(values) - 1) % step == 0 else [*kept, values[-1]]


def _short(value: float) -> float | None:
    """``value`` with five significant digits; None for NaN and Inf."""
    return float(f"{value:.5g}") if np.isfinite(value) else None


def _themed(svg: str, title: str) -> str:
    """The element ``svg`` of a file, with variables in place of colours and the page's font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<g id="[a-z]\w*">', "<g>", svg)  # repeated in the next plot of the page
    svg = re.sub(r'font: ([\d.]+)px [^;"]+', r"font-size: \1px", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r">\s+<", "><", svg)
    svg = re.sub("#[0-9a-f]{6}", lambda found: VARIABLES.get(found[0], found[0]), svg)
    svg = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", svg)
    svg = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", svg)
    return f'<svg role="img" aria-label="{html.escape(title)}"' + svg.removeprefix("<svg")
