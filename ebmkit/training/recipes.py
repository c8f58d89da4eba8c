"""Recipes: what a data set brings, so that one command is right on digits and on CIFAR-10.

A recipe is the lowest layer of a run's configuration. They stand in ``recipes.yaml``, with where
their numbers come from.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any, NamedTuple

import yaml

from ebmkit.objectives import parse_objective

Config = dict[str, Any]


class Recipe(NamedTuple):
    """Defaults for a data set: a nested mapping of `TrainConfig` fields, and a line about it."""

    config: Config
    description: str


def _read_recipes() -> dict[str, Recipe]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    text = files("ebmkit.training").joinpath("recipes.yaml").read_text(encoding="utf-8")
    found = yaml.load(text, loader)["recipes"]
    return {name: Recipe(own, own.pop("description")) for name, own in found.items()}


RECIPES = _read_recipes()

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
