r"""Suite ``ood``: whether the model knows images of its distribution from others.

In distribution are the images evaluated; out of it are the images of each of several sets
(`ebmkit.evaluation.ood_sets`). Each image gets the scores of `ebmkit.evaluation.ood_scores`, higher
meaning "in", and each set and score the measures of `ebmkit.evaluation.detection`: AUROC, AUPR with
either side as positives, and the share of images out that pass where 95 % of those in do. Nothing
is trained or tuned on any of these images.

``ood.json`` holds, beside the common entries: ``scores``, by name what each is; ``in``, ``count``
and the means of all scores; ``sets``, by name ``about``, ``count``, ``mean`` (of each score, with
its interval) and ``scores``, by name the measures with their intervals; ``energy``, the mean of
-log p(x) in and of each set, nats up to one constant, of models with a density; ``histograms``, by
score the ``edges`` of bins (the outer ones hold all that is beyond), the counts ``in`` and by set.
A score that is not finite on some image of a set has no measures there, and a warning.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from torch import Tensor

from ebmkit.energy import EnergyModel, ScoreModel
from ebmkit.evaluation import statistics
from ebmkit.evaluation.context import EvaluationContext, Suite
from ebmkit.evaluation.data import Batch, Images
from ebmkit.evaluation.detection import METRICS, detection
from ebmkit.evaluation.ood_scores import known_scores, scores_of
from ebmkit.evaluation.ood_sets import OutSet, find_set, standard_sets
from ebmkit.evaluation.subset import check_one_size, columns_of, noise_warnings
from ebmkit.evaluation.tables import interval, new_table, number
from ebmkit.noise import Sigma

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["OOD", "OodConfig", "draw", "run", "table"]

BINS = 40


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))


class OodConfig(BaseModel):
    """Settings of the suite ``ood``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sets: Annotated[tuple[str, ...], AfterValidator(_distinct)] = Field(
        ("auto",),
        min_length=1,
        description="OOD sets: auto; interpolations, constant, uniform, gaussian, inverted, "
        "shuffled; cifar10, cifar100, digits, patches; image folders and HDF5 "
        "files",
    )
    sigmas: Annotated[tuple[Sigma, ...], AfterValidator(_distinct)] = Field(
        (10 / 255, 25 / 255), description="noise levels of the scores on noisy images, image units"
    )
    draws: int = Field(4, ge=1, description="number of noise draws per image and level")


def check(model: ScoreModel, images: Images) -> None:
    """Any model will do, and images of one size.

    Raises:
        UserError: if their sizes differ.
    """
    check_one_size("ood", images)


def find_sets(setting: EvaluationContext) -> list[OutSet]:
    """The sets that the settings name.

    Raises:
        UserError: if one is not there, or cannot be made of these images.
    """
    found: dict[str, OutSet] = {}
    for name in _names(setting):
        own = find_set(name, setting.images, setting.data_dir, setting.seed)
        label, number = own.name, 1
        while label in found or label == "in":  # folders of one name in two places
            number += 1
            label = f"{own.name}-{number}"
        found[label] = replace(own, name=label)
    return list(found.values())


def run(setting: EvaluationContext) -> dict[str, Any]:
    """Measure; see the module's text for what is returned."""
    options, model = setting.option(OodConfig), setting.model
    names = known_scores(model, options.sigmas)
    measure = partial(_measure, setting, options)
    inside = setting.columns(0.0, measure)
    sets: dict[str, Any] = {}
    outside: dict[str, dict[str, Tensor]] = {}
    warnings = _warnings(model, options)
    for found in find_sets(setting):
        columns = outside[found.name] = columns_of(setting, found.images, 0.0, measure)
        unfinished = _unfinished(columns) | _unfinished(inside)
        if unfinished:
            warnings.append(
                f"{', '.join(unfinished)}: not finite on some images in or of {found.name}, so "
                "there is no measure"
            )
        sets[found.name] = {
            "about": found.description,
            "count": len(found.images),
            "mean": {name: statistics.mean(columns[name]).document() for name in names},
            "scores": {
                name: None
                if name in unfinished
                else _compared(inside[name], columns[name], setting)
                for name in names
            },
        }
        if len(found.images) < 100:
            warnings.append(f"{found.name} has only {len(found.images)} images")
    document: dict[str, Any] = {
        "sigmas": list(options.sigmas),
        "scores": names,
        "in": {
            "count": len(setting.images),
            "mean": {name: statistics.mean(inside[name]).document() for name in names},
        },
        "sets": sets,
        "histograms": {
            name: _histogram(inside[name], {s: c[name] for s, c in outside.items()})
            for name in names
        },
        "warnings": warnings,
    }
    if isinstance(model, EnergyModel):
        everything = {"in": inside, **outside}
        document["energy"] = {
            name: statistics.mean(-columns["log-density"]).document()
            for name, columns in everything.items()
        }
    return document


def _measure(setting: EvaluationContext, options: OodConfig, batch: Batch) -> dict[str, Tensor]:
    return scores_of(setting.model, batch.x, options.sigmas, options.draws, setting.seed)


def _compared(inside: Tensor, outside: Tensor, setting: EvaluationContext) -> dict[str, Any]:
    found = detection(inside, outside, setting.seed)
    return {name: estimate.document() for name, estimate in found.items()}


def _unfinished(columns: dict[str, Tensor]) -> dict[str, None]:
    """The scores that are not finite everywhere, in order."""
    return {name: None for name, column in columns.items() if not column.isfinite().all()}


def _histogram(inside: Tensor, outside: dict[str, Tensor]) -> dict[str, Any]:
    """Counts over the range of the images in, and where there are others twice as far down and once
    as far up again."""
    known = inside[inside.isfinite()].double()
    if len(known) == 0:
        return {"edges": [], "in": [], "sets": {name: [] for name in outside}}
    everything = torch.cat([c[c.isfinite()].double() for c in (inside, *outside.values())])
    low, high = torch.quantile(known, torch.tensor([0.01, 0.99], dtype=torch.float64)).tolist()
    wide = max(high - low, 1e-6 * max(1.0, abs(high)))
    first = max(low - 2 * wide, float(everything.min()) - 0.02 * wide)
    last = min(high + wide, float(everything.max()) + 0.02 * wide)
    edges = np.linspace(first, last, BINS + 1)

    def counts(column: Tensor) -> list[int]:
        finite = column[column.isfinite()].double().numpy()
        return [int(n) for n in np.histogram(np.clip(finite, edges[0], edges[-1]), edges)[0]]

    sets = {name: counts(column) for name, column in outside.items()}
    return {"edges": [float(e) for e in edges], "in": counts(inside), "sets": sets}


def draw(setting: EvaluationContext, document: dict[str, Any], folder: Path) -> None:
    """Write ``ood.png``, ``ood-histograms.png`` and ``ood-examples.png``."""
    from ebmkit.plots import ood as pictures

    pictures.auroc_map(document, folder / "ood.png")
    pictures.histograms(document, folder / "ood-histograms.png")
    shown = {"in": _few(setting.images)} | {s.name: _few(s.images) for s in find_sets(setting)}
    pictures.examples(shown, document, folder / "ood-examples.png")


def table(document: dict[str, Any]) -> Table:
    """Of each set and score: AUROC with its interval, both AUPR and FPR95."""
    heads = ("set, score", "AUROC", "95 % interval", *list(METRICS.values())[1:])
    result = new_table(document, heads)
    for name, found in document["sets"].items():
        result.add_row(f"{name}, {found['count']} images", *[""] * 5)
        for score, measures in found["scores"].items():
            own = measures or dict.fromkeys(METRICS, dict.fromkeys(("value", "low", "high")))
            span = interval(own["auroc"]["low"], own["auroc"]["high"], "{:.3f}")
            value, *others = (number(own[metric]["value"], "{:.3f}") for metric in METRICS)
            result.add_row(f"  {score}", value, span, *others)
        result.add_section()
    return result


def _few(images: Images) -> list[Tensor]:
    ((x, _),) = images.first(8).batches(8)
    return list(x)


def _warnings(model: ScoreModel, options: OodConfig) -> list[str]:
    if model.card is not None and model.card.sigma_range is None and options.sigmas:
        return [
            f"this model was not trained to denoise (its objective is {model.card.objective!r}): "
            "the scores residual and noise-level mean little"
        ]
    return noise_warnings(model, options.sigmas)


def _names(setting: EvaluationContext) -> list[str]:
    names: list[str] = []
    for name in setting.option(OodConfig).sets:
        auto = name == "auto"
        names += standard_sets(setting.images, setting.data_dir) if auto else [name]
    return list(dict.fromkeys(names))


def _ready(setting: EvaluationContext) -> None:
    find_sets(setting)


OOD = Suite(
    description="OOD detection: AUROC, AUPR, FPR95 of JEM's scores and of scores on noisy images",
    check=check,
    passes=lambda setting: 1 + len(_names(setting)),
    run=run,
    draw=draw,
    table=table,
    options=OodConfig,
    ready=_ready,
)
