r"""What an objective is.

An objective turns what a model says of a batch into a loss per image. It never calls the model
itself: it declares what it needs (`Objective`), gets it (`ModelOutput`), and the sum of a run's
objectives (`ebmkit.objectives.TrainingLoss`) shares one forward pass, one score and one compiled
graph among all that draw from the same stream.

An objective that needs more in its batch than clean and noisy images (images under attack, samples
of the model) makes it in its own file: `Objective.prepare` is called once for a run and returns a
function that is called before each step, outside the loss and its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple, Protocol

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


class Scale(Enum):
    """How a loss of one number per image entry is brought to the scale of one per image."""

    PLAIN = "plain"  # a loss per image as it stands
    MEAN = "mean"  # averaged over the d entries
    SUM = "sum"  # summed over the d entries
    BALANCED = "balanced"  # the logarithm of the average (see ebmkit.objectives.loss)


@dataclass(frozen=True)
class ModelOutput:
    """What a loss reads of the model at the noisy images of a batch.

    Attributes:
        energies: of an energy model, unless `Objective.needs_energies` is False.
        score: (B, C, H, W), of the labels that `Objective.score_labels` names; None where no score
            is needed.
        hessian_products: H v for each of `Objective.hessian_vectors`.
        forward: energies at other images (B, C, H, W) and their noise levels (B,) or None, with
            their gradient by the parameters.
    """

    energies: Energies | None
    score: Tensor | None = None
    hessian_products: Sequence[Tensor] = ()
    forward: Callable[[Tensor, Tensor | None], Energies] | None = None

    def energies_at(self, images: Tensor, sigma: Tensor | None) -> Energies:
        """Energies at other images, see `forward`."""
        assert self.forward is not None
        return self.forward(images, sigma)


class Loss(Protocol):
    def __call__(
        self, output: ModelOutput, batch: Batch, /
    ) -> Tensor | tuple[Tensor, Tensor | float]: ...


class ExtraPasses(NamedTuple):
    """Passes of the model that `Objective.prepare` costs for each batch, for predictions of cost.

    Attributes:
        name: what they are, as "7 attack steps".
        gradients: number of gradients by the images.
        of_labels: whether these are of log p(c | y), not of log p(y).
        forwards: number of forward passes beside.
    """

    name: str
    gradients: int
    of_labels: bool = False
    forwards: int = 0


@dataclass(frozen=True)
class RunContext:
    """What `Objective.prepare` knows of a run.

    Attributes:
        model: the model that is trained, on its device.
        term: name of the objective.
        stream: name of the stream that it draws from.
        seed: the run's.
        inference: precision and compilation; ``inference.wrap(model)`` computes as the run does.
        world: the processes that share each batch.
        parts: number of parts a process handles its share in, to need less memory.
        validating: whether the batches are for validation, where nothing is warmed up.
        images: the training images; None in validation.
        streams: configurations of the streams by name; none in validation.
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
    """Makes the columns that an objective adds to the batch of a step, each (B, ...).

    The loss finds them in ``batch.extra``. What is drawn must be a function of (seed, stream, step)
    alone, or a state of its own, as the replay buffer of `ebmkit.objectives.likelihood` is.
    """

    def __call__(self, batch: Batch, step: int, /) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Objective:
    """One objective: what it needs and its loss.

    Attributes:
        description: one line.
        stream: name of the data stream it draws from unless told otherwise.
        loss: from the model's output and a batch to the loss of each image (B,), unreduced over the
            batch; losses summed over entries are *means* over the d entries, `scale` says what
            becomes of them. A pair adds a penalty, a scalar that is minimised and not reported.
        family: of which method it is: ``classification``, ``score matching``, ``diffusion``,
            ``likelihood``, ``adversarial``, or empty; default recipes are chosen by it.
        needs_labels: whether data and model must have labels.
        needs_hard_labels: refuse a stream that mixes labels (MixUp, CutMix), for a loss of
            ``batch.labels``.
        needs_energies: whether the loss reads ``output.energies``, those at the noisy images;
            ``output.energies_at`` works in any case.
        needs_score: whether the loss reads ``output.score``, None otherwise.
        score_labels: from a batch to the labels (B,) whose score is needed, -1 for none; None: the
            score of log p(y).
        hessian_vectors: from a batch to the vectors that the Hessian is multiplied with; None
            where the loss does not differentiate twice.
        scale: how the loss enters the total.
        validates: whether its value on held-out images says anything.
        validation_loss: the loss of held-out images, where it is another.
        prepare: makes, for a run, what adds columns to its batches; None: nothing is added.
        columns: names of the added columns that have the images' shape.
        extra_passes: what `prepare` costs.
        card: facts for the card of the trained model (`ebmkit.card.ModelCard`).
        implies: what follows from it in a run's configuration, made of that before it is validated,
            what was given beside the recipe, and the name of its stream; None: nothing.
        config: class of its settings; None: it has none.
        configure: from settings to the objective under them.
        section: where a run's configuration has its settings; None: in ``terms.NAME``.
    """

    description: str
    stream: str
    loss: Loss
    family: str = ""
    needs_labels: bool = False
    needs_hard_labels: bool = False
    needs_energies: bool = True
    needs_score: bool = False
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
        """Whether log p(y) is learnt, by its gradient or by maximum likelihood."""
        return self.needs_score or self.family == "likelihood"


def mapping_at(values: Any, *path: str) -> Mapping[str, Any]:
    """The mapping at ``path`` of nested mappings; empty where there is none."""
    for key in path:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values if isinstance(values, Mapping) else {}
