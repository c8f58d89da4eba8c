r"""Sample efficiency: cross-entropy alone against joint training, by number of training images.

CDN section 2.1 argues that a generative fit needs fewer samples than a discriminative one: with n
training samples the expected excess error of either is :math:`b + v / n` (caption of figure 1; in
nats), and the generative fit has the larger bias b and the smaller variance v. Here the same
network is trained on n images with ``ce``, ``ce+dsm`` and ``ce+cdsm``.

- The images of a run are drawn by its seed, equally many of each class (``dataset.subset``), so a
  standard deviation over seeds is one over training sets, initial weights and augmentation. Rows of
  one seed share all three, so objectives are compared by paired differences.
- Every row has the same number of steps, so few images are repeated more often. A step of joint
  training costs more than one of cross-entropy. The images to denoise are the same n.
- NLL, in nats, is the excess error plus the entropy of the labels given the image, which no network
  can remove; it is small for these data. Joint training is not a generative fit, and networks are
  not fitted to convergence: the theory's curves are for comparison, not a prediction.

The rows of all training images are the rows ``gradresnet-ce``, ``joint`` and ``ce-cdsm`` of the
tables, and share their runs.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ebmkit.errors import UserError
from ebmkit.evaluation.statistics import LEVEL, finite
from ebmkit.experiments.report import (
    Experiment,
    Report,
    VariantResult,
    circumstances,
    run_grid,
    table_lines,
    text_of,
)
from ebmkit.experiments.runs import ExperimentRuns, Protocol, Variant
from ebmkit.experiments.tables import ROWS
from ebmkit.experiments.theory.families import PAPER
from ebmkit.experiments.theory.figure import draw_paper_curves
from ebmkit.plots import BLUE, GREEN, ORANGE, new_figure, save_figure
from ebmkit.training.config import merge

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OBJECTIVES = {"ce": "gradresnet-ce", "ce+dsm": "joint", "ce+cdsm": "ce-cdsm"}
"""By objective, the row of the tables that trains with it on all images."""

SIZES = {
    ("smoke",): (50, 200),
    ("cpu", "full"): (500, 1_000, 2_000, 5_000, 10_000),
}
"""By size of the scale, numbers of training images; all images come in addition."""

RADII = (0.1, 0.25)
"""l2 radii of the attack, image units."""

SIGMA = 25 / 255

ATTACKS: dict[str, dict[str, Any]] = {
    "smoke": {"images": 50, "steps": 5},
    "cpu": {"images": 300, "steps": 10},
    "full": {"images": 1000, "steps": 20},
}
"""Settings of the suite ``robustness-grid``, by size of the scale."""


class Metric(NamedTuple):
    """A measured quantity, as tables and plots show it."""

    title: str
    higher_is_better: bool = True
    form: str = "{:.1f}"


METRICS = {
    "accuracy": Metric("accuracy, %"),
    "nll": Metric("NLL, nats", False, "{:.3f}"),
    "ece": Metric("ECE, %", False),
    **{f"l2 {radius:g}": Metric(f"accuracy at l2 {radius:g}, %") for radius in RADII},
    "psnr": Metric("PSNR at 25/255, dB", True, "{:.2f}"),
}

LOOKS: dict[str, dict[str, Any]] = {
    "ce": {"color": ORANGE, "marker": "s", "ls": "--"},
    "ce+dsm": {"color": BLUE, "marker": "o", "ls": "-"},
    "ce+cdsm": {"color": GREEN, "marker": "^", "ls": "-."},
}
"""Looks of the objectives; figure 1 has the colours of the first two for its two kinds of fit."""


def _limited(objective: str, n: int, sizes: tuple[str, ...]) -> Variant:
    base = ROWS[OBJECTIVES[objective]]
    layer = merge(base.layer, {"dataset": {"limit": n, "subset": "balanced"}})
    name, label = f"{objective}-{n}", f"{objective}, {n:,} images"
    return replace(base, name=name, label=label, layer=layer, paper={}, only_at=sizes)


VARIANTS = (
    *(
        _limited(objective, n, sizes)
        for sizes, numbers in SIZES.items()
        for n in numbers
        for objective in OBJECTIVES
    ),
    *(
        replace(ROWS[row], label=f"{objective}, all images", paper={})
        for objective, row in OBJECTIVES.items()
    ),
)


def objective_of(variant: Variant) -> str:
    """The key of `OBJECTIVES` of ``variant``, which at some scales is in its plain form."""
    by_row = {row: objective for objective, row in OBJECTIVES.items()}
    return by_row.get(variant.name) or variant.name.rpartition("-")[0]


# --- the report ----------------------------------------------------------------------------------


def run_efficiency(runs: ExperimentRuns, only: Sequence[str]) -> Report:
    """Train, evaluate and compare the rows named in ``only`` (empty: all).

    Raises:
        Interrupted: if training is interrupted; the same call resumes it.
        UserError: if the scale has no row of that name, or data or memory do not suffice.
    """
    variants = runs.distinct(VARIANTS)
    for name in only:
        if name not in [variant.name for variant in variants]:
            raise UserError(
                f"target efficiency has no row {name!r} at scale {runs.scale.name}: --show lists "
                "its rows"
            )
    results = run_grid(runs, variants, only, partial(protocol_of, runs))
    total = len(runs.images(ROWS[OBJECTIVES["ce"]], "train"))
    about = circumstances(runs, "efficiency", results) | {"budget": _budget(runs, variants)}
    document = efficiency_document(runs.scale.name, results, total, about)
    plot = partial(draw_efficiency, document)
    return Report(document, {"efficiency.png": plot})


def protocol_of(runs: ExperimentRuns, variant: Variant) -> Protocol:
    """The evaluation of ``variant``."""
    suites = ["classify", "calibration", "robustness-grid"]
    images = dict(runs.scale.images)
    if "classify" in images:
        images["calibration"] = images["classify"]
    if variant.task == "joint":
        suites.append("denoise")
    attack = {"norm": "l2", "epsilons": RADII, **ATTACKS[runs.scale.size]}
    return Protocol("efficiency", tuple(suites), (SIGMA,), images, {"robustness-grid": attack})


def _budget(runs: ExperimentRuns, variants: Sequence[Variant]) -> str:
    """A sentence on the steps of the rows, which are the same for every n."""
    joint = runs.config(next(v for v in variants if v.task == "joint"))
    classify, denoise = (joint.stream(name).batch_size for name in ("classify", "denoise"))
    return (
        f"every row, whatever its n: {joint.steps:,} steps of {classify} images to classify, that "
        f"is {joint.steps * classify:,} / n passes over the training images, and in joint rows of "
        f"{denoise} images to denoise; a joint step costs more than one of ce"
    )


def figures_of(documents: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of one run, by `METRICS`; NaN and Inf are left out."""
    found: dict[str, float | None] = {}
    if one := documents.get("classify"):
        found |= {"accuracy": 100 * one["accuracy"], "nll": one["nll"]}
    if one := documents.get("calibration"):
        found["ece"] = None if one["ece"] is None else 100 * one["ece"]
    if one := documents.get("robustness-grid"):
        (column,) = one["columns"]
        for radius, accuracy in zip(one["epsilons"], column["accuracy"], strict=True):
            found[f"l2 {radius:g}"] = 100 * accuracy["value"]
    if one := documents.get("denoise"):
        found["psnr"] = one["denoisers"]["unconditional"]["psnr"]["25"]["value"]
    return {name: value for name, value in found.items() if name in METRICS and value is not None}


def efficiency_document(
    scale: str, results: Sequence[VariantResult], total: int, about: Mapping[str, Any]
) -> dict[str, Any]:
    """The JSON document: values by row and seed, their means, and comparisons of objectives.

    Args:
        scale: name of the scale.
        results: one per row.
        total: number of all training images.
        about: `ebmkit.experiments.report.circumstances`, and ``budget``, a sentence on the steps.
    """
    rows = []
    for one in results:
        values = {str(seed): figures_of(found) for seed, found in one.by_seed.items()}
        limit = one.variant.layer.get("dataset", {}).get("limit", total)
        rows.append(
            {
                "name": one.variant.name,
                "objective": objective_of(one.variant),
                "n": min(limit, total),
                "status": one.status,
                "by_seed": values,
                "summary": {
                    m: _summary([v[m] for v in values.values() if m in v]) for m in METRICS
                },
                "facts": one.facts,
            }
        )
    rows.sort(key=lambda row: row["n"])
    return {
        "target": "efficiency",
        "scale": scale,
        **about,
        "theory": [dict(curve) for curve in PAPER],
        "rows": rows,
        "verdicts": _verdicts(rows),
    }


def _summary(values: Sequence[float]) -> dict[str, Any]:
    return {
        "mean": statistics.fmean(values) if values else None,
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "seeds": len(values),
    }


def _verdicts(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Compare the objectives at every n, by the seeds that both have."""
    found = []
    for n in dict.fromkeys(row["n"] for row in rows):
        own = [row for row in rows if row["n"] == n]
        for other, one in itertools.combinations(own, 2):
            for metric, (_, higher_is_better, _) in METRICS.items():
                a, b = (
                    {seed: v[metric] for seed, v in row["by_seed"].items() if metric in v}
                    for row in (one, other)
                )
                if a.keys() & b.keys():
                    names = {"n": n, "objective": one["objective"], "against": other["objective"]}
                    result = paired_test(a, b)
                    result["verdict"] = _verdict(result, higher_is_better)
                    found.append(names | {"metric": metric} | result)
    return found


def paired_test(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, Any]:
    """Mean of a - b over common seeds, with Student's t interval and p, None for one seed.

    If all differences are equal, p is 0, or 1 if they are 0.
    """
    from scipy.stats import ttest_rel

    seeds = [seed for seed in a if seed in b]
    differences = [a[seed] - b[seed] for seed in seeds]
    found: dict[str, Any] = {"difference": statistics.fmean(differences), "seeds": len(seeds)}
    if len(seeds) < 2:
        return found | {"low": None, "high": None, "p": None}
    if math.isclose(min(differences), max(differences), rel_tol=1e-9, abs_tol=1e-12):
        value = differences[0]
        return found | {"low": value, "high": value, "p": float(abs(value) < 1e-12)}
    test = ttest_rel([a[seed] for seed in seeds], [b[seed] for seed in seeds])
    low, high = (finite(float(end)) for end in test.confidence_interval(LEVEL))
    return found | {"low": low, "high": high, "p": float(test.pvalue)}


def _verdict(result: Mapping[str, Any], higher_is_better: bool) -> str:
    if result["p"] is None:
        return "one seed"
    if result["p"] >= 1 - LEVEL:
        return "open"
    return "better" if (result["difference"] > 0) == higher_is_better else "worse"


def efficiency_text(document: Mapping[str, Any]) -> str:
    """`efficiency_document` as Markdown."""
    rows, verdicts = document["rows"], document["verdicts"]
    shown = [m for m in METRICS if any(row["summary"][m]["seeds"] for row in rows)]
    names = ["n", "objective", "seeds", *(METRICS[m].title for m in shown)]
    values = (
        [
            f"{row['n']:,}",
            row["objective"] if row["status"] == "done" else f"{row['objective']}: {row['status']}",
            len(row["by_seed"]) or "",
            *(_cell(row["summary"][m], METRICS[m].form) for m in shown),
        ]
        for row in rows
    )
    pairs: dict[tuple[Any, ...], dict[str, Any]] = {}
    for one in verdicts:
        pairs.setdefault((one["n"], one["objective"], one["against"]), {})[one["metric"]] = one
    comparisons = (
        [f"{n:,}", *both, *(_comparison(found.get(m), METRICS[m].form) for m in shown)]
        for (n, *both), found in pairs.items()
    )
    tests = sum(one["p"] is not None for one in verdicts)
    lines = [
        f"Scale `{document['scale']}`: {document['about']}. Mean ± standard deviation over seeds. "
        "Below all training images, every seed draws its own n images.",
        "",
        *table_lines(names, values, left=2),
    ]
    if pairs:
        lines += [
            "",
            "Which objective is better at each n: difference of the means (objective minus the "
            "other), and its verdict.",
            "",
            *table_lines(["n", "objective", "against", *names[3:]], comparisons, left=3),
            "",
            "*better*, *worse*: the paired t test over seeds has p < 0.05; *open*: it has not; "
            "*one seed*: no test. "
            + (
                f"{tests} tests: about {tests * (1 - LEVEL):.0f} of them would have p < 0.05 by "
                "chance if no objective were better."
                if tests
                else ""
            ),
        ]
    theory = "; ".join(
        f"{curve['title']}: generative {curve['b_gen']:g} + {curve['v_gen']:g}/n, discriminative "
        f"{curve['b_dis']:g} + {curve['v_dis']:g}/n"
        for curve in document["theory"]
    )
    notes = [
        document["budget"],
        "the theory beside it (not measured: constants that CDN assumes in figure 1, in nats): "
        + theory,
        "NLL is the excess error of the theory plus the entropy of labels given images",
        "accuracy at l2: PGD on the first test images, which bounds robustness from above",
    ]
    title = "Sample efficiency: cross-entropy alone against joint training (CDN section 2.1)"
    return text_of(title, lines, [*notes, *document["notes"]])


def _cell(summary: Mapping[str, Any], form: str) -> str:
    if summary["mean"] is None:
        return ""
    spread = "" if summary["sd"] is None else f" ± {form.format(summary['sd'])}"
    return form.format(summary["mean"]) + spread


def _comparison(one: Mapping[str, Any] | None, form: str) -> str:
    return (
        ""
        if one is None
        else f"{form.replace(':', ':+').format(one['difference'])} {one['verdict']}"
    )


# --- plot ----------------------------------------------------------------------------------------


def draw_efficiency(document: Mapping[str, Any], path: Path) -> None:
    """Draw the theory's curves, and each metric against n with standard deviations over seeds."""
    rows = document["rows"]
    panels = [
        ("nll", "NLL (excess error + label entropy)", "nats", True),
        ("accuracy", "Error", "100 - accuracy, %", True),
        ("ece", "Calibration error", "ECE, %", False),
        *((f"l2 {r:g}", f"Under attack, l2 {r:g}", "accuracy, %", False) for r in RADII),
        ("psnr", "Denoising, joint rows", METRICS["psnr"].title, False),
    ]
    panels = [panel for panel in panels if any(row["summary"][panel[0]]["seeds"] for row in rows)]
    theory = document["theory"]
    columns = -(-(len(theory) + len(panels)) // 2)
    figure = new_figure(3.7 * columns, 7.2, layout="constrained")
    axes = [figure.add_subplot(2, columns, k + 1) for k in range(len(theory) + len(panels))]
    for axis, curve in zip(axes, theory, strict=False):
        draw_paper_curves(axis, curve)
        axis.set_title(f"THEORY, not measured: b + v/n\n{curve['title']}", fontsize=9)
        axis.set(xscale="log", yscale="log", ylabel="excess error, nats", facecolor="#f4f4f4")
        axis.legend(frameon=False, fontsize=7.5, loc="upper right")
    for axis, (metric, title, unit, log) in zip(axes[len(theory) :], panels, strict=True):
        _measured(axis, rows, metric, log)
        axis.set_title(title, fontsize=9.5)
        axis.set_ylabel(unit)
    for axis in axes:
        axis.set_xlabel(
            "training images n" if axis in axes[len(theory) :] else "training samples n"
        )
        axis.grid(alpha=0.25, lw=0.5)
        axis.tick_params(which="both", labelsize=8)
        for label in (axis.xaxis.label, axis.yaxis.label):
            label.set_fontsize(8.5)
    seeds = sorted({row["summary"]["accuracy"]["seeds"] for row in rows} - {0})
    count = " to ".join(str(s) for s in dict.fromkeys((seeds[0], seeds[-1]))) if seeds else "0"
    bars = "" if count == "1" else "; bars: standard deviation"
    figure.suptitle(
        f"Sample efficiency, {document['dataset']}, scale {document['scale']}: means over {count} "
        f"seed{'' if count == '1' else 's'}{bars}",
        fontsize=11,
    )
    if panels:
        handles, labels = axes[len(theory)].get_legend_handles_labels()
        place: dict[str, Any] = {"loc": "outside lower center", "ncols": len(OBJECTIVES)}
        figure.legend(handles, labels, frameon=False, fontsize=9, **place)
    save_figure(figure, path)


def _measured(axes: Axes, rows: Sequence[Mapping[str, Any]], metric: str, log: bool) -> None:
    """Panel of ``metric``; of ``accuracy`` the error. Objectives are moved apart a little."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    for k, (objective, style) in enumerate(LOOKS.items()):
        own = [(row["n"], row["summary"][metric]) for row in rows if row["objective"] == objective]
        known = [
            (n, found["mean"], math.nan if found["sd"] is None else found["sd"])
            for n, found in own
            if found["seeds"]
        ]
        places = [n * 1.035 ** (k - 1) for n, _, _ in known]
        means = [100 - mean if metric == "accuracy" else mean for _, mean, _ in known]
        bars = [sd for _, _, sd in known]
        axes.errorbar(places, means, bars, label=objective, ms=4.5, lw=1.4, capsize=2.5, **style)
    sizes = sorted({row["n"] for row in rows})
    axes.set_xscale("log")
    names = [f"{n / 1000:.3g}k" if n >= 1000 else str(n) for n in sizes]
    axes.set_xticks(sizes, names)
    axes.xaxis.set_minor_locator(NullLocator())
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.ticklabel_format(axis="y", useOffset=False)


EFFICIENCY_EXPERIMENT = Experiment(
    "accuracy, calibration and robustness by number of training images, ce against joint training",
    run_efficiency,
    efficiency_text,
    VARIANTS,
)
