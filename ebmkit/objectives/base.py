r"""The `Objective` interface.

An objective computes a loss per image from the outputs of a model on a batch. It never calls the
model itself: it declares which outputs it needs (`Objective`) and receives them (`ModelOutput`). So
the sum of a run's objectives (`ebmkit.objectives.TrainingLoss`) shares one forward pass, one score
and one compiled graph among all objectives of a stream.

An objective that needs further columns in its batch (attacked images, samples of the model)
computes them itself: `Objective.prepare` is called once per run and returns a function that is
called before each step, outside the loss and its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ebmkit.compile import Inference
from ebmkit.data import AnyImages, Batch, StreamConfig
from ebmkit.distributed import DistributedContext
from ebmkit.energy import Energies, ScoreModel

__all__ = [
    "ExtraPasses",
    "ModelOutput",
    "Objective",
    "ObjectiveConfig",
    "Prepare",
    "RunContext",
    "Scale",
]


class ObjectiveConfig(BaseModel):
    """Settings of an objective; on the command line ``objective.NAME.FIELD=VALUE``."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    needs_term: ClassVar[bool] = False
    """Whether settings other than the defaults are an error in a run without the objective."""


class Scale(Enum):
    """How a loss with one value per image entry is reduced to one value per image."""

    PLAIN = "plain"  # no reduction: the loss has one value per image
    MEAN = "mean"  # mean over the d entries
    SUM = "sum"  # sum over the d entries
    BALANCED = "balanced"  # logarithm of the mean (see ebmkit.objectives.loss)


@dataclass(frozen=True)
class ModelOutput:
    """Outputs of the model at the noisy images of a batch.

    Attributes:
        energies: energies of an energy model; None if no objective of the stream needs them.
        score: score (B, C, H, W), per image unit, for the labels of `Objective.score_labels`; None
            without `Objective.needs_score`.
        time_score: d log p(y) / d log sigma, (B,), nats; None without `Objective.needs_time_score`.
        hessian_products: Hessian-vector products H v for each of `Objective.hessian_vectors`.
        forward: function from other images (B, C, H, W) and their noise levels (B,) or None to
            energies, differentiable with respect to the parameters.
    """

    energies: Energies | None
    score: Tensor | None = None
    hessian_products: Sequence[Tensor] = ()
    time_score: Tensor | None = None
    forward: Callable[[Tensor, Tensor | None], Energies] | None = None

    def energies_at(self, images: Tensor, sigma: Tensor | None) -> Energies:
        """Energies at other images (see `forward`)."""
        assert self.forward is not None
        return self.forward(images, sigma)


class Loss(Protocol):
    def __call__(
        self, output: ModelOutput, batch: Batch, /
    ) -> Tensor | tuple[Tensor, Tensor | float]: ...


class ExtraPasses(NamedTuple):
    """Passes of the model that `Objective.prepare` adds per batch, for cost estimates.

    Attributes:
        name: description, such as "7 attack steps".
        gradients: number of gradients with respect to the images.
        of_labels: whether these are gradients of log p(c | y) instead of log p(y).
        forwards: number of additional forward passes.
    """

    name: str
    gradients: int
    of_labels: bool = False
    forwards: int = 0


@dataclass(frozen=True)
class RunContext:
    """Facts of a run for `Objective.prepare`.

    Attributes:
        model: model to train, on its device.
        term: name of the objective.
        stream: name of the stream that the objective draws from.
        seed: seed of the run.
        inference: precision and compilation of the run; apply them by ``inference.wrap(model)``.
        world: processes that share each batch.
        parts: number of parts that a process splits its share into, to save memory.
        validating: whether the batches are for validation, which ignores warm-up.
        images: training images; None in validation.
        streams: stream name -> configuration; empty in validation.
    """

    model: ScoreModel
    term: str
    stream: str
    seed: int = 0
    inference: Inference = field(default_factory=Inference)
    world: DistributedContext = field(default_factory=DistributedContext)
    parts: int = 1
    validating: bool = False
    images: AnyImages | None = None
    streams: Mapping[str, StreamConfig] = field(default_factory=dict)


class Prepare(Protocol):
    """Computes the columns that an objective adds to the batch of a step, each (B, ...).

    The loss finds them in ``batch.extra``. They must be functions of (seed, stream, step), or of a
    state that is saved, such as the replay buffer of `ebmkit.objectives.likelihood`.
    """

    def __call__(self, batch: Batch, step: int, /) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Objective:
    """One objective: its requirements and its loss.

    Attributes:
        description: one-line description.
        stream: name of the default data stream.
        loss: function from the model's output and a batch to the loss of each image (B,). A loss
            over the d entries of an image must be their *mean*; `scale` converts it. It may return
            a pair with a scalar penalty, which is minimised and not reported.
        family: method: ``classification``, ``score matching``, ``diffusion``, ``likelihood``,
            ``adversarial``, or empty; selects the default recipe.
        needs_labels: whether data and model must have labels.
        needs_hard_labels: whether the loss uses ``batch.labels``, so that the stream must not mix
            labels (MixUp, CutMix).
        needs_energies: whether the loss uses ``output.energies``, at the noisy images;
            ``output.energies_at`` is always available.
        needs_score: whether the loss uses ``output.score``.
        needs_time_score: whether the loss uses ``output.time_score``.
        needs_levels: whether it compares noise levels, so that the model must take sigma as an
            input, and with a preconditioned model the density can be normalised.
        score_labels: function from a batch to the labels (B,) of the conditional score, -1 for the
            score of log p(y); None: the score of log p(y) for all images.
        hessian_vectors: function from a batch to the vectors v of Hessian-vector products; None:
            no second derivative is needed.
        scale: how the loss enters the total.
        validates: whether its value on held-out images is meaningful.
        validation_loss: loss on held-out images, if it differs from ``loss``.
        prepare: function from a run to a function that adds columns to its batches; None: no
            columns are added.
        columns: names of added columns that have the shape of the images.
        extra_passes: cost of `prepare`.
        card: facts for the card of the trained model (`ebmkit.card.ModelCard`).
        implies: function from a run's configuration before validation, the settings given beside
            the recipe, and the stream name to settings that the objective fixes; None: none.
        config: class of its settings; None: it has no settings.
        configure: function from settings to the objective with these settings.
        section: section of its settings in a run's configuration; None: ``terms.NAME``, on the
            command line ``objective.NAME``.
    """

    description: str
    stream: str
    loss: Loss
    family: str = ""
    needs_labels: bool = False
    needs_hard_labels: bool = False
    needs_energies: bool = True
    needs_score: bool = False
    needs_time_score: bool = False
    needs_levels: bool = False
    score_labels: Callable[[Batch], Tensor] | None = None
    hessian_vectors: Callable[[Batch], list[Tensor]] | None = None
    scale: Scale = Scale.PLAIN
    validates: bool = True
    validation_loss: Loss | None = None
    prepare: Callable[[RunContext], Prepare] | None = None
    columns: tuple[str, ...] = ()
    extra_passes: ExtraPasses | None = None
    card: Mapping[str, str] = field(default_factory=dict)
    implies: Callable[[Mapping[str, Any], Mapping[str, Any], str], dict[str, Any]] | None = None
    config: type[ObjectiveConfig] | None = None
    configure: Callable[[Any], Objective] | None = None
    section: str | None = None

    @property
    def trains_density(self) -> bool:
        """Whether the objective trains log p(y), by score matching or maximum likelihood."""
        return self.needs_score or self.needs_levels or self.family == "likelihood"

    @property
    def needs_noise(self) -> bool:
        """Whether the objective learns from noise of known level."""
        return self.needs_score or self.needs_levels


def mapping_at(values: Any, *path: str) -> Mapping[str, Any]:
    """The mapping at ``path`` of nested mappings; empty if there is none."""
    for key in path:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values if isinstance(values, Mapping) else {}
