"""Settings of a sampling job: everything that its samples depend on."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from ebmkit.energy import ScoreModel
from ebmkit.errors import UserError, unknown_name, validated
from ebmkit.guidance.score import GuidanceConfig
from ebmkit.noise import format_sigma
from ebmkit.objectives import parse_objective
from ebmkit.pretrained import results_folder
from ebmkit.sampling import SAMPLERS
from ebmkit.sampling.base import Sampler, hiding_level, highest_level
from ebmkit.sampling.entry import (
    RENAMED,
    SamplerConfig,
    SamplerEntry,
    Start,
    check_renamed,
    default_sampler,
    find_sampler,
    gaussians_of,
    noise_levels,
    takes_labels,
)
from ebmkit.sampling.jobs.chains import SETTINGS, UNFINISHED
from ebmkit.storage.reading import read_json

BUFFER = "buffer"
"""As sampler: return the chains of the replay buffer without a step. As start: start from them."""

STARTS = (*get_args(Start), "mean", BUFFER)
"""Legal starts: those of samplers, the mean training image with noise, the replay buffer."""


TIMESTEPS = 50
"""Number of timesteps, of 1000, of chains that by default start from stored Gaussians: 10 steps
below 100/255. On digits more steps do not improve the samples."""


class SamplingSettings(BaseModel):
    """Everything that samples depend on; a resumed job must have the same settings.

    Old names in files of earlier versions are replaced by the current ones.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sampler: str = Field(description="a name from `ebmkit list samplers`, or buffer")
    options: dict[str, Any] = Field({}, description="resolved settings of the sampler")
    start: str = Field(description="starting points of the chains")
    count: int = Field(description="number of chains")
    label: str | None = Field(None, description="name or number of a class, or all")
    seed: int = Field(0, ge=0, lt=2**63, description="random seed of starting points and steps")
    batch_size: int = Field(description="number of chains per batch")
    image_size: tuple[int, int] = Field(description="height and width")
    channels: int = Field(description="number of channels: 1 gray, 3 colour")
    weights: str = Field("last", description="which weights: last or best")
    digest: str = Field("", description="digest of the weights")
    dataset: str = Field("", description="data set of the starting points, if any")
    precision: str = Field("fp32", description="precision")
    compile: str = Field("off", description="compile the score: on or off")
    guidance: GuidanceConfig | None = Field(None, description="guidance settings, if guided")
    guide: str = Field("", description="name of the guide's run folder")
    guide_weights: str = Field("", description="which weights: last or best")
    guide_digest: str = Field("", description="digest of the guide's weights")
    guide_means: list[float] | None = Field(
        None, description="mean energy of each label's training images, nats"
    )
    computed_on: str = Field("cpu", description="type of the device")

    @model_validator(mode="before")
    @classmethod
    def _upgrade(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        own = ("sampler", "start")
        values = {k: _today(v) if k in own else v for k, v in values.items()}
        if isinstance(options := values.get("options"), dict):
            values["options"] = {
                _today(k): _today(v) if k == "start" else v for k, v in options.items()
            }
        return values

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of an image, (C, H, W)."""
        return (self.channels, *self.image_size)

    @property
    def batches(self) -> int:
        """Number of batches of chains."""
        return -(-self.count // self.batch_size)

    def rows(self, number: int) -> slice:
        """Chains of batch ``number``."""
        return slice(number * self.batch_size, min((number + 1) * self.batch_size, self.count))

    @property
    def config(self) -> SamplerConfig:
        """Settings of the sampler, parsed from ``options``."""
        kind: type[SamplerConfig] = find_sampler(self.sampler).config
        return validated(kind, self.options, f"settings of sampler {self.sampler!r}")


def _today(name: Any) -> Any:
    return RENAMED.get(name, name) if isinstance(name, str) else name


def default_folder(run: Path, settings: SamplingSettings) -> Path:
    """Return the default folder of samples of ``run``, named after the settings.

    If an earlier version left an unfinished job of the same settings, its folder is returned.
    """
    parts = [settings.sampler]
    if settings.label is not None:
        parts.append(f"label-{settings.label}")
    if settings.guidance is not None:
        parts.append(settings.guidance.guidance)
    digest = hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:8]
    name = "-".join([*parts, digest])
    folder = (
        results_folder(run)
        / "samples"
        / "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
    )
    if not folder.exists():
        for known in sorted(folder.parent.glob(f"*/{UNFINISHED}/{SETTINGS}")):
            with contextlib.suppress(UserError, ValidationError):
                if SamplingSettings.model_validate(read_json(known)) == settings:
                    return known.parents[1]
    return folder


def make_settings(
    model: ScoreModel,
    sampler: str | None = None,
    *,
    count: int = 64,
    label: str | None = None,
    steps: int | None = None,
    start: str | None = None,
    options: Mapping[str, Any] | None = None,
    data_available: bool = False,
    batch_size: int = 64,
    image_size: int | None = None,
    **others: Any,
) -> SamplingSettings:
    """Make the settings of a job and check them against ``model``.

    The arguments are the options of `ebmkit sample`. ``sampler`` is a name in `SAMPLERS` or
    ``buffer``, by default `default_sampler`; ``start`` is one of `STARTS`. ``data_available`` tells
    ``auto`` whether training images are available; ``others`` are fields of `SamplingSettings`.
    Chains that by default start from Gaussians stored with the model are of each class in turn.

    Raises:
        UserError: if the sampler is unknown or does not support the model, or a value is not legal.
    """
    if others.get("guidance") is not None and label is None:
        raise UserError("guidance needs a label: give --label NAME or --label all for each in turn")
    for what, value in (("samples", count), ("chains in a batch", batch_size)):
        if value < 1:
            raise UserError(f"{value} {what} cannot be drawn: take 1 or more")
    hint = "; --sampler buffer exports the chains of a run's replay buffer without a step"
    values = parse_options(options, steps, hint)
    for kind, name, known in (("start", start, STARTS), ("sampler", sampler, (*SAMPLERS, BUFFER))):
        check_renamed(kind, name)
        if name is not None and name not in known:
            raise unknown_name(kind, name, known)
    card = model.card
    if image_size is not None and image_size < 1:
        raise UserError(f"image size {image_size} is not a number of pixels: take 1 or more")
    size = (image_size, image_size) if image_size else card.image_size if card else None
    channels = card.channels if card else 3
    stored = size is not None and gaussians_of(model, (channels, *size)) is not None
    by_default = stored and sampler is None
    by_default = by_default and values.get("start", start) in (None, "auto", "class_gaussian")
    if by_default:
        label = "all" if label is None else label
        values = {"steps": TIMESTEPS} | values
    labels, resolved = parse_labels(model, label, 1), dict[str, Any]()
    if sampler == BUFFER:
        if values or start not in (None, BUFFER):
            raise UserError(
                "--sampler buffer takes no step: leave out --steps, --start and --set, or continue "
                "the chains with --sampler sgld --start buffer"
            )
        start = BUFFER
    else:
        entry = default_sampler(model, by_default) if sampler is None else SAMPLERS[sampler]
        entry.check(model, labels)
        sampler = entry.name
        if start in get_args(Start):
            values["start"] = start
        elif start == "mean":
            values["start"] = "noise"
        if start in (None, "auto"):
            given = values.get("start", entry.config.model_fields["start"].default)
            has_data = data_available or stored
            values["start"] = start = entry.resolve_start(given, model, has_data)
        entry.check_start(start)
        config = validated(entry.config, values, f"settings of sampler {sampler!r}")
        resolved = config.model_dump(mode="json")
        entry.build(model, labels, config)  # raises if a noise level is out of range
    if size is None:
        raise UserError("this model does not say what size it was trained at: give --image-size")
    return SamplingSettings(
        sampler=sampler,
        options=resolved,
        start=str(start),
        count=count,
        label=label,
        batch_size=min(batch_size, count),
        image_size=size,
        channels=channels,
        **others,
    )


def parse_options(
    options: Mapping[str, Any] | None, steps: int | None, hint: str = ""
) -> dict[str, Any]:
    """Merge the options of a sampler on the command line with ``steps``, if given.

    Raises:
        UserError: if ``steps`` is below 1 (the error ends with ``hint``), or a name is an old one.
    """
    values = dict(options or {}) | ({} if steps is None else {"steps": steps})
    for name in values:
        check_renamed("setting", name)
    start = values.get("start")
    check_renamed("start", start if isinstance(start, str) else None)
    steps = values.get("steps", 1)
    if isinstance(steps, int) and steps < 1:
        raise UserError(f"{steps} steps are too few: take 1 or more{hint}")
    return values


def cautions(
    model: ScoreModel, entry: SamplerEntry[Any], sampler: Sampler[Any], settings: SamplingSettings
) -> list[str]:
    """Warnings about the samples that are known before sampling."""
    found = []
    card = model.card
    if card is not None and card.image_size and tuple(card.image_size) != settings.image_size:
        size, own = ("{}x{}".format(*sides) for sides in (settings.image_size, card.image_size))
        found.append(
            f"images of {size} from a model trained at {own}: its samples are best at its own size"
        )
    try:
        terms = parse_objective(card.objective) if card else []
        trains_density = any(term.objective.trains_density for term in terms)
    except UserError:  # an objective that this installation does not know
        trains_density = not (card and card.classifies)
    if card is not None and card.sigma_range is None and not trains_density:
        found.append(
            f"this model was trained by {card.objective or 'an unknown objective'}, which trains "
            "no density: samples show what its classifier responds to, not realistic images"
        )
    mean = {"noise": "gray", "mean": "the mean image"}.get(settings.start)
    if mean is not None and card is not None and card.sigma_range is not None:
        level = noise_levels(sampler)[0]
        level = highest_level(model) if level is None else level
        wide = hiding_level(settings.shape)
        if level < wide:
            found.append(
                f"chains start with noise of {format_sigma(level)} about {mean}, in the trained "
                f"range (up to {format_sigma(card.sigma_range[1])}); images have a distance of "
                f"about {wide:.2g} from their mean, so this noise does not hide the starting "
                "image, and samples vary less than real images: start from class_gaussian, or "
                "train with higher noise"
            )
    if settings.start != BUFFER and settings.options["steps"] < entry.min_fresh_steps:
        found.append(
            f"{settings.options['steps']} steps from {settings.start} are too few, except for "
            "chains that continue a replay buffer: take --start buffer, or --steps 1000"
        )
    return found


# --- labels as people write them -----------------------------------------------------------------


def parse_label(model: ScoreModel, text: str) -> int:
    """Parse a label: the name or the number of a class.

    Raises:
        UserError: if the model has no labels or did not train them, or the label is unknown.
    """
    names = model.card.class_names if model.card else []
    if model.num_classes and not takes_labels(model):
        raise UserError("the labels of this model were never trained: leave out --label")
    if model.num_classes == 0:
        raise UserError("this model was trained without labels: leave out --label")
    if text in names:
        return names.index(text)
    known = f"0 to {model.num_classes - 1}" + (f" or {', '.join(names)}" if names else "")
    try:
        label = int(text)
    except ValueError:
        raise UserError(f"label {text!r} is unknown: this model knows {known}") from None
    if not 0 <= label < model.num_classes:
        raise UserError(f"label {text.strip():.60} is out of range: this model knows {known}")
    return label


def parse_labels(model: ScoreModel, text: str | None, count: int) -> Tensor | None:
    """Labels (count,) int64 of ``count`` chains: the same for all, or each in turn for ``all``.

    Raises:
        UserError: as `parse_label`.
    """
    if text is None:
        return None
    if text == "all":
        parse_label(model, "0")
        return torch.arange(count) % model.num_classes
    return torch.full((count,), parse_label(model, text))


def class_names_of(model: ScoreModel) -> list[str]:
    """Names of the labels: those of the model card, or the numbers."""
    names = model.card.class_names if model.card else []
    return list(names) or [str(c) for c in range(model.num_classes)]
