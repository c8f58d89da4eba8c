"""What chains start from, and are compared with: a run's images and its replay buffer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ebmkit.energy import ScoreModel
from ebmkit.errors import UserError
from ebmkit.sampling.buffer import ReplayBuffer
from ebmkit.sampling.jobs.settings import BUFFER, SamplingSettings
from ebmkit.storage.hdf5 import holds, open_hdf5
from ebmkit.training import DataConfig, RunFolder, resolve
from ebmkit.training.setup import Split, images_of

__all__ = ["Sources", "at_hand", "buffer_of", "data_of", "sources_for"]

MOST = 10_000
"""Training images that starts are drawn from, at the most."""

COMPARED = 1000
"""Held-out images whose energies are compared with those of samples, at the most."""

OF_DATA = ("data", "seeds", "mean")


@dataclass(frozen=True)
class Sources:
    """What a job may look at beside the model.

    Attributes:
        train: training images (M, C, H, W) and labels, for starts from them.
        buffer: the run's replay buffer.
        held_out: held-out images (M, C, H, W), to compare energies with.
        note: why there are none of those, if so.
    """

    train: tuple[Tensor, Tensor | None] | None = None
    buffer: ReplayBuffer | None = None
    held_out: Tensor | None = None
    note: str = ""


def sources_for(
    run: Path,
    model: ScoreModel,
    settings: SamplingSettings,
    dataset: str | None = None,
    data_dir: Path | None = None,
    progress: bool = False,
) -> Sources:
    """What the job with ``settings`` needs of ``run``.

    Raises:
        UserError: if chains are to start from what there is not, or from images of another shape.
    """
    train = None
    if settings.start in OF_DATA:
        source = data_of(run, dataset, data_dir)
        ours = (
            data_dir is not None or source.data_dir is None
        )  # into a run's own nothing is fetched
        images = images_of(source, "train", progress, download=ours).spread(MOST)
        train = _checked(next(iter(images.batches(MOST))), settings)
    buffer = buffer_of(run, model) if settings.start == BUFFER else None
    if buffer is not None and tuple(buffer.images.shape[1:]) != settings.shape:
        raise UserError(
            f"the replay buffer holds images of {tuple(buffer.images.shape[1:])}, not "
            f"{settings.shape}: leave the image size out"
        )
    held_out, note = None, ""
    try:
        held_out = _held_out(data_of(run, dataset, data_dir), settings)
    except UserError as error:  # a comparison is no reason to refuse samples
        note = str(error)
    return Sources(train, buffer, held_out, note)


def data_of(run: Path, dataset: str | None = None, data_dir: Path | None = None) -> DataConfig:
    """The run's data set, or the one that is named.

    Raises:
        UserError: if none is named and the run does not say which it was trained on.
    """
    if not (run / "config.yaml").is_file():
        if dataset is None:
            raise UserError(
                f"{str(run)!r} does not say what it was trained on (it holds no config.yaml, as "
                "imported models do): name the data by --dataset and --data-dir"
            )
        return DataConfig(name=dataset, data_dir=data_dir)
    own = resolve(RunFolder.open(run).config()).dataset
    if dataset not in (None, own.name):
        return DataConfig(name=str(dataset), data_dir=data_dir, unreadable=own.unreadable)
    return own.model_copy(update={"data_dir": data_dir or own.data_dir})


def at_hand(run: Path, dataset: str | None = None, data_dir: Path | None = None) -> bool:
    """Whether the run's training images can be had, without fetching them."""
    try:
        config = data_of(run, dataset, data_dir)
        images_of(config, "train", download=False)
    except UserError:
        return False
    return True


def buffer_of(run: Path, model: ScoreModel) -> ReplayBuffer:
    """The chains that the training of ``run`` ended with, on the CPU.

    Raises:
        UserError: if the run has none, or the file is damaged.
    """
    state = RunFolder(run).load_checkpoint() or {}
    content = state.get("buffer")
    if content is None:
        raise UserError(
            f"{str(run)!r} has no replay buffer: objectives with ml or cml (jem) train with one; "
            "start from noise, uniform, data or seeds"
        )
    what = f"the replay buffer of {str(run)!r}"
    images = ReplayBuffer.read_images(content, what)
    with open_hdf5(content, what) as file:
        labelled = holds(file, "labels")
    return ReplayBuffer(images, model.num_classes if labelled else 0)


def _held_out(config: DataConfig, settings: SamplingSettings) -> Tensor:
    split: Split = "validation"
    images = images_of(config, split, download=False).first(COMPARED)
    return _checked(next(iter(images.batches(COMPARED))), settings)[0]


def _checked(
    batch: tuple[Tensor, Tensor | None], settings: SamplingSettings
) -> tuple[Tensor, Tensor | None]:
    if tuple(batch[0].shape[1:]) != settings.shape:
        raise UserError(
            f"images of the data set are {tuple(batch[0].shape[1:])} and samples are to be "
            f"{settings.shape} (channels, height, width): give --dataset, or another --image-size"
        )
    return batch


def choose_slots(
    buffer: ReplayBuffer, count: int, labels: Tensor | None, generator: torch.Generator
) -> Tensor:
    """Slots (count,) of ``buffer``, different ones as long as there are enough."""
    if labels is not None and buffer.num_classes:
        return buffer.choose(count, generator, labels)
    order = torch.randperm(len(buffer), generator=generator)
    return order[torch.arange(count) % len(buffer)]
