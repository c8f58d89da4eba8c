"""How large a reproduction is: for CI, for two cores, and as the paper has it.

========= ============================== ================== =============================
scale     data                           network            training of a variant
========= ============================== ================== =============================
smoke     scikit-learn's digits, 8x8     width 8            60 steps: seconds
cpu       CIFAR-10                       width 16           1,000 steps: minutes on 2 cores
full      CIFAR-10 (table 2: ImageNet)   width 64           the paper's recipe, on a GPU
========= ============================== ================== =============================

Nothing else differs between the variants of a table than what each names, with one exception: below
``full`` those that denoise alone learn at a third of the rate, with clipped gradients. At the
rate of the others, which the small recipes have so that minutes suffice, they fell back to the
identity after some hundred steps and stayed there. Table 2 follows the
ImageNet recipe at every scale, crops that grow and batches that shrink included; below ``full`` on
the small images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ebmkit.registry import find
from ebmkit.training import RECIPES, TrainConfig, resolve


@dataclass(frozen=True)
class Scale:
    """Settings that all variants of an experiment share.

    Attributes:
        name: as on the command line.
        description: one line.
        recipe: by family of variants (cifar10, imagenet, guidance), the recipe below everything.
        layer: by family, what is laid over the recipe.
        images: by suite, test images evaluated at most; all where it is not named.
        by_task: laid over the variants of a task.
        threads: of a CPU at most; None: as many as there are.
    """

    name: str
    description: str
    recipe: Mapping[str, str]
    layer: Mapping[str, Mapping[str, Any]]
    images: Mapping[str, int]
    by_task: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    threads: int | None = None

    def resolve(self, family: str, task: str, *layers: Mapping[str, Any]) -> TrainConfig:
        """The whole configuration of a variant: its recipe, and above it the scale's layers.

        Args:
            family: of the variant.
            task: of the variant.
            layers: what is laid over both.
        """
        own = (self.layer[family], self.by_task.get(task, {}))
        return resolve(*own, *layers, recipe=self.recipe[family])


def _cpu_precision() -> str:
    """bf16 where the processor has it in hardware, which about halves the time; else fp32."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    checks = [getattr(torch.cpu, name, None) for name in names]
    return "bf16" if any(check() for check in checks if check is not None) else "fp32"


_SMOKE: dict[str, Any] = {
    "model": {"backbone": {"width": 8}},
    "streams": {"classify": {"batch_size": 64}, "denoise": {"batch_size": 32}},
    "steps": 60,
    "validation_images": 0,
    "checkpoint_every": 20,
}

_CPU: dict[str, Any] = {
    "steps": 1000,
    "validate_every": 250,
    "compute": {"precision": _cpu_precision()},
}


def _imagenet(name: str, width: int, batch: int, crops: tuple[int, ...]) -> dict[str, Any]:
    """The ImageNet recipe on the small images of ``name``: growing crops, shrinking batches."""
    sizes = zip(("150/400", "260/400", "340/400"), (40, 32, 16), crops[1:], strict=True)
    phases = [
        {"after": after, "batch_size": count * batch // 128, "crop_size": crop}
        for after, count, crop in sizes
    ]
    return {
        "dataset": {"name": name, "image_size": None, "workers": 0},
        "model": {"backbone": {"width": width}},
        "streams": {
            "classify": {"batch_size": batch, "augmentation": {"crop_size": crops[-1]}},
            "denoise": {
                "batch_size": batch // 2,
                "augmentation": {"crop_size": crops[0]},
                "phases": phases,
            },
        },
        "optimizer": {"lr": 3e-3, "weight_decay": 0.05},
    }


_PLAIN_HEAD: dict[str, Any] = {"head": "logit", "model": {"head": {"bias": True}}}


def _small(width: int, classify: int, steps: int, every: int) -> dict[str, Any]:
    """The networks of target guidance: E(x, y) = -logit, E(x) = -logsumexp (RCG eq. 2.32-2.38)."""
    return {
        **_PLAIN_HEAD,
        "model": {"backbone": {"width": width}, **_PLAIN_HEAD["model"]},
        "streams": {"classify": {"batch_size": classify}, "denoise": {"batch_size": 32}},
        "steps": steps,
        "validation_images": 0,
        "checkpoint_every": every,
    }


def _small_networks(
    judge: dict[str, Any], robust: int, jem: int, diffusion: tuple[int, int], own: tuple[int, int]
) -> dict[str, dict[str, Any]]:
    """By task, what is laid over `_small`: numbers of steps, or batch size and steps."""
    noise = {"kind": "fixed", "min": 0.0, "max": 0.015}
    stream = {"batch_size": 64, "noise": noise}
    return {
        "judge": {"backbone": "resnet18", **judge},
        "robust": {
            "terms": {"adv": {"steps": 3, "warmup_steps": robust // 2}},
            "streams": {"classify": {"batch_size": 64}},
            "steps": robust,
        },
        "diffusion": {
            "backbone": "unet",
            "head": "linear-quadratic",
            "model": {"backbone": {"width": 32, "blocks": 1}},
            "streams": {"denoise": {"batch_size": diffusion[0]}},
            "optimizer": {"lr": 2e-3, "weight_decay": 0.0, "ema": 0.995, "clip_norm": 1.0},
            "steps": diffusion[1],
            "checkpoint_every": 200,
        },
        "jem": {
            "backbone": "wideresnet10-jem",
            "streams": {"classify": stream, "generate": stream},
            "optimizer": {"lr": 1e-3, "weight_decay": 0.0, "warmup_steps": 30},
            "negatives": {"steps": 5, "buffer_size": 1000},
            "steps": jem,
        },
        # in the UNet's place; with plain norms, or cross-entropy beside, none begins to learn
        "own-diffusion": {
            "model": {"backbone": {"norm": "scale"}},
            "streams": {"denoise": {"batch_size": own[0]}},
            "optimizer": {"lr": 1e-3, "weight_decay": 0.0, "clip_norm": 1.0, "ema": 0.995},
            "steps": own[1],
        },
    }


_FULL_GUIDANCE = {
    "guide": RECIPES["cifar10-robust"].config | {"objective": "ce"},
    "judge": {"backbone": "wideresnet28-10"},
    "robust": RECIPES["cifar10-robust"].config,
    "diffusion": RECIPES["cifar10-ddpm"].config,
    "jem": RECIPES["jem"].config,
    "own-diffusion": RECIPES["cifar10-ddpm"].config
    | {"backbone": "gradresnet18", "model": {"backbone": {"norm": "scale"}}},
}

_GENTLE = {"denoising": {"optimizer": {"lr": 1e-3, "clip_norm": 1.0}}}
_SMOKE_STEPS = {key: _SMOKE[key] for key in ("steps", "validation_images", "checkpoint_every")}

SCALES: dict[str, Scale] = {
    "smoke": Scale(
        "smoke",
        "seconds a row, on embedded data: that every row trains and is evaluated",
        {"cifar10": "digits-adamw", "imagenet": "imagenet", "guidance": "digits-adamw"},
        {
            "cifar10": _SMOKE,
            "imagenet": _imagenet("digits", 8, 64, (5, 6, 7, 8)) | _SMOKE_STEPS,
            "guidance": _small(8, 64, 160, 80),
        },
        {"classify": 100, "denoise": 100},
        _GENTLE | _small_networks({}, 160, 100, (64, 600), (64, 200)),
        threads=1,  # several are no faster on images this small, and far slower beside other work
    ),
    "cpu": Scale(
        "cpu",
        "CIFAR-10, narrow networks, minutes a row on two cores",
        {"cifar10": "cifar10-adamw", "imagenet": "imagenet", "guidance": "cifar10-adamw"},
        {
            "cifar10": _CPU,
            "imagenet": _imagenet("cifar10", 16, 128, (20, 24, 28, 32)) | _CPU,
            "guidance": _small(16, 128, 400, 50),
        },
        {"denoise": 1000},
        _GENTLE | _small_networks({"steps": 500}, 400, 250, (32, 2000), (32, 600)),
    ),
    "full": Scale(
        "full",
        "the paper's recipes, on a GPU",
        {"cifar10": "cdn-cifar10", "imagenet": "imagenet", "guidance": "cdn-cifar10"},
        {"cifar10": {}, "imagenet": {}, "guidance": _PLAIN_HEAD},
        {},
        _FULL_GUIDANCE,
    ),
}


def find_scale(name: str) -> Scale:
    """The scale called ``name``.

    Raises:
        UserError: if there is none.
    """
    return find("scale", SCALES, name)
