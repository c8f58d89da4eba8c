"""What a sampling job is: everything that its samples depend on, to the last bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field

from ebmkit.energy import ScoreModel, classifies
from ebmkit.errors import UserError, unknown_name
from ebmkit.guidance.config import GuidanceConfig
from ebmkit.noise import format_sigma
from ebmkit.objectives import parse_objective
from ebmkit.sampling.base import Sampler
from ebmkit.sampling.config import SamplerConfig, Start
from ebmkit.sampling.jobs.labels import parse_labels
from ebmkit.sampling.levels import first_level, highest
from ebmkit.sampling.presets import SAMPLERS, SamplerEntry, find_sampler
from ebmkit.validation import validated

__all__ = [
    "BUFFER",
    "STARTS",
    "SamplingSettings",
    "cautions",
    "config_of",
    "default_sampler",
    "make_settings",
    "no_steps",
]

BUFFER = "buffer"
"""The name that gives the chains of a run's replay buffer as they are, without a step."""

STARTS = (*get_args(Start), "mean", BUFFER)
"""Where chains can start: what samplers know, the mean training image with noise, the buffer."""

SPREAD = 0.25
"""Standard deviation of a pixel of ordinary images, image units."""


class SamplingSettings(BaseModel):
    """Everything that samples depend on; a job that goes on must have the same."""

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

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image, (C, H, W)."""
        return (self.channels, *self.image_size)


def default_sampler(model: ScoreModel) -> str:
    """The sampler for ``model`` where none is asked for.

    ``ks`` for blind denoisers, ``ddim`` for those that take the noise level, and ``sgld``, JEM's
    own, for densities that were never trained to denoise.
    """
    return next(name for name in ("ks", "ddim", "sgld") if SAMPLERS[name].drives(model))


def make_settings(
    model: ScoreModel,
    sampler: str | None = None,
    *,
    count: int = 64,
    label: str | None = None,
    steps: int | None = None,
    start: str | None = None,
    options: Mapping[str, Any] | None = None,
    data_at_hand: bool = False,
    batch_size: int = 64,
    image_size: int | None = None,
    **others: Any,
) -> SamplingSettings:
    """The settings of a job, checked against ``model``.

    Args:
        model: as `ebmkit.load` gives it.
        sampler: a name of `SAMPLERS`, or ``buffer``; None: `default_sampler`.
        count: number of chains.
        label: class name or number, or ``all``: each in turn.
        steps: of each chain; None: the sampler's default.
        start: one of `STARTS`; None: the sampler's default.
        options: further settings of the sampler.
        data_at_hand: whether training images can be had, for starts that are left open.
        batch_size: chains that are moved together; it changes what is drawn.
        image_size: side of the images; None: what the model was trained at.
        others: further fields of `SamplingSettings`.

    Raises:
        UserError: if the sampler is unknown or cannot drive the model, or a value is not legal.
    """
    name = sampler or default_sampler(model)
    if others.get("guidance") is not None and label is None:
        raise UserError("guidance leads to a label: say which by --label, or all for each in turn")
    for what, value in (("samples", count), ("chains in a batch", batch_size)):
        if value < 1:
            raise UserError(f"{value} {what} cannot be drawn: take 1 or more")
    values = dict(options or {})
    if steps is not None:
        values["steps"] = steps
    no_steps(values, "; --sampler buffer gives the chains of a run's replay buffer as they are")
    if start is not None and start not in STARTS:
        raise unknown_name("start", start, STARTS)
    if name == BUFFER:
        if values or start not in (None, BUFFER):
            raise UserError(
                "--sampler buffer takes chains as they are: leave out --steps, --start and --set, "
                "or move them on by --sampler sgld --start buffer"
            )
        parse_labels(model, label, 1)
        resolved: dict[str, Any] = {}
        start = BUFFER
    else:
        if name not in SAMPLERS:
            raise unknown_name("sampler", name, [*SAMPLERS, BUFFER])
        entry = find_sampler(name)
        labels = parse_labels(model, label, 1)
        entry.check(model, labels)
        if start in get_args(Start):
            values["start"] = start
        elif start == "mean":
            values["start"] = "noise"
        if start in (None, "auto"):
            given = str(values.get("start", entry.config.model_fields["start"].default))
            seeds = data_at_hand and name != "ks" and model.schedule is None
            own = "seeds" if seeds else "noise"
            values["start"] = start = own if given == "auto" else given
        config = validated(entry.config, values, f"settings of sampler {name!r}")
        resolved = config.model_dump(mode="json")
        entry.build(model, labels, config)  # noise levels that are not the model's are refused
    return SamplingSettings(
        sampler=name,
        options=resolved,
        start=start,
        count=count,
        label=label,
        batch_size=min(batch_size, count),
        image_size=_size(model, image_size),
        channels=model.card.channels if model.card else 3,
        **others,
    )


def no_steps(values: Mapping[str, Any], hint: str = "") -> None:
    """Whether settings of a sampler ask for steps.

    Raises:
        UserError: if they ask for none, with a ``hint`` at what else may be meant.
    """
    steps = values.get("steps", 1)
    if isinstance(steps, int) and steps < 1:
        raise UserError(f"{steps} steps move no chain: take 1 or more{hint}")


def config_of(settings: SamplingSettings) -> SamplerConfig:
    """The sampler's own settings, built again from what was written."""
    kind: type[SamplerConfig] = find_sampler(settings.sampler).config
    return validated(kind, settings.options, f"settings of sampler {settings.sampler!r}")


def cautions(
    model: ScoreModel, entry: SamplerEntry[Any], sampler: Sampler[Any], settings: SamplingSettings
) -> list[str]:
    """What a reader of the samples should know beforehand, in sentences."""
    found = []
    card = model.card
    if card is not None and card.image_size and tuple(card.image_size) != settings.image_size:
        found.append(
            f"images of {_by(settings.image_size)} from a model trained at {_by(card.image_size)}: "
            "its samples are best at its own size"
        )
    if card is not None and card.sigma_range is None and not _learnt_density(model):
        found.append(
            f"this model was trained by {card.objective or 'an unknown objective'}, which trains "
            "no density: its samples show what its classifier responds to, not what images are"
        )
    description = {"noise": "gray", "mean": "the mean image"}.get(settings.start)
    level = first_level(sampler) if entry.name != "ascent" else None
    if description is not None and card is not None and card.sigma_range is not None:
        level = highest(model, None) if level is None else level
        wide = SPREAD * (settings.channels * settings.image_size[0] * settings.image_size[1]) ** 0.5
        if level < wide:
            found.append(
                f"chains begin with noise of {format_sigma(level)} about {description}, within "
                "what the model was trained for (up to "
                f"{format_sigma(card.sigma_range[1])}); images lie about {wide:.2g} from their "
                "mean, so this noise does not hide where they began, and samples vary less than "
                "images do: start from seeds, or train to higher noise"
            )
    if entry.name == "sgld" and settings.start != BUFFER and settings.options["steps"] < 100:
        found.append(
            f"{settings.options['steps']} steps from {settings.start} are what JEM moves a chain "
            "of its buffer by, not a chain's whole way: take --start buffer, or --steps 1000"
        )
    return found


def _learnt_density(model: ScoreModel) -> bool:
    assert model.card is not None
    try:
        terms = parse_objective(model.card.objective)
    except UserError:
        return not classifies(model)  # of someone else's making: nothing is known
    return any(t.objective.trains_density for t in terms)


def _size(model: ScoreModel, asked: int | None) -> tuple[int, int]:
    if asked is not None:
        if asked < 1:
            raise UserError(f"image size {asked} is not a number of pixels: take 1 or more")
        return (asked, asked)
    if model.card is None or model.card.image_size is None:
        raise UserError("this model does not say what size it was trained at: give --image-size")
    return (model.card.image_size[0], model.card.image_size[1])


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
