"""What a suite is, and what suites share: settings, checks, warnings and tables.

A suite is one file: its mathematics, its settings (`SuiteConfig`), and three functions, of which
`Suite` is made: ``measure`` (context -> document), ``plot`` (context, document, folder: writes PNG
files) and ``table`` (document -> table for the terminal).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from rich.table import Table
from rich.text import Text

from ebmkit.compile import in_float32
from ebmkit.energy import EnergyModel, ScoreModel, classifies
from ebmkit.errors import UserError
from ebmkit.evaluation.context import EvaluationContext, Images
from ebmkit.evaluation.statistics import to_json
from ebmkit.models import load
from ebmkit.noise import format_sigma
from ebmkit.terminal import shown_name

T = TypeVar("T")

Precision = Literal["single", "double"]
Positive = Annotated[int, Field(ge=1)]


def distinct(values: tuple[T, ...]) -> tuple[T, ...]:
    """``values`` without repeats, in order; for settings."""
    return tuple(dict.fromkeys(values))


Distinct = Annotated[tuple[T, ...], AfterValidator(distinct)]
Several = Annotated[tuple[T, ...], Field(min_length=1), AfterValidator(distinct)]
"""One value or more, without repeats."""


class SuiteConfig(BaseModel):
    """The base of settings of suites, all with defaults; what is below a field describes it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


@dataclass(frozen=True)
class Suite:
    """A kind of evaluation; `ebmkit.evaluation.SUITES` is the table of them.

    Attributes:
        description: one line for ``ebmkit list``.
        measure: what the JSON file holds beside the common entries (`run`). Its entry ``warnings``,
            if any, is a list of sentences.
        plot: writes PNG files into a folder, from the document.
        table: turns the document into a table for the terminal.
        check: raises `UserError` where model and images cannot be evaluated so.
        passes: how many passes over the images `measure` makes, for the progress bar.
        prepare: raises `UserError` where its settings name what is not there, before any suite
            runs.
        options: the class of the suite's own settings; None: it has none. Those in force are in its
            JSON file as ``options``.
        exact: whether it is computed eagerly in float32, or in the ``precision`` of its settings,
            whatever the evaluation has.
        standard: whether it is quick enough to be run unasked, at the end of training.
        needs: the setting without which it has nothing to measure, so that ``all`` leaves it out.
    """

    description: str
    measure: Callable[[EvaluationContext], dict[str, Any]]
    plot: Callable[[EvaluationContext, dict[str, Any], Path], None]
    table: Callable[[dict[str, Any]], Table]
    check: Callable[[ScoreModel, Images], None] = lambda model, images: None
    passes: Callable[[EvaluationContext], int] = lambda context: 1
    prepare: Callable[[EvaluationContext], object] = lambda context: None
    options: type[BaseModel] | None = None
    exact: bool = False
    standard: bool = False
    needs: str = ""

    def run(self, context: EvaluationContext) -> dict[str, Any]:
        """`measure`, with estimates and numbers as JSON has them (`to_json`)."""
        document: dict[str, Any]
        if not self.exact:
            document = to_json(self.measure(context))
            return document
        with in_float32(context.device):
            document = to_json(self.measure(context))
        config = context.option(self.options) if self.options else None
        double = getattr(config, "precision", "single") == "double"
        return document | {"precision": "fp64" if double else "fp32", "compiled": False}


def check_classifies(model: ScoreModel, images: Images) -> None:
    """Raise `UserError` where model or images have no labels, or they have different ones."""
    if not classifies(model):
        raise UserError(
            "this model was trained without labels and cannot classify: choose suites that need "
            "none (denoise, jacobian, linearity), or train with an objective that has ce or cdsm"
        )
    if images.labels is None:
        raise UserError(
            f"data set {images.name!r} has no labels to compare with: choose the suite denoise"
        )
    if images.num_classes != model.num_classes:
        raise UserError(
            f"data set {images.name!r} has {images.num_classes} classes and this model knows "
            f"{model.num_classes}: choose a data set with the classes that it was trained on"
        )


def check_one_size(suite: str, images: Images) -> None:
    """Raise `UserError` where images are pictures of any size."""
    if not getattr(images, "one_size", True):
        raise UserError(
            f"suite {suite!r} compares images of one size, and those of {images.name!r} differ: "
            "use data set 'folder' with --image-size"
        )


def noise_warnings(model: ScoreModel, sigmas: Sequence[float]) -> list[str]:
    """A sentence if ``model`` was not trained to denoise, or not at some of ``sigmas``."""
    card = model.card
    if card is None:
        return []
    if card.sigma_range is None:
        return [
            f"this model was not trained to denoise (its objective is {card.objective!r}): its "
            "score means little; add dsm to the objective"
        ]
    low, high = card.sigma_range
    outside = [s for s in sigmas if not low * (1 - 1e-6) <= s <= high * (1 + 1e-6)]
    if not outside:
        return []
    return [
        f"noise at {', '.join(format_sigma(s) for s in outside)} is outside the range that this "
        f"model was trained for, {format_sigma(low)} to {format_sigma(high)}"
    ]


def load_beside(
    context: EvaluationContext, runs: Iterable[Path | str], option: str
) -> Iterator[tuple[str, EnergyModel]]:
    """Names and models of other runs, for a suite that compares several.

    Args:
        context: its images have the classes of its model.
        runs: the folders.
        option: that names them, for errors.

    Raises:
        UserError: if one is not there, or knows other classes or channels.
    """

    images, classes = context.images, context.model.num_classes
    for run in runs:
        model = load(run, device=str(context.device))
        if not classifies(model) or model.num_classes != classes:
            raise UserError(
                f"{option}: the model in {str(run)!r} knows {model.num_classes} classes and the "
                f"one evaluated {classes}: name runs with labels of the same classes"
            )
        channels = model.card.channels if model.card else images.channels
        if channels != images.channels:
            raise UserError(
                f"{option}: the model in {str(run)!r} takes images of {channels} channel(s), and "
                f"{images.name!r} has {images.channels}: name another run"
            )
        yield Path(os.path.abspath(run)).name, model


def unique_name(name: str, taken: Container[str]) -> str:
    """``name``, with a number where it is ``taken``."""
    names = (f"{name}-{k}" if k > 1 else name for k in itertools.count(1))
    return next(own for own in names if own not in taken)


def class_name(images: Images, label: int) -> str:
    """The name of a class of ``images`` as plots show it; its number, where there is none."""
    names = images.class_names
    return shown_name(names[label]) if label < len(names) else str(label)


def new_table(document: dict[str, Any], columns: Sequence[str]) -> Table:
    """A table titled by suite, data set and number of images; the first column is left-aligned."""
    of = "" if document["images"] == document["of"] else f" of {document['of']}"
    where = f"{document['dataset']} {document['split']}".strip()
    result = Table(title_justify="left", caption_justify="left")
    result.title = Text(f"{document['suite']}: {where}, {document['images']}{of} images")
    if document["warnings"]:
        warnings = "\n".join(f"warning: {line}" for line in document["warnings"])
        result.caption = Text(warnings, style="yellow")
    for i, column in enumerate(columns):
        result.add_column(column, justify="left" if i == 0 else "right")
    return result


def estimate_table(
    document: dict[str, Any], rows: Iterable[tuple[str, Mapping[str, Any], str]]
) -> Table:
    """A `new_table` of estimates with their intervals: of each its name, itself and its format."""
    result = new_table(document, ("metric", "value", "95 % interval"))
    for name, estimate, form in rows:
        result.add_row(name, number(estimate, form), interval(estimate, form))
    return result


def add_note(table: Table, text: str) -> None:
    """Put ``text`` below ``table``, above the warnings."""
    table.caption = Text.assemble(text, *(("\n", table.caption) if table.caption else ()))


def number(value: float | Mapping[str, Any] | None, form: str) -> str:
    """A number, or the value of an estimate; a dash where there is no finite one.

    >>> number(0.98765, "{:.2%}")
    '98.77%'
    >>> number({"value": 29.1}, "{:.2f}")
    '29.10'
    """
    value = value["value"] if isinstance(value, Mapping) else value
    return "-" if value is None else form.format(value)


def interval(estimate: Mapping[str, Any], form: str) -> str:
    """Both ends of an estimate's interval; a dash where they are unknown.

    >>> interval({"low": 29.01, "high": 29.2}, "{:.2f}")
    '29.01 to 29.20'
    """
    low, high = estimate["low"], estimate["high"]
    return "-" if low is None or high is None else f"{form.format(low)} to {form.format(high)}"
