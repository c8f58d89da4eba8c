"""From a configuration to a `Trainer`: the parts the command line puts together."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal

import torch

from ebmkit.data import AnyImages, load_dataset
from ebmkit.data.imagesets import Faults
from ebmkit.energy import ScoreModel
from ebmkit.models import ModelConfig
from ebmkit.objectives import parse_objective
from ebmkit.objectives.loss import check_labels
from ebmkit.parallel import DistributedContext
from ebmkit.training.checks import trained_size
from ebmkit.training.config import DataConfig, TrainConfig
from ebmkit.training.runs import RunFolder
from ebmkit.training.trainer import Reporter, Trainer

__all__ = ["assemble", "build_model", "images_of"]

Split = Literal["train", "validation", "test"]


def images_of(
    config: DataConfig, split: Split, progress: bool = False, download: bool = True
) -> AnyImages:
    """The images of ``split``, as ``config`` names them.

    Args:
        config: the data set.
        split: of it.
        progress: whether to show bars while data is downloaded or read.
        download: fetch CIFAR if it is not there.

    Raises:
        UserError: if the data set is unknown, missing or incomplete.
    """
    return load_dataset(
        config.name,
        config.data_dir,
        split,
        image_size=config.image_size,
        download=download,
        progress=progress,
        faults=Faults(config.unreadable == "skip", config.links == "follow"),
    )


def build_model(config: TrainConfig, images: AnyImages) -> ScoreModel:
    """The model that ``config`` describes for ``images``, with weights drawn from its seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = model_config(config, images).build()
    return model


def model_config(config: TrainConfig, images: AnyImages) -> ModelConfig:
    """The model's configuration, with what follows from the images filled in."""
    facts = {
        "in_channels": images.channels,
        "num_classes": images.num_classes,
        "reference_size": config.model.reference_size or trained_size(config, images),
    }
    return ModelConfig.model_validate(config.model.model_dump() | facts)


def assemble(
    config: TrainConfig,
    run: RunFolder | None = None,
    reporter: Reporter | None = None,
    progress: bool = False,
    world: DistributedContext | None = None,
) -> Trainer:
    """Everything built: load the data, build the model, and go on from the run's checkpoint.

    Args:
        config: the resolved configuration.
        run: where to save, and to go on from if it holds a checkpoint.
        reporter: who is told of metrics.
        progress: whether to show bars while data is downloaded or read.
        world: the processes that train together; only the first is given a run and a reporter.

    Raises:
        UserError: as the parts do.
    """
    world = world or DistributedContext()
    if not world.first:
        world.broadcast(None)  # where data must be fetched, one does it
    train = images_of(config.dataset, "train", progress)
    if world.first:
        world.broadcast(None)
    if config.dataset.limit is not None:
        train = train.first(config.dataset.limit)
    for term in parse_objective(config.objective):  # before the network, whose head may want some
        check_labels(term.name, term.objective, train.num_classes)
    validation = None
    if config.validation_images:
        validation = images_of(config.dataset, "validation").first(config.validation_images)
    trainer = Trainer(
        build_model(config, train),
        config,
        train,
        validation,
        run,
        model_config(config, train),
        reporter,
        world,
    )
    if trainer.device.type == "cpu":  # where running out of memory ends the process unasked
        trainer.budget.check()
    with run.held() if run is not None else nullcontext():
        checkpoint = world.broadcast(run.load_checkpoint() if run is not None else None)
        if checkpoint is not None:
            trainer.restore(checkpoint)
        elif run is not None:
            run.forget_after(0)
    return trainer
