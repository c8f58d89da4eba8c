"""Renders runs as one HTML file, with its styles, script, plots and images inside.

The file loads nothing, so it can be mailed, archived and printed. The templates are in
``templates/``; every value is escaped (Jinja2's autoescape), and control characters in names are
shown as in the terminal (`ebmkit.terminal.clean`).
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shlex
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ebmkit.compute import environment
from ebmkit.errors import UserError
from ebmkit.evaluation.runner import FORMER_NAMES, SUITES
from ebmkit.evaluation.suite import unique_name
from ebmkit.noise import format_sigma
from ebmkit.objectives import parse_objective
from ebmkit.report.figures import Line, Panel
from ebmkit.report.runs import Evaluation, Run, differences, read_run
from ebmkit.report.suites import VIEWS, Metric, View
from ebmkit.storage import write_atomically
from ebmkit.storage.reading import opened
from ebmkit.terminal import clean
from ebmkit.training.cost import format_bytes, format_seconds, with_prefix
from ebmkit.training.metrics import (
    metric_names,
    metric_series,
    metric_title,
    needs_log_scale,
    running_mean,
)

if TYPE_CHECKING:
    from jinja2 import Environment

NAME = "report.html"

GENERATOR = "ebmkit report"
"""Marks a report in its first bytes; no other file is replaced."""

MOST_BYTES = 2_500_000
"""Maximum bytes of all images in a file, so that it stays below 3 MB; further ones are named."""

LOSSLESS_BYTES = 60_000
"""Plots of more bytes are compressed with loss (WebP), which is invisible at the usual size."""


WIDE = 1200
"""Width in pixels above which a plot takes the width of the page, and is scrolled on a phone."""


@dataclass(frozen=True)
class Block:
    """Result of a suite for one run: its table, plots and how it was measured."""

    run: str
    number: int
    table: dict[str, Any] | None
    images: list[dict[str, str]]
    omitted: list[str]
    how: str
    file: str
    warnings: list[str]


@dataclass(frozen=True)
class Section:
    """Results of a suite."""

    anchor: str
    title: str
    where: str
    description: str
    panels: list[dict[str, Any]]
    blocks: list[Block]


def write_report(paths: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of the runs at ``paths`` and return its path.

    Args:
        paths: run folders.
        out: HTML file; None: ``report.html`` in the run folder, or for several runs in the current
            folder. An older report is replaced.

    Raises:
        UserError: if ``out`` is another file, a run cannot be read, or ``out`` cannot be written.
    """
    runs = [read_run(path) for path in paths]
    target = out or (paths[0] / NAME if len(paths) == 1 else Path(NAME))
    if target.exists() and not is_report(target):
        raise UserError(f"{str(target)!r} exists and is no report of ebmkit: give another --out")
    if not target.parent.is_dir():
        raise UserError(f"cannot write {str(target)!r}: there is no folder {str(target.parent)!r}")
    write_atomically(target, render_report(runs).encode())
    return target


def refresh_report(run: Path) -> None:
    """Write the report of ``run`` after its training or evaluation; a failure is a warning."""
    try:
        write_report([run])
    except Exception as error:
        warnings.warn(f"{run / NAME} is not written: {error}", stacklevel=2)


def is_report(path: Path) -> bool:
    """Whether the file at ``path`` was written by `write_report`."""
    try:
        with opened(path) as (file, _):
            return f'content="{GENERATOR}"'.encode() in file.read(500)
    except UserError:
        return False


def render_report(runs: Sequence[Run]) -> str:
    """The report of ``runs`` as HTML; several runs are compared."""
    runs = _distinct(runs)
    budget = _Budget()
    sections = [own for group in _by_suite(runs) if (own := _section(runs, group, budget))]
    several = len(runs) > 1
    text: str = (
        _environment()
        .get_template("report.html")
        .render(
            title=" and ".join(run.name for run in runs) if len(runs) < 3 else f"{len(runs)} runs",
            generator=GENERATOR,
            version=environment()["ebmkit"],
            several=several,
            runs=[_head(run, number) for number, run in enumerate(runs)],
            comparison=_comparison(runs) if several else None,
            differences=[(n, [_value(v) for v in vs]) for n, vs in differences(runs)]
            if several
            else [],
            curves=_figures(_curves(runs)),
            sections=sections,
        )
    )
    return text


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("ebmkit.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda v: clean(v) if type(v) is str else v,  # not markup
    )


def _distinct(runs: Sequence[Run]) -> list[Run]:
    """Runs with distinct names."""
    found: list[Run] = []
    for run in runs:
        found.append(replace(run, name=unique_name(run.name, [own.name for own in found])))
    return found


def _head(run: Run, number: int) -> dict[str, Any]:
    """Sentence, key numbers and facts of a run."""
    return {
        "name": run.name,
        "number": number,
        "sentence": _sentence(run),
        "notices": run.notices,
        "metrics": [*_metrics(run), *_costs(run), *_size(run)],
        "facts": _facts(run),
        "recipe": run.recipe,
        "known_recipe": run.config is not None,
        "changes": [(name, _value(old), _value(new)) for name, old, new in run.changes],
        "command": _command(run),
    }


def _sentence(run: Run) -> str:
    card, config = run.card, run.config
    if config is None:
        assert card is not None
        return f"An imported model{f' for {card.dataset}' if card.dataset else ''}."
    head = f" with head {config.head}" if config.head else ""
    return (
        f"{config.backbone}{head}, trained with {config.objective} on {config.dataset.name} for "
        f"{run.steps:,} steps."
    )


def _metrics(run: Run) -> list[Metric]:
    """Key numbers of a run on the test images of its own data set."""
    found: list[Metric] = []
    for own in run.evaluations:
        if own.folder == "evaluation":
            found += _tried(lambda d: _view(d["suite"]).metrics(d), own.document) or []
    return found


def _costs(run: Run) -> list[Metric]:
    cost = run.cost
    if cost is None or run.config is None:
        return []
    flops = sum(cost.flops.values()) * cost.processes * run.config.steps
    step = format_seconds(cost.step_seconds)
    return [
        Metric(
            "Training time",
            format_seconds(cost.step_seconds * run.config.steps),
            "",
            f"{run.config.steps:,} steps of {step} (median)",
        ),
        Metric("Training cost", f"{with_prefix(flops)}FLOP", "", f"MFU {cost.share:.0%}"),
    ]


def _size(run: Run) -> list[Metric]:
    return [Metric("Parameters", f"{run.parameters:,}", "")] if run.parameters else []


def _facts(run: Run) -> list[tuple[str, str]]:
    config, card, cost, env = run.config, run.card, run.cost, run.environment
    facts: dict[str, Any] = {}
    if config is not None:
        facts |= {
            "Data": config.dataset.name,
            "Network": f"{config.backbone}, head {config.head}" if config.head else config.backbone,
            "Objective": config.objective,
            "Optimiser": f"{config.optimizer.kind}, learning rate {config.optimizer.lr:g}",
            "Batch": ", ".join(f"{n} {s.batch_size}" for n, s in _streams(run)),
            "Seed": str(config.seed),
        }
    if card is not None:
        size = card.image_size and " x ".join(map(str, card.image_size))
        colour = "gray" if card.channels == 1 else "colour" if card.channels == 3 else ""
        facts["Images"] = f"{size or 'any size'}, {colour or f'{card.channels} channels'}"
        facts["Noise"] = card.sigma_range and "sigma {} to {}".format(
            *map(format_sigma, card.sigma_range)
        )
        facts["Classes"] = card.class_names and f"{len(card.class_names)}"
    if cost is not None:
        facts |= {
            "Speed": f"{cost.images_per_s:,.0f} images/s",
            "Peak memory": format_bytes(cost.peak_memory),
            "Precision": f"{cost.precision}{', compiled' if cost.compiled else ''}",
        }
    if env:
        facts |= {
            "Hardware": _hardware(run),
            "Software": f"ebmkit {env.get('ebmkit')}, PyTorch {env.get('torch')}, Python "
            f"{env.get('python')}",
            "Commit": env.get("git_commit"),
        }
    return [(name, str(value)) for name, value in facts.items() if value]


def _streams(run: Run) -> list[tuple[str, Any]]:
    """Names and settings of the streams that the objective uses."""
    assert run.config is not None
    used = {term.objective.stream for term in parse_objective(run.config.objective)}
    return [(name, own) for name, own in run.config.streams if name in used]


def _hardware(run: Run) -> str:
    env, cost = run.environment, run.cost
    if cost is not None and env.get("gpu"):
        return f"{cost.processes} x {cost.device.removeprefix('a ')}"
    return f"CPU, {env.get('threads')} of {env.get('cores')} cores"


def _command(run: Run) -> str:
    command = run.environment.get("command")
    return shlex.join(map(str, command)) if isinstance(command, list) else ""


def _value(value: Any) -> str:
    """Format of a configuration value."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)


def _curves(runs: Sequence[Run]) -> list[Panel]:
    """Learning curves; with several runs, one colour per run."""
    panels = []
    several = len(runs) > 1
    for name in dict.fromkeys(n for run in runs for n in metric_names(run.rows)):
        lines: list[Line] = []
        for i, run in enumerate(runs):
            step, value = metric_series(run.rows, name, "train")
            colour, label = (i, run.name) if several else (0, "training")
            held = metric_series(run.rows, name, "validation")
            if len(step) >= 20 and name != "lr":
                lines.append(Line("", list(step), list(value), colour=colour, faint=True))
                value = running_mean(value)
                label = label if several else "training, smoothed"
            if len(step):
                style = "--" if several and len(held[0]) else "-"
                label = f"{label}, training" if style == "--" else label
                lines.append(Line(label, list(step), list(value), colour=colour, style=style))
            if len(held[0]):
                own, label = (i, run.name) if several else (1, "held-out")
                lines.append(Line(label, list(held[0]), list(held[1]), colour=own, marker="o"))
        log = needs_log_scale(name, [v for line in lines for v in line.y])
        if lines:
            panels.append(Panel(metric_title(name), "step", lines, log))
    return panels


def _figures(panels: Sequence[Panel]) -> list[dict[str, Any]]:
    found = []
    for panel in panels:
        svg, data = panel.figure()
        legend = [(own.label, own.colour, own.style) for own in panel.lines if own.label]
        found.append({"title": panel.title, "svg": svg, "data": data, "legend": legend})
    return found


def _comparison(runs: Sequence[Run]) -> list[tuple[str, str, list[Metric | None]]]:
    """Rows of the table of all runs: name and data of a number, and its value in each run.

    Numbers of different data, images or noise seeds are in different rows.
    """
    rows: dict[tuple[str, str], list[Metric | None]] = {}
    for i, run in enumerate(runs):
        for own in run.evaluations:
            for found in _tried(lambda d: _view(d["suite"]).metrics(d), own.document) or []:
                row = rows.setdefault((found.name, _data(own)), [None] * len(runs))
                row[i] = row[i] or found
    for i, run in enumerate(runs):
        for found in (*_costs(run), *_size(run)):
            rows.setdefault((found.name, ""), [None] * len(runs))[i] = found
    return [(name, data, cells) for (name, data), cells in rows.items()]


def _data(own: Evaluation) -> str:
    document = own.document
    images, of = document.get("images"), document.get("of")
    count = f"{images} images" if images == of else f"{images} of {of} images"
    return f"{document.get('dataset')} {document.get('split')}, {count}"


def _by_suite(runs: Sequence[Run]) -> list[list[tuple[int, Evaluation]]]:
    """Evaluations of all runs grouped by suite and subfolder: (number of the run, evaluation)."""
    groups: dict[tuple[str, str], list[tuple[int, Evaluation]]] = {}
    for i, run in enumerate(runs):
        for own in run.evaluations:
            groups.setdefault((own.folder, own.suite), []).append((i, own))
    return list(groups.values())


def _section(
    runs: Sequence[Run], group: list[tuple[int, Evaluation]], budget: _Budget
) -> Section | None:
    first = group[0][1]
    suite = SUITES.get(FORMER_NAMES.get(first.suite, first.suite))
    view = _view(first.suite)
    documents = [(runs[i].name, own.document) for i, own in group]
    panels = _tried(lambda d: _figures(view.panels(d)), documents) or []
    hidden = view.replaces if panels else ()
    blocks = []
    for i, own in group:
        images, omitted = budget.encode({n: v for n, v in own.plots.items() if n not in hidden})
        blocks.append(
            Block(
                run=runs[i].name,
                number=i,
                table=_tried(lambda d: _table(suite.table(d)), own.document) if suite else None,
                images=images,
                omitted=omitted,
                how=_how(own),
                file=f"{own.folder}/{own.suite}.json",
                warnings=[str(w) for w in own.document.get("warnings") or []],
            )
        )
    where = first.folder.removeprefix("evaluation").lstrip("/")
    name = first.suite.replace("-", " ")
    title = TITLES.get(first.suite, name[:1].upper() + name[1:])
    return Section(
        anchor=re.sub(r"[^a-z0-9]+", "-", f"{first.folder}-{first.suite}".lower()),
        title=title,
        where=where,
        description=suite.description if suite else "",
        panels=panels,
        blocks=blocks,
    )


TITLES = {"classify": "Classification", "denoise": "Denoising", "ood": "Out-of-distribution data"}
"""Titles of suites whose name is no title."""


def _view(suite: str) -> View:
    return VIEWS.get(FORMER_NAMES.get(suite, suite), View())


def _tried(function: Any, document: Any) -> Any:
    """``function(document)``, or None if the document lacks what the function reads, as one of
    another version does."""
    try:
        return function(document)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        return None


def _how(own: Evaluation) -> str:
    """How a result was measured, in one line."""
    d = own.document
    env = d.get("environment")
    torch = f"PyTorch {env.get('torch')}, " if isinstance(env, dict) else ""
    seconds = d.get("seconds")
    time = format_seconds(seconds) if isinstance(seconds, (int, float)) else ""
    return (
        f"{_data(own)}; weights {d.get('weights')}, seed {d.get('seed')}; {torch}"
        f"{d.get('device')}, {d.get('precision')}{f', {time}' if time else ''}"
    )


def _table(table: Table) -> dict[str, Any]:
    """Header, rows, alignment and notes of a table for the terminal."""
    cells = [[_plain(cell) for cell in column.cells] for column in table.columns]
    ends = [row.end_section for row in table.rows]
    return {
        "head": [_plain(column.header) for column in table.columns],
        "right": [column.justify == "right" for column in table.columns],
        "rows": list(zip(zip(*cells, strict=True), ends, strict=True)),
        "notes": [
            line
            for line in _plain(table.caption or "").splitlines()
            if not line.startswith("warning: ")
        ],
    }


def _plain(cell: Any) -> str:
    return cell if isinstance(cell, str) else getattr(cell, "plain", "")


class _Budget:
    """Encodes images until the file is full."""

    def __init__(self) -> None:
        self.left = MOST_BYTES

    def encode(self, plots: dict[str, bytes]) -> tuple[list[dict[str, str]], list[str]]:
        """Images as data URLs, and the names of those that do not fit."""
        images, omitted = [], []
        for name, content in plots.items():
            try:
                kind, small, (width, height) = _compressed(content)
            except (OSError, ValueError, SyntaxError):  # no image
                omitted.append(name)
                continue
            text = base64.b64encode(small).decode()
            if len(text) > self.left:
                omitted.append(name)
                continue
            self.left -= len(text)
            alt, scale = name.removesuffix(".png").replace("-", " "), 1.6 if width > WIDE else 2
            images.append(
                {
                    "src": f"data:image/{kind};base64,{text}",
                    "alt": alt,
                    "width": str(math.ceil(width / scale)),
                    "height": str(math.ceil(height / scale)),
                    "kind": "wide" if width > WIDE else "",
                }
            )
        return images, omitted


def _compressed(content: bytes) -> tuple[str, bytes, tuple[int, int]]:
    """Type, bytes, width and height in pixels of a PNG file, as WebP if it is large."""
    from PIL import Image

    with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
        if len(content) <= LOSSLESS_BYTES:
            return "png", content, image.size
        file = io.BytesIO()
        image.convert("RGB").save(file, "WEBP", quality=88, method=3)
        small = file.getvalue()
        return (
            ("webp", small, image.size)
            if len(small) < len(content)
            else ("png", content, image.size)
        )
