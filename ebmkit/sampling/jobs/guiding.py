"""From what a user asks for to a guided model, and what a sampling job writes down of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ebmkit.compile import Inference, device_of, laid_out
from ebmkit.data.identity import fingerprint
from ebmkit.energy import EnergyModel, ScoreModel
from ebmkit.errors import UserError, unknown_name
from ebmkit.guidance.config import CLASSIFIER_FREE, GuidanceConfig, make_guidance
from ebmkit.guidance.guides import check_guide
from ebmkit.guidance.means import class_energies, stored_energies, told_level
from ebmkit.guidance.model import GuidedModel, guided_model
from ebmkit.models import load, weights_digest
from ebmkit.sampling.jobs.settings import SamplingSettings
from ebmkit.sampling.jobs.sources import data_of
from ebmkit.training.setup import images_of

__all__ = ["GuidedRun", "default_folder", "guidance_asked", "guide_by", "mean_energies"]

VIEWS = {
    "noisy": ("noisy", False),
    "shrunk": ("shrunk", False),
    "clean": ("clean", False),
    "clean-through": ("clean", True),
}
"""What a guide sees, by the name on the command line, and whether its gradient goes through."""


class GuidedRun(NamedTuple):
    """A guided model, and the fields of `SamplingSettings` that tell of it."""

    model: GuidedModel
    settings: dict[str, Any]


def guidance_asked(
    guide: Path | None,
    guidance: str | None = None,
    scale: float | None = None,
    schedule: str | None = None,
    view: str | None = None,
    late: float | None = None,
    options: Mapping[str, Any] | None = None,
) -> GuidanceConfig | None:
    """The guidance that these options ask for; None if they ask for none.

    Args:
        guide: run folder of the guide; none for classifier-free guidance.
        guidance: a name of `ebmkit.guidance.GUIDES`; energy by default.
        scale: s, or w of classifier-free guidance.
        schedule: in its written form.
        view: noisy, shrunk, clean or clean-through.
        late: share of the noise levels without guidance.
        options: settings of the guide.

    Raises:
        UserError: if options are given without a guide, or one is not legal.
    """
    given = {
        "guidance": guidance,
        "scale": scale,
        "schedule": schedule,
        "view": view,
        "late": late,
        "options": dict(options) if options else None,
    }
    asked = {name: value for name, value in given.items() if value is not None}
    if guide is None and guidance != CLASSIFIER_FREE:
        if asked:
            first = next(iter(asked)).replace("options", "guide-set")
            raise UserError(
                f"--{first} is of guidance, and there is no guide: name a classifier's run by "
                f"--guide, or take --guidance {CLASSIFIER_FREE} of a model with labels"
            )
        return None
    if guide is not None and guidance == CLASSIFIER_FREE:
        raise UserError(f"{CLASSIFIER_FREE} guidance takes no guide: leave --guide out")
    if view is not None:
        if view not in VIEWS:
            raise unknown_name("view", view, VIEWS)
        asked["view"], asked["through"] = VIEWS[view]
    return make_guidance(**asked)


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
) -> GuidedRun:
    """``base`` guided by the model in folder ``guide``.

    Args:
        base: on its device.
        config: how.
        guide: a run folder; None for classifier-free guidance.
        weights: of the guide, last or best.
        run: folder of the base, whose data set stands in where the guide's is not known.
        dataset: to compute mean energies on; None: the one that the guide was trained on.
        data_dir: where its files are.
        progress: told of (images, images in all) while mean energies are computed.
        bars: whether to show bars while data is read.
        inference: how the guide is computed; None: eagerly, in float32.

    Raises:
        UserError: if the folder holds no model, or the two do not fit.
    """
    if guide is None:
        return GuidedRun(guided_model(base, None, config), {"guidance": config})
    model = load(guide, device=str(device_of(base)), weights=weights)
    check_guide(model)
    assert isinstance(model, EnergyModel)
    if inference is not None:
        model = laid_out(model, inference)
    if not config.needs_means:
        guided = guided_model(base, model, config)
    else:
        # base and guide are checked before anything is computed
        guided_model(base, model, config, [0.0] * model.num_classes)
        own = dataset is not None or (guide / "config.yaml").is_file()
        source = guide if own or run is None else run
        means = mean_energies(model, guide, source, weights, dataset, data_dir, progress, bars)
        guided = guided_model(base, model, config, means)
    return GuidedRun(
        guided,
        {
            "guidance": config.model_copy(update={"view": guided.view}),
            "guide": guide.resolve().name,
            "guide_weights": weights,
            "guide_digest": model.weights_sha256 or "",
            "guide_means": None if guided.means is None else list(guided.means),
        },
    )


def mean_energies(
    model: EnergyModel,
    run: Path,
    source: Path | None = None,
    weights: str = "last",
    dataset: str | None = None,
    data_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    bars: bool = False,
) -> list[float]:
    """Mean E(x) of each label's training images (C,), nats, stored in ``run`` once computed.

    Args:
        model: the guide.
        run: its folder.
        source: run whose data set is taken; None: ``run``.
        weights: which of the guide's were loaded.
        dataset: another data set.
        data_dir: where its files are.
        progress: told of (images, images in all).
        bars: whether to show bars while data is read.

    Raises:
        UserError: if the images cannot be had, or are not the model's.
    """
    data = data_of(source or run, dataset, data_dir)
    ours = data_dir is not None or data.data_dir is None  # into a run's own nothing is fetched
    images = images_of(data, "train", bars, download=ours)
    size = model.card.image_size if model.card else None
    if size is not None and tuple(images.image_size) != tuple(size):
        raise UserError(
            f"the guide was trained on images of {size[0]}x{size[1]} and those of {data.name} are "
            f"{images.image_size[0]}x{images.image_size[1]}: name its own by --dataset"
        )
    found = stored_energies(
        run,
        data.name,
        fingerprint(images),
        model.weights_sha256 or weights_digest(run, weights),
        lambda: class_energies(model, images, progress),
        told_level(model),
    )
    return list(found.energy)


def default_folder(run: Path, settings: SamplingSettings) -> Path:
    """Where samples of ``run`` go if nothing is said: the same settings, the same folder."""
    parts = [settings.sampler]
    if settings.label is not None:
        parts.append(f"label-{settings.label}")
    if settings.guidance is not None:
        parts.append(settings.guidance.guidance)
    mark = hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:8]
    name = "-".join([*parts, mark])
    return run / "samples" / "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
