"""The tables of "Classification-denoising networks" (CDN): our values and the paper's.

A cell is "ours (the paper's)"; a dash means that the paper has no value. Over several seeds, ours
is the mean with the sample standard deviation. A variant that was not run shows its status. The
report also states for each ordering in the paper whether it holds here, by the paired tests over
seeds and images of `ebmkit.experiments.seeds`; an ordering that they do not resolve is open.

Table 1 has additional rows. Denoisers differ in their knowledge of the noise level (Tweedie's
formula needs sigma, a blind DnCNN does not), so there are rows for GradResNet with its own estimate
of the level and for DRUNet with its published noise map. Other rows are the gradient-step denoisers
that the paper argues against. JEM follows the published recipe at full scale, else it is a small
network with five Langevin steps; it is not trained to denoise, as its PSNR shows.

``claims`` compares each variant of the paper's further claims with the joint model, also at noise
levels above those of training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebmkit.errors import UserError
from ebmkit.evaluation import SIGMAS
from ebmkit.evaluation.suite import number
from ebmkit.experiments.report import (
    Experiment,
    Report,
    VariantResult,
    circumstances,
    mark,
    mean_and_deviation,
    run_grid,
    spread,
    table_lines,
    text_of,
)
from ebmkit.experiments.runs import ExperimentRuns, Protocol, Variant, read_data
from ebmkit.experiments.seeds import compare_rows, p_value, rule
from ebmkit.noise import in_255ths
from ebmkit.plots import BLUE, GRAY, ORANGE, annotate, look, new_figure, save_figure
from ebmkit.registry import find

METRICS: dict[str, str] = {
    "accuracy": "accuracy, %",
    "15": "PSNR at 15/255, dB",
    "25": "PSNR at 25/255, dB",
    "50": "PSNR at 50/255, dB",
    "hours": "training, hours",
}
"""Metrics of a variant with their units, in the order of the paper's columns."""

PSNR = ("15", "25", "50")

SUITES_OF = {
    "classification": ("classify",),
    "denoising": ("denoise",),
    "joint": ("classify", "denoise"),
    "jem": ("classify", "denoise"),
}
"""Evaluation suites of a variant, by its task."""

CLAIM_SIGMAS = tuple(s / 255 for s in (15, 25, 50, 75, 100, 150, 200))
"""Noise levels of ``claims``; the largest of training is 100/255."""


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper.

    Attributes:
        name: name on the command line.
        variants: rows in the paper's order.
        orderings: orderings in the paper, each (better, worse, key of `METRICS`).
    """

    name: str
    title: str
    variants: tuple[Variant, ...]
    orderings: tuple[tuple[str, str, str], ...] = ()

    def variant(self, name: str) -> Variant:
        """The variant called ``name``.

        Raises:
            UserError: if there is none; the message suggests the nearest name.
        """
        return find(f"row of {self.name}", {v.name: v for v in self.variants}, name)


_DATA = read_data("tables.yaml")
ROWS: dict[str, Variant] = {}
"""The variants of all tables, by name."""
for _name, _row in _DATA["rows"].items():
    _row["run"] = ROWS.get(_row.get("run"))
    _figures = zip(("accuracy", *PSNR, "hours"), _row.pop("paper", []), strict=False)
    _row["paper"] = {metric: value for metric, value in _figures if value is not None}
    ROWS[_name] = Variant(_name, **_row)


def _table(
    name: str, title: str, rows: list[str], orderings: Sequence[list[str]] = ()
) -> PaperTable:
    each = tuple((a, b, metric) for a, b, *metrics in orderings for metric in metrics)
    return PaperTable(name, title, tuple(ROWS[row] for row in rows), each)


TABLES = {name: _table(name, **fields) for name, fields in _DATA["tables"].items()}
"""Tables by name, without ``claims``."""
CLAIMS = TABLES.pop("claims")
JOINT, JEM = ROWS["joint"], ROWS["jem"]
GRID = tuple(replace(ROWS[name], label=label) for name, label in _DATA["grid"].items())
"""{plain, scale-keeping norm} x {GELU, ReLU} x {no bias, biases}, for local linearity."""


# --- the reports ---------------------------------------------------------------------------------


def run_table(
    table: PaperTable,
    runs: ExperimentRuns,
    only: Sequence[str] = (),
    sigmas: Sequence[float] = SIGMAS,
    base: Variant | None = None,
) -> Report:
    """Train and evaluate the variants of ``table`` named in ``only`` (empty: all).

    Other variants stay in the report if they are finished. With ``base``, the document has the
    ``differences`` of every other variant to it.

    Raises:
        Interrupted: if training is interrupted; the same call resumes it.
        UserError: if a variant does not exist or equals another one at this scale, or data or
            memory do not suffice. Later failures are listed in ``runs.stopped`` and in the report.
    """
    variants = runs.distinct(table.variants)
    for name in only:
        if table.variant(name) not in variants:
            raise UserError(
                f"row {name!r} of {table.name} has the configuration of another row at scale "
                f"{runs.scale.name}: --show lists the rows and what differs"
            )
    folder = "table" if tuple(sigmas) == SIGMAS else "claims"
    results = run_grid(
        runs,
        variants,
        only,
        lambda v: Protocol(
            folder,
            SUITES_OF[v.task],
            tuple(sigmas),
            runs.scale.images,
            image_values=SUITES_OF[v.task],
        ),
    )
    for one in results:
        if "denoise" in one.documents:
            knows = one.documents["denoise"]["knows_sigma"]
            one.facts["knows_sigma"] = knows[one.variant.reads]
    about = circumstances(runs, table.name, results)
    document = table_document(table, runs.scale.name, results, about)
    if base is not None:
        document["differences"] = _differences(base, results)
    plots = {f"{table.name}.png": partial(compare_with_paper, document)}
    return Report(document, plots)


def figures_of(result: VariantResult) -> dict[str, dict[str, Any]]:
    """Metrics of a variant, by `METRICS`: ``value`` and its spread.

    Of one seed, the spread is the interval over images, ``low`` and ``high``; of several seeds,
    `mean_and_deviation`. Accuracy is in percent, PSNR in dB; each only for variants that were
    trained for it. A value is None if it is NaN or Inf for a seed. Hours are a mean over seeds.
    """
    each = list(figures_by_seed(result).values())
    if len(each) < 2:
        return each[0] if each else {}
    figures: dict[str, dict[str, Any]] = {}
    for metric in each[0]:
        values = [one.get(metric, {"value": None})["value"] for one in each]
        if None in values:
            figures[metric] = {"value": None}
            continue
        found = mean_and_deviation(values)
        figures[metric] = {"value": found["value"]} if metric == "hours" else found
    return figures


def figures_by_seed(result: VariantResult) -> dict[int, dict[str, dict[str, Any]]]:
    """The figures of each finished seed, with intervals over images."""
    return {
        seed: _figures_of_run(result.variant, documents, result.facts_by_seed.get(seed, {}))
        for seed, documents in result.by_seed.items()
    }


def _figures_of_run(
    variant: Variant, documents: Mapping[str, dict[str, Any]], facts: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    figures: dict[str, dict[str, Any]] = {}
    if "classify" in documents and variant.task != "denoising":
        found = documents["classify"]
        values = (found["accuracy"], *found["accuracy_interval"])
        figures["accuracy"] = {
            key: 100 * v for key, v in zip(("value", "low", "high"), values, strict=True)
        }
    if "denoise" in documents and variant.task != "classification":
        for level, estimate in documents["denoise"]["denoisers"][variant.reads]["psnr"].items():
            figures[level] = {key: estimate[key] for key in ("value", "low", "high")}
    seconds = facts.get("seconds")
    if seconds is not None and variant.run is None:
        figures["hours"] = {"value": seconds / 3600}
    return figures


def table_document(
    table: PaperTable, scale: str, results: Sequence[VariantResult], about: Mapping[str, Any]
) -> dict[str, Any]:
    """The JSON document of ``table``."""
    heading, data = table.title, about["dataset"]
    if scale != "full" and data and data not in heading.lower().replace("-", ""):
        heading = f"{heading}, here on {data}"
    rows: list[dict[str, Any]] = [
        {
            "name": one.variant.name,
            "label": one.variant.label,
            "task": one.variant.shown_task,
            "status": one.status,
            "seeds": list(one.by_seed),
            "missing_seeds": {str(seed): reason for seed, reason in one.missing.items()},
            "knows_sigma": one.facts.get("knows_sigma"),
            "recipe": one.facts.get("recipe"),
            "differences": one.facts.get("differences"),
            "ours": figures_of(one),
            "paper": dict(one.variant.paper),
            "facts": one.facts,
        }
        for one in results
    ]
    by_name = {one.variant.name: one for one in results}
    orderings = [] if scale == "smoke" else [_ordering(*o, by_name) for o in table.orderings]
    return {
        "table": table.name,
        "title": table.title,
        "heading": heading,
        "scale": scale,
        **about,
        "rows": rows,
        "orderings": [one for one in orderings if one is not None],
    }


def _ordering(
    better: str, worse: str, metric: str, results: Mapping[str, VariantResult]
) -> dict[str, Any] | None:
    """Compare an ordering in the paper with our values; None if a value is missing."""
    if not {better, worse} <= results.keys():
        return None
    a, b = results[better], results[worse]
    found = difference(a, b, metric)
    if found is None:
        return None
    paper = a.variant.paper[metric] - b.variant.paper[metric]
    return {"better": better, "worse": worse, "metric": metric, "paper": paper, **found}


def _differences(base: Variant, results: Sequence[VariantResult]) -> list[dict[str, Any]]:
    """`difference` of every variant to ``base``, in each metric but the hours."""
    (own,) = (one for one in results if one.variant.name == base.name)
    found = [
        {"row": one.variant.name, "metric": metric, **(difference(one, own, metric) or {})}
        for one in results
        for metric in figures_of(one)
        if one is not own and metric != "hours"
    ]
    return [one for one in found if "ours" in one]


def difference(a: VariantResult, b: VariantResult, metric: str) -> dict[str, Any] | None:
    """`compare_rows` of two variants; None if a value is missing, NaN or Inf."""
    rows = []
    for one in (a, b):
        means = {
            s: own[metric]["value"] for s, own in figures_by_seed(one).items() if metric in own
        }
        if None in means.values():
            return None
        rows.append({seed: _by_image(one, metric, seed, mean) for seed, mean in means.items()})
    return compare_rows(*rows)


def _by_image(result: VariantResult, metric: str, seed: int, mean: float) -> NDArray[np.float64]:
    """Values by image (N,) behind a figure of `figures_by_seed`, or ``mean`` (1,) without them."""
    suite, column = "denoise", f"{result.variant.reads}/{metric}"
    if metric == "accuracy":
        suite, column = "classify", "right/0"
    values = result.image_values.get(seed, {}).get(suite, {}).get(column)
    if values is None:
        return np.array([mean])
    return values.double().numpy() * (100 if metric == "accuracy" else 1)


def result_table(report: Mapping[str, Any]) -> list[str]:
    """The rows of `table_document` as a Markdown table."""
    shown = [m for m in METRICS if any(m in {**r["ours"], **r["paper"]} for r in report["rows"])]
    rows = (
        [
            row["task"],
            _label(row),
            row["knows_sigma"] or "",
            *(_ours_and_paper(metric, row) for metric in shown),
        ]
        for row in report["rows"]
    )
    return table_lines(["task", "network", "sigma", *(METRICS[m] for m in shown)], rows, left=3)


def table_text(report: Mapping[str, Any]) -> str:
    """`table_document` as Markdown."""
    seeds = max((len(row["seeds"]) for row in report["rows"]), default=0)
    ours = "ours" if seeds < 2 else f"ours, mean ± standard deviation over {seeds} seeds"
    lines = [
        f"Scale `{report['scale']}`: {report['about']}. Each cell: {ours} (the paper's).",
        "",
        *result_table(report),
        "",
        "Column sigma: which noise level the denoiser uses.",
    ]
    if report["orderings"]:
        lines += [
            "",
            "Orderings of the paper (difference, ours and the paper's):",
            "",
            *table_lines(
                ["better", "worse", "figure", "ours", "paper", "p", "verdict"],
                (
                    [
                        *(one["better"], one["worse"], METRICS[one["metric"]]),
                        *(f"{one['ours']:+.2f}", f"{one['paper']:+.2f}"),
                        *(p_value(one), one["verdict"]),
                    ]
                    for one in report["orderings"]
                ),
                left=3,
            ),
        ]
        lines += ["", rule(report["orderings"])]
    return text_of(report["heading"], lines, report["notes"])


def _label(row: Mapping[str, Any]) -> str:
    if row["status"] != "done":
        return f"{row['label']}: {row['status']}"
    return f"{row['label']}{_some_seeds(row)}"


def _some_seeds(row: Mapping[str, Any]) -> str:
    """How many seeds are finished, if not all."""
    done, missing = len(row["seeds"]), len(row["missing_seeds"])
    return f", {done} of {done + missing} seeds" if missing else ""


def _ours_and_paper(metric: str, row: Mapping[str, Any]) -> str:
    ours, paper = row["ours"].get(metric), row["paper"].get(metric)
    if ours is None and paper is None:
        return ""
    value = None if ours is None else ours["value"]
    if metric == "hours":
        form = "{:.2f}" if value is None or value >= 0.095 else "{:.4f}"
        return f"{number(value, form)} ({number(paper, '{:g}')})"
    form = "{:.1f}" if metric == "accuracy" else "{:.2f}"
    return f"{spread(ours, form)} ({number(paper, form)})"


def run_claims(runs: ExperimentRuns, only: Sequence[str]) -> Report:
    """The further claims: a table with differences to the joint model and more noise levels."""
    report = run_table(CLAIMS, runs, only, CLAIM_SIGMAS, base=JOINT)
    plots = dict(report.plots)
    plots["claims-beyond.png"] = partial(beyond_training, report.document)
    return Report(report.document, plots)


def claims_text(report: Mapping[str, Any]) -> str:
    """`table_text`, differences to the joint network, and PSNR at every noise level."""
    rows = {row["name"]: row for row in report["rows"]}
    done = [row for row in rows.values() if row["status"] == "done"]
    levels = [in_255ths(s) for s in CLAIM_SIGMAS]
    found = {(one["row"], one["metric"]): one for one in report["differences"]}
    differences = (
        [_label(row), *(_difference(found.get((row["name"], m))) for m in ("accuracy", *PSNR))]
        for row in done
        if row["name"] != JOINT.name
    )
    values = ([_label(row), *(spread(row["ours"][s], "{:.2f}") for s in levels)] for row in done)
    names = ["variant", "accuracy, %", "PSNR at 15/255", "at 25/255", "at 50/255"]
    lines = [
        table_text(report),
        "Each variant minus the joint network, with the p value in brackets; *: not open (the "
        "paper found no difference for ce+cdsm and ce+dsm+cdsm):",
        "",
        *table_lines(names, differences),
        "",
        *([rule(report["differences"]), ""] if report["differences"] else []),
        "PSNR in dB by noise level, in 255ths; the denoising stream ends at 100:",
        "",
        *table_lines(["network", *levels], values),
    ]
    return "\n".join(lines) + "\n"


def _difference(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    mark_of = "" if found["verdict"].startswith("open") else " *"
    return f"{found['ours']:+.2f} ({p_value(found)}){mark_of}"


# --- plots ---------------------------------------------------------------------------------------


def compare_with_paper(report: dict[str, Any], path: Path) -> None:
    """Plot each row of `table_document`: our value (dot) and its spread, the paper's (cross).

    The spread is the standard deviation over seeds, of one seed the 95 % interval over images.
    """
    rows = report["rows"]
    panels = {
        metric: title
        for metric, title in METRICS.items()
        if metric != "hours" and any(metric in {**row["ours"], **row["paper"]} for row in rows)
    }
    figure = new_figure(2.9 * len(panels) + 2.6, 0.34 * len(rows) + 1.5, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    names = [
        f"{row['label']} ({row['task']})"
        + (_some_seeds(row) if row["status"] == "done" else ", " + row["status"].partition(":")[0])
        for row in rows
    ]
    for axis, (metric, title) in zip(axes, panels.items(), strict=True):
        for place, row in enumerate(rows):
            mark(axis, place, row["paper"].get(metric), "x", ORANGE, 6)
            mark(axis, place, row["ours"].get(metric), size=5)
        axis.set_xlabel(title, fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", color=GRAY, alpha=0.3, linewidth=0.5)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].set_yticks(range(len(rows)), names)
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    several = any("sd" in one for row in rows for one in row["ours"].values())
    bars = "standard deviation over seeds" if several else "95 % interval over images"
    ours = f"ours, scale {report['scale']}; line: {bars}"
    axes[0].plot([], [], "o", color=BLUE, markersize=5, label=ours)
    axes[0].plot([], [], "x", color=ORANGE, markersize=6, label="the paper")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8
    )
    figure.suptitle(report["heading"], fontsize=10)
    save_figure(figure, path)


def beyond_training(report: dict[str, Any], path: Path, trained: float = 100.0) -> None:
    """Plot PSNR by noise level, a line per row; ``trained``: largest training noise, in 255ths."""
    figure = new_figure(7.6, 4.2, layout="constrained")
    axes = figure.subplots()
    done = [row for row in report["rows"] if row["status"] == "done"]
    for number_of_row, row in enumerate(done):
        levels = sorted(int(key) for key in row["ours"] if key.isdigit())
        values = [row["ours"][str(level)]["value"] for level in levels]
        axes.plot(levels, values, ms=4, lw=1.2, label=row["label"], **look(number_of_row))
    axes.axvline(trained, color=GRAY, linestyle=":", linewidth=1)
    ends: dict[str, Any] = {"xytext": (3, -9), "textcoords": "offset points", "fontsize": 7.5}
    axes.annotate("training ends", (trained, 1), xycoords=("data", "axes fraction"), **ends)
    title = "Denoising beyond the noise of training"
    annotate(axes, title, "noise level sigma, in 255ths", "PSNR, dB")
    figure.legend(loc="outside right upper", fontsize=7.5)
    save_figure(figure, path)


TABLE_EXPERIMENTS: dict[str, Experiment] = {
    name: Experiment(table.title, partial(run_table, table), table_text, table.variants)
    for name, table in TABLES.items()
}
CLAIMS_EXPERIMENT = Experiment(CLAIMS.title, run_claims, claims_text, CLAIMS.variants)
