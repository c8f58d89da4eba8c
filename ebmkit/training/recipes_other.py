"""Recipes of other objectives: JEM and its successors, diffusion models, robust classifiers.

``jem``, ``jem++`` and ``sada-jem`` follow the scripts that their authors released, in our units
(see `ebmkit.training.recipes`).
"""

from __future__ import annotations

from typing import Any

from ebmkit.training.recipes_joint import (
    CDN_CIFAR,
    CIFAR_ADAMW,
    DIGITS_ADAMW,
    stream,
)

__all__ = [
    "CIFAR_DDPM",
    "CIFAR_DDPM_SHORT",
    "CIFAR_JEM_SHORT",
    "CIFAR_ROBUST",
    "CIFAR_ROBUST_SHORT",
    "DIGITS_DDPM",
    "DIGITS_JEM",
    "DIGITS_ROBUST",
    "JEM",
    "JEM_PP",
    "SADA_JEM",
    "noisy_classifier",
    "wide",
]


def _jem_stream(augmented: bool, noise: float, padding: int = 4) -> dict[str, Any]:
    own = {"flip": True, "crop_padding": padding} if augmented else {}
    kind = "fixed" if noise else "none"
    return {"batch_size": 64, "noise": {"kind": kind, "max": noise}, "augmentation": own}


# 200 epochs of 50,000 images in batches of 64 are 156,250 steps.
JEM: dict[str, Any] = {
    "backbone": "wideresnet28-10-jem",
    "head": "logit",
    "objective": "jem",
    "streams": {
        "classify": _jem_stream(True, 0.015),
        "denoise": stream(64, "1/255", "100/255", flip=True),
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
JEM_PP: dict[str, Any] = {
    **JEM,
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

SADA_JEM: dict[str, Any] = {
    **JEM_PP,
    "streams": {
        **JEM["streams"],
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

DIGITS_JEM: dict[str, Any] = {
    **_SMALL_JEM,
    "streams": {
        "classify": _jem_stream(False, 0.015) | {"batch_size": 128},
        "denoise": stream(64, "1/255", "100/255"),
        "generate": _jem_stream(False, 0.015),
    },
    "steps": 400,
    "validation_images": 143,
    "validate_every": 50,
    "checkpoint_every": 100,
}

CIFAR_JEM_SHORT: dict[str, Any] = {
    **_SMALL_JEM,
    "streams": {
        "classify": _jem_stream(True, 0.015, padding=0) | {"batch_size": 128},
        "denoise": stream(64, "1/255", "100/255", flip=True),
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


DIGITS_DDPM: dict[str, Any] = {
    **_ddpm(DIGITS_ADAMW, 64),
    "model": {"backbone": {"width": 32}},
    "optimizer": {"lr": 2e-3, "weight_decay": 0.0, "ema": 0.995, "clip_norm": 1.0},
    "steps": 1200,
    "validate_every": 250,
    "checkpoint_every": 250,
}

# Ho et al. 2020, appendix B: Adam at a constant rate, 800,000 steps.
CIFAR_DDPM: dict[str, Any] = {
    **_ddpm(CDN_CIFAR, 128, flip=True),
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

CIFAR_DDPM_SHORT: dict[str, Any] = {
    **_ddpm(CIFAR_ADAMW, 32, flip=True),
    "model": {"backbone": {"width": 32}},
    "optimizer": {"lr": 1e-3, "weight_decay": 0.0, "ema": 0.999, "clip_norm": 1.0},
    "steps": 3000,
    "validate_every": 500,
    "checkpoint_every": 500,
}


def noisy_classifier(recipe: dict[str, Any]) -> dict[str, Any]:
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
CIFAR_ROBUST: dict[str, Any] = {
    **CDN_CIFAR,
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
        "denoise": CDN_CIFAR["streams"]["denoise"],
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
CIFAR_ROBUST_SHORT: dict[str, Any] = {
    **CIFAR_ADAMW,
    "backbone": "gradresnet18-imagenet",
    "head": "logit",
    "objective": "adv",
    "terms": {
        "adv": {"steps": 3, "warmup_steps": 200},
        "trades": {"steps": 3, "warmup_steps": 200},
    },
    "streams": {
        "classify": {"batch_size": 128, "noise": _NO_NOISE, "augmentation": {"flip": True}},
        "denoise": CIFAR_ADAMW["streams"]["denoise"],
    },
    "steps": 400,
    "validate_every": 100,
}

DIGITS_ROBUST: dict[str, Any] = {
    **DIGITS_ADAMW,
    "head": "logit",
    "objective": "adv",
    "terms": {"adv": {"warmup_steps": 200}, "trades": {"warmup_steps": 200}},
    "model": {"backbone": {"width": 8}},
    "streams": {
        "classify": {"batch_size": 128, "noise": _NO_NOISE, "augmentation": {"crop_padding": 1}},
        "denoise": DIGITS_ADAMW["streams"]["denoise"],
    },
    "steps": 400,
}


def wide(recipe: dict[str, Any]) -> dict[str, Any]:
    """``recipe`` with denoising up to sigma 50, where an image is all noise: to sample from it."""
    noise = {"kind": "log-uniform", "min": "1/255", "max": "50/1"}
    denoise = {**recipe["streams"]["denoise"], "noise": noise}
    return {**recipe, "streams": {**recipe["streams"], "denoise": denoise}}
