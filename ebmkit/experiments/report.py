"""Experiments: train and evaluate a grid of variants, and write the report.

An experiment is a title, its grid, a function from the runs to a `Report` (a JSON document and
plots), and a function from the JSON document to Markdown, which also renders documents of earlier
runs. Every report states command, data, hardware, versions and commits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from ebmkit.errors import UserError
from ebmkit.evaluation.suite import number
from ebmkit.experiments.runs import ExperimentRuns, Protocol, Variant
from ebmkit.plots import BLUE
from ebmkit.storage import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Report(NamedTuple):
    """Results of an experiment."""

    document: dict[str, Any]  # content of the JSON file
    plots: Mapping[str, Callable[[Path], None]] = {}  # drawing functions by file name
    copies: Mapping[str, Path] = {}  # plots of evaluation suites to copy, by file name


class Experiment(NamedTuple):
    """A table or figure.

    ``run`` trains, evaluates and reports the named variants (none: all); ``text`` is Markdown of
    the JSON document, as it was written or read again.
    """

    title: str
    run: Callable[[ExperimentRuns, Sequence[str]], Report]
    text: Callable[[Mapping[str, Any]], str]
    variants: tuple[Variant, ...] = ()  # its grid; empty if nothing is trained


@dataclass(frozen=True)
class VariantResult:
    """Results of a variant, done if a run of any seed is finished.

    Attributes:
        documents: of the first finished seed, by suite; empty if there is none.
        facts: of training and evaluation, of the first finished seed.
        status: ``done``, or the reason why it is not done.
        by_seed: documents by suite, of each finished seed.
        facts_by_seed: facts of each finished seed.
        image_values: `read_image_values` of the documents, by seed and suite.
        missing: the requested seeds that are not finished, with the reasons.
    """

    variant: Variant
    documents: dict[str, dict[str, Any]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    status: str = "done"
    by_seed: Mapping[int, dict[str, dict[str, Any]]] = field(default_factory=dict)
    facts_by_seed: Mapping[int, dict[str, Any]] = field(default_factory=dict)
    image_values: Mapping[int, Mapping[str, Mapping[str, Tensor]]] = field(default_factory=dict)
    missing: Mapping[int, str] = field(default_factory=dict)


def run_grid(
    runs: ExperimentRuns,
    variants: Sequence[Variant],
    only: Sequence[str],
    protocol: Callable[[Variant], Protocol | None],
) -> list[VariantResult]:
    """Train and evaluate the variants named in ``only`` (empty: all); return results of every one.

    Each has a run for every seed; all variants run with the first seed before any runs with the
    next. ``protocol`` returns the evaluation protocol of a variant; None: it is only trained. Other
    processes may run the same grid at the same time: this function returns when all of it is done.

    Raises:
        Interrupted: if training is interrupted; the same call resumes it.
        UserError: if data or memory do not suffice for a variant. Later failures are listed
            in ``runs.stopped`` and in the report.
    """
    chosen = [v.run or v for v in variants if not only or v.name in only]
    owners = {own.folder: own for own in chosen}
    runs.check(list(owners.values()))
    runs.share(
        (one.named(own), partial(one.try_run, own, protocol(own)))
        for one in runs.each_seed()
        for own in owners.values()
    )
    return [_result(runs, variant, protocol(variant.run or variant)) for variant in variants]


def _result(runs: ExperimentRuns, variant: Variant, protocol: Protocol | None) -> VariantResult:
    own = variant.run or variant
    by_seed, facts, values, missing = {}, {}, {}, {}
    for one in runs.each_seed():
        try:
            documents = one.measured(own, protocol)
        except UserError as error:  # a run of another configuration, which was not to be run
            missing[one.seed] = str(error)
            continue
        if documents is None:
            reason = one.stop_reason(own)
            missing[one.seed] = f"stopped: {reason}" if reason else "not run yet"
            continue
        by_seed[one.seed] = documents
        facts[one.seed] = one.facts(own) | measured_facts(documents.values())
        values[one.seed] = one.image_values(own, protocol, documents) if protocol else {}
    if not by_seed:
        reasons = [text for text in missing.values() if text != "not run yet"]
        return VariantResult(variant, status=(reasons or ["not run yet"])[0], missing=missing)
    first = next(iter(by_seed))
    return VariantResult(
        variant,
        by_seed[first],
        facts[first],
        by_seed=by_seed,
        facts_by_seed=facts,
        image_values=values,
        missing=missing,
    )


def measured_facts(documents: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The evaluated images, and the commits of evaluation."""
    found, data = list(documents), []
    for one in found:
        some, of = one["images"], one["of"]
        count = f"all {of:,}" if some == of else f"the first {some:,} of {of:,}"
        data.append(f"{one['dataset']}, {count} test images ({one['suite']})")
    return {"data": data, "measured_by": [one["environment"]["git_commit"] for one in found]}


def circumstances(
    runs: ExperimentRuns,
    target: str,
    results: Sequence[VariantResult],
    first_seed_shown: bool = False,
) -> dict[str, Any]:
    """Notes below a table or figure: command, data, hardware, versions, commits."""
    ran = [one for one in results if one.status == "done"]
    every = [(r.variant, f) for r in ran for f in (list(r.facts_by_seed.values()) or [r.facts])]
    facts = [own for _, own in every]
    owned = [(variant, own) for variant, own in every if variant.run is None]
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
            "seeds, one run per row and seed": [str(f["seed"]) for f in facts],
            "PyTorch": [f["torch"] for f in facts],
            "commit of training": [str(f["git_commit"]) for f in facts],
            "commit of measuring": [str(commit) for f in facts for commit in f["measured_by"]],
        }
        notes += [f"{name}: {', '.join(dict.fromkeys(values))}" for name, values in columns.items()]
        notes.append("hours are wall clock, validation and checkpoints included")
    if len(runs.seeds) > 1 and first_seed_shown:
        notes.append(f"numbers without ± and plots of single networks: seed {runs.seed}")
    notes += [
        f"{one.variant.name}, seed {seed}: {reason}"
        for one in ran
        for seed, reason in one.missing.items()
        if one.variant.run is None
    ]
    if runs.scale.size == "smoke":
        notes.append("little is learnt in so few steps: this scale shows that every row runs")
    return {
        "about": runs.scale.description,
        "dataset": next((data.split(",")[0] for f in facts for data in f["data"]), ""),
        "notes": notes,
        "command": command,
        "seeds": list(runs.seeds),
    }


def line(cells: Iterable[object]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def table_lines(names: Sequence[str], rows: Iterable[Iterable[object]], left: int = 1) -> list[str]:
    """A Markdown table; the first ``left`` columns are left-aligned, others right."""
    rule = ["---"] * left + ["---:"] * (len(names) - left)
    return [line(names), line(rule), *map(line, rows)]


def percent(estimate: Mapping[str, float], form: str = "{:.0f}") -> str:
    """An estimate with its interval, or a mean with its standard deviation, in percent."""
    if "sd" in estimate:
        return f"{form.format(100 * estimate['value'])} ± {form.format(100 * estimate['sd'])}"
    value, low, high = (form.format(100 * estimate[key]) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def text_of(title: str, lines: Iterable[str], notes: Iterable[str]) -> str:
    """Markdown: ``lines`` under a heading, and ``notes`` as a list below."""
    return "\n".join([f"## {title}", "", *lines, "", *(f"- {note}" for note in notes)]) + "\n"


def mean_and_deviation(values: Sequence[float]) -> dict[str, float]:
    """Mean ``value`` of ``values`` over seeds, sample standard deviation ``sd``, and ``seeds``.

    ``low`` and ``high`` are one standard deviation below and above the mean.
    """
    value, sd = mean(values), stdev(values)
    return {"value": value, "sd": sd, "low": value - sd, "high": value + sd, "seeds": len(values)}


def spread(estimate: Mapping[str, Any] | float | None, form: str) -> str:
    """Format a number or an estimate, with its standard deviation if it is a mean over seeds.

    >>> spread({"value": 84.71, "sd": 0.26, "seeds": 3}, "{:.1f}")
    '84.7 ± 0.3'
    """
    deviation = estimate.get("sd") if isinstance(estimate, Mapping) else None
    own = number(estimate, form)
    return own if deviation is None else f"{own} ± {form.replace('+', '').format(deviation)}"


def mark(
    axis: Axes, place: int, estimate: Any, look: str = "o", colour: str = BLUE, size: int = 4
) -> None:
    """Plot a number, or an estimate with its interval, in row ``place``; skip None."""
    found = estimate if isinstance(estimate, dict) else {"value": estimate}
    if found["value"] is not None:
        axis.plot(found["value"], place, look, color=colour, markersize=size)
        if found.get("low") is not None:
            axis.plot([found["low"], found["high"]], [place, place], color=colour, linewidth=1.5)


def write(name: str, experiment: Experiment, report: Report, folder: Path) -> list[Path]:
    """Write ``NAME.md``, ``NAME.json`` and the plots into ``folder``; return their paths."""
    paths = [folder / f"{name}.md", folder / f"{name}.json"]
    content = json.dumps(report.document, indent=2, allow_nan=False)  # first: it may fail
    write_atomically(paths[0], experiment.text(json.loads(content)).encode())
    write_atomically(paths[1], content.encode())
    for file, draw in report.plots.items():
        draw(folder / file)
    for file, source in report.copies.items():
        write_atomically(folder / file, source.read_bytes())
    return [*paths, *(folder / file for file in (*report.copies, *report.plots))]
