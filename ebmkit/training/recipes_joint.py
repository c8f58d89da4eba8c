"""Recipes of joint models and denoisers: those of CDN (appendix A), and faster ones of ours.

Ours train by Muon at a rate that stays constant and then falls to 0, and evaluate averaged weights;
how they were found, and which choices carry over from short runs to long ones, is in the docs ("The
recipe"). Those called ``adamw`` are what they are compared with.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "CDN_CIFAR",
    "CIFAR",
    "CIFAR_ADAMW",
    "CIFAR_CPU",
    "CIFAR_SHORT",
    "DIGITS",
    "DIGITS_ADAMW",
    "DNCNN",
    "IMAGENET",
    "OWN",
    "PATCHES",
    "stream",
]


def stream(batch_size: int, low: str, high: str, **augmentation: Any) -> dict[str, Any]:
    """A stream with the paper's law of sigma, the square of a uniform variable."""
    noise = {"kind": "squared-uniform", "min": low, "max": high}
    return {"batch_size": batch_size, "noise": noise, "augmentation": augmentation}


CDN_CIFAR: dict[str, Any] = {
    "model": {"backbone": {"width": 64}},
    "streams": {
        "classify": stream(128, "0", "20/255", flip=True, crop_padding=4, mix="both"),
        "denoise": stream(64, "1/255", "100/255", flip=True),
    },
    "optimizer": {"lr": 3e-4, "weight_decay": 0.05},
    "steps": 78_000,
    "validation_images": 1000,
    "validate_every": 1000,
    "checkpoint_every": 1000,
    "log_every": 50,
}

# 400 epochs of 1,281,167 images in batches of 512 are 1,000,912 steps.
IMAGENET: dict[str, Any] = {
    "dataset": {"name": "imagenet", "image_size": 224, "workers": 8},
    "backbone": "gradresnet18-imagenet",
    "model": {"backbone": {"width": 64}},
    "streams": {
        "classify": stream(
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
            **stream(64, "1/255", "70/255", flip=True, crop_size=128),
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

CIFAR_ADAMW: dict[str, Any] = {
    **CDN_CIFAR,
    "model": {"backbone": {"width": 16}},
    "streams": {
        "classify": stream(128, "0", "20/255", flip=True),
        "denoise": stream(64, "1/255", "100/255", flip=True),
    },
    "optimizer": {"lr": 3e-3, "weight_decay": 0.05},
    "steps": 1000,
    "validation_images": 500,
    "validate_every": 100,
    "checkpoint_every": 250,
    "log_every": 10,
}

MUON: dict[str, Any] = {
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

CIFAR_SHORT: dict[str, Any] = {
    **CIFAR_ADAMW,
    "backbone": "gradresnet10",
    "streams": {
        "classify": stream(
            128, "0", "5/255", flip="alternating", crop_padding=2, crop_fill="reflect"
        ),
        "denoise": stream(64, "1/255", "100/255", flip=True),
    },
    "optimizer": MUON,
    "steps": 2100,
    "validate_every": 300,
}

# 2.6 PFLOP: 53 epochs of the classification stream.
CIFAR_CPU: dict[str, Any] = {
    **CIFAR_ADAMW,
    "backbone": "gradresnet10",
    "model": {"backbone": {"width": 40}},
    "streams": {
        "classify": stream(
            160,
            "0",
            "5/255",
            flip="alternating",
            crop_padding=4,
            crop_fill="reflect",
            mix="both",
            mix_probability=0.5,
        ),
        "denoise": stream(48, "1/255", "100/255", flip=True),
    },
    "optimizer": MUON | {"decay_share": 0.5, "ema": 0.995},
    "steps": 16_500,
    "validate_every": 500,
    "checkpoint_every": 100,
}

# 18 PFLOP: 61 epochs of the classification stream.
CIFAR: dict[str, Any] = {
    **CIFAR_CPU,
    "backbone": "gradresnet18",
    "model": {"backbone": {"width": 64}},
    "streams": {
        "classify": CIFAR_CPU["streams"]["classify"] | {"batch_size": 256},
        "denoise": stream(96, "1/255", "100/255", flip=True),
    },
    "steps": 12_000,
    "validation_images": 1000,
    "checkpoint_every": 1000,
    "log_every": 50,
}

DIGITS_ADAMW: dict[str, Any] = {
    "model": {"backbone": {"width": 16}},
    "streams": {
        "classify": stream(128, "0", "20/255", crop_padding=1),
        "denoise": stream(64, "1/255", "100/255"),
    },
    "optimizer": {"lr": 3e-3, "weight_decay": 0.05},
    "steps": 800,
    "validation_images": 143,
    "validate_every": 50,
    "checkpoint_every": 100,
}

# lambda is 8: digits are soon classified, and denoising begins late.
DIGITS: dict[str, Any] = {
    **DIGITS_ADAMW,
    "balance": 8.0,
    "streams": {
        "classify": stream(96, "0", "20/255", crop_padding=1),
        "denoise": stream(64, "1/255", "100/255"),
    },
    "optimizer": MUON,
    "steps": 360,
    "validate_every": 60,
    "checkpoint_every": 120,
}

PATCHES: dict[str, Any] = {
    "model": {"backbone": {"width": 16}},
    "objective": "dsm",
    "streams": {
        "classify": stream(64, "0", "20/255", flip=True),
        "denoise": stream(64, "1/255", "100/255", flip=True),
    },
    "optimizer": {"lr": 2e-3, "weight_decay": 0.05, "clip_norm": 1.0},
    "steps": 400,
    "validate_every": 50,
    "checkpoint_every": 100,
}

# Zhang et al. 2017, DnCNN-S: 50 epochs of 1,600 batches of 128 patches (by AdamW, not SGD).
DNCNN: dict[str, Any] = {
    "dataset": {"name": "folder"},
    "backbone": "dncnn",
    "objective": "dsm",
    "model": {"backbone": {"width": 64}},
    "streams": {
        "classify": stream(128, "0", "20/255", flip=True, crop_size=40),
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

OWN: dict[str, Any] = {
    **CDN_CIFAR,
    "model": {"backbone": {"width": 32}},
    "streams": {
        "classify": stream(64, "0", "20/255", flip=True, crop_padding=4),
        "denoise": stream(32, "1/255", "100/255", flip=True),
    },
    "optimizer": {"lr": 1e-3, "weight_decay": 0.05},
    "steps": 10_000,
}
