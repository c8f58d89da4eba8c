"""Builds data, model and loss from a configuration, and checks that they fit together."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ebmkit.blind import fit_calibration
from ebmkit.card import ModelCard
from ebmkit.class_gaussians import ClassGaussians, storable_rank
from ebmkit.data import AnyImages, load_dataset
from ebmkit.data.imagesets import FaultPolicy
from ebmkit.data.schedule import Stage, images_between, stages
from ebmkit.energy import EnergyModel, ScoreModel
from ebmkit.errors import UserError, first_line, shown
from ebmkit.models import Features, JointModel, ModelConfig
from ebmkit.models.base import PooledBackbone
from ebmkit.models.noise_conditional import LOWEST, PreconditionedModel
from ebmkit.objectives import Scale, TrainingLoss, parse_objective
from ebmkit.objectives.loss import check_labels
from ebmkit.randomness import keyed_generator
from ebmkit.registry import loaded_plugins
from ebmkit.training.config import DataConfig, TrainConfig

CALIBRATION_IMAGES, CALIBRATION_BATCH, CALIBRATION_LEVELS = 100, 25, 16
"""Maximum number of images, their number at a time, and number of noise levels, uniform in
log(sigma), of `calibrate_sigma`."""

STATISTICS_IMAGES, ANCHOR_IMAGES = 2000, 1000
"""Maximum numbers of images for mean and standard deviation of a preconditioned model, and for its
constant."""

FIT_IMAGES, FIT_NUMBERS = 10_000, 2**26
"""Maximum number of images that `fit_class_gaussians` reads, and of all their pixels and channels
(256 MiB in float32)."""

Split = Literal["train", "validation", "test"]

CHANCE_THRESHOLDS, MIN_STEPS = {"ce": 0.98, "score": 0.97}, 100
"""A loss above this share of that of guessing, or of a zero score, counts as not learnt. Shorter
runs than `MIN_STEPS` are not checked."""


def images_of(
    config: DataConfig, split: Split, progress: bool = False, download: bool = True
) -> AnyImages:
    """Load the images of ``split`` of the data set in ``config``.

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
        faults=FaultPolicy(config.unreadable == "skip", config.links == "follow"),
        hold_out=config.hold_out,
    )


def steps_of_epochs(epochs: float, images: int, config: TrainConfig) -> int:
    """Number of steps in which the main stream draws ``images`` training images ``epochs`` times.

    The main stream is that of classification, or without labels that of the first objective.

    Raises:
        UserError: if ``epochs`` is not above 0, or Inf.
    """
    if not 0 < epochs < math.inf:
        raise UserError(f"--epochs {epochs:g} is not legal: take a number above 0, as 20 or 0.5")
    terms = parse_objective(config.objective)
    drawn = [config.draw_from.get(term.name, term.objective.stream) for term in terms]
    name = "classify" if "classify" in drawn else drawn[0]
    many = 10**6  # a run this long has the mean batch size of the phases, which are shares of a run
    plan = stages({name: config.stream(name)}, many)
    return max(1, math.ceil(epochs * images * many / images_between(plan, 0, many)))


def build_model(
    config: TrainConfig, images: AnyImages, network: nn.Module | None = None
) -> ScoreModel:
    """Build the model of ``config`` for ``images``, with initial weights drawn from its seed.

    Args:
        network: a model, returned unchanged, or a backbone for the head of ``config``.

    Raises:
        UserError: if the memory is too small, ``network`` does not take the images, or it returns
            neither `Features` nor a tensor of features.
    """
    if isinstance(network, ScoreModel):
        return network
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if network is None:
            try:
                return model_config(config, images).build()
            except (RuntimeError, MemoryError) as error:
                text = str(error).lower()
                if "memory" not in text and "overflow" not in text:
                    raise
                raise UserError(
                    f"the memory is too small for network {config.backbone!r}: take a smaller "
                    "one, or reduce its width or depth"
                ) from None
        own, size = config.model, training_image_size(config, images)
        backbone = _as_backbone(network, (images.channels, *size))
        return JointModel(
            backbone,
            own.head.build(backbone.num_features, images.num_classes),
            images.channels,
            own.reference_size or size,
            own.size_scaling,
            own.input_mean,
            own.input_std,
        )


def _as_backbone(network: nn.Module, shape: tuple[int, int, int]) -> Any:
    """``network`` as a `Backbone`, tried on images of ``shape`` (C, H, W)."""
    name, mode = type(network).__name__, network.training
    place = next((p.device for p in network.parameters()), torch.device("cpu"))
    try:
        with torch.no_grad():
            found = network.eval()(torch.zeros(2, *shape, device=place))
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        size = "x".join(map(str, shape))
        raise UserError(f"{name} takes no images of {size}: {first_line(error)}") from error
    finally:
        network.train(mode)
    if isinstance(found, Features):
        return network
    if isinstance(found, Tensor) and found.ndim in (2, 4):
        return PooledBackbone(network, found.shape[1])
    raise UserError(
        f"{name} is no backbone: it must return Features, a tensor of features (B, K), or maps "
        "(B, K, H, W)"
    )


def config_of(model: ScoreModel) -> ModelConfig | None:
    """The configuration that builds ``model``; None if it was composed or changed by hand."""
    config = model.built_from
    if not isinstance(config, ModelConfig):
        return None

    def layers(network: nn.Module) -> list[tuple[str, str, str]]:
        return [(n, type(m).__name__, m.extra_repr()) for n, m in network.named_modules()]

    with torch.random.fork_rng(devices=[]):
        return config if layers(config.without_pretrained().build()) == layers(model) else None


def model_config(config: TrainConfig, images: AnyImages) -> ModelConfig:
    """The model's configuration, with the fields that depend on the images filled in."""
    facts = {
        "in_channels": images.channels,
        "num_classes": images.num_classes,
        "reference_size": config.model.reference_size or training_image_size(config, images),
    }
    if config.model.preconditioned:
        facts |= _preconditioning(config, images)
    return ModelConfig.model_validate(config.model.model_dump() | facts)


def _preconditioning(config: TrainConfig, images: AnyImages) -> dict[str, Any]:
    """Mean, standard deviation and lowest noise level of a preconditioned model, if not given."""
    own, facts = config.model, dict[str, Any]()
    if own.sigma_min is None:
        streams = [config.draw_from.get(t.name, t.objective.stream) for t in _matching(config)]
        levels = [config.stream(name).noise.range[0] for name in streams]
        facts["sigma_min"] = next((level for level in levels if level > 0), LOWEST)
    if own.input_std == 1.0 and own.input_mean == 0.0:
        pixels = torch.cat([x.double().movedim(1, -1).reshape(-1, x.shape[1])
                            for x, _ in images.spread(STATISTICS_IMAGES).batches(500)])  # fmt: skip
        facts["input_mean"] = tuple(float(f"{m:.6g}") for m in pixels.mean(0))
        facts["input_std"] = float(f"{float(pixels.var(0).mean()) ** 0.5:.6g}")
    return facts


def _matching(config: TrainConfig) -> list[Any]:
    """The terms of ``config`` that train the density at noise levels."""
    return [t for t in parse_objective(config.objective) if t.objective.needs_noise]


def make_loss(model: ScoreModel, config: TrainConfig, training: bool = True) -> TrainingLoss:
    """Loss of ``model``: the objectives of training, or those of validation."""
    terms = parse_objective(config.objective, config.objective_settings())
    if not training:
        terms = tuple(own for term in terms if (own := term.for_validation()) is not None)
    return TrainingLoss(model, terms, config.balance, config.draw_from)


def make_card(loss: TrainingLoss, config: TrainConfig, images: AnyImages) -> ModelCard:
    """The model card of a run."""
    matching = [term.name for term in loss.terms if term.objective.needs_noise]
    denoise = config.stream(loss.stream_of[matching[0]]) if matching else None
    return ModelCard(
        dataset=images.name,
        objective=config.objective,
        image_size=training_image_size(config, images),
        channels=images.channels,
        class_names=list(images.class_names),
        sigma_range=denoise.noise.range if denoise else None,
        classifies=isinstance(loss.model, EnergyModel)
        and any(term.objective.needs_labels for term in loss.terms),
        plugins=list(loaded_plugins()),
        energies="model" if any(t.objective.trains_density for t in loss.terms) else "logits",
        **{name: text for term in loss.terms for name, text in term.objective.card.items()},
    )


@torch.no_grad()
def calibrate_sigma(model: ScoreModel, images: AnyImages, card: ModelCard) -> None:
    """Fit the calibration of the noise levels that ``model`` estimates, and store it in ``card``.

    It uses at most `CALIBRATION_IMAGES` of ``images``, cropped to the training size, and noise that
    depends on nothing else. Models that take the noise level, or were not trained to denoise, get
    none; nor do runs shorter than `MIN_STEPS`.
    """
    if model.noise_conditional or card.sigma_range is None or card.steps < MIN_STEPS:
        return
    from torchvision.transforms.functional import center_crop

    low, high = card.sigma_range
    levels = np.geomspace(max(low, high / 1000), high, CALIBRATION_LEVELS).tolist()
    generator, card.sigma_calibration = keyed_generator("cpu", 0, "sigma calibration"), []
    training, raw, true = model.training, list[float](), list[float]()
    model.eval()
    for x, _ in images.spread(CALIBRATION_IMAGES).batches(CALIBRATION_BATCH):
        size = card.image_size or x.shape[-2:]
        x = center_crop(x, [min(pair) for pair in zip(size, x.shape[-2:], strict=True)])
        for sigma in levels:
            eps = torch.randn(x.shape, generator=generator).to(x)
            raw += model.estimate_sigma(x + sigma * eps).tolist()
            true += [sigma] * len(x)
    model.train(training)
    card.sigma_calibration = fit_calibration(raw, true)


def fit_reference(model: ScoreModel, images: AnyImages, size: tuple[int, int]) -> None:
    """Fit the Gaussians of the classes that a preconditioned ``model`` begins with, if it has any
    and they were not loaded, to training ``images``, cropped to ``size``."""
    if not isinstance(model, PreconditionedModel) or model.reference is None:
        return
    if not model.reference.fitted:
        model.fit_reference(*_images_to_fit(images, size))


def _images_to_fit(images: AnyImages, size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """Training images to fit Gaussians to, cropped to ``size``, and their labels; on the CPU."""
    from torchvision.transforms.functional import center_crop

    few = images.spread(min(FIT_IMAGES, FIT_NUMBERS // (images.channels * math.prod(size))))
    found = [(center_crop(x.cpu(), list(size)), c) for x, c in few.batches(CALIBRATION_BATCH)]
    labels = [c.cpu() for _, c in found if c is not None]
    return torch.cat([x for x, _ in found]), torch.cat(labels) if labels else None


@torch.no_grad()
def normalize(loss: TrainingLoss, model: ScoreModel, images: AnyImages, card: ModelCard) -> None:
    """Fix the constant of a preconditioned ``model`` by training ``images``; note it in ``card``.

    Only if the objectives of ``loss`` compare noise levels; else each has a constant of its own.
    The noise depends on nothing else.
    """
    if not isinstance(model, PreconditionedModel):
        return
    model.forget_anchor()  # perhaps of the weights that the run began with
    if card.sigma_range is None or not any(t.objective.needs_levels for t in loss.terms):
        return
    from torchvision.transforms.functional import center_crop

    place, size = next(model.parameters()).device, list(card.image_size or images.image_size)
    found = list(images.spread(ANCHOR_IMAGES).batches(CALIBRATION_BATCH))
    x = torch.cat([center_crop(x, size).to(place) for x, _ in found])
    labels = [c.to(place) for _, c in found if c is not None]
    own = torch.cat(labels) if labels and model.num_classes else None
    training, generator = model.training, keyed_generator(place, 0, "anchor")
    model.eval()
    try:
        model.anchor(x, card.sigma_range[1], own, generator)
        card.log_density_error = float(model.constant_error)
    except UserError as error:
        warnings.warn(f"the density is not normalised: {error}", stacklevel=2)
    model.train(training)


def fit_class_gaussians(
    model: ScoreModel, images: AnyImages, card: ModelCard
) -> ClassGaussians | None:
    """Gaussians of the classes of the training ``images``, cropped to the training size.

    They are for blind joint models, whose noise does not hide the images that chains start from.
    None for other models, for runs shorter than `MIN_STEPS`, if a class has fewer than two images,
    or if the images are too large (`storable_rank`).
    """
    size = card.image_size
    blind = card.sigma_range is not None and not model.noise_conditional
    if not (blind and card.classifies and size) or card.steps < MIN_STEPS:
        return None
    entries = images.channels * math.prod(size)
    if not (rank := storable_rank(images.num_classes, entries)):
        return None
    try:
        return ClassGaussians(*_images_to_fit(images, size)).compressed(rank)
    except UserError:  # a class has too few images
        return None


def check_terms(loss: TrainingLoss, config: TrainConfig, images: AnyImages) -> None:
    """Check that model and stream provide what each objective needs.

    Raises:
        UserError: if labels, noise or a second derivative are missing, or labels are mixed for an
            objective that needs hard labels.
    """
    model, data = loss.model, f"data set {images.name!r}"
    if model.in_channels not in (None, images.channels):
        raise UserError(
            f"the model takes images of {model.in_channels} channel(s), and {data} has "
            f"{images.channels}: convert the images, or build the model with in_channels="
            f"{images.channels}"
        )
    if model.num_classes and images.num_classes not in (0, model.num_classes):
        raise UserError(
            f"the model has {model.num_classes} classes, and {data} has {images.num_classes}: "
            f"build the model with num_classes={images.num_classes}"
        )
    for term in loss.terms:
        name = loss.stream_of[term.name]
        stream = config.stream(name)
        if term.objective.needs_labels and images.num_classes and not loss.model.num_classes:
            raise UserError(
                f"objective {term.name!r} needs labels, and {config.backbone!r} is a denoiser "
                "without them: use --objective dsm, or a backbone"
            )
        wrong = _no_hessian(loss.model) if term.objective.hessian_vectors else None
        if wrong:
            raise UserError(
                f"objective {term.name!r} needs the second derivative of the density, and {wrong}"
            )
        mixes = stream.augmentation.mix != "none"
        check_labels(term.name, term.objective, images.num_classes, mixes, name)
        if term.objective.needs_levels and not isinstance(loss.model, EnergyModel):
            raise UserError(
                f"objective {term.name!r} needs a density, and {config.backbone!r} is a denoiser "
                "without one: take a backbone"
            )
        if term.objective.needs_levels and not loss.model.noise_conditional:
            raise UserError(
                f"objective {term.name!r} compares noise levels, and this model is blind to them: "
                "set model.preconditioned=true and take a backbone with sigma as an input"
            )
        if term.objective.needs_levels and not isinstance(loss.model, PreconditionedModel):
            warnings.warn(
                f"{term.name} ties the noise levels, but only a preconditioned model is "
                "normalised: set model.preconditioned=true for log p in nats",
                stacklevel=2,
            )
        if term.objective.needs_noise and stream.noise.range[1] == 0:
            raise UserError(
                f"objective {term.name!r} learns from noise, and stream {name!r} has none: set "
                f"streams.{name}.noise.kind and max, for example to squared-uniform and 100/255"
            )


def check_test_images(train: AnyImages, test: AnyImages) -> None:
    """Check that the trained model can be evaluated on ``test``.

    Raises:
        UserError: if channels or classes differ from those of the training images.
    """
    for what, before, now in (
        ("channels", train.channels, test.channels),
        ("classes", list(train.class_names), list(test.class_names)),
    ):
        if before != now:
            raise UserError(
                f"the training images of data set {train.name!r} have the {what} {shown(before)} "
                f"and its test images {shown(now)}: make them the same, or use --no-evaluate"
            )


def check_classes(recorded: object, train: AnyImages) -> None:
    """Check that the data of a run has the classes in its model card, as when it was started.

    Raises:
        UserError: if they differ.
    """
    card = recorded.get("card") if isinstance(recorded, dict) else None
    names = card.get("class_names") if isinstance(card, dict) else None
    if names and names != list(train.class_names):
        raise UserError(
            f"data set {train.name!r} has the classes {shown(list(train.class_names))}, and the "
            f"run was started with {shown(names)}: restore them, or start a new run"
        )


def _no_hessian(model: ScoreModel) -> str | None:
    """Why ``model`` has no useful second derivative for each image; None if it has one."""
    if not model.is_energy_based:
        return "this network is a plain denoiser and has none: use --objective dsm, or a backbone"
    if model.has_batch_norm:
        return "BatchNorm mixes the images of a batch: use another norm (norm=group), or dsm"
    if kinked := model.kinked_activation:
        return f"autograd's misses the kinks of {kinked}: use a smooth activation, or dsm"
    return None


def check_compiled(stages: Sequence[Stage]) -> None:
    """Check that the compiler can compile the shapes of all stages.

    Raises:
        UserError: if there are more than its limit.
    """
    most = torch.compiler.config.recompile_limit
    if len(stages) > most:
        raise UserError(
            f"sizes change {len(stages) - 1} times during the run, and a step is compiled for "
            f"at most {most} shapes: use fewer phases, or --compile off"
        )


def warn_if_at_chance(
    means: Mapping[str, float], loss: TrainingLoss, classes: int, config: TrainConfig
) -> None:
    """Warn at the end of a run if cross-entropy and score matching are at chance.

    A rate that is too high does not always give NaN. ``means`` are results of the last validation.
    """
    matching = [t.name for t in loss.terms if t.objective.scale is not Scale.PLAIN]
    chance = dict.fromkeys(matching, "that of a score of zero (1)")
    idle = {name: means[name] >= CHANCE_THRESHOLDS["score"] for name in matching}
    if "ce" in means and classes > 1:
        chance["ce"] = f"that of guessing (log {classes} = {math.log(classes):.2f})"
        idle["ce"] = means["ce"] >= CHANCE_THRESHOLDS["ce"] * math.log(classes)
    if config.steps < MIN_STEPS or not idle or not all(idle.values()):
        return
    found = " and ".join(f"{name} = {means[name]:.2f} is {chance[name]}" for name in sorted(idle))
    warnings.warn(
        f"learnt nothing: {found}: the rate (optimizer.lr = {config.optimizer.lr:g}) may be too "
        f"high, or {config.steps:,} steps too few",
        stacklevel=2,
    )


def shapes(
    stage: Stage, images: AnyImages, processes: int = 1
) -> dict[str, tuple[int, int, int, int]]:
    """Shapes (B, C, H, W) of the images that a process draws from each stream per step."""
    return {
        name: (own.batch_size // processes, images.channels, *_seen_size(own.crop_size, images))
        for name, own in stage.spans.items()
    }


def training_image_size(config: TrainConfig, images: AnyImages) -> tuple[int, int]:
    """Height and width of the images (or crops) that the network sees in training.

    They are those of the first objective that needs the score, or else of the first objective. If
    crops grow during the run, the largest: up to that size, the log-density is the plain formula.
    """
    terms = parse_objective(config.objective)
    first = next((t for t in terms if t.objective.needs_noise), terms[0])
    name = config.draw_from.get(first.name, first.objective.stream)
    spans = config.stream(name).spans(config.steps)
    sizes = [_seen_size(span.crop_size, images) for span in spans]
    return max(sizes, key=lambda size: size[0] * size[1])


def _seen_size(crop: int | None, images: AnyImages) -> tuple[int, int]:
    return images.image_size if crop is None else (crop, crop)
