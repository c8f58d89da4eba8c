"""Recipes: what a data set brings, so that one command is right on digits and on CIFAR-10.

A recipe is the lowest layer of a run's configuration. ``cdn-cifar10`` and ``imagenet`` are the
paper's (CDN appendix A); ``jem``, ``jem++`` and ``sada-jem`` follow the scripts that their authors
released, in our units: their images live in [-1, 1], so noise and bounds are halved here, and a
step of 1 is one of 1/4 (`ebmkit.sampling.langevin`). ``cifar10-robust`` has the numbers of the
`robustness` package, by which RCG's classifiers were trained, but for its changes of colour and
rotations. The others are ours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ebmkit.objectives import parse_objective
from ebmkit.training.recipes_joint import (
    CDN_CIFAR,
    CIFAR,
    CIFAR_ADAMW,
    CIFAR_CPU,
    CIFAR_SHORT,
    DIGITS,
    DIGITS_ADAMW,
    DNCNN,
    IMAGENET,
    OWN,
    PATCHES,
)
from ebmkit.training.recipes_other import (
    CIFAR_DDPM,
    CIFAR_DDPM_SHORT,
    CIFAR_JEM_SHORT,
    CIFAR_ROBUST,
    CIFAR_ROBUST_SHORT,
    DIGITS_DDPM,
    DIGITS_JEM,
    DIGITS_ROBUST,
    JEM,
    JEM_PP,
    SADA_JEM,
    noisy_classifier,
    wide,
)

__all__ = ["RECIPES", "Recipe", "recipe_for"]


class Recipe(NamedTuple):
    """Defaults for a data set: a nested mapping of `TrainConfig` fields, and a line about it."""

    config: dict[str, Any]
    description: str


def _for(dataset: str, config: dict[str, Any]) -> dict[str, Any]:
    return {"dataset": {"name": dataset}, **config}


RECIPES: dict[str, Recipe] = {
    "digits": Recipe(
        _for("digits", DIGITS), "8x8 digits by Muon, in about 80 seconds on two cores"
    ),
    "digits-adamw": Recipe(
        _for("digits", DIGITS_ADAMW),
        "the same by AdamW alone, 800 steps: the baseline of digits",
    ),
    "patches": Recipe(
        _for("patches", PATCHES), "photo patches, denoising alone, on a CPU in minutes"
    ),
    "cifar10": Recipe(
        _for("cifar10", CIFAR),
        "GradResNet18 of width 64 by Muon, for a GPU: 18 PFLOP; not run yet",
    ),
    "cdn-cifar10": Recipe(
        _for("cifar10", CDN_CIFAR),
        "the paper's CIFAR-10 recipe: width 64, 78,000 steps of AdamW, MixUp/CutMix",
    ),
    "cifar100": Recipe(_for("cifar100", CDN_CIFAR), "the paper's CIFAR-10 recipe on CIFAR-100"),
    "cifar10-short": Recipe(
        _for("cifar10", CIFAR_SHORT), "GradResNet10 of width 16, 53 TFLOP by Muon: minutes on a CPU"
    ),
    "cifar10-cpu": Recipe(
        _for("cifar10", CIFAR_CPU),
        "GradResNet10 of width 40, 2.6 PFLOP by Muon: hours on two CPU cores",
    ),
    "cifar10-adamw": Recipe(
        _for("cifar10", CIFAR_ADAMW),
        "GradResNet18 of width 16, 54 TFLOP by AdamW, flips: the baseline of cifar10-short",
    ),
    "imagenet": Recipe(
        IMAGENET, "the paper's ImageNet recipe: 400 epochs, crops from 128 to 224 pixels"
    ),
    "dncnn": Recipe(
        DNCNN,
        "DnCNN-S at sigma 25/255 on 40x40 patches of a folder of gray images, for example Train400",
    ),
    "digits-wide": Recipe(
        _for("digits", wide(DIGITS_ADAMW)),
        "digits-adamw with denoising up to sigma 50; does not learn to denoise",
    ),
    "cifar10-wide": Recipe(
        _for("cifar10", wide(CIFAR_ADAMW)), "cifar10-adamw with denoising up to sigma 50"
    ),
    "jem": Recipe(
        _for("cifar10", JEM),
        "JEM with its authors' settings: WideResNet-28-10, no norm, 200 epochs",
    ),
    "jem++": Recipe(
        _for("cifar10", JEM_PP), "JEM++: BatchNorm, SGD, Gaussian starts, bounded Langevin steps"
    ),
    "sada-jem": Recipe(
        _for("cifar10", SADA_JEM),
        "SADA-JEM: sharpness-aware, likelihood of images without augmentation",
    ),
    "digits-jem": Recipe(_for("digits", DIGITS_JEM), "JEM on digits on a CPU in minutes"),
    "cifar10-jem-short": Recipe(
        _for("cifar10", CIFAR_JEM_SHORT), "JEM on CIFAR-10, a small network, 1,000 steps"
    ),
    "digits-ddpm": Recipe(
        _for("digits", DIGITS_DDPM), "a diffusion model of digits on a CPU in minutes"
    ),
    "cifar10-ddpm": Recipe(
        _for("cifar10", CIFAR_DDPM), "DDPM with its authors' settings, 800,000 steps; for a GPU"
    ),
    "cifar10-ddpm-short": Recipe(
        _for("cifar10", CIFAR_DDPM_SHORT), "a small diffusion model, minutes on a CPU"
    ),
    "digits-noisy-classifier": Recipe(
        _for("digits", noisy_classifier(DIGITS_ADAMW)),
        "a classifier with the noise level as an input, trained at all levels "
        "of a diffusion schedule",
    ),
    "cifar10-noisy-classifier": Recipe(
        _for("cifar10", noisy_classifier(CIFAR_ADAMW)), "the same on CIFAR-10, from cifar10-adamw"
    ),
    "cifar10-robust": Recipe(
        _for("cifar10", CIFAR_ROBUST),
        "adversarial training with the robustness package's settings: "
        "ResNet-50, l2 0.5, 150 epochs",
    ),
    "cifar10-robust-short": Recipe(
        _for("cifar10", CIFAR_ROBUST_SHORT),
        "adversarial training, width 16, 3 steps of PGD, 400 steps: minutes on a CPU",
    ),
    "digits-robust": Recipe(
        _for("digits", DIGITS_ROBUST), "adversarial training on digits on a CPU in a minute"
    ),
    "folder": Recipe(_for("folder", OWN), "starting point for your own images in folders"),
    "hdf5": Recipe(_for("hdf5", OWN), "starting point for your own images in HDF5"),
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
    if any(term.objective.family == "likelihood" for term in named):
        config = RECIPES[JEM_RECIPES.get(dataset, "cifar10-jem-short")].config
    elif [term.name for term in named] == ["ddpm"]:
        config = RECIPES[DDPM_RECIPES.get(dataset, "cifar10-ddpm-short")].config
    elif any(term.objective.family == "adversarial" for term in named):
        name = ROBUST_RECIPES.get(dataset, dataset)
        config = RECIPES.get(name, RECIPES["folder"]).config | {"head": "logit"}
    else:
        config = RECIPES.get(dataset, RECIPES["folder"]).config
    return config | {"dataset": config["dataset"] | {"name": dataset}}
