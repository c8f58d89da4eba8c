r"""Suite ``robustness-grid``: accuracy by test epsilon and by training epsilon (RCG table 4.1).

A row is the radius :math:`\epsilon` of the test attack, a column is a network with the radius of
its training attack. An image counts as correct at :math:`\epsilon` if its clean prediction is
correct and no attack at :math:`\epsilon` or at a smaller radius of the grid (whose perturbations
are also allowed) makes it wrong.

The attack is PGD (`ebmkit.evaluation.attacks`) with 20 steps of 2.5 eps / 20 from a random start in
the ball, on the network without a defence. The networks are the evaluated one and those of the runs
in ``beside``. The training radius is in the ``model.json`` of a run: 0 if its objective has no
attack; unknown for an imported network, whose column has the name of its run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from ebmkit import plots
from ebmkit.attacks import Norm
from ebmkit.card import ModelCard
from ebmkit.energy import EnergyModel
from ebmkit.evaluation.attacks import Attack, Defence, DefendedClassifier, predicted_labels
from ebmkit.evaluation.robustness import (
    Curve,
    Radii,
    norm_name,
    percent,
    plot_curves,
    strength,
)
from ebmkit.evaluation.statistics import accuracy
from ebmkit.evaluation.suite import (
    EvaluationBatch,
    EvaluationContext,
    Images,
    Positive,
    Suite,
    SuiteConfig,
    Unique,
    check_classifies,
    load_comparison_models,
    new_table,
)

VALUES_PER_STEP = 800_000
"""Maximum number of pixel values per batch of the attack."""

THESIS = {
    (0.0, 0.0): 0.9525, (0.0, 0.25): 0.9277, (0.0, 0.5): 0.9083, (0.0, 1.0): 0.8162,
    (0.25, 0.0): 0.0865, (0.25, 0.25): 0.8121, (0.25, 0.5): 0.8240, (0.25, 1.0): 0.7553,
    (0.5, 0.0): 0.0028, (0.5, 0.25): 0.6229, (0.5, 0.5): 0.7017, (0.5, 1.0): 0.6863,
    (1.0, 0.0): 0.0, (1.0, 0.25): 0.2118, (1.0, 0.5): 0.4048, (1.0, 1.0): 0.5272,
    (2.0, 0.0): 0.0, (2.0, 0.25): 0.0053, (2.0, 0.5): 0.0522, (2.0, 1.0): 0.1859,
}  # fmt: skip
"""(test radius, training radius) -> accuracy of a ResNet-50 on CIFAR-10; l2, images in [0, 1]
(RCG table 4.1; its "/255" is an error)."""


class RobustnessGridConfig(SuiteConfig):
    """Settings of the suite, as in ``--set robustness-grid.steps=40``."""

    name: str = ""
    """name of the evaluated run in tables and plots"""
    beside: Unique[str] = ()
    """run folders of further classifiers, one column each"""
    images: Positive = 1000
    """number of attacked images, from the first"""
    norm: Norm = "l2"
    """norm of the radii: l2 or linf"""
    epsilons: Radii = (0.0, 0.25, 0.5, 1.0, 2.0)
    """test radii, image units; 0 is always included"""
    steps: Positive = 20
    """number of PGD steps; each has length 2.5 radius / steps"""
    restarts: Positive = 1
    """number of random starts of PGD; the strongest counts"""


@dataclass(frozen=True)
class _Column:
    """A network of the grid; ``trained`` is None if unknown."""

    name: str
    model: EnergyModel
    trained: tuple[str, float] | None


def trained(card: ModelCard | None) -> tuple[str, float] | None:
    """Norm and radius of the training attack, ("", 0.0) without one; None if unknown."""
    if card is None or not card.objective:
        return None
    norm, _, radius = card.attack.partition(" ")
    return (norm, float(radius)) if radius else ("", 0.0)


def load_columns(context: EvaluationContext) -> list[_Column]:
    """Load the networks, sorted by training radius, unknown ones last.

    Raises:
        UserError: if a run of ``beside`` is missing, or has other classes or channels.
    """
    config, model = context.option(RobustnessGridConfig), context.exact_model
    assert isinstance(model, EnergyModel)
    found = [_Column(config.name, model, trained(context.model.card))]
    for name, other in load_comparison_models(context, config.beside, "robustness-grid.beside"):
        found.append(_Column(name, other, trained(other.card)))
    return sorted(found, key=lambda c: (c.trained is None, (c.trained or ("", 0.0))[::-1]))


def measure(context: EvaluationContext) -> dict[str, Any]:
    """Attack all networks; return the document. `UserError` if an image is outside [0, 1]."""
    config = context.option(RobustnessGridConfig)
    images = context.first(config.images)
    columns = []
    for column in load_columns(context):
        smallest = _minimal_epsilons(context, images, column.model, config)
        estimates = [accuracy(smallest > epsilon) for epsilon in config.epsilons]
        columns.append({"name": column.name, "trained": column.trained, "accuracy": estimates})
    thesis = [
        {"test": test, "train": train, "accuracy": value}
        for (test, train), value in THESIS.items()
        if context.images.name == "cifar10" and config.norm == "l2"
    ]
    return {
        "images": len(images),
        "chance": 1 / context.model.num_classes,
        "norm": config.norm,
        "epsilons": list(config.epsilons),
        "columns": columns,
        "thesis": thesis,
    }


def _minimal_epsilons(
    context: EvaluationContext, images: Images, model: EnergyModel, config: RobustnessGridConfig
) -> Tensor:
    """Smallest radius (N,) of the grid that breaks each image, found in ascending order; or inf."""
    target = DefendedClassifier(model, Defence("direct"))
    attack = Attack(config.norm, "pgd", config.steps, config.restarts, 2.5 / config.steps)

    def measure(batch: EvaluationBatch) -> dict[str, Tensor]:
        x, labels = batch.x, batch.labels
        assert labels is not None
        wrong = (predicted_labels(target, x, None) != labels).cpu()
        smallest = torch.full((len(x),), torch.inf, dtype=torch.float64).masked_fill(wrong, 0.0)
        for epsilon in config.epsilons[1:]:
            left = torch.nonzero(smallest.isinf()).squeeze(1).to(x.device)
            if len(left):
                seed = f"grid {context.seed}"
                broken = attack.succeeds(target, x[left], labels[left], epsilon, seed=seed)
                smallest[left[broken].cpu()] = epsilon
        return {"smallest": smallest}

    height, width = images.image_size
    rows = max(1, VALUES_PER_STEP // (images.channels * height * width))
    share = -(-len(images) // context.world.size)
    own = replace(context, model=model)
    return own.columns(0.0, measure, images, min(rows, share))["smallest"]


def column_names(document: dict[str, Any]) -> list[str]:
    """Column names: the training radius, and the run if several have the same radius."""
    names = []
    for column in document["columns"]:
        norm, radius = column["trained"] or ("", None)
        norm = norm or document["norm"]
        text = strength(norm, radius) if radius else "0"
        other = "" if norm == document["norm"] else f"{norm_name(norm)} "
        names.append("" if radius is None else f"trained {other}{text}")
    return [
        name
        if name and names.count(name) == 1
        else f"{name} ({column['name'] or 'this run'})".strip()
        for name, column in zip(names, document["columns"], strict=True)
    ]


def plot(context: EvaluationContext, document: dict[str, Any], folder: Path) -> None:
    """Write ``robustness-grid.png``: accuracy against the test radius, one line per network, thin
    lines for the thesis."""
    curves: list[Curve] = []
    colours: dict[float, str] = {}
    names = column_names(document)
    for i, (name, column) in enumerate(zip(names, document["columns"], strict=True)):
        curves.append(Curve(name, plots.look(i), document["epsilons"], column["accuracy"]))
        if column["trained"] is not None:
            colours.setdefault(column["trained"][1], plots.look(i)["color"])
    for radius in sorted({e["train"] for e in document["thesis"]} & colours.keys()):
        points = [(e["test"], e["accuracy"]) for e in document["thesis"] if e["train"] == radius]
        x, y = zip(*sorted(points), strict=True)
        label = f"trained {radius:g}, thesis (ResNet-50)"
        curves.append(Curve(label, {"color": colours[radius], "ls": ":"}, x, y))
    title = f"Accuracy under PGD attacks: {plots.images_of(document)}, bands 95 %"
    panels, path = {document["norm"]: curves}, folder / "robustness-grid.png"
    plot_curves(panels, document["chance"], title, path)


def table(document: dict[str, Any]) -> Table:
    """Accuracy in % by test radius (rows) and network (columns, then the thesis's)."""
    cell = partial(percent, with_interval=len(document["columns"]) <= 3)
    theirs = {(e["test"], e["train"]): e["accuracy"] for e in document["thesis"]}
    train = sorted({radius for _, radius in theirs})
    heads = [*column_names(document), *(f"thesis {radius:g}" for radius in train)]
    result = new_table(document, (f"test eps, {norm_name(document['norm'])}", *heads))
    for i, epsilon in enumerate(document["epsilons"]):
        cells = [cell(column["accuracy"][i]) for column in document["columns"]]
        for radius in train:
            known = theirs.get((epsilon, radius))
            cells.append("-" if known is None else f"{100 * known:.2f}")
        result.add_row(strength(document["norm"], epsilon) if epsilon else "0", *cells)
    return result


ROBUSTNESS_GRID = Suite(
    description="accuracy by test and training epsilon under PGD, of this run and of others",
    measure=measure,
    plot=plot,
    table=table,
    check=check_classifies,
    passes=lambda context: 1 + len(context.option(RobustnessGridConfig).beside),
    prepare=load_columns,
    exact=True,
    options=RobustnessGridConfig,
)
