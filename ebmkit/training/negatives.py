r"""Negatives: samples of the model being trained, for maximum likelihood.

At each step a batch of chains is taken from a replay buffer, some of them started anew, and moved
by K Langevin steps on the model as it is (JEM, arXiv 1912.03263, algorithm 1),

.. math:: \tilde y \leftarrow \tilde y + \eta\,\nabla_y \log p_\theta(\tilde y) + \tau\,\xi ,

whereupon they go into the loss and back into the buffer. Defaults are JEM's in our units
(`ebmkit.sampling.langevin`). Chains start from uniform noise, or, as JEM++ does (arXiv 2109.09032),
from a Gaussian fitted to the training images of each class.

Slots, new starts and noise are drawn for the whole batch from a generator keyed by (seed, step,
attempt); a process moves its share of the chains, and all of them keep the same buffer. So the
number of processes does not change what is drawn, and a checkpoint needs nothing but the buffer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ebmkit.compile import Inference
from ebmkit.data import AnyImages, Batch, StreamConfig
from ebmkit.energy import EnergyModel, Noise
from ebmkit.errors import UserError
from ebmkit.objectives import Term, TrainingLoss
from ebmkit.parallel import DistributedContext
from ebmkit.randomness import keyed_generator
from ebmkit.sampling.base import normal_like
from ebmkit.sampling.langevin import JEM_NOISE, JEM_STEP, Langevin
from ebmkit.sampling.starts import ClassGaussians, ReplayBuffer

__all__ = ["Negatives", "NegativesConfig", "likelihood_terms"]

FITTED = 10_000
"""Training images that the Gaussians of starting points are fitted to, at the most."""


class NegativesConfig(BaseModel):
    """How negatives are drawn; the defaults are JEM's, for images in [0, 1]."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    steps: int = Field(20, ge=1, description="Langevin steps of a chain at each training step")
    step_size: float = Field(JEM_STEP, gt=0, description="eta, image units squared")
    noise: float = Field(JEM_NOISE, ge=0, description="deviation of a step's noise, image units")
    largest_drift: float | None = Field(
        None, gt=0, description="bound on each entry of eta * score, image units (JEM++)"
    )
    clip: bool = Field(False, description="clip chains to [0, 1] after each step")
    buffer_size: int = Field(10_000, ge=1, description="chains kept; a multiple of the classes")
    restart: float = Field(0.05, ge=0, le=1, description="share of chains started anew")
    start: Literal["uniform", "gaussian"] = Field(
        "uniform", description="where chains start: uniform noise, or class-wise Gaussians (JEM++)"
    )
    training_mode: bool = Field(
        False,
        description="leave the network in training mode meanwhile: BatchNorm of the batch (JEM++)",
    )
    penalty: float = Field(0.0, ge=0, description="alpha of the penalty of squared energies")


def likelihood_terms(loss: TrainingLoss) -> tuple[Term, ...]:
    """The terms of ``loss`` that need negatives."""
    return tuple(term for term in loss.terms if term.objective.likelihood is not None)


class Negatives:
    """Draws the negatives of a run.

    Args:
        loss: model and objectives, on their device.
        config: how they are drawn.
        images: the training images, for Gaussian starts.
        stream: configuration of the stream that the negatives join.
        seed: the run's.
        inference: precision and compilation of the score.
        world: the processes that train together.

    Attributes:
        stream: whose batches they join.
        buffer: the chains.
        steps: Langevin steps of a chain, which a watch may raise.
        attempt: how often the run went back; part of the key of all that is drawn.
        spread: root mean square of the last chains about gray, image units, a scalar tensor.

    Raises:
        UserError: if the model has no density, two objectives want different negatives, the buffer
            does not divide among the classes or is smaller than a batch.
    """

    def __init__(
        self,
        loss: TrainingLoss,
        config: NegativesConfig,
        images: AnyImages,
        stream: StreamConfig,
        seed: int,
        inference: Inference | None = None,
        world: DistributedContext | None = None,
    ) -> None:
        terms = likelihood_terms(loss)
        if not isinstance(loss.model, EnergyModel):
            raise UserError(
                f"objective {terms[0].name!r} needs a log-density, and this network is a plain "
                "denoiser: choose a backbone"
            )
        if len(terms) > 1:
            raise UserError(
                f"objectives {' and '.join(t.name for t in terms)} need negatives of different "
                "densities: choose one of them"
            )
        batch_size, crop = stream.batch_size, stream.augmentation.crop_size
        if stream.phases or (crop is not None and config.start == "gaussian"):
            raise UserError(
                "negatives are of one size, and start from whole images where they start from "
                "Gaussians: leave phases (and crop_size) out of the stream of "
                f"{terms[0].name!r}, or set negatives.start=uniform"
            )
        if batch_size > config.buffer_size:
            raise UserError(
                f"a batch of {batch_size} negatives needs as many chains, and the replay buffer "
                f"holds {config.buffer_size}: raise negatives.buffer_size"
            )
        self.model: EnergyModel = loss.model
        self.config, self.seed, self.world = config, seed, world or DistributedContext()
        self.computed = (inference or Inference()).wrap(self.model)
        self.stream = loss.stream_of[terms[0].name]
        self.conditional = terms[0].objective.needs_labels
        self.steps, self.attempt = config.steps, 0
        self.device = next(loss.parameters()).device
        self.shape = (images.channels, *(images.image_size if crop is None else (crop, crop)))
        self._classes = images.num_classes if self.conditional else 0
        self._gaussians = _fitted(images, self.device) if config.start == "gaussian" else None
        labels = torch.arange(config.buffer_size) * self._classes // config.buffer_size
        generator = keyed_generator(self.device, seed, "negatives", "start")
        start = self._fresh(config.buffer_size, generator, labels.to(self.device))
        self.buffer = ReplayBuffer(start, self._classes)
        self.spread = torch.zeros((), device=self.device)

    def join(self, batches: Mapping[str, Batch], step: int) -> dict[str, Batch]:
        """``batches`` of ``step`` with this process's negatives in the one that needs them."""
        batch = batches[self.stream]
        return {**batches, self.stream: batch._replace(negatives=self.draw(batch, step))}

    def draw(self, batch: Batch, step: int) -> Tensor:
        """Negatives (B, C, H, W) for ``batch``; their chains in the buffer move on."""
        config, world = self.config, self.world
        labels = self._everyone(batch.labels) if self.conditional else None
        total = len(batch.x) * world.size
        own = slice(world.rank * len(batch.x), (world.rank + 1) * len(batch.x))
        generator = keyed_generator(self.device, self.seed, "negatives", step, self.attempt)
        slots = self.buffer.choose(total, generator, labels)
        anew = torch.rand(total, generator=generator, device=self.device) < config.restart
        fresh = self._fresh(total, generator, labels)
        start = torch.where(anew[:, None, None, None], fresh, self.buffer.images[slots])[own]
        moved = self._moved(start, None if labels is None else labels[own], generator, own, total)
        self.buffer.put(slots, self._everyone(moved))
        self.spread = (moved - 0.5).square().mean().sqrt()
        return moved

    def _moved(
        self,
        x: Tensor,
        labels: Tensor | None,
        generator: torch.Generator,
        own: slice,
        total: int,
    ) -> Tensor:
        """Chains ``x`` after the Langevin steps."""
        config, training = self.config, self.model.training

        def score(y: Tensor, sigma: Noise | None = None) -> Tensor:
            return self.computed._score(y, sigma, labels)  # labels are those of the batch

        def normal(y: Tensor, generator: torch.Generator) -> Tensor:
            if len(y) == total:
                return normal_like(y, generator)
            shape = (total, *y.shape[1:])  # the share of what one process would draw
            return torch.randn(shape, generator=generator, device=y.device)[own]

        langevin = Langevin(
            score,
            config.step_size,
            noise_std=config.noise,
            drift_clip=config.largest_drift,
            bounds=(0.0, 1.0) if config.clip else None,
            normal=normal,
        )
        if not config.training_mode:
            self.model.eval()
        try:
            with torch.no_grad():
                state = langevin.init(x)
                for _ in range(self.steps):
                    state, _ = langevin.step(state, generator)
        finally:
            self.model.train(training)
        return state.x

    def _fresh(self, count: int, generator: torch.Generator, labels: Tensor | None) -> Tensor:
        if self._gaussians is not None:
            return self._gaussians.sample(count, generator, labels if self._classes else None)
        return torch.rand((count, *self.shape), generator=generator, device=self.device)

    def _everyone(self, rows: Tensor | None) -> Tensor:
        """The rows of all processes, by rank."""
        assert rows is not None
        if self.world.size == 1:
            return rows
        return torch.cat([part.to(self.device) for part in self.world.gather(rows.cpu())])


def _fitted(images: AnyImages, device: torch.device) -> ClassGaussians:
    floats, labels = next(iter(images.spread(FITTED).batches(FITTED)))
    return ClassGaussians(floats.to(device), None if labels is None else labels.to(device))
