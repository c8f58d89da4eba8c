"""Figure 1 for the paper's constants and for specific families, computed and measured.

The document of `figure1` can be written as JSON:

- ``paper``: the two sets of constants in the paper's caption;
- ``settings``: constants of each family, and measured errors at a range of n;
- ``settings[i]["fit"]``: v and b estimated from the measurements alone.

Errors and b are in nats, v in nats times samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ebmkit.errors import unknown_name
from ebmkit.evaluation.statistics import finite
from ebmkit.experiments.report import table_lines
from ebmkit.experiments.theory.families import PAPER, SETTINGS, Setting
from ebmkit.experiments.theory.fits import (
    Expansion,
    Point,
    discriminative,
    fit_bias,
    fit_variance,
    generative,
    measure,
)
from ebmkit.plots import BLUE, GRAY, ORANGE, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZES = 9  # training set sizes per setting, each twice the last
FITTED = 4  # number of largest sizes that estimate v and b
ROUNDING = 1e-7  # nats; a smaller bias is zero up to quadrature and rounding
COLUMNS = 3  # of panels
STYLES = (
    ("generative", "gen", BLUE, "-", "o"),
    ("discriminative", "dis", ORANGE, "--", "s"),
)

_BUDGETS = {"smoke": (300_000, 200, 30), "cpu": (15_000_000, 8000, 50),
            "full": (150_000_000, 40_000, 200)}  # fmt: skip
"""By scale: feature values (sets x samples x features) per setting and size; maximum and minimum
number of training sets."""


def figure1(
    scale: str, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Compute and measure the constants of equation (4).

    Args:
        scale: number of training sets: ``smoke`` (seconds), ``cpu`` (minutes), ``full`` (an hour).
            The constants are the same at every scale.
        seed: random seed of the training sets.
        progress: called with (points measured, total points).

    Raises:
        UserError: if ``scale`` is unknown.

    Source: arXiv 2410.03505, figure 1, equation (4), appendix D.
    """
    if scale not in _BUDGETS:
        raise unknown_name("scale", scale, _BUDGETS)
    done = itertools.count(1)

    def advance() -> None:
        if progress is not None:
            progress(next(done), len(SETTINGS) * SIZES)

    return {
        "figure": "fig1",
        "scale": scale,
        "seed": seed,
        "unit": "nats",
        "paper": [dict(curve) for curve in PAPER],
        "settings": [_setting(setting, _BUDGETS[scale], seed, advance) for setting in SETTINGS],
    }


def _setting(
    setting: Setting, budget: tuple[int, int, int], seed: int, advance: Callable[[], None]
) -> dict[str, Any]:
    family = setting.family
    nodes = setting.truth.nodes()
    gen, dis = generative(family, nodes), discriminative(family, nodes)
    start = family.weights(family.gaussians(dis.theta))
    points: list[list[Point]] = []
    for k in range(SIZES):
        n = setting.smallest * 2**k
        numbers, most, least = budget
        sets = max(least, min(most, numbers // (n * len(start))))
        points.append(measure(setting, n, sets, start, seed))
        advance()
    measured = dict(zip(("generative", "discriminative"), zip(*points, strict=True), strict=True))
    b_gen, b_dis = (b if b > ROUNDING else 0.0 for b in (gen.bias, dis.bias))
    saved, gap = dis.variance - gen.variance, b_gen - b_dis
    return {
        "name": setting.name,
        "title": setting.title,
        "about": setting.description,
        "well_specified": setting.well_specified,
        "classes": family.num_classes,
        "dim": family.dim,
        "parameters": family.num_parameters,
        "rank": dis.rank,
        "b_gen": b_gen,
        "b_dis": b_dis,
        "v_gen": gen.variance,
        "v_dis": dis.variance,
        "formula_gen": gen.formula,
        "formula_dis": dis.formula,
        "crossing": saved / (2 * gap) if gap > 0 and saved > 0 else None,
        "measured": {name: [_document(p) for p in row] for name, row in measured.items()},
        "fit": {
            "generative": _fit(measured["generative"], gen),
            "discriminative": _fit(measured["discriminative"], dis),
        },
    }


def _document(point: Point) -> dict[str, Any]:
    counts = {"n": point.n, "sets": point.sets, "without_fit": point.without}
    return counts | {"excess": finite(point.excess), "standard_error": finite(point.error)}


def _fit(points: Sequence[Point], expansion: Expansion) -> dict[str, Any]:
    """Estimates of v and b from the largest sizes at which every training set has a fit."""
    usable = [p for p in points if p.without == 0][-FITTED:]
    found: dict[str, Any] = {"sizes": [p.n for p in usable], "v": None, "b": None}
    if len(usable) == FITTED:
        fits = {"v": fit_variance(usable, expansion.bias), "b": fit_bias(usable)}
        for name, (value, error) in fits.items():
            low, high = value - 1.96 * error, value + 1.96 * error
            found[name] = {"value": value, "standard_error": error, "low": low, "high": high}
    return found


def rows(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per family and estimator of a document of `figure1`.

    Keys: ``family``, ``about``, ``estimator`` (generative or discriminative), ``well_specified``,
    ``parameters``, ``rank``, ``v`` and ``b`` (computed), ``v_formula`` (the paper's expression),
    ``v_measured`` and ``b_measured`` (each with value, standard_error, low and high at 95 %;
    None if too few sizes have a fit for every training set).
    """
    return [
        {
            "family": setting["title"],
            **{key: setting[key] for key in ("about", "well_specified", "parameters", "rank")},
            "estimator": estimator,
            "v": setting[f"v_{short}"],
            "v_formula": setting[f"formula_{short}"],
            "v_measured": setting["fit"][estimator]["v"],
            "b": setting[f"b_{short}"],
            "b_measured": setting["fit"][estimator]["b"],
        }
        for setting in document["settings"]
        for estimator, short in (("generative", "gen"), ("discriminative", "dis"))
    ]


def markdown(document: Mapping[str, Any]) -> str:
    """`rows` as a Markdown table, with 95 % intervals and b in thousandths of a nat."""
    names = ("family", "fit", "parameters", "rank", "v", "v by (26)-(27)", "v measured", "b (mnat)",
             "b measured (mnat)")  # fmt: skip
    cells = (
        [
            *(row[key] for key in ("family", "estimator", "parameters", "rank")),
            *(f"{row[key]:.3f}" for key in ("v", "v_formula")),
            _interval(row["v_measured"], 1, 2),
            f"{1e3 * row['b']:.3f}",
            _interval(row["b_measured"], 1e3, 3),
        ]
        for row in rows(document)
    )
    return "\n".join(table_lines(names, cells, left=2)) + "\n"


def _interval(estimate: dict[str, Any] | None, factor: float, digits: int) -> str:
    if estimate is None:
        return "not measured"
    value, low, high = (f"{factor * estimate[k]:.{digits}f}" for k in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def draw_figure1(document: Mapping[str, Any], path: Path) -> None:
    """Draw a document of `figure1` to the PNG file ``path``.

    Every panel shows the excess error E[KL(p(c|x) || p_theta(c|x))] in nats against the number of
    training samples. The panels of the paper's constants show b + v/n, as in its caption; those of
    families b + v/(2n), equation (4), with a point and its 95 % interval per measured size. Hollow
    points are means over fewer than 99 % of the training sets: the others have no fit.
    """
    panels = len(document["paper"]) + len(document["settings"])
    rows = -(-panels // COLUMNS)
    figure = new_figure(4.1 * COLUMNS, 3.5 * rows + 0.5, layout="constrained")
    figure.suptitle(
        "Excess error of labels against the number of training samples: the paper's curves, and "
        "real families (lines: b + v/2n; points: measured, 95 %)",
        fontsize=11,
    )
    figure.supxlabel(
        "Dotted: the bias b.  Vertical line: where the curves of a family cross.  Hollow points: "
        "means over the training sets that have a fit, fewer than 99 % of them.",
        fontsize=9,
    )
    axes = [figure.add_subplot(rows, COLUMNS, i + 1) for i in range(panels)]
    for panel, curve in zip(axes, document["paper"], strict=False):
        draw_paper_curves(panel, curve)
        panel.set_title(f"{curve['title']}\nb + v/n, as in its caption", fontsize=9)
    for panel, setting in zip(axes[len(document["paper"]) :], document["settings"], strict=True):
        _family(panel, setting)
    for panel in axes:
        panel.set(xscale="log", yscale="log")
        panel.grid(alpha=0.25, lw=0.5)
        panel.set_xlabel("training samples n", fontsize=8.5)
        panel.set_ylabel("excess error (nats)", fontsize=8.5)
        panel.tick_params(which="both", labelsize=8)
        panel.legend(frameon=False, fontsize=7.5, loc="upper right")
    save_figure(figure, path)


def draw_paper_curves(axes: Axes, curve: Mapping[str, Any]) -> None:
    """Draw b + v/n of both fits, an entry of `ebmkit.experiments.theory.families.PAPER`."""
    n = np.geomspace(1, 1e5, 200)
    for name, short, colour, line, _ in STYLES:
        bias, variance = curve[f"b_{short}"], curve[f"v_{short}"]
        label = f"{name}: {bias:g} + {variance:g}/n"
        axes.plot(n, bias + variance / n, line, color=colour, lw=1.6, label=label)


def _family(axes: Axes, setting: dict[str, Any]) -> None:
    """Panel of a family: b + v/2n, and measured points."""
    sizes = [p["n"] for row in setting["measured"].values() for p in row]
    n = np.geomspace(min(sizes) / 1.3, max(sizes) * 1.3, 200)
    for name, short, colour, line, marker in STYLES:
        bias, variance = setting[f"b_{short}"], setting[f"v_{short}"]
        label = f"{name}: b = {bias:.2g}, v = {variance:.3g}"
        axes.plot(n, bias + variance / (2 * n), line, color=colour, lw=1.4, label=label)
        for point in setting["measured"][name]:
            if point["excess"] is None or point["standard_error"] is None:
                continue
            fill = colour if point["without_fit"] <= 0.01 * point["sets"] else "white"
            style: dict[str, Any] = {"fmt": marker, "ms": 4, "color": colour, "mfc": fill}
            error = 1.96 * point["standard_error"]
            axes.errorbar(point["n"], point["excess"], error, elinewidth=1, capsize=2, **style)
        if bias > 0:
            axes.axhline(bias, color=colour, lw=0.7, ls=":")
    if setting["crossing"] is not None and min(sizes) < setting["crossing"] < max(sizes):
        axes.axvline(setting["crossing"], ymax=0.78, color=GRAY, lw=0.8)
    kind = "well specified" if setting["well_specified"] else "misspecified"
    axes.set_title(
        f"{setting['title']}\n{kind}, {setting['parameters']} parameters, rank {setting['rank']}",
        fontsize=9,
    )
