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
from ebmkit.models.heads import trained_energies
from ebmkit.objectives import ClassificationConfig, TrainingLoss, parse_objective
from ebmkit.parallel import DistributedContext
from ebmkit.training.attacks import Attacks, attack_terms
from ebmkit.training.averaging import exponential_average
from ebmkit.training.checks import shapes, trained_size
from ebmkit.training.config import TrainConfig
from ebmkit.training.cost import Effort
from ebmkit.training.engine import TrainingStep
from ebmkit.training.negatives import Negatives, likelihood_terms
from ebmkit.training.optim import optimizer_flops, states_of
from ebmkit.training.run_stats import Budget

__all__ = [
    "make_attacks",
    "make_average",
    "make_budget",
    "make_card",
    "make_loss",
    "make_negatives",
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
        training: False to validate: without objectives that need negatives, and without smoothing
            of labels.
    """
    terms, settings = parse_objective(config.objective), config.terms
    if not training:
        terms = tuple(term for term in terms if term.objective.likelihood is None)
        settings = settings.model_copy(update={"ce": ClassificationConfig()})
    return TrainingLoss(model, terms, config.balance, config.draw_from, settings)


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
            config.negatives.steps if loss.needs_negatives else 0,
            1 if config.optimizer.sharpness is None else 2,
            optimizer_flops(loss.model, config.optimizer),
        ),
        described,
    )


def make_card(loss: TrainingLoss, config: TrainConfig, images: AnyImages) -> ModelCard:
    """What the model is trained for."""
    matching = [term.name for term in loss.terms if term.objective.needs_score]
    denoise = stream_config(config, loss.stream_of[matching[0]]) if matching else None
    card = ModelCard(
        dataset=images.name,
        objective=config.objective,
        image_size=trained_size(config, images),
        channels=images.channels,
        class_names=list(images.class_names),
        sigma_range=denoise.noise.range if denoise else None,
        classifies=isinstance(loss.model, EnergyModel)
        and any(term.objective.needs_labels for term in loss.terms),
        attack=_attack_text(loss),
    )
    return card.model_copy(update={"energies": trained_energies(card)})


def _attack_text(loss: TrainingLoss) -> str:
    """Norm and radius of the attack, as in "l2 0.5"; empty where there is none."""
    configs = [loss.settings.attack(term.name) for term in attack_terms(loss).values()]
    return next((f"{c.norm} {c.eps:.6g}" for c in configs if c.eps), "")


def make_attacks(
    loss: TrainingLoss, config: TrainConfig, step: TrainingStep, world: DistributedContext
) -> Attacks:
    """The attacks of objectives that train under one, computed as ``step`` is."""
    inference = make_inference(step.device, step.precision, config.compute.compile)
    return Attacks(loss, config.seed, inference, world, config.compute.accumulate)


def make_negatives(
    loss: TrainingLoss,
    config: TrainConfig,
    images: AnyImages,
    step: TrainingStep,
    world: DistributedContext,
) -> Negatives:
    """The chains of an objective that needs samples of the model, computed as ``step`` is."""
    stream = stream_config(config, loss.stream_of[likelihood_terms(loss)[0].name])
    inference = make_inference(step.device, step.precision, config.compute.compile)
    return Negatives(loss, config.negatives, images, stream, config.seed, inference, world)
