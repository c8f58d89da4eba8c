"""Recipes: what a data set brings, so that one command is right on digits and on CIFAR-10.

A recipe is the lowest layer of a run's configuration. ``cifar10`` and ``imagenet`` are the paper's
(CDN appendix A); the others are ours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
    "folder": Recipe(_for("folder", _OWN), "a start for images of your own in folders"),
    "hdf5": Recipe(_for("hdf5", _OWN), "a start for images of your own in HDF5"),
}


def recipe_for(dataset: str) -> dict[str, Any]:
    """The recipe of the data set called ``dataset``; `folder`'s where it has none of its own."""
    config = RECIPES.get(dataset, RECIPES["folder"]).config
    return config | {"dataset": config["dataset"] | {"name": dataset}}
