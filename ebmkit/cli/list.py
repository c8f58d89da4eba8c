"""``ebmkit list``: the tables of named components."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from rich.table import Table
from typer import Argument

from ebmkit.cli.console import console

Kind = Literal[
    "backbones", "denoisers", "heads", "objectives", "datasets", "recipes", "suites", "samplers",
    "tasks", "checkpoints", "guidance",
]  # fmt: skip


def tables() -> dict[str, dict[str, str]]:
    """Kind -> name -> description, from the tables in which the program looks names up."""
    from ebmkit.data import DATASETS
    from ebmkit.evaluation import SUITES
    from ebmkit.guidance import GUIDANCE_SCHEDULES, GUIDES
    from ebmkit.models import BACKBONES, DENOISERS, HEADS
    from ebmkit.models.importing import KINDS
    from ebmkit.objectives import ALIASES, OBJECTIVES
    from ebmkit.sampling import SAMPLERS
    from ebmkit.sampling.inverse import TASKS
    from ebmkit.training import RECIPES

    return {
        "backbones": {name: preset.description for name, preset in BACKBONES.items()}
        | {"timm:NAME": "any network of timm, as timm:convnext_atto"},
        "denoisers": {name: preset.description for name, preset in DENOISERS.items()},
        "heads": {name: preset.description for name, preset in HEADS.items()},
        "objectives": {name: objective.description for name, objective in OBJECTIVES.items()}
        | {name: f"short for {'+'.join(parts)}" for name, parts in ALIASES.items()},
        "datasets": {name: dataset.description for name, dataset in DATASETS.items()},
        "recipes": {name: recipe.description for name, recipe in RECIPES.items()},
        "suites": {name: suite.description for name, suite in SUITES.items()},
        "samplers": {name: sampler.description for name, sampler in SAMPLERS.items()},
        "tasks": {name: task.description for name, task in TASKS.items()},
        "checkpoints": dict(KINDS),
        "guidance": {name: guide.description for name, guide in GUIDES.items()}
        | {f"--schedule {kind.form}": kind.description for kind in GUIDANCE_SCHEDULES.values()},
    }


def list_(
    kind: Annotated[Kind, Argument(help=", ".join(get_args(Kind)))],
) -> None:
    """List the names that options accept: backbones, objectives, samplers, ..."""
    table = Table(kind.removesuffix("s"), "description")
    for name, description in tables()[kind].items():
        table.add_row(name, description)
    console.print(table)
