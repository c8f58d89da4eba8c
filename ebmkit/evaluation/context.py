r"""What is evaluated and how: model, images, noise levels, seed; shared by all suites.

Noise at level sigma is drawn on the CPU, image after image, from one generator per (seed, sigma).
So the n-th image gets the same noise whatever the model, the device, the batch size, or a limit on
the number of images.

A suite measures images one by one and then sums up. Of W processes the r-th measures batches r,
r + W, ...; the columns of measures, one entry per image, are gathered and put in order, so that
each process sums up what a single one would have.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, Self, TypeVar

import torch
from pydantic import BaseModel
from torch import Tensor

from ebmkit.compile import Inference, device_of, unwrapped
from ebmkit.distributed import DistributedContext
from ebmkit.energy import EnergyModel, ScoreModel
from ebmkit.errors import UserError
from ebmkit.randomness import hashed_generator

K = TypeVar("K", bound=Hashable)
O = TypeVar("O", bound=BaseModel)

SIGMAS = (15 / 255, 25 / 255, 50 / 255)
"""Noise levels at which denoising is measured, image units."""

NOISE_LEVELS = tuple(s / 255 for s in (0, 5, 10, 20, 30, 50, 75, 100))
"""Noise levels at which classification is measured, image units."""


class Images(Protocol):
    """The side of a set of images that an evaluation needs; `ebmkit.data.ImageSet` is one."""

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


class Batch(NamedTuple):
    """Images x, noisy images y = x + sigma * eps, both (B, C, H, W), labels (B,), if any, and the
    number of the first image."""

    x: Tensor
    y: Tensor
    labels: Tensor | None
    number: int = 0


def noise_generator(seed: int, sigma: float) -> torch.Generator:
    """The generator of the noise at level ``sigma`` (image units)."""
    return hashed_generator("evaluation noise", str(seed), f"{sigma:.9g}")


def noisy_batches(
    images: Images,
    sigma: float,
    seed: int = 0,
    batch_size: int = 250,
    device: torch.device | str = "cpu",
    world: DistributedContext | None = None,
) -> Iterator[Batch]:
    """All ``images`` in order, noisy at level ``sigma``, on ``device``; at 0 the clean ones.

    Of several processes each gets every W-th batch; the noise of the others is drawn all the same.
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
            yield Batch(x.to(device), y.to(device), labels, first)
        first += len(x)


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
        advance: called with the number of images more that are done.
        left: how many images are left to measure, over all passes of a suite.
        inference: how the model is computed, which may be a wrapper.
        measured: tensors that a suite measured and its plots show, beside the document.
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
    _predictions: dict[float, dict[str, Tensor]] = field(default_factory=dict)

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

    def model_in(self, precision: Literal["single", "double"]) -> ScoreModel:
        """`exact_model`, or a copy of it in float64."""
        model = self.exact_model
        return copy.deepcopy(model).double() if precision == "double" else model

    def option(self, kind: type[O]) -> O:
        """The settings of class ``kind`` that were given, or its defaults."""
        found = self.options.get(kind)
        return found if isinstance(found, kind) else kind()

    def first(self, count: int) -> Images:
        """The first ``count`` images, or all if they are fewer."""
        return self.images.first(min(count, len(self.images)))

    def columns(
        self,
        sigma: float,
        measure: Callable[[Batch], Mapping[K, Tensor]],
        images: Images | None = None,
        batch_size: int | None = None,
        passes: float = 1,
    ) -> dict[K, Tensor]:
        """``measure`` of all images at noise level ``sigma``; the same noise in every suite.

        Args:
            sigma: image units.
            measure: what it gives has one entry per image of the batch, (B, ...).
            images: others than the context's.
            batch_size: images at a time, if not the context's; processes share batches.
            passes: over the context's images that this counts as, for the progress bar, which
                ``measure`` may move itself (`skip`) by its share of them.

        Returns:
            Its columns over all images, (N, ...), on the CPU; the same in every process.
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
            done = min(count, done + share)  # with what the others do meanwhile
            self.skip(total * done // count - (before - self.left))
            if len(own) > 1 and total:  # the first warms up
                ahead = self.left * count / total
                self.inference.expect(seconds * ahead / (len(batch.x) * self.world.size))
        self.skip(total - (before - self.left))
        everyone = self.world.gather(own)
        batches = [part[k] for k in range(len(everyone[0])) for part in everyone if k < len(part)]
        return {key: torch.cat([columns[key] for columns in batches]) for key in batches[0]}

    def predictions(self, sigma: float) -> dict[str, Tensor]:
        """What the classifier predicts at noise level ``sigma``; computed once.

        Returns:
            Of each image, (N,), on the CPU: ``labels``, the true ones; ``predicted``, the most
            probable label; whether it is ``right``; ``confidence``, its probability; ``nll``,
            -log p(c|y) of the true label, nats; ``brier``, the sum over labels of
            (p(k|y) - 1[k = c])^2, 0 to 2.

        Raises:
            UserError: if a probability is NaN or Inf.
        """
        if sigma in self._predictions:
            self.skip(len(self.images))
            return self._predictions[sigma]
        model = self.model
        assert isinstance(model, EnergyModel)
        found = self.columns(sigma, lambda batch: _predict(model, batch, sigma))
        if not found["brier"].isfinite().all():
            raise UserError(
                "this model gives probabilities that are not finite: its training diverged, or its "
                "weights are damaged"
            )
        self._predictions[sigma] = found
        return found

    def skip(self, count: int) -> None:
        """Report to the progress bar that ``count`` images more are done."""
        self.left -= count
        self.advance(count)


def _predict(model: EnergyModel, batch: Batch, sigma: float) -> dict[str, Tensor]:
    assert batch.labels is not None
    log_posterior = model.energies(batch.y, sigma).log_posterior()
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
