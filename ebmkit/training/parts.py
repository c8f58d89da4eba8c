"""What a trainer is made of, each part from the configuration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim.swa_utils import AveragedModel

from ebmkit.card import ModelCard
from ebmkit.compile import make_inference
from ebmkit.data import AnyImages, Stream, StreamConfig
from ebmkit.data.schedule import Stage
from ebmkit.energy import EnergyModel, ScoreModel
from ebmkit.models import ModelConfig
from ebmkit.objectives import TrainingLoss, parse_objective
from ebmkit.objectives.base import Prepare
from ebmkit.parallel import DistributedContext
from ebmkit.training.averaging import exponential_average
from ebmkit.training.checks import shapes, trained_size
from ebmkit.training.config import TrainConfig
from ebmkit.training.cost import Effort
from ebmkit.training.engine import TrainingStep
from ebmkit.training.optim import optimizer_flops, states_of
from ebmkit.training.run_stats import Budget

__all__ = [
    "make_average",
    "make_budget",
    "make_card",
    "make_loss",
    "make_preparations",
    "make_stream",
    "stream_config",
]


def stream_config(config: TrainConfig, name: str) -> StreamConfig:
    """The configuration of the stream called ``name``."""
    found: StreamConfig = getattr(config.streams, name)
    return found


def make_loss(model: ScoreModel, config: TrainConfig, training: bool = True) -> TrainingLoss:
    """Model and objectives.

    Args:
        model: to train, or to validate.
        config: the run's.
        training: False to validate: with the losses of held-out images (`Term.for_validation`).
    """
    terms = parse_objective(config.objective, config.objective_settings())
    if not training:
        terms = tuple(own for term in terms if (own := term.for_validation()) is not None)
    return TrainingLoss(model, terms, config.balance, config.draw_from)


def make_stream(
    config: TrainConfig,
    name: str,
    images: AnyImages,
    device: torch.device,
    world: DistributedContext,
) -> Stream:
    """The stream called ``name``, this process's share of it."""
    return Stream(
        images,
        stream_config(config, name),
        name,
        config.seed,
        device,
        workers=config.dataset.workers,
        rank=world.rank,
        world_size=world.size,
        parts=config.compute.accumulate,
        steps=config.steps,
    )


def make_average(model: ScoreModel, config: TrainConfig) -> AveragedModel | None:
    """The averaged weights, where they are asked for."""
    decay = config.optimizer.ema
    if decay is None:
        return None
    return exponential_average(model, decay, config.optimizer.ema_warmup)


def make_budget(
    loss: TrainingLoss,
    config: TrainConfig,
    stages: Sequence[Stage],
    images: AnyImages,
    world: DistributedContext,
    built_from: ModelConfig | None = None,
) -> Budget:
    """The steps of the run, to be counted; ``built_from`` describes the model, if it can be."""
    device = next(loss.parameters()).device
    described = None
    if built_from is not None:
        described = f"{device} {built_from.model_dump_json()} {config.model_dump_json()}"
    return Budget(
        loss,
        [(stage, shapes(stage, images, world.size)) for stage in stages],
        states_of(loss.model, config.optimizer),
        config.compute.accumulate,
        world.size,
        Effort(
            1 if config.optimizer.sharpness is None else 2,
            optimizer_flops(loss.model, config.optimizer),
        ),
        described,
    )


def make_card(loss: TrainingLoss, config: TrainConfig, images: AnyImages) -> ModelCard:
    """What the model is trained for."""
    matching = [term.name for term in loss.terms if term.objective.needs_score]
    denoise = stream_config(config, loss.stream_of[matching[0]]) if matching else None
    return ModelCard(
        dataset=images.name,
        objective=config.objective,
        image_size=trained_size(config, images),
        channels=images.channels,
        class_names=list(images.class_names),
        sigma_range=denoise.noise.range if denoise else None,
        classifies=isinstance(loss.model, EnergyModel)
        and any(term.objective.needs_labels for term in loss.terms),
        **{name: text for term in loss.terms for name, text in term.objective.card.items()},
    )


def make_preparations(
    loss: TrainingLoss,
    config: TrainConfig,
    images: AnyImages,
    step: TrainingStep,
    world: DistributedContext,
) -> dict[str, Prepare]:
    """Term -> what adds columns to its batches, computed as ``step`` is."""
    return loss.preparations(
        seed=config.seed,
        inference=make_inference(step.device, step.precision, config.compute.compile),
        world=world,
        parts=config.compute.accumulate,
        images=images,
        streams={name: stream_config(config, name) for name in loss.streams},
    )
