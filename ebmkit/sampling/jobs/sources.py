"""Inputs of a sampling job besides the model: images, the replay buffer, and a guide."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ebmkit.compile import Inference, device_of, wrap_channels_last
from ebmkit.data import AnyImages
from ebmkit.data.imagesets import fingerprint
from ebmkit.energy import EnergyModel, ScoreModel
from ebmkit.errors import UserError, unknown_name
from ebmkit.guidance import (
    CLASSIFIER_FREE,
    GuidanceConfig,
    GuidedModel,
    check_guide,
    class_energies,
    guided_model,
    make_guidance,
    stored_energies,
)
from ebmkit.models import load, weights_digest
from ebmkit.pretrained import results_folder
from ebmkit.sampling.base import clean_level
from ebmkit.sampling.entry import ReplayBuffer, gaussians_of
from ebmkit.sampling.jobs.settings import BUFFER, SamplingSettings, class_names_of
from ebmkit.storage.hdf5 import holds, open_hdf5
from ebmkit.training import DataConfig, RunFolder, resolve
from ebmkit.training.setup import images_of

MAX_TRAIN, MAX_HELD_OUT = 10_000, 1000
"""Maximum number of training images for starting points, and of held-out images whose energies are
compared with those of samples."""


@dataclass(frozen=True)
class Sources:
    """Inputs of a job besides the model."""

    train: tuple[Tensor, Tensor | None] | None = None  # images (M, C, H, W), labels: to start from
    buffer: ReplayBuffer | None = None
    held_out: Tensor | None = None  # images (M, C, H, W) to compare energies with
    note: str = ""  # why there are no held-out images


def sources_for(
    run: Path,
    model: ScoreModel,
    settings: SamplingSettings,
    dataset: str | None = None,
    data_dir: Path | None = None,
    progress: bool = False,
) -> Sources:
    """Load the inputs that a job with ``settings`` needs from ``run``.

    Chains from ``class_gaussian`` need no images if ``model`` stores its Gaussians, unless a
    ``dataset`` is named.

    Raises:
        UserError: if the images or the buffer to start from are missing or have another shape.
    """
    train = buffer = held_out = None
    note = ""
    stored = dataset is None and gaussians_of(model, settings.shape) is not None
    if settings.start in ("data", "mean") or (settings.start == "class_gaussian" and not stored):
        train = training_images(run, model, settings, dataset, data_dir, progress)
    if settings.start == BUFFER:
        buffer = buffer_of(run, model)
        if tuple(buffer.images.shape[1:]) != settings.shape:
            raise UserError(
                f"the replay buffer holds images of {tuple(buffer.images.shape[1:])}, not "
                f"{settings.shape}: leave the image size out"
            )
    try:
        own = images_of(data_of(run, dataset, data_dir), "validation", download=False)
        held_out, _ = _first_batch(own.first(MAX_HELD_OUT), MAX_HELD_OUT, settings)
    except UserError as error:  # the comparison is optional
        note = str(error)
    return Sources(train, buffer, held_out, note)


def training_images(
    run: Path,
    model: ScoreModel,
    settings: SamplingSettings,
    dataset: str | None = None,
    data_dir: Path | None = None,
    progress: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Training images (M, C, H, W) to start from, and their labels; a `UserError` if missing."""
    images = _training_images(data_of(run, dataset, data_dir), data_dir, progress)
    images = images.with_classes(class_names_of(model))
    return _first_batch(images.spread(MAX_TRAIN), MAX_TRAIN, settings)


def data_of(run: Path, dataset: str | None = None, data_dir: Path | None = None) -> DataConfig:
    """Return the data set called ``dataset``, or that of the run.

    Raises:
        UserError: if none is named and the run does not state the data it was trained on.
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
    """Whether the training images of the run are available without a download."""
    try:
        images_of(data_of(run, dataset, data_dir), "train", download=False)
    except UserError:
        return False
    return True


def buffer_of(run: Path, model: ScoreModel) -> ReplayBuffer:
    """Load the replay buffer from the end of the training of ``run``, on the CPU.

    Raises:
        UserError: if the run has none, or the file is damaged.
    """
    content = (RunFolder(run).load_checkpoint() or {}).get("buffer")
    if content is None:
        raise UserError(
            f"{str(run)!r} has no replay buffer: objectives with ml or cml (jem) train with one; "
            "start from noise, uniform, data or class_gaussian"
        )
    what = f"the replay buffer of {str(run)!r}"
    images = ReplayBuffer.read_images(content, what)
    with open_hdf5(content, what) as file:
        labelled = holds(file, "labels")
    return ReplayBuffer(images, model.num_classes if labelled else 0)


def _training_images(config: DataConfig, data_dir: Path | None, progress: bool) -> AnyImages:
    """Training images; nothing is downloaded to a folder that only the run names."""
    download = data_dir is not None or config.data_dir is None
    return images_of(config, "train", progress, download=download)


def _first_batch(
    images: AnyImages, count: int, settings: SamplingSettings
) -> tuple[Tensor, Tensor | None]:
    batch = next(iter(images.batches(count)))
    if tuple(batch[0].shape[1:]) != settings.shape:
        raise UserError(
            f"images of the data set are {tuple(batch[0].shape[1:])} and samples are to be "
            f"{settings.shape} (channels, height, width): give --dataset, or another --image-size"
        )
    return batch


# --- guides --------------------------------------------------------------------------------------

VIEWS = ("noisy", "x_t", "x0_hat", "x0_hat-backpropagate")
"""Values of ``--view``; with ``-backpropagate`` the gradient is computed through the denoiser."""


def parse_guidance(
    guide: Path | None,
    guidance: str | None = None,
    scale: float | None = None,
    schedule: str | None = None,
    view: str | None = None,
    start: float | None = None,
    options: Mapping[str, Any] | None = None,
) -> GuidanceConfig | None:
    """Guidance settings from options of `ebmkit sample`; None without guidance.

    Raises:
        UserError: if options are given without a guide, or one is not legal.
    """
    given: dict[str, Any] = {"guidance": guidance, "scale": scale, "schedule": schedule}
    given |= {"view": view, "start": start, "options": dict(options or {}) or None}
    given = {name: value for name, value in given.items() if value is not None}
    if guide is None and guidance != CLASSIFIER_FREE:
        if given:
            names = {"options": "guide-set", "start": "guide-start"}
            first = names.get(first := next(iter(given)), first)
            raise UserError(
                f"--{first} needs a guide: give the run of a classifier by --guide, or take "
                f"--guidance {CLASSIFIER_FREE} for a model with labels"
            )
        return None
    if guide is not None and guidance == CLASSIFIER_FREE:
        raise UserError(f"{CLASSIFIER_FREE} guidance takes no guide: leave --guide out")
    if view is not None:
        if view not in VIEWS:
            raise unknown_name("view", view, VIEWS)
        given["view"] = view.removesuffix("-backpropagate")
        given["backpropagate"] = view != given["view"]
    return make_guidance(**given)


def guide_by(
    base: ScoreModel,
    config: GuidanceConfig,
    guide: Path | None = None,
    weights: str = "last",
    run: Path | None = None,
    dataset: str | None = None,
    data_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    bars: bool = False,
    inference: Inference | None = None,
) -> tuple[GuidedModel, dict[str, Any]]:
    """Return ``base`` guided by the model in folder ``guide``, and fields of `SamplingSettings`.

    Without ``guide``, guidance is classifier-free. Mean energies are computed on ``dataset`` in
    ``data_dir``, by default the data set of the guide, or of ``run``, the folder of the base.
    Meanwhile ``progress`` is called with (images done, all images). ``bars`` shows progress bars of
    reading. ``inference`` sets precision and compilation of the guide; None: eager, float32.

    Raises:
        UserError: if the folder holds no model, base and guide do not fit, or the images for mean
            energies are not available.
    """
    if guide is None:
        return guided_model(base, None, config), {"guidance": config}
    model = load(guide, device=str(device_of(base)), weights=weights)
    check_guide(model)
    assert isinstance(model, EnergyModel)
    if inference is not None:
        model = wrap_channels_last(model, inference)
    means = None
    if config.needs_means:
        # check base and guide before computing energies
        guided_model(base, model, config, [0.0] * model.num_classes)
        own = dataset is not None or (guide / "config.yaml").is_file()
        data = data_of(guide if own or run is None else run, dataset, data_dir)
        images = _training_images(data, data_dir, bars)
        size = model.card.image_size if model.card else None
        if size is not None and tuple(images.image_size) != tuple(size):
            raise UserError(
                f"the guide was trained on images of {size[0]}x{size[1]} and those of {data.name} "
                f"are {images.image_size[0]}x{images.image_size[1]}: name its own by --dataset"
            )
        means = stored_energies(
            guide,
            data.name,
            fingerprint(images),
            model.weights_sha256 or weights_digest(guide, weights),
            lambda: class_energies(model, images, progress),
            clean_level(model),
        ).energy
    guided = guided_model(base, model, config, means)
    return guided, {
        "guidance": config.model_copy(update={"view": guided.view}),
        "guide": results_folder(guide).resolve().name,
        "guide_weights": weights,
        "guide_digest": model.weights_sha256 or "",
        "guide_means": None if guided.means is None else list(guided.means),
    }
