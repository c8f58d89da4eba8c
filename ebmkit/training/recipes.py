"""Recipes: what a data set brings, so that one command is right on digits and on CIFAR-10.

A recipe is the lowest layer of a run's configuration. ``cifar10`` and ``imagenet`` are the paper's
(CDN appendix A); ``jem``, ``jem++`` and ``sada-jem`` follow the scripts that their authors
released, in our units: their images live in [-1, 1], so noise and bounds are halved here, and a
step of 1 is one of 1/4 (`ebmkit.sampling.langevin`). ``cifar10-robust`` has the numbers of the
`robustness` package, by which RCG's classifiers were trained, but for its changes of colour and
rotations. The others are ours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ebmkit.objectives import parse_objective

__all__ = ["RECIPES", "Recipe", "recipe_for"]


class Recipe(NamedTuple):
    """Defaults for a data set: a nested mapping of `TrainConfig` fields, and a line about it."""

    config: dict[str, Any]
    about: str


def _stream(batch_size: int, low: str, high: str, **augmentation: Any) -> dict[str, Any]:
    """A stream with the paper's law of sigma, the square of a uniform variable."""
    noise = {"kind": "squared-uniform", "min": low, "max": high}
    return {"batch_size": batch_size, "noise": noise, "augmentation": augmentation}


_CIFAR: dict[str, Any] = {
    "model": {"backbone": {"width": 64}},
    "streams": {
        "classify": _stream(128, "0", "20/255", flip=True, crop_padding=4, mix="both"),
        "denoise": _stream(64, "1/255", "100/255", flip=True),
    },
    "optimizer": {"lr": 3e-4, "weight_decay": 0.05},
    "steps": 78_000,
    "validation_images": 1000,
    "validate_every": 1000,
    "checkpoint_every": 1000,
    "log_every": 50,
}

# 400 epochs of 1,281,167 images in batches of 512 are 1,000,912 steps.
_IMAGENET: dict[str, Any] = {
    "dataset": {"name": "imagenet", "image_size": 224, "workers": 8},
    "backbone": "gradresnet18-imagenet",
    "model": {"backbone": {"width": 64}},
    "streams": {
        "classify": _stream(
            512,
            "1/255",
            "70/255",
            flip=True,
            crop_size=224,
            crop_scale=[0.08, 1.0],
            crop_ratio=[3 / 4, 4 / 3],
            mix="both",
        ),
        "denoise": {
            **_stream(64, "1/255", "70/255", flip=True, crop_size=128),
            "phases": [
                {"after": "150/400", "batch_size": 40, "crop_size": 160},
                {"after": "260/400", "batch_size": 32, "crop_size": 192},
                {"after": "340/400", "batch_size": 16, "crop_size": 224},
            ],
        },
    },
    "optimizer": {"lr": 2e-4, "weight_decay": 1e-4},
    "steps": 1_000_912,
    "validation_images": 1000,
    "validate_every": 5000,
    "checkpoint_every": 1000,
    "log_every": 100,
}

_CIFAR_SHORT: dict[str, Any] = {
    **_CIFAR,
    "model": {"backbone": {"width": 16}},
    "streams": {
        "classify": _stream(128, "0", "20/255", flip=True),
        "denoise": _stream(64, "1/255", "100/255", flip=True),
    },
    "optimizer": {"lr": 3e-3, "weight_decay": 0.05},
    "steps": 1000,
    "validation_images": 500,
    "validate_every": 100,
    "checkpoint_every": 250,
    "log_every": 10,
}

_DIGITS: dict[str, Any] = {
    "model": {"backbone": {"width": 16}},
    "streams": {
        "classify": _stream(128, "0", "20/255", crop_padding=1),
        "denoise": _stream(64, "1/255", "100/255"),
    },
    "optimizer": {"lr": 3e-3, "weight_decay": 0.05},
    "steps": 800,
    "validation_images": 143,
    "validate_every": 50,
    "checkpoint_every": 100,
}

_PATCHES: dict[str, Any] = {
    "model": {"backbone": {"width": 16}},
    "objective": "dsm",
    "streams": {
        "classify": _stream(64, "0", "20/255", flip=True),
        "denoise": _stream(64, "1/255", "100/255", flip=True),
    },
    "optimizer": {"lr": 2e-3, "weight_decay": 0.05, "clip_norm": 1.0},
    "steps": 400,
    "validate_every": 50,
    "checkpoint_every": 100,
}

# Zhang et al. 2017, DnCNN-S: 50 epochs of 1,600 batches of 128 patches (by AdamW, not SGD).
_DNCNN: dict[str, Any] = {
    "dataset": {"name": "folder"},
    "backbone": "dncnn",
    "objective": "dsm",
    "model": {"backbone": {"width": 64}},
    "streams": {
        "classify": _stream(128, "0", "20/255", flip=True, crop_size=40),
        "denoise": {
            "batch_size": 128,
            "noise": {"kind": "fixed", "max": "25/255"},
            "augmentation": {"flip": True, "crop_size": 40},
        },
    },
    "optimizer": {"lr": 1e-3, "weight_decay": 1e-4},
    "steps": 80_000,
    "validation_images": 8,
    "validate_every": 500,
    "checkpoint_every": 500,
    "log_every": 50,
}

_OWN: dict[str, Any] = {
    **_CIFAR,
    "model": {"backbone": {"width": 32}},
    "streams": {
        "classify": _stream(64, "0", "20/255", flip=True, crop_padding=4),
        "denoise": _stream(32, "1/255", "100/255", flip=True),
    },
    "optimizer": {"lr": 1e-3, "weight_decay": 0.05},
    "steps": 10_000,
}


def _jem_stream(augmented: bool, noise: float, padding: int = 4) -> dict[str, Any]:
    own = {"flip": True, "crop_padding": padding} if augmented else {}
    kind = "fixed" if noise else "none"
    return {"batch_size": 64, "noise": {"kind": kind, "max": noise}, "augmentation": own}


# 200 epochs of 50,000 images in batches of 64 are 156,250 steps.
_JEM: dict[str, Any] = {
    "backbone": "wideresnet28-10-jem",
    "head": "logit",
    "objective": "jem",
    "streams": {
        "classify": _jem_stream(True, 0.015),
        "denoise": _stream(64, "1/255", "100/255", flip=True),
        "generate": _jem_stream(True, 0.015),
    },
    "optimizer": {
        "lr": 1e-4,
        "weight_decay": 0.0,
        "warmup_steps": 1000,
        "schedule": "milestones",
        "milestones": ["160/200", "180/200"],
        "milestone_factor": 0.3,
    },
    "steps": 156_250,
    "validation_images": 1000,
    "validate_every": 1000,
    "checkpoint_every": 1000,
    "log_every": 50,
}

_SGD: dict[str, Any] = {
    "kind": "sgd",
    "lr": 0.1,
    "momentum": 0.9,
    "warmup_steps": 1000,
    "schedule": "milestones",
    "milestone_factor": 0.2,
}

# 150 epochs. Of its 5 x 5 proximal steps of 0.2 the inner ones reuse the upper layers' gradient
# (YOPO); here 5 steps of 1 are taken with the whole gradient.
_JEM_PP: dict[str, Any] = {
    **_JEM,
    "backbone": "wideresnet28-10",
    "optimizer": {
        **_SGD,
        "weight_decay": 4e-4,
        "milestones": ["50/150", "100/150", "125/150"],
    },
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

_SADA_JEM: dict[str, Any] = {
    **_JEM_PP,
    "streams": {
        **_JEM["streams"],
        "classify": _jem_stream(True, 0.0),
        "generate": _jem_stream(False, 0.0),
    },
    "optimizer": {
        **_SGD,
        "weight_decay": 5e-4,
        "milestones": ["60/200", "120/200", "180/200"],
        "sharpness": 2.0,
        "sharpness_adaptive": True,
    },
    "steps": 156_250,
}

_SMALL_JEM: dict[str, Any] = {
    "backbone": "wideresnet10-jem",
    "head": "logit",
    "objective": "jem",
    "optimizer": {"lr": 3e-3, "weight_decay": 0.0},
    "negatives": {"steps": 10, "buffer_size": 1000},
    "watch": {"every": 25},
}

_DIGITS_JEM: dict[str, Any] = {
    **_SMALL_JEM,
    "streams": {
        "classify": _jem_stream(False, 0.015) | {"batch_size": 128},
        "denoise": _stream(64, "1/255", "100/255"),
        "generate": _jem_stream(False, 0.015),
    },
    "steps": 400,
    "validation_images": 143,
    "validate_every": 50,
    "checkpoint_every": 100,
}

_CIFAR_JEM_SHORT: dict[str, Any] = {
    **_SMALL_JEM,
    "streams": {
        "classify": _jem_stream(True, 0.015, padding=0) | {"batch_size": 128},
        "denoise": _stream(64, "1/255", "100/255", flip=True),
        "generate": _jem_stream(True, 0.015, padding=0),
    },
    "optimizer": {"lr": 3e-4, "weight_decay": 0.0, "warmup_steps": 30},
    "steps": 1000,
    "validation_images": 500,
    "validate_every": 100,
    "checkpoint_every": 100,
    "log_every": 10,
}


def _ddpm(recipe: dict[str, Any], batch_size: int, **augmentation: Any) -> dict[str, Any]:
    """Noise prediction by a UNet; validation and streams of ``recipe``."""
    denoise = {
        "batch_size": batch_size,
        "noise": {"kind": "diffusion"},
        "augmentation": augmentation,
    }
    return {
        **recipe,
        "backbone": "unet",
        "model": {},
        "objective": "ddpm",
        "streams": {**recipe["streams"], "denoise": denoise},
    }


_DIGITS_DDPM: dict[str, Any] = {
    **_ddpm(_DIGITS, 64),
    "model": {"backbone": {"width": 32}},
    "optimizer": {"lr": 2e-3, "weight_decay": 0.0, "ema": 0.995, "clip_norm": 1.0},
    "steps": 1200,
    "validate_every": 250,
    "checkpoint_every": 250,
}

# Ho et al. 2020, appendix B: Adam at a constant rate, 800,000 steps.
_CIFAR_DDPM: dict[str, Any] = {
    **_ddpm(_CIFAR, 128, flip=True),
    "backbone": "unet-cifar10",
    "optimizer": {
        "lr": 2e-4,
        "weight_decay": 0.0,
        "schedule": "constant",
        "warmup_steps": 5000,
        "clip_norm": 1.0,
        "ema": 0.9999,
    },
    "steps": 800_000,
    "validate_every": 5000,
    "checkpoint_every": 5000,
    "log_every": 100,
}

_CIFAR_DDPM_SHORT: dict[str, Any] = {
    **_ddpm(_CIFAR_SHORT, 32, flip=True),
    "model": {"backbone": {"width": 32}},
    "optimizer": {"lr": 1e-3, "weight_decay": 0.0, "ema": 0.999, "clip_norm": 1.0},
    "steps": 3000,
    "validate_every": 500,
    "checkpoint_every": 500,
}


def _noisy_classifier(recipe: dict[str, Any]) -> dict[str, Any]:
    """Cross-entropy at all levels of a diffusion, by a network that is told the level."""
    classify = {**recipe["streams"]["classify"], "noise": {"kind": "diffusion"}}
    return {
        **recipe,
        "model": {**recipe["model"], "noise_conditional": True},
        "objective": "ce",
        "streams": {**recipe["streams"], "classify": classify},
    }


_NO_NOISE: dict[str, Any] = {"kind": "none"}

# 150 epochs of 50,000 images in batches of 128 are 58,594 steps.
_CIFAR_ROBUST: dict[str, Any] = {
    **_CIFAR,
    "backbone": "resnet50",
    "head": "logit",
    "objective": "adv",
    "model": {"backbone": {"width": 64}},
    "terms": {"adv": {"steps": 7, "random_start": False}},
    "streams": {
        "classify": {
            "batch_size": 128,
            "noise": _NO_NOISE,
            "augmentation": {"flip": True, "crop_padding": 4},
        },
        "denoise": _CIFAR["streams"]["denoise"],
    },
    "optimizer": {
        "kind": "sgd",
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "schedule": "milestones",
        "milestones": ["50/150", "100/150"],
        "milestone_factor": 0.1,
    },
    "steps": 58_594,
}

# The strides of the network for ImageNet take a quarter of the work.
_CIFAR_ROBUST_SHORT: dict[str, Any] = {
    **_CIFAR_SHORT,
    "backbone": "gradresnet18-imagenet",
    "head": "logit",
    "objective": "adv",
    "terms": {"adv": {"steps": 3}, "trades": {"steps": 3}},
    "streams": {
        "classify": {"batch_size": 128, "noise": _NO_NOISE, "augmentation": {"flip": True}},
        "denoise": _CIFAR_SHORT["streams"]["denoise"],
    },
    "steps": 400,
    "validate_every": 100,
}

_DIGITS_ROBUST: dict[str, Any] = {
    **_DIGITS,
    "head": "logit",
    "objective": "adv",
    "model": {"backbone": {"width": 8}},
    "streams": {
        "classify": {"batch_size": 128, "noise": _NO_NOISE, "augmentation": {"crop_padding": 1}},
        "denoise": _DIGITS["streams"]["denoise"],
    },
    "steps": 400,
}


def _wide(recipe: dict[str, Any]) -> dict[str, Any]:
    """``recipe`` with denoising up to sigma 50, where an image is all noise: to sample from it."""
    noise = {"kind": "log-uniform", "min": "1/255", "max": "50/1"}
    denoise = {**recipe["streams"]["denoise"], "noise": noise}
    return {**recipe, "streams": {**recipe["streams"], "denoise": denoise}}


def _for(dataset: str, config: dict[str, Any]) -> dict[str, Any]:
    return {"dataset": {"name": dataset}, **config}


RECIPES: dict[str, Recipe] = {
    "digits": Recipe(_for("digits", _DIGITS), "8x8 digits on a CPU in about two minutes"),
    "patches": Recipe(
        _for("patches", _PATCHES), "photo patches, denoising alone, on a CPU in minutes"
    ),
    "cifar10": Recipe(
        _for("cifar10", _CIFAR), "the paper's CIFAR-10 recipe: width 64, 78,000 steps, MixUp/CutMix"
    ),
    "cifar100": Recipe(_for("cifar100", _CIFAR), "the paper's CIFAR-10 recipe on CIFAR-100"),
    "cifar10-short": Recipe(
        _for("cifar10", _CIFAR_SHORT), "width 16, 1,000 steps, flips only: minutes on a CPU"
    ),
    "imagenet": Recipe(
        _IMAGENET, "the paper's ImageNet recipe: 400 epochs, crops from 128 to 224 pixels"
    ),
    "dncnn": Recipe(
        _DNCNN, "DnCNN-S at sigma 25/255: 40x40 patches of a folder of gray images, as Train400"
    ),
    "digits-wide": Recipe(
        _for("digits", _wide(_DIGITS)), "digits with denoising up to sigma 50, to sample from noise"
    ),
    "cifar10-wide": Recipe(
        _for("cifar10", _wide(_CIFAR_SHORT)), "cifar10-short with denoising up to sigma 50"
    ),
    "jem": Recipe(
        _for("cifar10", _JEM), "JEM as its authors ran it: WideResNet-28-10, no norm, 200 epochs"
    ),
    "jem++": Recipe(
        _for("cifar10", _JEM_PP), "JEM++: BatchNorm, SGD, Gaussian starts, bounded Langevin steps"
    ),
    "sada-jem": Recipe(
        _for("cifar10", _SADA_JEM),
        "SADA-JEM: sharpness-aware, likelihood of images without augmentation",
    ),
    "digits-jem": Recipe(_for("digits", _DIGITS_JEM), "JEM on digits on a CPU in minutes"),
    "cifar10-jem-short": Recipe(
        _for("cifar10", _CIFAR_JEM_SHORT), "JEM on CIFAR-10, a small network, 1,000 steps"
    ),
    "digits-ddpm": Recipe(
        _for("digits", _DIGITS_DDPM), "a diffusion model of digits on a CPU in minutes"
    ),
    "cifar10-ddpm": Recipe(
        _for("cifar10", _CIFAR_DDPM), "DDPM as its authors ran it, 800,000 steps; for a GPU"
    ),
    "cifar10-ddpm-short": Recipe(
        _for("cifar10", _CIFAR_DDPM_SHORT), "a small diffusion model, minutes on a CPU"
    ),
    "digits-noisy-classifier": Recipe(
        _for("digits", _noisy_classifier(_DIGITS)),
        "a classifier that is told the noise, trained at all levels of a diffusion",
    ),
    "cifar10-noisy-classifier": Recipe(
        _for("cifar10", _noisy_classifier(_CIFAR_SHORT)), "the same, of cifar10-short"
    ),
    "cifar10-robust": Recipe(
        _for("cifar10", _CIFAR_ROBUST),
        "adversarial training as the robustness package has it: ResNet-50, l2 0.5, 150 epochs",
    ),
    "cifar10-robust-short": Recipe(
        _for("cifar10", _CIFAR_ROBUST_SHORT),
        "adversarial training, width 16, 3 steps of PGD, 400 steps: minutes on a CPU",
    ),
    "digits-robust": Recipe(
        _for("digits", _DIGITS_ROBUST), "adversarial training on digits on a CPU in a minute"
    ),
    "folder": Recipe(_for("folder", _OWN), "a start for images of your own in folders"),
    "hdf5": Recipe(_for("hdf5", _OWN), "a start for images of your own in HDF5"),
}


JEM_RECIPES = {"digits": "digits-jem", "cifar10": "jem", "cifar100": "jem"}
"""Data set -> its recipe for objectives that need negatives; others have the small network's."""


DDPM_RECIPES = {"digits": "digits-ddpm", "cifar10": "cifar10-ddpm", "cifar100": "cifar10-ddpm"}
"""Data set -> its recipe for noise prediction alone; others have the small network's."""

ROBUST_RECIPES = {
    "digits": "digits-robust",
    "cifar10": "cifar10-robust",
    "cifar100": "cifar10-robust",
}
"""Data set -> its recipe for objectives that attack; others keep their own, with a logit head."""


def recipe_for(dataset: str, objective: str = "") -> dict[str, Any]:
    """The recipe of the data set called ``dataset``; `folder`'s where it has none of its own.

    Args:
        dataset: a name.
        objective: the objective, if it was named: one that needs negatives has other recipes, and
            so have noise prediction alone and one that trains under attack.

    Raises:
        UserError: if the objective does not parse.
    """
    named = parse_objective(objective) if objective else ()
    if any(term.objective.likelihood is not None for term in named):
        config = RECIPES[JEM_RECIPES.get(dataset, "cifar10-jem-short")].config
    elif [term.name for term in named] == ["ddpm"]:
        config = RECIPES[DDPM_RECIPES.get(dataset, "cifar10-ddpm-short")].config
    elif any(term.objective.attack is not None for term in named):
        name = ROBUST_RECIPES.get(dataset, dataset)
        config = RECIPES.get(name, RECIPES["folder"]).config | {"head": "logit"}
    else:
        config = RECIPES.get(dataset, RECIPES["folder"]).config
    return config | {"dataset": config["dataset"] | {"name": dataset}}
