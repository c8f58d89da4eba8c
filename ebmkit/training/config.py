"""Configuration of a training run.

`TrainConfig` holds all settings of a run; the resolved configuration is written to ``config.yaml``.
It is merged from layers, of which later ones override earlier ones: the *recipe* of the data set
(``recipes.yaml`` names the sources of its values), a configuration file, named options, and
``--set key=value``. Configurations of earlier versions load: fields that were added later have
defaults that keep the earlier behaviour.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from ebmkit.compute import ComputeConfig
from ebmkit.data import StreamConfig
from ebmkit.data.schedule import parse_share
from ebmkit.errors import UserError, shown, unknown_name, validated
from ebmkit.models import ModelConfig
from ebmkit.models.config import NETWORKS, find_network
from ebmkit.models.heads import find_head
from ebmkit.objectives import BALANCE, OBJECTIVES, ObjectiveConfig, TermSettings, parse_objective
from ebmkit.objectives.base import mapping_at
from ebmkit.objectives.likelihood import NegativesConfig
from ebmkit.registry import Plugin, check_plugins, find, loaded_plugins
from ebmkit.storage.reading import YAML_BYTES, parse_yaml, read_text
from ebmkit.synonyms import KEYS, field_keys, meant

MAX_KEY_DEPTH = 20
"""Maximum number of names in a key; ``optimizer.lr`` has two."""

RECIPES_BY_OBJECTIVE = {
    "likelihood": {"digits": "digits-jem", "cifar10": "jem", "cifar100": "jem"},
    "diffusion": {"digits": "digits-ddpm", "cifar10": "cifar10-ddpm", "cifar100": "cifar10-ddpm"},
    "adversarial": dict.fromkeys(("cifar10", "cifar100"), "cifar10-robust")
    | {"digits": "digits-robust"},
}
"""Family of objectives -> data set -> recipe, for data sets whose default recipe differs."""

DEFAULTS: dict[tuple[str, str], dict[str, Any]] = {
    ("kind", "adamw"): {"lr": 3e-4},
    ("kind", "muon"): {"lr": 1e-2, "momentum": 0.95, "adamw_lr": 3e-3, "nesterov": True},
    ("kind", "sgd"): {"lr": 0.1},
    ("schedule", "warmup-stable-decay"): {"decay_share": 0.2},
}
"""Optimiser setting and its value -> defaults of other optimiser settings."""

RUN_FIELDS = {"dataset", "backbone", "head", "model", "objective", "streams", "optimizer", "steps"}
"""A layer with all of these fields is the complete configuration of a run."""

USED_BY: dict[str, tuple[str, tuple[str, ...] | str]] = {
    "adamw_lr": ("kind", ("muon",)),
    "adamw_for": ("kind", ("muon",)),
    "nesterov": ("kind", ("muon",)),
    "momentum": ("kind", ("muon", "sgd")),
    "betas": ("kind", ("adamw", "muon")),
    "decay_share": ("schedule", ("warmup-stable-decay",)),
    "milestones": ("schedule", ("milestones",)),
    "milestone_factor": ("schedule", ("milestones",)),
    "ema_warmup": ("ema", "ema, as 0.999"),
    "sharpness_adaptive": ("sharpness", "sharpness, as 0.05"),
}
"""Optimiser setting -> the setting that uses it, and at which values (or how to set that one)."""

FREE_TO_CHANGE = {
    *("device", "log_every", "validate_every", "checkpoint_every", "keep_checkpoints", "plugins"),
    *("dataset.data_dir", "dataset.workers", "dataset.unreadable", "dataset.links"),
    *("compute.precision", "compute.compile", "compute.accumulate", "compute.recompute"),
}
"""Fields that may change when a run is resumed: they affect no result, or only its rounding."""

OPTIONS = {
    "dataset": "dataset.name",
    "data_dir": "dataset.data_dir",
    "image_size": "dataset.image_size",
    "limit": "dataset.limit",
    "workers": "dataset.workers",
    "width": "model.backbone.width",
    "batch_size": "streams.*.batch_size",
    "lr": "optimizer.lr",
    "ema": "optimizer.ema",
    "precision": "compute.precision",
    "compile": "compute.compile",
}
"""Options of ``ebmkit train`` and `ebmkit.train` that are no fields of `TrainConfig`, and the
fields that they set; ``*`` stands for every stream."""

SAVED_FIELDS = RUN_FIELDS | {"draw_from", "device"}
"""A layer with all of these fields is a run's ``config.yaml``; recipes lack some."""

Schedule = Literal["cosine", "constant", "milestones", "linear", "warmup-stable-decay"]
Beta = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, BeforeValidator(parse_share)]
AbsolutePath = Annotated[
    Path, AfterValidator(lambda path: Path(os.path.expanduser(path)).absolute())
]
"""A path by which a run finds a folder from any working directory."""
DecayShare = Annotated[float, BeforeValidator(partial(parse_share, of_decay=True))]


def _absolute_if_it_exists(source: str) -> str:
    path = Path(os.path.expanduser(source))
    return str(path.absolute()) if path.exists() else source


class _Config(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class DataConfig(_Config):
    """The training images."""

    name: str = Field("digits", description="a name from `ebmkit list datasets`")
    data_dir: AbsolutePath | None = Field(None, description="folder or file of the data set")
    image_size: int | None = Field(None, ge=1)
    """image height and width, in pixels; images in a folder are resized and cropped to it"""
    workers: int = Field(0, ge=0)
    """number of processes that read images, for data sets on disk"""
    unreadable: Literal["error", "skip"] = "error"
    """if an image cannot be read: error (end the command) or skip"""
    links: Literal["inside", "follow"] = "inside"
    """symbolic links in a folder: inside (only to files in the folder) or follow (to anywhere)"""
    limit: int | None = Field(None, ge=1, description="maximum number of training images")
    hold_out: bool = True
    """hold out some training images for validation; default: false if validation_images is 0"""
    subset: Literal["first", "balanced"] = "first"
    """images that limit keeps: first (the same for every seed), or balanced (equally many of each
    class, drawn by the run's seed)"""


class FaultsConfig(_Config):
    """Fields of a run's `DataConfig` that ``ebmkit evaluate --set dataset.FIELD=VALUE`` can set."""

    unreadable: Literal["error", "skip"] = "error"
    links: Literal["inside", "follow"] = "inside"


class OptimizerConfig(_Config):
    """Optimiser and learning rate schedule; by default AdamW and a cosine (CDN appendix A)."""

    kind: Literal["adamw", "sgd", "muon"] = Field(
        "adamw",
        description="optimiser: adamw, sgd (with momentum), or muon (weight matrices by "
        "Muon, the rest by AdamW)",
    )
    lr: float = Field(
        3e-4,
        gt=0,
        description="initial learning rate (muon: of the matrices). If kind differs from "
        "the recipe's, the default is 3e-4 for adamw, 1e-2 for muon, 0.1 for sgd",
    )
    adamw_lr: float | None = Field(None, gt=0)
    """muon: initial learning rate of AdamW for the other parameters; null: 3e-3"""
    adamw_for: tuple[str, ...] = ()
    """muon: parts of the names of matrices that AdamW updates, for example [stem]"""
    weight_decay: float = Field(0.05, ge=0)
    """decoupled weight decay; sgd: added to the gradient"""
    decay_norms: bool = True
    """apply weight decay to norm weights and biases too, as in the paper"""
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="betas of AdamW, also in muon")
    momentum: Beta = Field(0.9, description="momentum of sgd and muon; 0.95 by default for muon")
    nesterov: bool | None = Field(None, description="muon: Nesterov momentum; null: true")
    schedule: Schedule = Field("cosine", description="learning rate schedule")
    decay_share: DecayShare | None = Field(
        None,
        description="warmup-stable-decay: share of the steps, at the end, over which the "
        "rate falls to 0; null: 0.2",
    )
    milestones: tuple[Share, ...] = ()
    """milestones: shares of the steps after which the rate falls, for example [160/200, 180/200]"""
    milestone_factor: float = Field(0.3, gt=0, lt=1)
    """milestones: factor that multiplies the rate at each milestone"""
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up (the paper: none)")
    clip_norm: float | None = Field(None, gt=0, description="maximum norm of the gradient")
    ema: float | None = Field(None, gt=0, lt=1)
    """decay of the averaged weights (EMA), for example 0.999"""
    ema_warmup: bool = False
    """use the decay (1 + t) / (10 + t) after t steps while it is smaller than ema"""
    sharpness: float | None = Field(None, gt=0)
    """rho of sharpness-aware minimisation (SAM), which doubles the cost of a step"""
    sharpness_adaptive: bool = False
    """measure rho in units of each weight's size (ASAM)"""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        """Fill in defaults that depend on other settings."""
        filled = dict(values) if isinstance(values, Mapping) else {}
        for (setting, at), defaults in DEFAULTS.items():
            if filled.get(setting) == at:
                filled |= {n: value for n, value in defaults.items() if filled.get(n) is None}
        return filled or values


class StreamsConfig(_Config):
    """The data streams; each objective draws from one."""

    classify: StreamConfig
    denoise: StreamConfig
    generate: StreamConfig = StreamConfig()


class RollbackConfig(_Config):
    """Divergence limits of a run that needs negatives, and mitigations."""

    gap: float = Field(50.0, gt=0)
    """maximum smoothed energy difference between samples and data, nats"""
    sample: float = Field(5.0, gt=0)
    """maximum rms distance of samples from gray, image units"""
    gradient: float = Field(1000.0, gt=1)
    """maximum ratio of the gradient norm to its running mean"""
    every: int = Field(50, ge=1, description="steps between rollback snapshots")
    max_rollbacks: int = Field(10, ge=0, description="maximum number of rollbacks")
    order: tuple[Literal["rate", "steps", "penalty"], ...] = Field(
        ("rate", "steps", "penalty"), min_length=1
    )
    """mitigations, applied in turn: one per rollback"""


class TrainConfig(_Config):
    """All settings of a training run."""

    dataset: DataConfig = DataConfig()
    backbone: str = "gradresnet18"
    """a name from `ebmkit list backbones` or `denoisers`, or timm:NAME"""
    head: str = Field("linear-quadratic", description="a name from `ebmkit list heads`")
    model: ModelConfig = ModelConfig()
    objective: str = Field("ce+dsm", description="objectives joined by +, for example ce+0.5*dsm")
    balance: float = Field(BALANCE, gt=0, description="weight lambda of balanced objectives")
    terms: TermSettings = TermSettings()
    """settings of individual objectives, for example objective.adv.eps=0.5"""
    streams: StreamsConfig
    draw_from: dict[str, Literal["classify", "denoise", "generate"]] = Field({})
    """objective -> stream, to override its own; {ce: denoise} shares one forward pass"""
    optimizer: OptimizerConfig = OptimizerConfig()
    negatives: NegativesConfig = NegativesConfig()
    rollback: RollbackConfig = RollbackConfig()
    init: Annotated[str, AfterValidator(_absolute_if_it_exists)] | None = None
    """run, file or name on the Hugging Face hub with the initial weights; null: random"""
    steps: int = Field(1000, ge=1, description="number of optimiser steps")
    seed: int = Field(0, ge=0, lt=2**63)
    """random seed of initial weights, data order, augmentation and noise"""
    device: str = Field("auto", description="device: auto, cpu, cuda, cuda:1")
    compute: ComputeConfig = ComputeConfig()
    log_every: int = Field(10, ge=1, description="steps between rows of metrics.jsonl")
    validate_every: int = Field(100, ge=1, description="steps between validations")
    validation_images: int = Field(500, ge=0)
    """number of held-out images for validation; 0: no validation, and training on all images"""
    checkpoint_every: int = Field(500, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="number of newest checkpoints to keep")
    plugins: tuple[Plugin, ...] = Field((), description="plugins that the run needs")

    @model_validator(mode="before")
    @classmethod
    def _read_former_names(cls, values: Any) -> Any:
        return current_names(values) if isinstance(values, Mapping) else values

    @model_validator(mode="after")
    def _check_held_out(self) -> Self:
        if self.validation_images and not self.dataset.hold_out:
            raise ValueError(
                f"validation_images = {self.validation_images} needs held-out images, and "
                "dataset.hold_out is false: set it to true, or validation_images=0"
            )
        return self

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """The main settings; ``model_dump`` has all."""
        yield "dataset", self.dataset.name
        yield from ((n, getattr(self, n)) for n in ("backbone", "head", "objective", "steps"))
        yield "optimizer", self.optimizer.kind
        yield from (("lr", self.optimizer.lr), ("seed", self.seed))

    def objective_settings(self) -> dict[str, ObjectiveConfig | None]:
        """Settings of each objective by its name; None for an objective without settings."""
        return {
            name: getattr(self, own.section) if own.section else self.terms.of(name)
            for name, own in OBJECTIVES.items()
        }

    def stream(self, name: str) -> StreamConfig:
        """Configuration of the stream ``name``.

        Raises:
            UserError: if there is no such stream.
        """
        if name not in StreamsConfig.model_fields:
            raise unknown_name("stream", name, StreamsConfig.model_fields)
        found: StreamConfig = getattr(self.streams, name)
        return found


class Recipe(NamedTuple):
    """Defaults for a data set: nested mapping of `TrainConfig` fields, and one-line description."""

    config: dict[str, Any]
    description: str


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TEXT = files("ebmkit.training").joinpath("recipes.yaml").read_text(encoding="utf-8")
RECIPES = {
    name: Recipe(own, own.pop("description"))
    for name, own in yaml.load(_TEXT, _LOADER)["recipes"].items()
}


def recipe_for(dataset: str, objective: str = "") -> dict[str, Any]:
    """Default recipe of ``dataset`` for ``objective``; that of ``folder`` for an unknown data set.

    Maximum likelihood, diffusion alone and adversarial training have separate recipes
    (`RECIPES_BY_OBJECTIVE`). For other data sets, the first two use the short CIFAR-10 recipe, and
    adversarial training uses the recipe of the data set with a logit head.
    """
    terms = parse_objective(objective) if objective else ()
    families = {term.objective.family for term in terms}
    name, head = dataset, {}
    if "likelihood" in families:
        name = RECIPES_BY_OBJECTIVE["likelihood"].get(dataset, "cifar10-jem-short")
    elif families == {"diffusion"}:
        name = RECIPES_BY_OBJECTIVE["diffusion"].get(dataset, "cifar10-ddpm-short")
    elif "adversarial" in families:
        name, head = RECIPES_BY_OBJECTIVE["adversarial"].get(dataset, dataset), {"head": "logit"}
    config = RECIPES.get(name, RECIPES["folder"]).config | head
    return config | {"dataset": config["dataset"] | {"name": dataset}}


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested mappings; later ones override earlier ones."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            old = result.get(key)
            both = isinstance(old, dict) and isinstance(value, Mapping)
            result[key] = merge(old or {}, value) if both else value
    return result


def resolve(*layers: Mapping[str, Any], recipe: str | None = None) -> TrainConfig:
    """Merge ``layers`` over a recipe and validate the result.

    Args:
        *layers: nested mappings; later ones override earlier ones. If a layer names a backbone or
            a head, the settings of that preset apply at that layer.
        recipe: name of the recipe below the layers. Default: that of the data set and objective in
            the layers, or no recipe if a layer is the complete configuration of a run.

    Raises:
        UserError: on an unknown name, an unknown field or an illegal value.
    """
    layers = tuple(_move_terms(current_names(layer)) for layer in layers)
    for layer in layers:
        check_plugins(layer.get("plugins", ()), "this run")
    base = find("recipe", RECIPES, recipe).config if recipe else {}
    dataset = str(mapping_at(merge(base, *layers), "dataset").get("name", "digits"))
    if not base and not any(layer.keys() >= RUN_FIELDS for layer in layers):
        base = recipe_for(dataset, str(merge(*layers).get("objective", "")))
    named = [layer["backbone"] for layer in layers if "backbone" in layer]
    if named:  # drop the recipe's preset, and fields that the new network does not have
        base = {**base, "backbone": named[-1], "model": _fitting_network(base, str(named[-1]))}
    start = _expand(base)
    expanded = _last_head([start, *(_expand(layer) for layer in layers)])
    start, *expanded = (
        _drop_unused(own, merge(*expanded[i:]), whole=i == 1 or own.keys() >= RUN_FIELDS)
        for i, own in enumerate(expanded, 1)
    )
    raw = merge(*_hold_out([start, *expanded]))
    raw = merge(raw, _implied(raw, merge(*expanded)))
    raw["plugins"] = [plugin.model_dump() for plugin in loaded_plugins()]
    config = validated(TrainConfig, raw, "configuration")
    _check_used(config, merge(*(own for own in (start, *expanded) if not own.keys() >= RUN_FIELDS)))
    terms = {term.name: term for term in parse_objective(config.objective)}
    for name in config.draw_from:
        find("objective in draw_from", terms, name)
    for name, own in config.objective_settings().items():
        if own is not None and own.needs_term and name not in terms:
            for key, value in own.model_dump(exclude_defaults=True).items():
                raise UserError(
                    f"objective.{name}.{key} = {shown(value)} does nothing: objective "
                    f"{config.objective!r} has no term {name}; leave it out"
                )
    return config


def _drop_unused(
    layer: Mapping[str, Any], over: Mapping[str, Any], whole: bool
) -> Mapping[str, Any]:
    """``layer`` without optimiser settings that the kind or schedule in ``over`` does not use.

    A ``whole`` layer (a recipe or a run) without kind or schedule has the default one.
    """
    own, chosen = layer.get("optimizer"), over.get("optimizer")
    if not isinstance(own, Mapping) or not isinstance(chosen, Mapping):
        return layer
    idle = {n for n, (s, at) in USED_BY.items() if isinstance(at, str) and chosen.get(s, 1) is None}
    for setting, default in {"kind": "adamw", "schedule": "cosine"}.items():
        before = own.get(setting, default if whole else chosen.get(setting))
        if chosen.get(setting, before) != before:
            idle |= {name for name, (by, _) in USED_BY.items() if by == setting}
            if setting == "kind":
                idle = (idle | {"lr"}) - (set() if chosen["kind"] == "sgd" else {"betas"})
    return {**layer, "optimizer": {k: v for k, v in own.items() if k not in idle}}


def _fitting_network(recipe: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Model settings of ``recipe`` without backbone fields that network ``name`` does not have.

    Its width is for its own kind of network: ``resnet50`` on digits has the published width 64.
    """
    model = dict(recipe.get("model", {}))
    if isinstance(model.get("backbone"), Mapping):
        config, own = find_network(name).config, recipe.get("backbone", "gradresnet18")
        fields = set(type(config).model_fields)
        if config.kind != find_network(str(own)).config.kind:
            fields -= {"width"}
        model["backbone"] = {k: v for k, v in model["backbone"].items() if k in fields}
    return model


def _check_used(config: TrainConfig, given: Mapping[str, Any]) -> None:
    """Reject optimiser settings in ``given`` that have no effect. ``given`` excludes complete
    configurations of runs, since those of earlier versions may contain such settings."""
    for name, (setting, at) in USED_BY.items():
        chosen, value = getattr(config.optimizer, setting), getattr(config.optimizer, name)
        used = chosen in at if isinstance(at, tuple) else chosen is not None
        idle = not used and value != OptimizerConfig.model_fields[name].default
        if idle and name in given.get("optimizer", {}):
            needed = f"{setting}={' or '.join(at)}" if isinstance(at, tuple) else at
            raise UserError(
                f"optimizer.{name} = {shown(value)} does nothing here: leave it out, or set "
                f"optimizer.{needed}"
            )


def _implied(raw: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that follow from the objectives of a configuration (`Objective.implies`)."""
    objective, streams = raw.get("objective"), mapping_at(raw, "draw_from")
    terms = parse_objective(objective) if isinstance(objective, str) else ()
    return merge(
        *(
            term.objective.implies(raw, given, streams.get(term.name, term.objective.stream))
            for term in terms
            if term.objective.implies is not None
        )
    )


def _last_head(layers: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """``layers`` without settings of a head that a later layer replaces."""
    last = max((i for i, layer in enumerate(layers) if "head" in layer), default=0)
    return [
        {**own, "model": {k: v for k, v in own["model"].items() if k != "head"}}
        if i < last and isinstance(own.get("model"), Mapping)
        else own
        for i, own in enumerate(layers)
    ]


def current_names(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    """``layer`` as written today: until December 2026, ``rollback.max_rollbacks`` was called
    ``watch.breaches``, and runs held images out without a field ``dataset.hold_out``."""
    if layer.keys() >= SAVED_FIELDS:
        layer = merge({"dataset": {"hold_out": True}}, layer)
    own = layer.get("watch")
    if not isinstance(own, Mapping):
        return layer
    rest = {key: value for key, value in layer.items() if key != "watch"}
    renamed = {"max_rollbacks" if key == "breaches" else key: value for key, value in own.items()}
    return merge({"rollback": renamed}, rest)


def _hold_out(layers: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """``layers``, of which each that changes ``validation_images`` sets ``dataset.hold_out`` too:
    without validation, a run trains on all training images."""
    before = None
    for layer in layers:
        images = layer.get("validation_images", before)
        own = {} if images == before else {"dataset": {"hold_out": images != 0}}
        yield merge(own, layer)
        before = images


def _move_terms(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Move the settings under ``objective`` of ``layer`` to ``terms``."""
    if not isinstance(layer.get("objective"), Mapping):
        return layer
    own = dict(layer["objective"])
    for name in own:
        if name in OBJECTIVES and OBJECTIVES[name].config is None:
            raise UserError(f"objective {name!r} has no settings: leave out objective.{name}")
    named = {"objective": own.pop("name")} if "name" in own else {}
    rest = {key: value for key, value in layer.items() if key != "objective"}
    return merge(rest, named, {"terms": own})


def _expand(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Merge ``layer`` over the settings of the presets that it names."""
    parts: dict[str, Any] = {}
    if "backbone" in layer:
        preset = find_network(str(layer["backbone"])).config
        own = preset.model_dump()
        parts["backbone"] = {"kind": own["kind"]} | preset.model_dump(exclude_unset=True)
    if "head" in layer:
        parts["head"] = find_head(str(layer["head"])).model_dump()
    return merge({"model": parts}, layer) if parts else layer


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Read ``["optimizer.lr=1e-3", ...]`` into a nested mapping; values are YAML.

    >>> parse_assignments(["optimizer.lr=1e-3", "model.backbone.norm=scale"])
    {'optimizer': {'lr': '1e-3'}, 'model': {'backbone': {'norm': 'scale'}}}
    """
    result: dict[str, Any] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        keys = key.strip().split(".")
        if not equals or not all(keys) or len(keys) > MAX_KEY_DEPTH:
            raise UserError(
                f"--set {shown(text)} is not of the form key=value, as in optimizer.lr=1e-3"
            )
        nested = _nested(keys, parse_yaml(value, f"the value of --set {shown(text)}"))
        result = merge(result, _move_terms(nested))
    return result


def layer_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration layer of ``options``: names in `OPTIONS`, or fields, with dots or without.

    >>> layer_of({"lr": 0.1, "optimizer.ema": 0.9, "seed": 1})
    {'optimizer': {'lr': 0.1, 'ema': 0.9}, 'seed': 1}
    """
    return merge(
        *(
            _nested(OPTIONS.get(name, name).replace("*", stream).split("."), value)
            for name, value in options.items()
            for stream in StreamsConfig.model_fields
        )
    )


def _nested(keys: Sequence[str], value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    return dict(value)


def check_options(options: Mapping[str, Any], others: Iterable[str]) -> None:
    """Check the names of ``options``; ``others`` are further options of the same function.

    Raises:
        UserError: if one is unknown and another option or a field is meant.
    """
    known = [name.replace("_", "-") for name in (*others, *OPTIONS, *TrainConfig.model_fields)]
    for name, value in options.items():
        is_field = name.partition(".")[0] in TrainConfig.model_fields
        if name in OPTIONS or (is_field and (name not in KEYS or isinstance(value, Mapping))):
            continue
        option, keys = meant(name, [own for own in known if own != name], setting_keys)
        if option is not None:
            raise UserError(f"unknown option {name!r}: did you mean {option.replace('-', '_')}?")
        if keys:
            fix = " or ".join(f"**{{{key!r}: {shown(value, 40)}}}" for key in keys[:3])
            raise UserError(f"{name} = {shown(value, 40)} is no option: write {fix}")


def setting_keys() -> list[str]:
    """Keys of all settings, such as ``optimizer.lr`` and ``objective.ce.label_smoothing``."""
    found: list[tuple[Any, str]] = [(TrainConfig, "")]
    found += [(network, "model.backbone.") for network in NETWORKS]
    found += [(own.config, f"objective.{name}.") for name, own in OBJECTIVES.items()]
    keys = [key for model, prefix in found if model for key in field_keys(model, prefix)]
    return [key for key in dict.fromkeys(keys) if not key.startswith("terms.")]


def read_config(path: Path) -> dict[str, Any]:
    """Read the YAML file ``path``, which must contain a mapping."""
    values = parse_yaml(read_text(path, YAML_BYTES), f"configuration {str(path)!r}")
    if not isinstance(values, dict):
        raise UserError(
            f"configuration {str(path)!r} must hold fields, as a run's config.yaml does"
        )
    return values


def difference(old: dict[str, Any], new: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """First of the `differences`: name, old and new value.

    Fields that others follow from come first.
    """
    found = differences(old, new)
    leading = ("kind", "schedule", "validation_images")
    first = min(found, key=lambda k: (k.rpartition(".")[2] not in leading, k), default=None)
    return None if first is None else (first, *found[first])


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields that make two configurations different runs: name -> (old value, new value)."""
    before, after = flat(old), flat(new)
    keys = sorted((before.keys() | after.keys()) - FREE_TO_CHANGE)
    return {k: (before.get(k), after.get(k)) for k in keys if before.get(k) != after.get(k)}


def check_same(saved: dict[str, Any], new: BaseModel | dict[str, Any], what: str, ask: str) -> None:
    """Check that resuming with the settings ``new`` continues what was started with ``saved``.

    If ``new`` is a pydantic model, it upgrades ``saved`` settings of earlier versions.

    Raises:
        UserError: "``what``: FIELD was OLD and is now NEW; ``ask``", for the first `difference`.
    """
    if isinstance(new, BaseModel):
        with contextlib.suppress(ValidationError):  # fields that were added later get defaults
            saved = type(new).model_validate(saved).model_dump(mode="json")
        new = new.model_dump(mode="json")
    found = difference(saved, new)
    if found is not None:
        key, before, now = found
        raise UserError(f"{what}: {key} was {before!r} and is now {now!r}; {ask}")


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested ``values`` as one mapping; keys are names with dots, such as optimizer.lr."""
    if not isinstance(values, dict):
        return {prefix.removesuffix("."): values}
    nested = (flat(value, f"{prefix}{key}.") for key, value in values.items())
    return {key: value for part in nested for key, value in part.items()}
