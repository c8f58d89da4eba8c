r"""Suite ``robustness-grid``: accuracy by test epsilon and by training epsilon (RCG table 4.1).

A row is the radius :math:`\epsilon` of the attack that images are tested with, a column a network
and the radius that it was trained with. An image counts as right at :math:`\epsilon` where it is
right as it is and no attack at :math:`\epsilon`, nor at a smaller radius of the grid, whose
perturbations are allowed too, makes it wrong.

Protocol. PGD by foolbox (`ebmkit.evaluation.attacks`) of 20 steps of 2.5 eps / 20 from a random
start in the ball, in image units, in float32, directly on the network's labels, on the first 1000
images unless told otherwise (`RobustnessGridConfig`). The thesis's table is on all of CIFAR-10's
test images.

The networks are the one evaluated and those of the runs that ``beside`` names. What a run was
trained with is read from its ``model.json``: 0 where its objective has no attack; unknown for an
imported network, whose column has the name of its run.

``robustness-grid.json`` holds, beside the common entries (``images`` is the number attacked):
``norm``, ``epsilons`` and ``columns``, a list of ``name`` (of the run; empty for the one
evaluated), ``trained`` (the norm and radius in training, null if unknown) and ``accuracy``, a list
of estimates over ``epsilons``; and ``thesis``, the table of RCG as pairs of test and training
radius with the accuracy, for CIFAR-10 and l2.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from torch import Tensor

from ebmkit.card import ModelCard
from ebmkit.compile import in_float32
from ebmkit.energy import EnergyModel
from ebmkit.errors import UserError
from ebmkit.evaluation.attacks import Attack, Norm
from ebmkit.evaluation.context import EvaluationContext, Suite, check_classifies
from ebmkit.evaluation.data import Batch, Images
from ebmkit.evaluation.defences import Defence, DefendedClassifier, labels_given
from ebmkit.evaluation.masking import norm_name, share
from ebmkit.evaluation.masking import strength as in_words
from ebmkit.evaluation.robustness_config import Radii
from ebmkit.evaluation.subset import columns_of
from ebmkit.evaluation.tables import new_table

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["ROBUSTNESS_GRID", "THESIS", "RobustnessGridConfig", "draw", "run", "table", "trained"]

VALUES_PER_STEP = 800_000
"""Pixel values in a step of the attack at most."""

THESIS = {
    (0.0, 0.0): 0.9525, (0.0, 0.25): 0.9277, (0.0, 0.5): 0.9083, (0.0, 1.0): 0.8162,
    (0.25, 0.0): 0.0865, (0.25, 0.25): 0.8121, (0.25, 0.5): 0.8240, (0.25, 1.0): 0.7553,
    (0.5, 0.0): 0.0028, (0.5, 0.25): 0.6229, (0.5, 0.5): 0.7017, (0.5, 1.0): 0.6863,
    (1.0, 0.0): 0.0, (1.0, 0.25): 0.2118, (1.0, 0.5): 0.4048, (1.0, 1.0): 0.5272,
    (2.0, 0.0): 0.0, (2.0, 0.25): 0.0053, (2.0, 0.5): 0.0522, (2.0, 1.0): 0.1859,
}  # fmt: skip
"""(test radius, training radius), l2 for images in [0, 1] -> accuracy of a ResNet-50 on CIFAR-10
(RCG table 4.1, whose "/255" is a slip)."""


def _distinct(values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))


class RobustnessGridConfig(BaseModel):
    """Settings of the suite, as in ``--set robustness-grid.steps=40``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field("", description="name of the evaluated run in tables and plots")
    beside: Annotated[tuple[str, ...], AfterValidator(_distinct)] = Field(
        (), description="run folders of further classifiers, one column each"
    )
    images: int = Field(1000, ge=1, description="number of attacked images, from the first")
    norm: Norm = Field("l2", description="norm of the radii: l2 or linf")
    epsilons: Radii = Field(
        (0.0, 0.25, 0.5, 1.0, 2.0),
        description="test radii, image units; 0 is always included",
    )
    steps: int = Field(
        20, ge=1, description="number of PGD steps; each has length 2.5 radius / steps"
    )
    restarts: int = Field(
        1, ge=1, description="number of random starts of PGD; the strongest counts"
    )


@dataclass(frozen=True)
class _Column:
    """A network of the grid; ``trained`` is None where nobody knows."""

    name: str
    model: EnergyModel
    trained: tuple[str, float] | None


def trained(card: ModelCard | None) -> tuple[str, float] | None:
    """Norm and radius of the attack in training, ("", 0.0) if there was none; None if unknown."""
    if card is None or not card.objective:
        return None
    norm, _, radius = card.attack.partition(" ")
    return (norm, float(radius)) if radius else ("", 0.0)


def ready(setting: EvaluationContext) -> None:
    """Whether the runs beside are there, and know the same labels.

    Raises:
        UserError: if not.
    """
    _columns(setting)


def run(setting: EvaluationContext) -> dict[str, Any]:
    """Measure; see the module's text for what is returned.

    Raises:
        UserError: if a run beside is not there, or an image leaves [0, 1].
    """
    config = setting.option(RobustnessGridConfig)
    images = setting.images.first(min(config.images, len(setting.images)))
    columns = []
    for column in _columns(setting):
        with in_float32(setting.device):
            smallest = _smallest(setting, images, column.model, config)
        accuracy = [share(smallest > epsilon) for epsilon in config.epsilons]
        columns.append({"name": column.name, "trained": column.trained, "accuracy": accuracy})
    thesis = [
        {"test": test, "train": train, "accuracy": accuracy}
        for (test, train), accuracy in THESIS.items()
        if setting.images.name == "cifar10" and config.norm == "l2"
    ]
    return {
        "images": len(images),
        "precision": "fp32",
        "compiled": False,
        "chance": 1 / setting.model.num_classes,
        "norm": config.norm,
        "epsilons": list(config.epsilons),
        "columns": columns,
        "thesis": thesis,
    }


def _columns(setting: EvaluationContext) -> list[_Column]:
    """The networks, by training radius; those of which it is not known last."""
    from ebmkit.models import load

    model = setting.exact_model
    assert isinstance(model, EnergyModel)
    found = [_Column(setting.option(RobustnessGridConfig).name, model, trained(setting.model.card))]
    for run in setting.option(RobustnessGridConfig).beside:
        model = load(run, device=str(setting.device))
        try:
            check_classifies(model, setting.images)
        except UserError as error:
            raise UserError(f"robustness-grid.beside: {run!r}: {error}") from None
        assert isinstance(model, EnergyModel)
        channels = model.card.channels if model.card else setting.images.channels
        if channels != setting.images.channels:
            raise UserError(
                f"robustness-grid.beside: the model in {run!r} takes images of {channels} "
                f"channel(s), and these have {setting.images.channels}: name another run"
            )
        found.append(_Column(Path(os.path.abspath(run)).name, model, trained(model.card)))
    return sorted(found, key=lambda c: (c.trained is None, (c.trained or ("", 0.0))[::-1]))


def _smallest(
    setting: EvaluationContext, images: Images, model: EnergyModel, config: RobustnessGridConfig
) -> Tensor:
    """The smallest radius of the grid that breaks each image, (N,); inf where none does."""
    target = DefendedClassifier(model, Defence("direct"))
    attack = Attack(config.norm, "pgd", config.steps, config.restarts, 2.5 / config.steps)

    def measure(batch: Batch) -> dict[str, Tensor]:
        x, labels = batch.x, batch.labels
        assert labels is not None
        right = labels_given(target, x, None) == labels
        smallest = torch.full((len(x),), torch.inf, dtype=torch.float64)
        smallest[~right.cpu()] = 0.0
        for epsilon in config.epsilons[1:]:
            left = torch.nonzero(smallest.isinf()).squeeze(1).to(x.device)
            if len(left):
                seed = f"grid {setting.seed}"
                broken = attack.breaks(target, x[left], labels[left], epsilon, seed=seed)
                smallest[left[broken].cpu()] = epsilon
        return {"smallest": smallest}

    height, width = images.image_size
    rows = max(1, VALUES_PER_STEP // (images.channels * height * width))
    share_of = -(-len(images) // setting.world.size)
    own = replace(setting, model=model)
    return columns_of(own, images, 0.0, measure, min(rows, share_of))["smallest"]


def draw(setting: EvaluationContext, document: dict[str, Any], folder: Path) -> None:
    """Write ``robustness-grid.png``: accuracy against the test radius, a line per network."""
    from ebmkit.plots.robustness import grid

    grid(document, names(document), folder / "robustness-grid.png")


def names(document: dict[str, Any]) -> list[str]:
    """What each column is called: its training radius, and its run where others have the same."""
    told = [_trained_name(c["trained"], document["norm"]) for c in document["columns"]]
    return [
        name if name and told.count(name) == 1 else _with_run(name, column["name"])
        for name, column in zip(told, document["columns"], strict=True)
    ]


def _trained_name(found: Sequence[Any] | None, norm: str) -> str:
    if found is None:
        return ""
    own, radius = found
    text = in_words(own or norm, radius) if radius else "0"
    return f"trained {text}" if own in ("", norm) else f"trained {norm_name(own)} {text}"


def _with_run(name: str, run: str) -> str:
    return " ".join(part for part in (name, f"({run or 'this run'})") if part)


def table(document: dict[str, Any]) -> Table:
    """Accuracy in % by test radius (rows) and network (columns), the thesis's beside ours."""
    few = len(document["columns"]) <= 3
    theirs = {(e["test"], e["train"]): e["accuracy"] for e in document["thesis"]}
    train = sorted({radius for _, radius in theirs})
    heads = [*names(document), *(f"thesis {radius:g}" for radius in train)]
    result = new_table(document, (f"test eps, {norm_name(document['norm'])}", *heads))
    for i, epsilon in enumerate(document["epsilons"]):
        cells = [_cell(c["accuracy"][i], few) for c in document["columns"]]
        for radius in train:
            known = theirs.get((epsilon, radius))
            cells.append("-" if known is None else f"{100 * known:.2f}")
        result.add_row(in_words(document["norm"], epsilon) if epsilon else "0", *cells)
    return result


def _cell(estimate: dict[str, Any], with_interval: bool) -> str:
    value, low, high = (100 * estimate[key] for key in ("value", "low", "high"))
    return f"{value:.1f} ({low:.0f} to {high:.0f})" if with_interval else f"{value:.1f}"


ROBUSTNESS_GRID = Suite(
    description="accuracy by test and training epsilon under PGD, of this run and of others",
    check=check_classifies,
    passes=lambda setting: 1 + len(setting.option(RobustnessGridConfig).beside),
    run=run,
    draw=draw,
    table=table,
    options=RobustnessGridConfig,
    ready=ready,
)
