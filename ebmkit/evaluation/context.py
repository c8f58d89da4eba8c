r"""What is evaluated and how: model, images, noise levels, seed; shared by all suites.

A suite measures images one by one and then sums up. Of W processes the r-th measures batches r,
r + W, ...; the columns of measures, one entry per image, are gathered and put in order, so that
each process sums up what a single one would have.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from pydantic import BaseModel
from torch import Tensor

from ebmkit.compile import Inference, device_of, unwrapped
from ebmkit.distributed import DistributedContext
from ebmkit.energy import EnergyModel, ScoreModel, classifies
from ebmkit.errors import UserError
from ebmkit.evaluation.data import Batch, Images, noisy_batches

__all__ = [
    "NOISE_LEVELS",
    "SIGMAS",
    "EvaluationContext",
    "Predictions",
    "Suite",
    "check_classifies",
]

K = TypeVar("K", bound=Hashable)
O = TypeVar("O", bound=BaseModel)

SIGMAS = (15 / 255, 25 / 255, 50 / 255)
"""Noise levels at which denoising is measured, image units."""

NOISE_LEVELS = tuple(s / 255 for s in (0, 5, 10, 20, 30, 50, 75, 100))
"""Noise levels at which classification is measured, image units."""


class Predictions(NamedTuple):
    """What the classifier says of each image, all (N,), on the CPU.

    Attributes:
        labels: the true ones.
        predicted: the most probable label.
        confidence: its probability.
        nll: -log p(c|y) of the true label, nats.
        brier: sum over labels of (p(k|y) - 1[k = c])^2, 0 to 2.
    """

    labels: Tensor
    predicted: Tensor
    confidence: Tensor
    nll: Tensor
    brier: Tensor

    @property
    def right(self) -> Tensor:
        """Whether each prediction is right, (N,) bool."""
        return self.predicted == self.labels


@dataclass
class EvaluationContext:
    """One model, one set of images, and the protocol.

    Args:
        model: in evaluation mode.
        images: all of them are used.
        seed: of the noise, and of the bootstrap.
        batch_size: changes the time taken, not the results.
        sigmas: levels for denoising, image units.
        noise_levels: levels for classification, image units; 0 is always among them.
        world: the processes that share the work.
        options: settings of suites that have some, by their class (`option`).
        data_dir: where the data set's files are, for suites that look for others beside them.
        advance: told how many images more are done.
        left: how many images are left to measure, over all passes of a suite.
        inference: how the model is computed, which may be a wrapper.
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
    _predictions: dict[float, Predictions] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.noise_levels = tuple(sorted({0.0, *self.noise_levels}))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return device_of(self.model)

    @property
    def exact_model(self) -> ScoreModel:
        """The model computed in float32 and eagerly, for what is sensitive to rounding."""
        return unwrapped(self.model)

    def option(self, kind: type[O]) -> O:
        """The settings of class ``kind`` that were given, or its defaults."""
        found = self.options.get(kind)
        return found if isinstance(found, kind) else kind()

    def columns(
        self, sigma: float, measure: Callable[[Batch], Mapping[K, Tensor]]
    ) -> dict[K, Tensor]:
        """``measure`` of all images at noise level ``sigma``; the same noise in every suite.

        Args:
            sigma: image units.
            measure: what it gives has one entry per image of the batch, (B, ...).

        Returns:
            Its columns over all images, (N, ...), on the CPU; the same in every process.
        """
        own: list[dict[K, Tensor]] = []
        share, total, done = self.batch_size * self.world.size, len(self.images), 0
        for batch in noisy_batches(
            self.images, sigma, self.seed, self.batch_size, self.device, self.world
        ):
            start = time.perf_counter()
            own.append({key: column.cpu() for key, column in measure(batch).items()})
            seconds = time.perf_counter() - start
            self.skip(min(share, total - done))  # with what the others do meanwhile
            done += min(share, total - done)
            if len(own) > 1:  # the first warms up
                ahead = self.left / (len(batch.x) * self.world.size)
                self.inference.expect(seconds * ahead)
        self.skip(total - done)
        everyone = self.world.gather(own)
        batches = [part[k] for k in range(len(everyone[0])) for part in everyone if k < len(part)]
        return {key: torch.cat([columns[key] for columns in batches]) for key in batches[0]}

    def predictions(self, sigma: float) -> Predictions:
        """What the classifier says at noise level ``sigma``; computed once.

        Raises:
            UserError: if a probability is not finite.
        """
        if sigma in self._predictions:
            self.skip(len(self.images))
            return self._predictions[sigma]
        model = self.model
        assert self.images.labels is not None
        assert isinstance(model, EnergyModel)
        columns = self.columns(sigma, lambda batch: _predict(model, batch, sigma))
        if not columns["brier"].isfinite().all():
            raise UserError(
                "this model gives probabilities that are not finite: its training diverged, or its "
                "weights are damaged"
            )
        found = Predictions(labels=self.images.labels.cpu(), **columns)
        self._predictions[sigma] = found
        return found

    def skip(self, count: int) -> None:
        """Tell the progress that ``count`` images more are done."""
        self.left -= count
        self.advance(count)


class Suite(NamedTuple):
    """A kind of evaluation; `ebmkit.evaluation.SUITES` is the table of them.

    Attributes:
        about: one line for ``ebmkit list``.
        check: raises `UserError` where model and images cannot be evaluated so.
        passes: how many passes over the images `run` makes, for the progress bar.
        run: measures; returns what the JSON file holds beside the common entries. Its entry
            ``warnings``, if any, is a list of sentences.
        draw: draws pictures into a folder.
        table: turns the JSON document into a table for the terminal.
        options: the class of the suite's own settings, all with defaults; None: it has none. Those
            in force are in its JSON file as ``options``.
        standard: whether it is quick enough to be run unasked, at the end of training.
        needs: the setting without which it has nothing to measure, so that ``all`` leaves it out.
        ready: raises `UserError` where its settings name what is not there, before any suite runs.
    """

    description: str
    check: Callable[[ScoreModel, Images], None]
    passes: Callable[[EvaluationContext], int]
    run: Callable[[EvaluationContext], dict[str, Any]]
    draw: Callable[[EvaluationContext, dict[str, Any], Any], None]
    table: Callable[[dict[str, Any]], Any]
    options: type[BaseModel] | None = None
    standard: bool = False
    needs: str = ""
    ready: Callable[[EvaluationContext], None] = lambda setting: None


def check_classifies(model: ScoreModel, images: Images) -> None:
    """Whether labels can be predicted and compared.

    Raises:
        UserError: if the model or the images have no labels, or they have different ones.
    """
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


def _predict(model: EnergyModel, batch: Batch, sigma: float) -> dict[str, Tensor]:
    assert batch.labels is not None
    log_posterior = model.energies(batch.y, sigma).log_posterior()
    posterior = log_posterior.exp()
    confidence, predicted = posterior.max(dim=1)
    own = batch.labels[:, None]
    off = posterior.scatter_add(1, own, -torch.ones_like(posterior[:, :1]))
    return {
        "predicted": predicted,
        "confidence": confidence,
        "nll": -log_posterior.gather(1, own).squeeze(1),
        "brier": off.square().sum(1),
    }
