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

import importlib.resources
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml

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
        options: by suite, settings of those behind the figures.
        threads: of a CPU at most; None: as many as there are.
    """

    name: str
    description: str
    recipe: Mapping[str, str]
    layer: Mapping[str, Mapping[str, Any]]
    images: Mapping[str, int] = field(default_factory=dict)
    by_task: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
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


def read_data(name: str) -> Any:
    """A YAML file of this package."""
    text = importlib.resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
    return yaml.safe_load(text)


def over_recipe(layer: Mapping[str, Any]) -> dict[str, Any]:
    """``layer`` over the configuration of the recipe that its entry ``recipe`` names, if any."""
    own = dict(layer)
    recipe = own.pop("recipe", None)
    return {**(RECIPES[recipe].config if recipe else {}), **own}


def _scale(name: str, fields: dict[str, Any]) -> Scale:
    by_task = {task: over_recipe(layer) for task, layer in fields.pop("by_task").items()}
    if name == "cpu":
        for family in ("cifar10", "imagenet"):
            fields["layer"][family]["compute"] = {"precision": _cpu_precision()}
    return Scale(name=name, by_task=by_task, **fields)


SCALES: dict[str, Scale] = {n: _scale(n, fields) for n, fields in read_data("scales.yaml").items()}


def find_scale(name: str) -> Scale:
    """The scale called ``name``.

    Raises:
        UserError: if there is none.
    """
    return find("scale", SCALES, name)
