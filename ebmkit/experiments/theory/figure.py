"""Figure 1 for the paper's constants and for real families, computed and measured.

The document (`figure1`) holds numbers only and is JSON as it stands:

- ``paper``: the two sets of constants in the caption of figure 1;
- ``settings``: for each family its constants, and the measured errors at a range of n;
- ``settings[i]["fit"]``: v and b estimated from the measurements alone.

Errors and b are in nats, v in nats times samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from ebmkit.errors import unknown_name
from ebmkit.evaluation.statistics import finite
from ebmkit.experiments.theory.constants import Expansion, discriminative, generative
from ebmkit.experiments.theory.fits import Fitted, Point, fit_bias, fit_variance, measure
from ebmkit.experiments.theory.settings import PAPER, SETTINGS, Setting

SIZES = 9  # numbers of samples per setting, each twice the one before
FITTED = 4  # of them, the largest, that v and b are estimated from

ROUNDING = 1e-7  # nats: a bias below is zero but for quadrature and rounding


_BUDGETS = {"smoke": (300_000, 200, 30), "cpu": (15_000_000, 8000, 50),
            "full": (150_000_000, 40_000, 200)}  # fmt: skip
"""By scale: numbers of features (sets x samples x features) per setting and size; training sets at
most and at least."""


def figure1(
    scale: str, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Compute and measure the constants of equation (4).

    Args:
        scale: how many training sets: ``smoke`` (seconds), ``cpu`` (minutes), ``full`` (an hour).
            The constants are the same at every scale.
        seed: of the training sets.
        progress: called with the number of points measured so far and in all.

    Raises:
        UserError: if ``scale`` is unknown.

    Source: arXiv 2410.03505, figure 1, equation (4), appendix D.
    """
    if scale not in _BUDGETS:
        raise unknown_name("scale", scale, _BUDGETS)
    total, done = len(SETTINGS) * SIZES, itertools.count(1)

    def advance() -> None:
        if progress is not None:
            progress(next(done), total)

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
        "measured": {
            name: [
                {
                    "n": point.n,
                    "sets": point.sets,
                    "without_fit": point.without,
                    "excess": finite(point.excess),
                    "standard_error": finite(point.error),
                }
                for point in row
            ]
            for name, row in measured.items()
        },
        "fit": {
            "generative": _fit(measured["generative"], gen),
            "discriminative": _fit(measured["discriminative"], dis),
        },
    }


def _fit(points: Sequence[Point], expansion: Expansion) -> dict[str, Any]:
    """v and b from the largest sizes at which every training set had a fit."""
    usable = [p for p in points if p.without == 0][-FITTED:]
    fits: dict[str, Fitted] = {}
    if len(usable) == FITTED:
        fits = {"v": fit_variance(usable, expansion.bias), "b": fit_bias(usable)}
    found: dict[str, Any] = {"sizes": [p.n for p in usable], "v": None, "b": None}
    for name, fitted in fits.items():
        low, high = fitted.interval()
        error = fitted.error
        found[name] = {"value": fitted.value, "standard_error": error, "low": low, "high": high}
    return found


def rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per family and estimator of a document of `figure1`.

    Keys: ``family``, ``about``, ``estimator`` (generative or discriminative), ``well_specified``,
    ``parameters``, ``rank``, ``v`` and ``b`` (computed), ``v_formula`` (the paper's expression),
    ``v_measured`` and ``b_measured`` (each with value, standard_error, low and high at 95 %;
    None if too few training sets had a fit).
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


def markdown(document: dict[str, Any]) -> str:
    """`rows` as a Markdown table; intervals at 95 %, b in thousandths of a nat."""
    lines = [
        "| family | fit | parameters | rank | v | v by (26)-(27) | v measured | b (mnat) "
        "| b measured (mnat) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows(document):
        lines.append(
            f"| {row['family']} | {row['estimator']} | {row['parameters']} | {row['rank']} "
            f"| {row['v']:.3f} | {row['v_formula']:.3f} | {_interval(row['v_measured'], 1, 2)} "
            f"| {1e3 * row['b']:.3f} | {_interval(row['b_measured'], 1e3, 3)} |"
        )
    return "\n".join(lines) + "\n"


def _interval(estimate: dict[str, Any] | None, factor: float, digits: int) -> str:
    if estimate is None:
        return "not measured"
    value, low, high = (f"{factor * estimate[k]:.{digits}f}" for k in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
