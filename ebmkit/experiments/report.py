"""Reports: what was found beside what the paper prints, as Markdown, JSON and a figure.

A cell is "ours (the paper's)"; a dash stands where the paper has no figure, and where a row did not
run its cells say so. Below come the circumstances, and each ordering that the paper reports with
whether ours has it. An ordering is called open where the 95 % intervals of the two accuracies
overlap, or the PSNRs are within 0.1 dB: all is from one seed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebmkit.experiments.rows import METRICS, Expectation, Row, Table
from ebmkit.storage import write_atomically

__all__ = ["Found", "document", "figures_of", "is_open", "markdown", "write"]

CLOSE = 0.1
"""PSNRs that are no further apart, in dB, are called open: one seed cannot tell them apart."""


@dataclass(frozen=True)
class Found:
    """What is known of a row.

    Attributes:
        row: which.
        ours: figures by `METRICS`, with ``low`` and ``high`` where there is an interval.
        facts: how it was trained and measured; empty if it did not run.
        status: done, or why not.
    """

    row: Row
    ours: dict[str, dict[str, float]]
    facts: dict[str, Any]
    status: str = "done"


def figures_of(row: Row, documents: dict[str, Any], seconds: float | None) -> dict[str, Any]:
    """The figures of ``row`` from the documents of the suites ``classify`` and ``denoise``.

    Accuracies in percent, PSNR in dB; PSNR only of rows that were trained to denoise.
    """
    ours: dict[str, dict[str, float]] = {}
    if "classify" in documents and row.task != "denoising":
        found = documents["classify"]
        low, high = found["accuracy_interval"]
        ours["accuracy"] = {
            "value": 100 * found["accuracy"],
            "low": 100 * low,
            "high": 100 * high,
        }
    if "denoise" in documents and row.task != "classification":
        for level, estimate in documents["denoise"]["denoisers"][row.reads]["psnr"].items():
            ours[level] = {key: estimate[key] for key in ("value", "low", "high")}
    if seconds is not None and row.run is None:
        ours["hours"] = {"value": seconds / 3600}
    return ours


def document(
    table: Table, scale: str, found: Sequence[Found], circumstances: dict[str, Any]
) -> dict[str, Any]:
    """Everything about ``table``, as JSON has it."""
    by_name = {one.row.name: one for one in found}
    return {
        "table": table.name,
        "title": table.title,
        "heading": _heading(table, scale, circumstances["dataset"]),
        "scale": scale,
        **circumstances,
        "rows": [
            {
                "name": one.row.name,
                "label": one.row.label,
                "task": one.row.task,
                "status": one.status,
                "knows_sigma": one.facts.get("knows_sigma"),
                "ours": one.ours,
                "paper": dict(one.row.paper),
                "facts": one.facts,
            }
            for one in found
        ],
        "orderings": [
            ordering
            for expected in table.expected
            if (ordering := _ordering(expected, by_name)) is not None and scale != "smoke"
        ],
    }


def _ordering(expected: Expectation, found: dict[str, Found]) -> dict[str, Any] | None:
    """How ours stand in an ordering of the paper; None where a figure is missing."""
    better, worse = found.get(expected.better), found.get(expected.worse)
    metric = expected.metric
    if better is None or worse is None or metric not in better.ours or metric not in worse.ours:
        return None
    a, b = better.ours[metric], worse.ours[metric]
    if a["value"] is None or b["value"] is None:  # one of them diverged
        return None
    gap = a["value"] - b["value"]
    return {
        "better": better.row.name,
        "worse": worse.row.name,
        "metric": metric,
        "paper": better.row.paper[metric] - worse.row.paper[metric],
        "ours": gap,
        "verdict": "open" if is_open(a, b, metric) else "holds" if gap > 0 else "reversed",
    }


def is_open(a: dict[str, float], b: dict[str, float], metric: str) -> bool:
    """Whether two figures are too close to be told apart by one seed."""
    if metric == "accuracy":
        return a["low"] <= b["high"] and b["low"] <= a["high"]
    return abs(a["value"] - b["value"]) <= CLOSE


def markdown(report: dict[str, Any]) -> str:
    """``report`` as Markdown."""
    shown = [m for m in METRICS if any(m in {**r["ours"], **r["paper"]} for r in report["rows"])]
    heads = ["task", "network", "sigma", *(METRICS[m] for m in shown)]
    lines = [
        f"## {report['heading']}",
        "",
        f"Scale `{report['scale']}`: {report['description']}. Each cell: ours (the paper's).",
        "",
        _line(heads),
        _line(["---"] * 3 + ["---:"] * len(shown)),
    ]
    for row in report["rows"]:
        label = row["label"] if row["status"] == "done" else f"{row['label']}: {row['status']}"
        known = row["knows_sigma"] or ""
        cells = [_cell(metric, row) for metric in shown]
        lines.append(_line([row["task"], label, known, *cells]))
    lines += ["", "Column sigma: what the denoiser is told of the noise level.", ""]
    if report["orderings"]:
        lines += [
            "Orderings of the paper (difference, ours and the paper's):",
            "",
            _line(["better", "worse", "figure", "ours", "paper", "here it"]),
            _line(["---", "---", "---", "---:", "---:", "---"]),
        ]
        for o in report["orderings"]:
            numbers = [f"{o[who]:+.2f}" for who in ("ours", "paper")]
            verdict = {"open": "is open"}.get(
                o["verdict"], o["verdict"].replace("reversed", "is reversed")
            )
            lines.append(_line([o["better"], o["worse"], METRICS[o["metric"]], *numbers, verdict]))
        rule = "*open*: the 95 % intervals of accuracies overlap, or PSNRs are within"
        lines += ["", f"One seed. {rule} {CLOSE} dB.", ""]
    lines += [f"- {sentence}" for sentence in report["notes"]]
    return "\n".join(lines) + "\n"


def _heading(table: Table, scale: str, data: str) -> str:
    """The title of ``table``, which names the data where they are not what it promises."""
    if scale == "full" or not data or data in table.title.lower().replace("-", ""):
        return table.title
    return f"{table.title}, here on {data}"


def _cell(metric: str, row: dict[str, Any]) -> str:
    ours, paper = row["ours"].get(metric), row["paper"].get(metric)
    if ours is None and paper is None:
        return ""
    if ours is not None and ours["value"] is None:
        ours = None
    form = "{:.1f}" if metric == "accuracy" else "{:.2f}"
    hours = metric == "hours"
    mine = "-" if ours is None else _hours(ours["value"]) if hours else form.format(ours["value"])
    theirs = "-" if paper is None else f"{paper:g}" if hours else form.format(paper)
    return f"{mine} ({theirs})"


def _hours(value: float) -> str:
    return f"{value:.2f}" if value >= 0.095 else f"{value:.4f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def write(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``TABLE.md``, ``TABLE.json`` and ``TABLE.png`` into ``folder``; their paths."""
    from ebmkit.plots.experiments import compare_with_paper

    paths = [folder / f"{report['table']}.{suffix}" for suffix in ("md", "json", "png")]
    write_atomically(paths[0], markdown(report).encode())
    write_atomically(paths[1], json.dumps(report, indent=2, allow_nan=False).encode())
    compare_with_paper(report, paths[2])
    return paths
