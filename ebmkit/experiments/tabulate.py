"""Tables: train what is missing, measure, report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ebmkit.errors import UserError
from ebmkit.evaluation import SIGMAS
from ebmkit.experiments.keeping import Protocol
from ebmkit.experiments.report import Found, document, figures_of, write
from ebmkit.experiments.rows import Row, Table
from ebmkit.experiments.runs import Rows

__all__ = ["circumstances", "measured", "run_table", "table_report"]

SUITES_OF = {
    "classification": ("classify",),
    "denoising": ("denoise",),
    "joint": ("classify", "denoise"),
}
"""What a row is measured by, by its task."""


def run_table(
    table: Table, rows: Rows, only: Sequence[str] = (), sigmas: Sequence[float] = SIGMAS
) -> list[Path]:
    """Train and measure the rows of ``table`` that are ``only``, all if empty; write the report.

    Rows that are left out now but were finished before stay in the report.

    Raises:
        Interrupted: if training was; calling again goes on.
        UserError: if a row does not exist, has no objective yet, or does not suit this machine.
            One that stops later is named in ``rows.stopped`` and in the report.
    """
    return write(table_report(table, rows, only, sigmas), rows.out)


def table_report(
    table: Table, rows: Rows, only: Sequence[str] = (), sigmas: Sequence[float] = SIGMAS
) -> dict[str, Any]:
    """What `run_table` writes."""
    chosen = [table.row(name) for name in only] or list(table.rows)
    if only and all(row.missing is not None for row in chosen):
        raise UserError(f"row {only[0]} cannot be trained: {chosen[0].missing}")
    runs = {table.own(row).name: table.own(row) for row in chosen if row.missing is None}
    rows.check(list(runs.values()), table.family)
    for row in runs.values():
        rows.try_measure(row, table.family, _protocol(row, rows, sigmas))
    found = [_found(table, row, rows, sigmas) for row in table.rows]
    return document(table, rows.scale.name, found, circumstances(rows, table.name, found))


def _protocol(row: Row, rows: Rows, sigmas: Sequence[float]) -> Protocol:
    name = "table" if tuple(sigmas) == SIGMAS else "claims"
    return Protocol(name, SUITES_OF[row.task], tuple(sigmas), rows.scale.images)


def _found(table: Table, row: Row, rows: Rows, sigmas: Sequence[float]) -> Found:
    if row.missing is not None:
        return Found(row, {}, {}, row.missing)
    own = table.own(row)
    protocol = _protocol(own, rows, sigmas)
    if not rows.finished(own, table.family, protocol):
        reason = rows.why_stopped(own)
        return Found(row, {}, {}, f"stopped: {reason}" if reason else "not run yet")
    documents = rows.measure(own, table.family, protocol)
    facts = rows.facts(own, table.family)
    if "denoise" in documents:
        facts["knows_sigma"] = documents["denoise"]["knows_sigma"][row.reads]
    facts |= measured(documents.values())
    return Found(row, figures_of(row, documents, facts["seconds"]), facts)


def measured(documents: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Which images were measured, and by which code."""
    found = list(documents)
    return {
        "data": [data_of(document) for document in found],
        "measured_by": [document["environment"]["git_commit"] for document in found],
    }


def data_of(document: dict[str, Any]) -> str:
    """Which images a suite measured, in words."""
    some = document["images"], document["of"]
    count = f"all {some[1]:,}" if some[0] == some[1] else f"the first {some[0]:,} of {some[1]:,}"
    return f"{document['dataset']}, {count} test images ({document['suite']})"


def circumstances(rows: Rows, target: str, found: Sequence[Found]) -> dict[str, Any]:
    """What stands below a table or figure: data, hardware, versions, commits, command."""
    ran = [one for one in found if one.status == "done"]
    done = [one.facts | {"task": one.row.task} for one in ran]
    command = rows.command(target)
    notes = [f"command: `{command}`"]
    dataset = next((f["data"][0].split(",")[0] for f in done), "")
    if done:
        owned = [(f, one) for f, one in zip(done, ran, strict=True) if one.row.run is None]
        facts = {
            "data": [line for f in done for line in f["data"]],
            "hardware": [f["gpu"] or f"CPU, {f['threads']} of {f['cores']} cores" for f in done],
            "steps": [f"{f['steps']:,}" for f in done],
            "parameters": [f"{f['parameters']:,} ({one.row.name})" for f, one in owned],
            "initial learning rate": [f"{f['lr']:g} ({f['task']})" for f, _ in owned],
            "hours of training": [f"{_hours(f)} ({one.row.name})" for f, one in owned],
            "precision of training": [f["precision"] for f in done],
            "seed, one run per row": [str(f["seed"]) for f in done],
            "PyTorch": [f["torch"] for f in done],
            "commit of training": [str(f["git_commit"]) for f in done],
            "commit of measuring": [str(commit) for f in done for commit in f["measured_by"]],
        }
        notes += [f"{name}: {', '.join(dict.fromkeys(values))}" for name, values in facts.items()]
        notes.append("hours are wall clock, validation and checkpoints included")
    if rows.scale.name == "smoke":
        notes.append("little is learnt in so few steps: this scale shows that every row runs")
    return {
        "about": rows.scale.description,
        "dataset": dataset,
        "notes": notes,
        "command": command,
    }


def _hours(facts: dict[str, Any]) -> str:
    seconds = facts["seconds"]
    return "-" if seconds is None else f"{seconds / 3600:.2g}"
