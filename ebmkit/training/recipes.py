"""Recipes: what a data set brings, so that one command is right on digits and on CIFAR-10.

A recipe is the lowest layer of a run's configuration. ``cdn-cifar10`` and ``imagenet`` are the
paper's (CDN appendix A); ``jem``, ``jem++`` and ``sada-jem`` follow the scripts that their authors
released, in our units: their images live in [-1, 1], so noise and bounds are halved here, and a
step of 1 is one of 1/4 (`ebmkit.sampling.langevin`). ``cifar10-robust`` has the numbers of the
`robustness` package, by which RCG's classifiers were trained, but for its changes of colour and
rotations. The others are ours. Those by Muon have a rate that stays constant and then falls to 0,
and evaluate averaged weights; how they were found, and which choices carry over from short runs to
long ones, is in the docs ("The recipe"). Those called ``adamw`` are what they are compared with.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ebmkit.objectives import parse_objective

Config = dict[str, Any]


class Recipe(NamedTuple):
    """Defaults for a data set: a nested mapping of `TrainConfig` fields, and a line about it."""

    config: Config
    description: str


def _length(steps: int, *, images: int, validate: int, save: int, log: int | None = None) -> Config:
    """Steps of a run, validation images, steps between validations, checkpoints and log rows."""
    fields = {
        "steps": steps,
        "validation_images": images,
        "validate_every": validate,
        "checkpoint_every": save,
    }
    return fields if log is None else {**fields, "log_every": log}


def _stream(batch_size: int, low: str, high: str, **augmentation: Any) -> Config:
    """A stream with the paper's law of sigma, the square of a uniform variable."""
    noise = {"kind": "squared-uniform", "min": low, "max": high}
    return {"batch_size": batch_size, "noise": noise, "augmentation": augmentation}


def _streams(classify: Config, denoise: Config, **others: Config) -> Config:
    return {"streams": {"classify": classify, "denoise": denoise, **others}}


def _width(channels: int) -> Config:
    return {"model": {"backbone": {"width": channels}}}


def _adamw(lr: float, *, weight_decay: float, **others: Any) -> Config:
    return {"optimizer": {"lr": lr, "weight_decay": weight_decay, **others}}


def _denoise(batch_size: int, **augmentation: Any) -> Config:
    return _stream(batch_size, "1/255", "100/255", **augmentation)


CDN_CIFAR: Config = {
    **_width(64),
    **_streams(
        _stream(128, "0", "20/255", flip=True, crop_padding=4, mix="both"),
        _denoise(64, flip=True),
    ),
    **_adamw(3e-4, weight_decay=0.05),
    **_length(78_000, images=1000, validate=1000, save=1000, log=50),
}

# 400 epochs of 1,281,167 images in batches of 512 are 1,000,912 steps.
IMAGENET: Config = {
    "dataset": {"name": "imagenet", "image_size": 224, "workers": 8},
    "backbone": "gradresnet18-imagenet",
    **_width(64),
    **_streams(
        _stream(
            512,
            "1/255",
            "70/255",
            flip=True,
            crop_size=224,
            crop_scale=[0.08, 1.0],
            crop_ratio=[3 / 4, 4 / 3],
            mix="both",
        ),
        {
            **_stream(64, "1/255", "70/255", flip=True, crop_size=128),
            "phases": [
                {"after": "150/400", "batch_size": 40, "crop_size": 160},
                {"after": "260/400", "batch_size": 32, "crop_size": 192},
                {"after": "340/400", "batch_size": 16, "crop_size": 224},
            ],
        },
    ),
    **_adamw(2e-4, weight_decay=1e-4),
    **_length(1_000_912, images=1000, validate=5000, save=1000, log=100),
}

CIFAR_ADAMW: Config = {
    **_width(16),
    **_streams(_stream(128, "0", "20/255", flip=True), _denoise(64, flip=True)),
    **_adamw(3e-3, weight_decay=0.05),
    **_length(1000, images=500, validate=100, save=250, log=10),
}

MUON: Config = {
    "kind": "muon",
    "lr": 1e-2,
    "adamw_lr": 1e-2,
    "momentum": 0.9,
    "weight_decay": 0.05,
    "schedule": "warmup-stable-decay",
    "decay_share": 0.4,
    "ema": 0.98,
    "ema_warmup": True,
}

_SHIFTED: Config = {"flip": "alternating", "crop_fill": "reflect"}

CIFAR_SHORT: Config = {
    **CIFAR_ADAMW,
    "backbone": "gradresnet10",
    **_streams(_stream(128, "0", "5/255", crop_padding=2, **_SHIFTED), _denoise(64, flip=True)),
    "optimizer": MUON,
    **_length(2100, images=500, validate=300, save=250, log=10),
}


def _mixed(batch_size: int) -> Config:
    mixing = {"mix": "both", "mix_probability": 0.5}
    return _stream(batch_size, "0", "5/255", crop_padding=4, **_SHIFTED, **mixing)


# 2.6 PFLOP: 53 epochs of the classification stream.
CIFAR_CPU: Config = {
    "backbone": "gradresnet10",
    **_width(40),
    **_streams(_mixed(160), _denoise(48, flip=True)),
    "optimizer": MUON | {"decay_share": 0.5, "ema": 0.995},
    **_length(16_500, images=500, validate=500, save=100, log=10),
}

# 18 PFLOP: 61 epochs of the classification stream.
CIFAR: Config = {
    **CIFAR_CPU,
    "backbone": "gradresnet18",
    **_width(64),
    **_streams(_mixed(256), _denoise(96, flip=True)),
    **_length(12_000, images=1000, validate=500, save=1000, log=50),
}

DIGITS_ADAMW: Config = {
    **_width(16),
    **_streams(_stream(128, "0", "20/255", crop_padding=1), _denoise(64)),
    **_adamw(3e-3, weight_decay=0.05),
    **_length(800, images=143, validate=50, save=100),
}

# lambda is 8: digits are soon classified, and denoising begins late.
DIGITS: Config = {
    **_width(16),
    "balance": 8.0,
    **_streams(_stream(96, "0", "20/255", crop_padding=1), _denoise(64)),
    "optimizer": MUON,
    **_length(360, images=143, validate=60, save=120),
}

PATCHES: Config = {
    **_width(16),
    "objective": "dsm",
    **_streams(_stream(64, "0", "20/255", flip=True), _denoise(64, flip=True)),
    **_adamw(2e-3, weight_decay=0.05, clip_norm=1.0),
    "steps": 400,
    "validate_every": 50,
    "checkpoint_every": 100,
}

# Zhang et al. 2017, DnCNN-S: 50 epochs of 1,600 batches of 128 patches (by AdamW, not SGD).
DNCNN: Config = {
    "dataset": {"name": "folder"},
    "backbone": "dncnn",
    "objective": "dsm",
    **_width(64),
    **_streams(
        _stream(128, "0", "20/255", flip=True, crop_size=40),
        {
            "batch_size": 128,
            "noise": {"kind": "fixed", "max": "25/255"},
            "augmentation": {"flip": True, "crop_size": 40},
        },
    ),
    **_adamw(1e-3, weight_decay=1e-4),
    **_length(80_000, images=8, validate=500, save=500, log=50),
}

OWN: Config = {
    **CDN_CIFAR,
    **_width(32),
    **_streams(_stream(64, "0", "20/255", flip=True, crop_padding=4), _denoise(32, flip=True)),
    **_adamw(1e-3, weight_decay=0.05),
    "steps": 10_000,
}


def _jem_streams(
    batch_size: int, noise: float, generated: Config, denoise: Config, **augmentation: Any
) -> Config:
    """Streams of JEM: the images of ``generate`` are augmented as ``generated`` says."""
    own = {"batch_size": 64, "noise": {"kind": "fixed" if noise else "none", "max": noise}}
    return _streams(
        {**own, "batch_size": batch_size, "augmentation": augmentation},
        denoise,
        generate={**own, "augmentation": generated},
    )


_CROPPED: Config = {"flip": True, "crop_padding": 4}


def _milestones(factor: float, *at: str, **optimizer: Any) -> Config:
    """An optimiser whose rate falls by ``factor`` after the shares ``at`` of the steps."""
    schedule = {"schedule": "milestones", "milestones": [*at], "milestone_factor": factor}
    return {"optimizer": {**optimizer, **schedule}}


_SGD: Config = {"kind": "sgd", "lr": 0.1, "momentum": 0.9}

# 200 epochs of 50,000 images in batches of 64 are 156,250 steps.
JEM: Config = {
    "backbone": "wideresnet28-10-jem",
    "head": "logit",
    "objective": "jem",
    **_jem_streams(64, 0.015, _CROPPED, _denoise(64, flip=True), **_CROPPED),
    **_milestones(0.3, "160/200", "180/200", lr=1e-4, weight_decay=0.0, warmup_steps=1000),
    **_length(156_250, images=1000, validate=1000, save=1000, log=50),
}

# 150 epochs. Of its 5 x 5 proximal steps of 0.2 the inner ones reuse the upper layers' gradient
# (YOPO); here 5 steps of 1 are taken with the whole gradient.
JEM_PP: Config = {
    **JEM,
    "backbone": "wideresnet28-10",
    **_milestones(
        0.2, "50/150", "100/150", "125/150", **_SGD, weight_decay=4e-4, warmup_steps=1000
    ),
    "negatives": {
        "steps": 5,
        "noise": 0.0,
        "largest_drift": 0.5,
        "clip": True,
        "start": "gaussian",
        "training_mode": True,
    },
    "steps": 117_188,
}

SADA_JEM: Config = {
    **JEM_PP,
    **_jem_streams(64, 0.0, {}, _denoise(64, flip=True), **_CROPPED),
    **_milestones(
        0.2,
        "60/200",
        "120/200",
        "180/200",
        **_SGD,
        weight_decay=5e-4,
        warmup_steps=1000,
        sharpness=2.0,
        sharpness_adaptive=True,
    ),
    "steps": 156_250,
}

_SMALL_JEM: Config = {
    "backbone": "wideresnet10-jem",
    "head": "logit",
    "objective": "jem",
    "negatives": {"steps": 10, "buffer_size": 1000},
    "watch": {"every": 25},
}

DIGITS_JEM: Config = {
    **_SMALL_JEM,
    **_jem_streams(128, 0.015, {}, _denoise(64)),
    **_adamw(3e-3, weight_decay=0.0),
    **_length(400, images=143, validate=50, save=100),
}

_FLIPPED: Config = {"flip": True, "crop_padding": 0}

CIFAR_JEM_SHORT: Config = {
    **_SMALL_JEM,
    **_jem_streams(128, 0.015, _FLIPPED, _denoise(64, flip=True), **_FLIPPED),
    **_adamw(3e-4, weight_decay=0.0, warmup_steps=30),
    **_length(1000, images=500, validate=100, save=100, log=10),
}


def _ddpm(recipe: Config, batch_size: int, **augmentation: Any) -> Config:
    """Noise prediction by a UNet; validation and streams of ``recipe``."""
    noise = {"kind": "diffusion"}
    denoise = {"batch_size": batch_size, "noise": noise, "augmentation": augmentation}
    streams = _streams(recipe["streams"]["classify"], denoise)
    return {**recipe, "backbone": "unet", "model": {}, "objective": "ddpm", **streams}


DIGITS_DDPM: Config = {
    **_ddpm(DIGITS_ADAMW, 64),
    **_width(32),
    **_adamw(2e-3, weight_decay=0.0, ema=0.995, clip_norm=1.0),
    **_length(1200, images=143, validate=250, save=250),
}

# Ho et al. 2020, appendix B: Adam at a constant rate, 800,000 steps.
CIFAR_DDPM: Config = {
    **_ddpm(CDN_CIFAR, 128, flip=True),
    "backbone": "unet-cifar10",
    **_adamw(
        2e-4, weight_decay=0.0, schedule="constant", warmup_steps=5000, clip_norm=1.0, ema=0.9999
    ),
    **_length(800_000, images=1000, validate=5000, save=5000, log=100),
}

CIFAR_DDPM_SHORT: Config = {
    **_ddpm(CIFAR_ADAMW, 32, flip=True),
    **_width(32),
    **_adamw(1e-3, weight_decay=0.0, ema=0.999, clip_norm=1.0),
    **_length(3000, images=500, validate=500, save=500, log=10),
}


def _noisy_classifier(recipe: Config) -> Config:
    """Cross-entropy at all levels of a diffusion, by a network that is told the level."""
    classify = {**recipe["streams"]["classify"], "noise": {"kind": "diffusion"}}
    model = {**recipe["model"], "noise_conditional": True}
    streams = _streams(classify, recipe["streams"]["denoise"])
    return {**recipe, "model": model, "objective": "ce", **streams}


def _robust(recipe: Config, terms: Config, **augmentation: Any) -> Config:
    """Adversarial training without noise; the rest of ``recipe``."""
    classify = {"batch_size": 128, "noise": {"kind": "none"}, "augmentation": augmentation}
    streams = _streams(classify, recipe["streams"]["denoise"])
    return {**recipe, "head": "logit", "objective": "adv", "terms": terms, **streams}


# 150 epochs of 50,000 images in batches of 128 are 58,594 steps.
CIFAR_ROBUST: Config = {
    **_robust(CDN_CIFAR, {"adv": {"steps": 7, "random_start": False}}, **_CROPPED),
    "backbone": "resnet50",
    **_milestones(0.1, "50/150", "100/150", **_SGD, weight_decay=5e-4),
    "steps": 58_594,
}

_WARM: Config = {"warmup_steps": 200}

# The strides of the network for ImageNet take a quarter of the work.
CIFAR_ROBUST_SHORT: Config = {
    **_robust(
        CIFAR_ADAMW, {"adv": {"steps": 3, **_WARM}, "trades": {"steps": 3, **_WARM}}, flip=True
    ),
    "backbone": "gradresnet18-imagenet",
    "steps": 400,
    "validate_every": 100,
}

DIGITS_ROBUST: Config = {
    **_robust(DIGITS_ADAMW, {"adv": _WARM, "trades": _WARM}, crop_padding=1),
    **_width(8),
    "steps": 400,
}


def _wide(recipe: Config) -> Config:
    """``recipe`` with denoising up to sigma 50, where an image is all noise: to sample from it."""
    noise = {"kind": "log-uniform", "min": "1/255", "max": "50/1"}
    denoise = {**recipe["streams"]["denoise"], "noise": noise}
    return {**recipe, **_streams(recipe["streams"]["classify"], denoise)}


def _recipe(dataset: str, config: Config, description: str) -> Recipe:
    return Recipe({"dataset": {"name": dataset}, **config}, description)


RECIPES: dict[str, Recipe] = {
    "digits": _recipe("digits", DIGITS, "8x8 digits by Muon, in about 80 seconds on two cores"),
    "digits-adamw": _recipe(
        "digits", DIGITS_ADAMW, "the same by AdamW alone, 800 steps: the baseline of digits"
    ),
    "patches": _recipe("patches", PATCHES, "photo patches, denoising alone, on a CPU in minutes"),
    "cifar10": _recipe(
        "cifar10", CIFAR, "GradResNet18 of width 64 by Muon, for a GPU: 18 PFLOP; not run yet"
    ),
    "cdn-cifar10": _recipe(
        "cifar10",
        CDN_CIFAR,
        "the paper's CIFAR-10 recipe: width 64, 78,000 steps of AdamW, MixUp/CutMix",
    ),
    "cifar100": _recipe("cifar100", CDN_CIFAR, "the paper's CIFAR-10 recipe on CIFAR-100"),
    "cifar10-short": _recipe(
        "cifar10", CIFAR_SHORT, "GradResNet10 of width 16, 53 TFLOP by Muon: minutes on a CPU"
    ),
    "cifar10-cpu": _recipe(
        "cifar10", CIFAR_CPU, "GradResNet10 of width 40, 2.6 PFLOP by Muon: hours on two CPU cores"
    ),
    "cifar10-adamw": _recipe(
        "cifar10",
        CIFAR_ADAMW,
        "GradResNet18 of width 16, 54 TFLOP by AdamW, flips: the baseline of cifar10-short",
    ),
    "imagenet": _recipe(
        "imagenet",
        IMAGENET,
        "the paper's ImageNet recipe: 400 epochs, crops from 128 to 224 pixels",
    ),
    "dncnn": _recipe(
        "folder",
        DNCNN,
        "DnCNN-S at sigma 25/255 on 40x40 patches of a folder of gray images, for example Train400",
    ),
    "digits-wide": _recipe(
        "digits",
        _wide(DIGITS_ADAMW),
        "digits-adamw with denoising up to sigma 50; does not learn to denoise",
    ),
    "cifar10-wide": _recipe(
        "cifar10", _wide(CIFAR_ADAMW), "cifar10-adamw with denoising up to sigma 50"
    ),
    "jem": _recipe(
        "cifar10", JEM, "JEM with its authors' settings: WideResNet-28-10, no norm, 200 epochs"
    ),
    "jem++": _recipe(
        "cifar10", JEM_PP, "JEM++: BatchNorm, SGD, Gaussian starts, bounded Langevin steps"
    ),
    "sada-jem": _recipe(
        "cifar10", SADA_JEM, "SADA-JEM: sharpness-aware, likelihood of images without augmentation"
    ),
    "digits-jem": _recipe("digits", DIGITS_JEM, "JEM on digits on a CPU in minutes"),
    "cifar10-jem-short": _recipe(
        "cifar10", CIFAR_JEM_SHORT, "JEM on CIFAR-10, a small network, 1,000 steps"
    ),
    "digits-ddpm": _recipe(
        "digits", DIGITS_DDPM, "a diffusion model of digits on a CPU in minutes"
    ),
    "cifar10-ddpm": _recipe(
        "cifar10", CIFAR_DDPM, "DDPM with its authors' settings, 800,000 steps; for a GPU"
    ),
    "cifar10-ddpm-short": _recipe(
        "cifar10", CIFAR_DDPM_SHORT, "a small diffusion model, minutes on a CPU"
    ),
    "digits-noisy-classifier": _recipe(
        "digits",
        _noisy_classifier(DIGITS_ADAMW),
        "a classifier with the noise level as an input, trained at all levels "
        "of a diffusion schedule",
    ),
    "cifar10-noisy-classifier": _recipe(
        "cifar10", _noisy_classifier(CIFAR_ADAMW), "the same on CIFAR-10, from cifar10-adamw"
    ),
    "cifar10-robust": _recipe(
        "cifar10",
        CIFAR_ROBUST,
        "adversarial training with the robustness package's settings: "
        "ResNet-50, l2 0.5, 150 epochs",
    ),
    "cifar10-robust-short": _recipe(
        "cifar10",
        CIFAR_ROBUST_SHORT,
        "adversarial training, width 16, 3 steps of PGD, 400 steps: minutes on a CPU",
    ),
    "digits-robust": _recipe(
        "digits", DIGITS_ROBUST, "adversarial training on digits on a CPU in a minute"
    ),
    "folder": _recipe("folder", OWN, "starting point for your own images in folders"),
    "hdf5": _recipe("hdf5", OWN, "starting point for your own images in HDF5"),
}

SPECIAL = {
    "likelihood": {"digits": "digits-jem", "cifar10": "jem", "cifar100": "jem"},
    "ddpm": {"digits": "digits-ddpm", "cifar10": "cifar10-ddpm", "cifar100": "cifar10-ddpm"},
    "adversarial": {
        "digits": "digits-robust",
        "cifar10": "cifar10-robust",
        "cifar100": "cifar10-robust",
    },
}
"""Kind of objective -> data set -> its recipe, where that is not the data set's own."""


def recipe_for(dataset: str, objective: str = "") -> Config:
    """The recipe of the data set called ``dataset``; `folder`'s where it has none of its own.

    Args:
        dataset: a name.
        objective: the objective, if it was named: one that needs negatives has other recipes, and
            so have noise prediction alone (other data sets have the small network's of either) and
            one that trains under attack (others keep their own, with a logit head).

    Raises:
        UserError: if the objective does not parse.
    """
    terms = parse_objective(objective) if objective else ()
    families = {term.objective.family for term in terms}
    name, head = dataset, {}
    if "likelihood" in families:
        name = SPECIAL["likelihood"].get(dataset, "cifar10-jem-short")
    elif [term.name for term in terms] == ["ddpm"]:
        name = SPECIAL["ddpm"].get(dataset, "cifar10-ddpm-short")
    elif "adversarial" in families:
        name, head = SPECIAL["adversarial"].get(dataset, dataset), {"head": "logit"}
    config = RECIPES.get(name, RECIPES["folder"]).config | head
    return config | {"dataset": config["dataset"] | {"name": dataset}}
