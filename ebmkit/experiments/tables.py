"""The tables of "Classification-denoising networks" (CDN): our values and the paper's.

A cell is "ours (the paper's)"; a dash means that the paper has no value. A variant that was not run
shows its status. The report also states for each ordering in the paper whether it holds here. An
ordering is open if the 95 % intervals of the two accuracies overlap, or the PSNRs are within 0.1
dB: all values are from one seed.

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

from ebmkit.errors import UserError
from ebmkit.evaluation import SIGMAS
from ebmkit.evaluation.suite import number
from ebmkit.experiments.report import (
    Experiment,
    Report,
    VariantResult,
    circumstances,
    mark,
    run_grid,
    table_lines,
    text_of,
)
from ebmkit.experiments.runs import ExperimentRuns, Protocol, Variant, read_data
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

CLOSE = 0.1
"""Largest difference of PSNRs, in dB, that is open: one seed cannot distinguish them."""

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
) -> Report:
    """Train and evaluate the variants of ``table`` named in ``only`` (empty: all).

    Other variants stay in the report if they are finished.

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
        lambda v: Protocol(folder, SUITES_OF[v.task], tuple(sigmas), runs.scale.images),
    )
    for one in results:
        if "denoise" in one.documents:
            knows = one.documents["denoise"]["knows_sigma"]
            one.facts["knows_sigma"] = knows[one.variant.reads]
    about = circumstances(runs, table.name, results)
    document = table_document(table, runs.scale.name, results, about)
    plots = {f"{table.name}.png": partial(compare_with_paper, document)}
    return Report(document, table_text(document), plots)


def figures_of(result: VariantResult) -> dict[str, dict[str, float]]:
    """Metrics of a variant, by `METRICS`, with ``low`` and ``high`` if there is an interval.

    Accuracy is in percent, PSNR in dB; each only for variants that were trained for it.
    """
    variant, documents, figures = result.variant, result.documents, {}
    if "classify" in documents and variant.task != "denoising":
        found = documents["classify"]
        values = (found["accuracy"], *found["accuracy_interval"])
        figures["accuracy"] = {
            key: 100 * v for key, v in zip(("value", "low", "high"), values, strict=True)
        }
    if "denoise" in documents and variant.task != "classification":
        for level, estimate in documents["denoise"]["denoisers"][variant.reads]["psnr"].items():
            figures[level] = {key: estimate[key] for key in ("value", "low", "high")}
    seconds = result.facts.get("seconds")
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
            "task": "joint" if one.variant.task == "jem" else one.variant.task,
            "status": one.status,
            "knows_sigma": one.facts.get("knows_sigma"),
            "recipe": one.facts.get("recipe"),
            "differences": one.facts.get("differences"),
            "ours": figures_of(one),
            "paper": dict(one.variant.paper),
            "facts": one.facts,
        }
        for one in results
    ]
    by_name = {row["name"]: row for row in rows}
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
    better: str, worse: str, metric: str, rows: Mapping[str, dict[str, Any]]
) -> dict[str, Any] | None:
    """Compare an ordering in the paper with our values; None if a value is missing."""
    pair = [rows[name] for name in (better, worse) if name in rows]
    figures = [row["ours"].get(metric, {"value": None}) for row in pair]
    if len(pair) < 2 or any(one["value"] is None for one in figures):
        return None
    a, b = figures
    gap = a["value"] - b["value"]
    return {
        **{"better": better, "worse": worse, "metric": metric},
        "paper": pair[0]["paper"][metric] - pair[1]["paper"][metric],
        "ours": gap,
        "verdict": "open" if _is_open(a, b, metric) else "holds" if gap > 0 else "reversed",
    }


def _is_open(a: Mapping[str, float], b: Mapping[str, float], metric: str) -> bool:
    """Whether two values are too close to be distinguished by one seed."""
    if metric == "accuracy":
        return a["low"] <= b["high"] and b["low"] <= a["high"]
    return abs(a["value"] - b["value"]) <= CLOSE


def table_text(report: Mapping[str, Any]) -> str:
    """`table_document` as Markdown."""
    shown = [m for m in METRICS if any(m in {**r["ours"], **r["paper"]} for r in report["rows"])]
    rows = [
        [
            row["task"],
            row["label"] if row["status"] == "done" else f"{row['label']}: {row['status']}",
            row["knows_sigma"] or "",
            *(_ours_and_paper(metric, row) for metric in shown),
        ]
        for row in report["rows"]
    ]
    lines = [
        f"Scale `{report['scale']}`: {report['about']}. Each cell: ours (the paper's).",
        "",
        *table_lines(["task", "network", "sigma", *(METRICS[m] for m in shown)], rows, left=3),
        "",
        "Column sigma: which noise level the denoiser uses.",
    ]
    if report["orderings"]:
        lines += [
            "",
            "Orderings of the paper (difference, ours and the paper's):",
            "",
            *table_lines(
                ["better", "worse", "figure", "ours", "paper", "verdict"],
                (
                    [
                        *(one["better"], one["worse"], METRICS[one["metric"]]),
                        *(f"{one['ours']:+.2f}", f"{one['paper']:+.2f}", one["verdict"]),
                    ]
                    for one in report["orderings"]
                ),
                left=3,
            ),
        ]
        rule = "*open*: the 95 % intervals of accuracies overlap, or PSNRs are within"
        lines += ["", f"One seed. {rule} {CLOSE} dB."]
    return text_of(report["heading"], lines, report["notes"])


def _ours_and_paper(metric: str, row: Mapping[str, Any]) -> str:
    ours, paper = row["ours"].get(metric), row["paper"].get(metric)
    if ours is None and paper is None:
        return ""
    value = None if ours is None else ours["value"]
    if metric == "hours":
        form = "{:.2f}" if value is None or value >= 0.095 else "{:.4f}"
        return f"{number(value, form)} ({number(paper, '{:g}')})"
    form = "{:.1f}" if metric == "accuracy" else "{:.2f}"
    return f"{number(value, form)} ({number(paper, form)})"


def run_claims(runs: ExperimentRuns, only: Sequence[str]) -> Report:
    """The further claims: a table with differences to the joint model and more noise levels."""
    report = run_table(CLAIMS, runs, only, CLAIM_SIGMAS)
    plots = dict(report.plots)
    plots["claims-beyond.png"] = partial(beyond_training, report.document)
    return Report(report.document, claims_text(report.document), plots)


def claims_text(report: Mapping[str, Any]) -> str:
    """`table_text`, differences to the joint network, and PSNR at every noise level."""
    rows = {row["name"]: row for row in report["rows"]}
    done = [row for row in rows.values() if row["status"] == "done"]
    base = rows[JOINT.name]["ours"]
    levels = [in_255ths(s) for s in CLAIM_SIGMAS]
    differences = (
        [row["label"], *(_difference(row["ours"], base, m) for m in ("accuracy", *PSNR))]
        for row in done
        if base and row["name"] != JOINT.name
    )
    values = (
        [row["label"], *(number(row["ours"][s]["value"], "{:.2f}") for s in levels)] for row in done
    )
    names = ["variant", "accuracy, %", "PSNR at 15/255", "at 25/255", "at 50/255"]
    lines = [
        table_text(report),
        "Each variant minus the joint network (*: not open by the rule for orderings, one seed; "
        "the paper found no difference for ce+cdsm and ce+dsm+cdsm):",
        "",
        *table_lines(names, differences),
        "",
        "PSNR in dB by noise level, in 255ths; the denoising stream ends at 100:",
        "",
        *table_lines(["network", *levels], values),
    ]
    return "\n".join(lines) + "\n"


def _difference(ours: Mapping[str, Any], base: Mapping[str, Any], metric: str) -> str:
    a, b = ours[metric], base[metric]
    if a["value"] is None or b["value"] is None:
        return "NaN or Inf"
    return f"{a['value'] - b['value']:+.2f}{'' if _is_open(a, b, metric) else ' *'}"


# --- plots ---------------------------------------------------------------------------------------


def compare_with_paper(report: dict[str, Any], path: Path) -> None:
    """Plot each row of `table_document`: our value (dot, 95 % interval), the paper's (cross)."""
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
        + ("" if row["status"] == "done" else ", " + row["status"].partition(":")[0])
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
    axes[0].plot([], [], "o", color=BLUE, markersize=5, label=f"ours, scale {report['scale']}")
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
    name: Experiment(table.title, partial(run_table, table), table.variants)
    for name, table in TABLES.items()
}
CLAIMS_EXPERIMENT = Experiment(CLAIMS.title, run_claims, CLAIMS.variants)
