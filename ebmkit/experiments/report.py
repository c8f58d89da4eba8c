"""Experiments: train and evaluate a grid of variants, and write the report.

An experiment is a title, its grid, and a function from the runs to a `Report`: a JSON document,
its text in Markdown, and plots. Every report states command, data, hardware, versions and commits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ebmkit.experiments.runs import ExperimentRuns, Protocol, Variant
from ebmkit.plots import BLUE
from ebmkit.storage import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Report(NamedTuple):
    """Results of an experiment."""

    document: dict[str, Any]  # content of the JSON file
    text: str  # content of the Markdown file
    plots: Mapping[str, Callable[[Path], None]] = {}  # drawing functions by file name
    copies: Mapping[str, Path] = {}  # plots of evaluation suites to copy, by file name


class Experiment(NamedTuple):
    """A table or figure; ``run`` trains, evaluates and reports the named variants (none: all)."""

    title: str
    run: Callable[[ExperimentRuns, Sequence[str]], Report]
    variants: tuple[Variant, ...] = ()  # its grid; empty if nothing is trained


@dataclass(frozen=True)
class VariantResult:
    """Results of a variant; documents and facts are empty if it is not finished."""

    variant: Variant
    documents: dict[str, dict[str, Any]] = field(default_factory=dict)  # by suite
    facts: dict[str, Any] = field(default_factory=dict)  # of training and evaluation
    status: str = "done"  # or the reason why it is not done


def run_grid(
    runs: ExperimentRuns,
    variants: Sequence[Variant],
    only: Sequence[str],
    protocol: Callable[[Variant], Protocol | None],
) -> list[VariantResult]:
    """Train and evaluate the variants named in ``only`` (empty: all); return results of every one.

    ``protocol`` returns the evaluation protocol of a variant; None: it is only trained. Other
    processes may run the same grid at the same time: this function returns when all of it is done.

    Raises:
        Interrupted: if training is interrupted; the same call resumes it.
        UserError: if data or memory do not suffice for a variant. Later failures are listed
            in ``runs.stopped`` and in the report.
    """
    chosen = [v.run or v for v in variants if not only or v.name in only]
    owners = {own.folder: own for own in chosen}
    runs.check(list(owners.values()))
    runs.share((own.name, partial(runs.try_run, own, protocol(own))) for own in owners.values())
    return [_result(runs, variant, protocol(variant.run or variant)) for variant in variants]


def _result(runs: ExperimentRuns, variant: Variant, protocol: Protocol | None) -> VariantResult:
    own = variant.run or variant
    documents = runs.measured(own, protocol)
    if documents is None:
        reason = runs.stop_reason(own)
        return VariantResult(variant, status=f"stopped: {reason}" if reason else "not run yet")
    return VariantResult(variant, documents, runs.facts(own) | measured_facts(documents.values()))


def measured_facts(documents: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The evaluated images, and the commits of evaluation."""
    found, data = list(documents), []
    for one in found:
        some, of = one["images"], one["of"]
        count = f"all {of:,}" if some == of else f"the first {some:,} of {of:,}"
        data.append(f"{one['dataset']}, {count} test images ({one['suite']})")
    return {"data": data, "measured_by": [one["environment"]["git_commit"] for one in found]}


def circumstances(
    runs: ExperimentRuns, target: str, results: Sequence[VariantResult]
) -> dict[str, Any]:
    """Notes below a table or figure: command, data, hardware, versions, commits."""
    ran = [one for one in results if one.status == "done"]
    facts = [one.facts for one in ran]
    owned = [(one.variant, one.facts) for one in ran if one.variant.run is None]
    command = runs.command(target)
    notes = [f"command: `{command}`"]
    if ran:
        columns = {
            "data": [data for f in facts for data in f["data"]],
            "hardware": [f["gpu"] or f"CPU, {f['threads']} of {f['cores']} cores" for f in facts],
            "recipe (differences by row: --show)": [f["recipe"] for f in facts],
            "steps": [f"{f['steps']:,}" for f in facts],
            "parameters": [f"{f['parameters']:,} ({v.name})" for v, f in owned],
            "initial learning rate": [f"{f['lr']:g} ({v.task})" for v, f in owned],
            "hours of training": [
                f"{'-' if f['seconds'] is None else format(f['seconds'] / 3600, '.2g')} ({v.name})"
                for v, f in owned
            ],
            "precision of training": [f["precision"] for f in facts],
            "seed, one run per row": [str(f["seed"]) for f in facts],
            "PyTorch": [f["torch"] for f in facts],
            "commit of training": [str(f["git_commit"]) for f in facts],
            "commit of measuring": [str(commit) for f in facts for commit in f["measured_by"]],
        }
        notes += [f"{name}: {', '.join(dict.fromkeys(values))}" for name, values in columns.items()]
        notes.append("hours are wall clock, validation and checkpoints included")
    if runs.scale.size == "smoke":
        notes.append("little is learnt in so few steps: this scale shows that every row runs")
    return {
        "about": runs.scale.description,
        "dataset": next((f["data"][0].split(",")[0] for f in facts), ""),
        "notes": notes,
        "command": command,
    }


def line(cells: Iterable[object]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def table_lines(names: Sequence[str], rows: Iterable[Iterable[object]], left: int = 1) -> list[str]:
    """A Markdown table; the first ``left`` columns are left-aligned, others right."""
    rule = ["---"] * left + ["---:"] * (len(names) - left)
    return [line(names), line(rule), *map(line, rows)]


def percent(estimate: Mapping[str, float], form: str = "{:.0f}") -> str:
    """An estimate with its interval, in percent."""
    value, low, high = (form.format(100 * estimate[key]) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def text_of(title: str, lines: Iterable[str], notes: Iterable[str]) -> str:
    """Markdown: ``lines`` under a heading, and ``notes`` as a list below."""
    return "\n".join([f"## {title}", "", *lines, "", *(f"- {note}" for note in notes)]) + "\n"


def mark(
    axis: Axes, place: int, estimate: Any, look: str = "o", colour: str = BLUE, size: int = 4
) -> None:
    """Plot a number, or an estimate with its interval, in row ``place``; skip None."""
    found = estimate if isinstance(estimate, dict) else {"value": estimate}
    if found["value"] is not None:
        axis.plot(found["value"], place, look, color=colour, markersize=size)
        if found.get("low") is not None:
            axis.plot([found["low"], found["high"]], [place, place], color=colour, linewidth=1.5)


def write(name: str, report: Report, folder: Path) -> list[Path]:
    """Write ``NAME.md``, ``NAME.json`` and the plots into ``folder``; return their paths."""
    paths = [folder / f"{name}.md", folder / f"{name}.json"]
    content = json.dumps(report.document, indent=2, allow_nan=False)  # first: it may fail
    write_atomically(paths[0], report.text.encode())
    write_atomically(paths[1], content.encode())
    for file, draw in report.plots.items():
        draw(folder / file)
    for file, source in report.copies.items():
        write_atomically(folder / file, source.read_bytes())
    return [*paths, *(folder / file for file in (*report.copies, *report.plots))]
