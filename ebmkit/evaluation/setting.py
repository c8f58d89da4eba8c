"""What is evaluated and how: model, images, noise levels, seed; shared by all suites."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebmkit.core import EnergyModel
from ebmkit.errors import UserError
from ebmkit.evaluation.data import Batch, Images, noisy_batches

__all__ = [
    "NOISE_LEVELS",
    "SIGMAS",
    "Predictions",
    "Setting",
    "Suite",
    "check_classifies",
    "classifies",
    "in_255ths",
]

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
class Setting:
    """One model, one set of images, and the protocol.

    Args:
        model: in evaluation mode.
        images: all of them are used.
        seed: of the noise, and of the bootstrap.
        batch_size: changes the time taken, not the results.
        sigmas: levels for denoising, image units.
        noise_levels: levels for classification, image units; 0 is always among them.
        advance: told how many images another pass has done.
    """

    model: EnergyModel
    images: Images
    seed: int = 0
    batch_size: int = 250
    sigmas: tuple[float, ...] = SIGMAS
    noise_levels: tuple[float, ...] = NOISE_LEVELS
    advance: Callable[[int], None] = lambda count: None
    _predictions: dict[float, Predictions] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.noise_levels = tuple(sorted({0.0, *self.noise_levels}))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return tensors[0].device if tensors else torch.device("cpu")

    def batches(self, sigma: float) -> Iterator[Batch]:
        """Batches of clean and noisy images; the same noise in every suite."""
        for batch in noisy_batches(self.images, sigma, self.seed, self.batch_size, self.device):
            yield batch
            self.advance(len(batch.x))

    def predictions(self, sigma: float) -> Predictions:
        """What the classifier says at noise level ``sigma``; computed once."""
        if sigma not in self._predictions:
            parts = [_predict(self.model, batch, sigma) for batch in self.batches(sigma)]
            self._predictions[sigma] = Predictions(
                *(torch.cat(p) for p in zip(*parts, strict=True))
            )
        else:
            self.advance(len(self.images))
        return self._predictions[sigma]


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
    """

    about: str
    check: Callable[[EnergyModel, Images], None]
    passes: Callable[[Setting], int]
    run: Callable[[Setting], dict[str, Any]]
    draw: Callable[[Setting, dict[str, Any], Any], None]
    table: Callable[[dict[str, Any]], Any]


def in_255ths(sigma: float) -> str:
    """How JSON keys and pictures name a noise level.

    >>> in_255ths(25 / 255)
    '25'
    """
    return f"{sigma * 255:.4g}"


def classifies(model: EnergyModel) -> bool:
    """Whether ``model`` has labels and, if it says what it was trained for, was trained on them."""
    return model.num_classes > 0 and (model.card is None or model.card.classifies)


def check_classifies(model: EnergyModel, images: Images) -> None:
    """Whether labels can be predicted and compared.

    Raises:
        UserError: if the model or the images have no labels, or they have different ones.
    """
    if not classifies(model):
        raise UserError(
            "this model was trained without labels and cannot classify: leave out the suites "
            "classify and calibration, or train with an objective that has ce or cdsm"
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


def _predict(model: EnergyModel, batch: Batch, sigma: float) -> Predictions:
    assert batch.labels is not None
    log_posterior = model(batch.y, sigma).log_posterior()
    posterior = log_posterior.exp()
    confidence, predicted = posterior.max(dim=1)
    own = batch.labels[:, None]
    off = posterior.scatter_add(1, own, -torch.ones_like(posterior[:, :1]))
    if not posterior.isfinite().all():
        raise UserError(
            "this model gives probabilities that are not finite: its training diverged, or its "
            "weights are damaged"
        )
    nll = -log_posterior.gather(1, own).squeeze(1)
    columns = (batch.labels, predicted, confidence, nll, off.square().sum(1))
    return Predictions(*(column.cpu() for column in columns))
