r"""Maximum likelihood, with negatives: samples of the model being trained.

The gradient of :math:`-\log p(y)` with respect to the parameters contains that of the intractable
normalising constant, an expectation over the model itself,
:math:`-E_{\tilde y \sim p}[\nabla_\theta \log \tilde p(\tilde y)]` with the unnormalised
:math:`\tilde p`. So the losses are differences,

.. math::
    \text{ml:}  & \quad \log p(\tilde y) - \log p(y) \\
    \text{cml:} & \quad \log p(\tilde y \mid c) - \log p(y \mid c) ,

whose value is not informative (it should stay near 0) and whose gradient is correct if the
*negatives* :math:`\tilde y` are samples of the model. JEM (arXiv 1912.03263, eq. 6-8) is ``ce+ml``,
with the alias ``jem``. A penalty :math:`\alpha\,(e^2(y) + e^2(\tilde y))` of the energies (Du &
Mordatch, arXiv 1903.08689, eq. 7) counteracts their divergence.

Each step takes a batch of chains from a replay buffer, restarts some of them, and updates them by K
Langevin steps on the current model (JEM, algorithm 1),

.. math:: \tilde y \leftarrow \tilde y + \eta\,\nabla_y \log p_\theta(\tilde y) + \tau\,\xi .

The loss uses the result as negatives, and the buffer stores it. Defaults are JEM's in our units
(`ebmkit.sampling.langevin`). Chains start from uniform noise, or, as in JEM++ (arXiv 2109.09032),
from a Gaussian fitted to the training images of each class.

Slots, restarts and noise are drawn for the whole batch from a generator keyed by (seed, step,
attempt). A process updates its share of the chains; all processes hold the same buffer. So the
random numbers do not depend on the number of processes, and a checkpoint needs only the buffer.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ebmkit.class_gaussians import ClassGaussians
from ebmkit.data import Batch
from ebmkit.energy import Energies, EnergyModel, Noise
from ebmkit.errors import UserError
from ebmkit.objectives.base import ExtraPasses, ModelOutput, Objective, ObjectiveConfig, RunContext
from ebmkit.randomness import keyed_generator
from ebmkit.sampling.base import normal_like
from ebmkit.sampling.entry import ReplayBuffer
from ebmkit.sampling.langevin import JEM_NOISE, JEM_STEP, Langevin

__all__ = ["CML", "ML", "Negatives", "NegativesConfig", "log_density_of"]

FITTED = 10_000
"""Maximum number of training images to fit the Gaussians of starting points to."""


class NegativesConfig(ObjectiveConfig):
    """Sampling of negatives; the defaults are JEM's, for images in [0, 1]."""

    steps: int = Field(20, ge=1, description="Langevin steps per chain in each training step")
    step_size: float = Field(JEM_STEP, gt=0, description="step size eta, image units squared")
    noise: float = Field(
        JEM_NOISE, ge=0, description="standard deviation of the noise in a step, image units"
    )
    largest_drift: float | None = Field(
        None, gt=0, description="bound on each entry of eta * score, image units (JEM++)"
    )
    clip: bool = Field(False, description="clip chains to [0, 1] after each step")
    buffer_size: int = Field(
        10_000,
        ge=1,
        description="number of chains in the replay buffer; a multiple of the number of classes",
    )
    restart: float = Field(
        0.05, ge=0, le=1, description="share of chains that restart in each training step"
    )
    start: Literal["uniform", "gaussian"] = Field(
        "uniform",
        description="starting points of chains: uniform noise, or class-wise Gaussians (JEM++)",
    )
    training_mode: bool = Field(
        False,
        description="keep the network in training mode while sampling: BatchNorm uses batch "
        "statistics (JEM++)",
    )
    penalty: float = Field(
        0.0, ge=0, description="alpha, the weight of the penalty of squared energies"
    )


def log_density_of(energies: Energies, labels: Tensor | None) -> Tensor:
    """log p(y), or with ``labels`` log p(y|c), up to a constant, (B,), nats."""
    if labels is None:
        return energies.log_density
    return energies.log_density + energies.at_label(labels)


class Negatives:
    """Draws the negatives of a run; returned by `Objective.prepare` of maximum likelihood.

    Args:
        context: facts of the run, with its training images.
        config: settings of the sampling.
        conditional: whether chains sample log p(y|c).

    Attributes:
        stream: name of the stream whose batches get the negatives.
        buffer: replay buffer of the chains.
        steps: Langevin steps per chain; divergence mitigation may raise them.
        penalty: alpha of the penalty; divergence mitigation may raise it.
        attempt: number of rollbacks of the run; part of the random key.
        spread: root mean square of the last chains about gray, image units, a scalar tensor.

    Raises:
        UserError: if the model has no density, the stream's images change size, the buffer cannot
            be divided equally among the classes or is smaller than a batch.
    """

    def __init__(self, context: RunContext, config: NegativesConfig, conditional: bool) -> None:
        images, stream = context.images, context.streams[context.stream]
        assert images is not None
        if not isinstance(context.model, EnergyModel):
            raise UserError(
                f"objective {context.term!r} needs a log-density, and this network is a plain "
                "denoiser: choose a backbone"
            )
        batch_size, crop = stream.batch_size, stream.augmentation.crop_size
        if stream.phases or (crop is not None and config.start == "gaussian"):
            raise UserError(
                "negatives have a fixed size, and with negatives.start=gaussian that of whole "
                "images: remove phases (and crop_size) from the stream of "
                f"{context.term!r}, or set negatives.start=uniform"
            )
        if batch_size > config.buffer_size:
            raise UserError(
                f"a batch of {batch_size} negatives needs as many chains, and the replay buffer "
                f"holds {config.buffer_size}: raise negatives.buffer_size"
            )
        self.model: EnergyModel = context.model
        self.config, self.seed, self.world = config, context.seed, context.world
        self.computed = context.inference.wrap(self.model)
        self.stream, self.conditional = context.stream, conditional
        self.penalty = config.penalty
        self.steps, self.attempt = config.steps, 0
        self.device = next(self.model.parameters()).device
        self.shape = (images.channels, *(images.image_size if crop is None else (crop, crop)))
        self._classes = images.num_classes if self.conditional else 0
        self._gaussians: ClassGaussians | None = None
        if config.start == "gaussian":
            x, c = next(iter(images.spread(FITTED).batches(FITTED)))
            c = None if c is None else c.to(self.device)
            self._gaussians = ClassGaussians(x.to(self.device), c)
        labels = torch.arange(config.buffer_size) * self._classes // config.buffer_size
        generator = keyed_generator(self.device, self.seed, "negatives", "start")
        start = self._draw_starts(config.buffer_size, generator, labels.to(self.device))
        self.buffer = ReplayBuffer(start, self._classes)
        self.spread = torch.zeros((), device=self.device)

    def __call__(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Columns for ``batch`` at ``step``: this process's negatives, and the penalty's weight."""
        columns = {"negatives": self.draw(batch, step)}
        if self.penalty:
            columns["penalty"] = torch.full((len(batch.x),), self.penalty, device=self.device)
        return columns

    def draw(self, batch: Batch, step: int) -> Tensor:
        """Draw negatives (B, C, H, W) for ``batch``, and store them in the buffer."""
        config, world = self.config, self.world
        labels = self._everyone(batch.labels) if self.conditional else None
        total = len(batch.x) * world.size
        own = slice(world.rank * len(batch.x), (world.rank + 1) * len(batch.x))
        generator = keyed_generator(self.device, self.seed, "negatives", step, self.attempt)
        slots = self.buffer.choose(total, generator, labels)
        anew = torch.rand(total, generator=generator, device=self.device) < config.restart
        fresh = self._draw_starts(total, generator, labels)
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
        """Run the Langevin steps on chains ``x``."""
        config, training = self.config, self.model.training

        def score(y: Tensor, sigma: Noise | None = None) -> Tensor:
            return self.computed._score(y, sigma, labels)  # labels are those of the batch

        def normal(y: Tensor, generator: torch.Generator) -> Tensor:
            if len(y) == total:
                return normal_like(y, generator)
            shape = (total, *y.shape[1:])  # draw for all processes, and take this one's share
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

    def _draw_starts(self, count: int, generator: torch.Generator, labels: Tensor | None) -> Tensor:
        if self._gaussians is not None:
            return self._gaussians.sample(count, generator, labels if self._classes else None)
        return torch.rand((count, *self.shape), generator=generator, device=self.device)

    def _everyone(self, rows: Tensor | None) -> Tensor:
        """Concatenate the rows of all processes, by rank."""
        assert rows is not None
        if self.world.size == 1:
            return rows
        return torch.cat([part.to(self.device) for part in self.world.gather(rows.cpu())])


def _maximum_likelihood(config: NegativesConfig, conditional: bool, what: str) -> Objective:
    def loss(output: ModelOutput, batch: Batch) -> Tensor | tuple[Tensor, Tensor]:
        assert output.energies is not None
        labels = batch.labels if conditional else None
        positive = -log_density_of(output.energies, labels)
        negative = -log_density_of(output.energies_at(batch.extra["negatives"], None), labels)
        if "penalty" not in batch.extra:
            return positive - negative
        penalty = batch.extra["penalty"][0] * (positive.square() + negative.square()).mean()
        return positive - negative, penalty

    return Objective(
        description=f"maximum likelihood of {what} with negatives by Langevin dynamics",
        stream="generate",
        loss=loss,
        family="likelihood",
        needs_labels=conditional,
        needs_hard_labels=conditional,
        validates=False,
        prepare=lambda context: Negatives(context, config, conditional),
        columns=("negatives",),
        extra_passes=ExtraPasses(f"{config.steps} Langevin steps", config.steps),
        config=NegativesConfig,
        configure=lambda config: _maximum_likelihood(config, conditional, what),
        section="negatives",
    )


ML = _maximum_likelihood(NegativesConfig(), False, "log p(y)")
CML = _maximum_likelihood(NegativesConfig(), True, "log p(y|c)")
