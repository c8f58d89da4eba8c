"""Reads a run folder into plain data for a report.

Only small files are read: configuration, environment, metrics, cost, the model card, and the JSON
files and plots of evaluations. Each is compared with its checksum. A run folder may come from
anywhere: what cannot be read is left out and listed in `Run.notices`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ebmkit.card import ModelCard
from ebmkit.errors import UserError
from ebmkit.evaluation import SUITES
from ebmkit.models.saving import read_card
from ebmkit.storage import DamagedFile, read_together
from ebmkit.storage.atomic import other_writer
from ebmkit.storage.reading import check_links, parse_json
from ebmkit.training import RunFolder, TrainConfig, resolve
from ebmkit.training.config import RECIPES, recipe_for
from ebmkit.training.cost import RunStats
from ebmkit.training.metrics import whole_rows

UNCOMPARED = ("dataset.data_dir", "dataset.workers", "device", "plugins", "seed")
"""Fields of a configuration that are no difference from a recipe."""


@dataclass(frozen=True)
class Evaluation:
    """Result of a suite.

    Attributes:
        folder: folder of its files, relative to the run.
        document: content of the JSON file.
        plots: PNG files by name.
    """

    folder: str
    document: dict[str, Any]
    plots: dict[str, bytes]

    @property
    def suite(self) -> str:
        """Name of the suite."""
        return str(self.document["suite"])


@dataclass(frozen=True)
class Run:
    """A run, as a report shows it.

    Attributes:
        name: name of the folder, unique in the report.
        config: the configuration; None for an imported model.
        card: the model card; None if no model was saved yet.
        recipe: name of the recipe below the configuration.
        changes: fields that differ from the recipe: name, value in the recipe, value in the run.
        rows: rows of ``metrics.jsonl``.
        cost: measured cost; None if the run did not end.
        environment: versions, hardware and command of the training.
        parameters: number of weights in ``model.safetensors``.
        evaluations: results of suites, in the order of `ebmkit.evaluation.SUITES`.
        notices: what the reader must know, such as that the run is unfinished or damaged.
    """

    name: str
    config: TrainConfig | None
    card: ModelCard | None
    recipe: str | None = None
    changes: list[tuple[str, Any, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    cost: RunStats | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    evaluations: list[Evaluation] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Number of optimiser steps done, by the metrics or the saved model."""
        last = [int(row["step"]) for row in self.rows[-1:]]
        return max([*last, self.card.steps if self.card else 0])


def read_run(path: Path) -> Run:
    """Read the run at ``path``, which may be training or an imported model.

    Raises:
        UserError: if there is no run, or its configuration or manifest is damaged, or it needs a
            plugin.
    """
    if not path.is_dir():
        raise UserError(f"there is no run folder {str(path)!r}")
    imported = (path / "model.json").is_file() and not (path / "config.yaml").exists()
    config = None if imported else resolve(RunFolder.open(path).config())
    check_links(path)
    reader = _Reader(path)
    environment, cost = reader.document("environment.json"), None
    if values := reader.document("cost.json"):
        try:
            cost = TypeAdapter(RunStats).validate_python(values)
        except ValidationError:
            reader.notices.append("cost.json is left out: it has other fields")
    card = None
    if (path / "model.json").is_file():
        try:
            card = read_card(path)
        except DamagedFile as error:
            if imported:  # nothing is left
                raise
            reader.notices.append(f"model.json is left out: {_reason(error)}")
    recipe, changes = recipe_changes(config, environment) if config else (None, [])
    run = Run(
        name=path.resolve().name,
        config=config,
        card=card,
        recipe=recipe,
        changes=changes,
        rows=[row for row, _ in whole_rows(reader.content("metrics.jsonl") or b"")],
        cost=cost,
        environment=environment,
        parameters=_parameters(path / "model.safetensors"),
        evaluations=_evaluations(reader),
        notices=reader.notices,
    )
    if state := _state(path, run):
        run.notices.insert(0, state)
    return run


class _Reader:
    """Reads files of the run at ``path``; ``notices`` names those that cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notices: list[str] = []

    def content(self, name: str) -> bytes | None:
        """The bytes of a file, compared with its checksum; None if it is missing or damaged."""
        if not (self.path / name).exists():
            return None
        try:
            return read_together(self.path, [name])[name]
        except UserError as error:
            self.notices.append(f"{name} is left out: {_reason(error)}")
            return None

    def document(self, name: str) -> dict[str, Any]:
        """A JSON object; an empty one if the file is missing or damaged."""
        content = self.content(name)
        try:
            values = {} if content is None else parse_json(content, name)
        except UserError as error:
            self.notices.append(f"{name} is left out: {_reason(error)}")
            return {}
        return values if isinstance(values, dict) else {}


def _reason(error: UserError) -> str:
    return str(error).partition(" is damaged: ")[2] or str(error)


def _state(path: Path, run: Run) -> str | None:
    """What is not finished."""
    if run.config is None:
        return None
    if run.steps < run.config.steps:
        writer = other_writer(path)
        done = f"{run.steps:,} of {run.config.steps:,} steps are done"
        if writer:
            return f"The run is being written: {done}. {writer}."
        return f"The run is unfinished: {done}; `ebmkit train --resume` resumes it."
    if not run.evaluations:
        return "The model is not evaluated yet: run `ebmkit evaluate`."
    return None


def _parameters(path: Path) -> int | None:
    """Number of values in a safetensors file, without statistics of BatchNorm."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            sizes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    total = 0
    for name, shape in sizes.items():
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            size = 1
            for side in shape:
                size *= side
            total += size
    return total


def _evaluations(reader: _Reader) -> list[Evaluation]:
    """All results in the folder ``evaluation`` of the run and its subfolders."""
    home, found = reader.path / "evaluation", []
    for file in sorted([*home.glob("*.json"), *home.glob("*/*.json")]):
        folder = file.parent.relative_to(reader.path)
        values = reader.document((folder / file.name).as_posix())
        if not isinstance(values.get("suite"), str):
            continue
        names = values.get("pictures")
        plots = {}
        for name in names if isinstance(names, list) else []:
            own = isinstance(name, str) and Path(name).name == name and name.endswith(".png")
            plot = reader.content((folder / name).as_posix()) if own else None
            if plot is not None and plot.startswith(b"\x89PNG"):
                plots[name] = plot
        found.append(Evaluation(folder.as_posix(), values, plots))
    order = list(SUITES)
    rank = {name: i for i, name in enumerate(order)}
    return sorted(found, key=lambda own: (own.folder, rank.get(own.suite, len(order))))


def recipe_changes(
    config: TrainConfig, environment: Mapping[str, Any]
) -> tuple[str | None, list[tuple[str, Any, Any]]]:
    """Name of the recipe of a run, and the fields of ``config`` that differ from it."""
    command = environment.get("command")
    words = [str(word) for word in command] if isinstance(command, list) else []
    named = next((w.partition("=")[2] for w in words if w.startswith("--recipe=")), None)
    if "--recipe" in words[:-1]:
        named = words[words.index("--recipe") + 1]
    dataset, objective = config.dataset.name, config.objective
    named = named if named in RECIPES else None
    base = RECIPES[named].config if named else recipe_for(dataset, objective)
    name = named or _name_of(base)
    chosen: dict[str, Any] = {"dataset": {"name": dataset}, "objective": objective}
    parts = {"backbone": config.backbone, "head": config.head}
    chosen |= {key: part for key, part in parts.items() if part != base.get(key)}
    try:
        recipe = resolve(chosen, recipe=named)
    except UserError:  # a combination that needs further settings
        return name, []
    before, after = flat(recipe), flat(config)
    for key in ("backbone", "head", "objective"):  # which decide about many other fields
        before[key] = base.get(key, before[key])
    changes = [(key, before.get(key), value) for key, value in after.items()]
    return name, [c for c in changes if c[1] != c[2] and c[0] not in UNCOMPARED]


def _name_of(base: Mapping[str, Any]) -> str | None:
    """The recipe whose values ``base`` has, up to the data set and the head."""

    def core(config: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in config.items() if k not in ("dataset", "head")}

    return next((n for n, own in RECIPES.items() if core(own.config) == core(base)), None)


def flat(config: TrainConfig) -> dict[str, Any]:
    """The fields of ``config`` by dotted name, as in ``--set``."""
    found: dict[str, Any] = {}

    def visit(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, own in value.items():
                visit(f"{prefix}.{key}" if prefix else str(key), own)
        else:
            found[prefix] = value

    visit("", config.model_dump(mode="json"))
    return found


def differences(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """Fields whose values differ between ``runs``, with the value in each (None: not set)."""
    each = [flat(run.config) if run.config else {} for run in runs]
    names = dict.fromkeys(name for own in each for name in own)
    rows = [(name, [own.get(name) for own in each]) for name in names]
    known = [row for row in rows if row[0] not in ("dataset.data_dir", "dataset.workers")]
    return [(name, values) for name, values in known if any(v != values[0] for v in values)]
