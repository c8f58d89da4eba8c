r"""The `Suite` interface and shared tools: context, noise, settings, checks and tables.

A suite is one module: its mathematics, its settings (`SuiteConfig`), and the three functions of
its `Suite`: ``measure`` (context -> document), ``plot`` (context, document, folder: writes PNG
files) and ``table`` (document -> table for the terminal).

Noise at level sigma is drawn on the CPU, image by image, from one generator per (seed, sigma). The
n-th image therefore gets the same noise for every model, device, batch size and limit on the number
of images.

A suite measures each image and then aggregates. With W processes, process r measures batches r,
r + W, ...; the columns of measurements, one entry per image, are gathered in image order, so every
process aggregates the same values as a single process.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import time
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol, Self, TypeVar

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ebmkit.compile import Inference, device_of, in_float32, unwrapped
from ebmkit.distributed import DistributedContext
from ebmkit.energy import EnergyModel, ScoreModel, classifies
from ebmkit.errors import UserError
from ebmkit.evaluation.statistics import to_json
from ebmkit.models import load
from ebmkit.noise import format_sigma, outside_range
from ebmkit.randomness import hashed_generator
from ebmkit.terminal import shown_name

K = TypeVar("K", bound=Hashable)
O = TypeVar("O", bound=BaseModel)
T = TypeVar("T")

Precision = Literal["single", "double"]
Positive = Annotated[int, Field(ge=1)]


def without_repeats(values: tuple[T, ...]) -> tuple[T, ...]:
    """Remove repeated ``values``, keeping the order; a validator of settings."""
    return tuple(dict.fromkeys(values))


Unique = Annotated[tuple[T, ...], AfterValidator(without_repeats)]
NonEmptyUnique = Annotated[tuple[T, ...], Field(min_length=1), AfterValidator(without_repeats)]
"""At least one value; repeats are removed."""

SIGMAS = (15 / 255, 25 / 255, 50 / 255)
"""Noise levels at which denoising is measured, image units."""

NOISE_LEVELS = tuple(s / 255 for s in (0, 5, 10, 20, 30, 50, 75, 100))
"""Noise levels at which classification is measured, image units."""


class Images(Protocol):
    """The interface of an image set that evaluation uses, as `ebmkit.data.ImageSet` has it."""

    @property
    def name(self) -> str: ...
    @property
    def split(self) -> str: ...
    @property
    def labels(self) -> Tensor | None: ...
    @property
    def class_names(self) -> tuple[str, ...]: ...
    @property
    def channels(self) -> int: ...
    @property
    def image_size(self) -> tuple[int, int]: ...
    @property
    def num_classes(self) -> int: ...
    def __len__(self) -> int: ...
    def first(self, n: int, /) -> Self: ...
    def select(self, chosen: Tensor, /) -> Self: ...
    def batches(self, size: int, /) -> Iterable[tuple[Tensor, Tensor | None]]: ...


class EvaluationBatch(NamedTuple):
    """Images x and noisy images y = x + sigma * eps, both (B, C, H, W), labels (B,) or None, and
    the index of the first image."""

    x: Tensor
    y: Tensor
    labels: Tensor | None
    number: int = 0


def noise_generator(seed: int, sigma: float) -> torch.Generator:
    """The generator of the noise of ``seed`` at level ``sigma`` (image units)."""
    return hashed_generator("evaluation noise", str(seed), f"{sigma:.9g}")


def noisy_batches(
    images: Images,
    sigma: float,
    seed: int = 0,
    batch_size: int = 250,
    device: torch.device | str = "cpu",
    world: DistributedContext | None = None,
) -> Iterator[EvaluationBatch]:
    """Yield ``images`` in order with noise at level ``sigma`` (0: none), on ``device``.

    Each of W processes gets every W-th batch, and also draws the noise of the other batches.
    """
    world = world or DistributedContext()
    generator, first = noise_generator(seed, sigma), 0
    for number, (x, labels) in enumerate(images.batches(batch_size)):
        y = x
        if sigma:
            eps = torch.stack([torch.randn(x.shape[1:], generator=generator) for _ in x])
            y = x + sigma * eps.to(x)
        if number % world.size == world.rank:
            labels = None if labels is None else labels.to(device)
            yield EvaluationBatch(x.to(device), y.to(device), labels, first)
        first += len(x)


@dataclass
class EvaluationContext:
    """A model, a set of images, and the settings of their evaluation.

    Args:
        model: the model, in evaluation mode.
        images: the images to use.
        seed: random seed of the noise and the bootstrap.
        batch_size: images per batch; changes the run time, not the results.
        sigmas: noise levels for denoising, image units.
        noise_levels: noise levels for classification, image units; 0 is always added.
        world: the processes that share the work.
        options: settings of suites, by settings class (`option`).
        data_dir: folder of data sets, for suites that load further ones.
        advance: progress callback, called with the number of images done since the last call.
        left: number of images left to measure, over all passes of a suite.
        inference: precision and compilation of the model, which may be a wrapper.
        measured: tensors for plots that are not in the document.
        image_values: values by image (N,) behind the means of the document, by name; `evaluate`
            writes them on request.
    """

    model: ScoreModel
    images: Images
    seed: int = 0
    batch_size: int = 250
    sigmas: tuple[float, ...] = SIGMAS
    noise_levels: tuple[float, ...] = NOISE_LEVELS
    world: DistributedContext = field(default_factory=DistributedContext)
    options: Mapping[type[BaseModel], BaseModel] = field(default_factory=dict)
    data_dir: Path | None = None
    advance: Callable[[int], None] = lambda count: None
    left: int = 0
    inference: Inference = field(default_factory=Inference)
    measured: dict[str, Tensor] = field(default_factory=dict)
    image_values: dict[str, Tensor] = field(default_factory=dict)
    _predictions: dict[float, dict[str, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.noise_levels = tuple(sorted({0.0, *self.noise_levels}))

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return device_of(self.model)

    @property
    def exact_model(self) -> ScoreModel:
        """The model in float32 and eager mode, for computations that are sensitive to rounding."""
        return unwrapped(self.model)

    def model_in(self, precision: Precision) -> ScoreModel:
        """Return `exact_model`, or a float64 copy if ``precision`` is ``double``."""
        model = self.exact_model
        return copy.deepcopy(model).double() if precision == "double" else model

    def option(self, kind: type[O]) -> O:
        """Return the given settings of class ``kind``, or its defaults."""
        found = self.options.get(kind)
        return found if isinstance(found, kind) else kind()

    def first(self, count: int) -> Images:
        """Return the first ``count`` images, or all if there are fewer."""
        return self.images.first(min(count, len(self.images)))

    def columns(
        self,
        sigma: float,
        measure: Callable[[EvaluationBatch], Mapping[K, Tensor]],
        images: Images | None = None,
        batch_size: int | None = None,
        passes: float = 1,
    ) -> dict[K, Tensor]:
        """Apply ``measure`` to all images with noise at level ``sigma``, the same in every suite.

        Args:
            sigma: noise level, image units.
            measure: function from a batch to columns with one entry per image, (B, ...).
            images: the images; default: the context's.
            batch_size: images per batch; default: the context's.
            passes: what this call adds to the progress bar, as passes over the context's images;
                ``measure`` may report a part of them itself (`skip`).

        Returns:
            The columns over all images, (N, ...), on the CPU; the same in every process.
        """
        images = self.images if images is None else images
        batch_size = batch_size or self.batch_size
        own: list[dict[K, Tensor]] = []
        share, count, done = batch_size * self.world.size, len(images), 0
        total, before = round(passes * len(self.images)), self.left
        for batch in noisy_batches(images, sigma, self.seed, batch_size, self.device, self.world):
            start = time.perf_counter()
            own.append({key: column.cpu() for key, column in measure(batch).items()})
            seconds = time.perf_counter() - start
            done = min(count, done + share)  # including the batches of the other processes
            self.skip(total * done // count - (before - self.left))
            if len(own) > 1 and total:  # the first warms up
                ahead = self.left * count / total
                self.inference.expect(seconds * ahead / (len(batch.x) * self.world.size))
        self.skip(total - (before - self.left))
        everyone = self.world.gather(own)
        batches = [part[k] for k in range(len(everyone[0])) for part in everyone if k < len(part)]
        return {key: torch.cat([columns[key] for columns in batches]) for key in batches[0]}

    def predictions(self, sigma: float) -> dict[str, Tensor]:
        """Predictions of the classifier at noise level ``sigma``; cached.

        Returns:
            Columns (N,) on the CPU: ``labels``, the true labels; ``predicted``, the most probable
            labels; ``right``, whether they are equal; ``confidence``, the probability of the
            predicted label; ``nll``, -log p(c|y) of the true label, nats; ``brier``, the sum over
            labels of (p(k|y) - 1[k = c])^2, 0 to 2.

        Raises:
            UserError: if a probability is NaN or Inf.
        """
        if sigma in self._predictions:
            self.skip(len(self.images))
            return self._predictions[sigma]
        found = self.columns(sigma, lambda batch: self._predict(batch, sigma))
        if not found["brier"].isfinite().all():
            raise UserError(
                "probabilities of this model are NaN or Inf: its training diverged, or its weights "
                "are damaged"
            )
        self._predictions[sigma] = found
        return found

    def _predict(self, batch: EvaluationBatch, sigma: float) -> dict[str, Tensor]:
        assert isinstance(self.model, EnergyModel)
        assert batch.labels is not None
        log_posterior = self.model.energies(batch.y, sigma).log_posterior()
        posterior = log_posterior.exp()
        confidence, predicted = posterior.max(dim=1)
        own = batch.labels[:, None]
        off = posterior.scatter_add(1, own, -torch.ones_like(posterior[:, :1]))
        return {
            "labels": batch.labels,
            "predicted": predicted,
            "right": predicted == batch.labels,
            "confidence": confidence,
            "nll": -log_posterior.gather(1, own).squeeze(1),
            "brier": off.square().sum(1),
        }

    def skip(self, count: int) -> None:
        """Advance the progress bar by ``count`` images."""
        self.left -= count
        self.advance(count)


class SuiteConfig(BaseModel):
    """Base class of suite settings; every field has a default and a docstring."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


@dataclass(frozen=True)
class Suite:
    """An evaluation suite; `ebmkit.evaluation.SUITES` lists all suites.

    Attributes:
        description: one line for ``ebmkit list``.
        measure: returns the fields of the JSON file except the common ones. The optional field
            ``warnings`` is a list of sentences.
        plot: writes PNG files into a folder, from the document.
        table: turns the document into a table for the terminal.
        check: raises `UserError` if the suite cannot evaluate this model on these images.
        passes: number of passes over the images that `measure` makes, for the progress bar.
        prepare: called before any suite runs; raises `UserError` if a file or run named in the
            settings is missing.
        options: class of the suite's settings, which its JSON file holds as ``options``; or None.
        exact: whether the suite always runs eagerly, in float32 or the ``precision`` of its
            settings.
        standard: whether the suite is among the quick ones that run by default and after training.
        needs: name of a required setting; ``all`` skips a suite that has one.
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
        """Run `measure` and convert its document to JSON types (`to_json`)."""
        with in_float32(context.device) if self.exact else contextlib.nullcontext():
            document: dict[str, Any] = to_json(self.measure(context))
        if not self.exact:
            return document
        config = context.option(self.options) if self.options else None
        double = getattr(config, "precision", "single") == "double"
        return document | {"precision": "fp64" if double else "fp32", "compiled": False}


def check_classifies(model: ScoreModel, images: Images) -> None:
    """Raise `UserError` if model or images have no labels, or different numbers of classes."""
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
            f"data set {images.name!r} has {images.num_classes} classes and this model has "
            f"{model.num_classes}: choose a data set with the classes that it was trained on"
        )


def check_one_size(suite: str, images: Images) -> None:
    """Raise `UserError` if the images have different sizes."""
    if not getattr(images, "one_size", True):
        raise UserError(
            f"suite {suite!r} compares images of one size, and those of {images.name!r} differ: "
            "use data set 'folder' with --image-size"
        )


def noise_warnings(model: ScoreModel, sigmas: Sequence[float]) -> list[str]:
    """A warning if ``model`` was not trained to denoise, or not at some of ``sigmas``."""
    card = model.card
    if card is None:
        return []
    if not card.denoises:
        return [
            f"this model was not trained to denoise (its objective is {card.objective!r}): its "
            "score is not meaningful; add dsm to the objective"
        ]
    if card.sigma_range is None:
        return []
    outside = outside_range(sigmas, card.sigma_range)
    low, high = map(format_sigma, card.sigma_range)
    sentence = (
        f"noise at {', '.join(map(format_sigma, outside))} is outside the range that this model "
        f"was trained for, {low} to {high}"
    )
    return [sentence] if outside else []


def load_comparison_models(
    context: EvaluationContext, runs: Iterable[Path | str], option: str
) -> Iterator[tuple[str, EnergyModel]]:
    """Yield names and models of ``runs``, given in the setting ``option``, for comparison.

    Raises:
        UserError: if a run is missing, or its model has other classes or channels.
    """
    images, classes = context.images, context.model.num_classes
    for run in runs:
        model = load(run, device=str(context.device))
        if not classifies(model) or model.num_classes != classes:
            raise UserError(
                f"{option}: the model in {str(run)!r} has {model.num_classes} classes and the "
                f"evaluated model {classes}: name runs with the same classes"
            )
        channels = model.card.channels if model.card else images.channels
        if channels != images.channels:
            raise UserError(
                f"{option}: the model in {str(run)!r} takes images of {channels} channel(s), and "
                f"{images.name!r} has {images.channels}: name another run"
            )
        yield Path(os.path.abspath(run)).name, model


def unique_name(name: str, taken: Container[str]) -> str:
    """Return ``name``, with a number appended if it is ``taken``."""
    names = (f"{name}-{k}" if k > 1 else name for k in itertools.count(1))
    return next(own for own in names if own not in taken)


def class_name(images: Images, label: int) -> str:
    """The name of a class of ``images`` for plots; ``label`` itself if the class has no name."""
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
    """A `new_table` of estimates with intervals; ``rows`` are (name, estimate, number format)."""
    result = new_table(document, ("metric", "value", "95 % interval"))
    for name, estimate, form in rows:
        result.add_row(name, number(estimate, form), interval(estimate, form))
    return result


def add_note(table: Table, text: str) -> None:
    """Add ``text`` below ``table``, above the warnings."""
    table.caption = Text.assemble(text, *(("\n", table.caption) if table.caption else ()))


def number(value: float | Mapping[str, Any] | None, form: str) -> str:
    """Format a number or the value of an estimate; a dash for None.

    >>> number(0.98765, "{:.2%}")
    '98.77%'
    >>> number({"value": 29.1}, "{:.2f}")
    '29.10'
    """
    value = value["value"] if isinstance(value, Mapping) else value
    return "-" if value is None else form.format(value)


def interval(estimate: Mapping[str, Any], form: str) -> str:
    """Format the interval of an estimate; a dash if an end is None.

    >>> interval({"low": 29.01, "high": 29.2}, "{:.2f}")
    '29.01 to 29.20'
    """
    low, high = estimate["low"], estimate["high"]
    return "-" if low is None or high is None else f"{form.format(low)} to {form.format(high)}"
