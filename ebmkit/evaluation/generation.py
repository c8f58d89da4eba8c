r"""Suite ``generation``: how far samples are from real images, as a network sees both.

The samples are in a file that `ebmkit sample` wrote; the real images, the *reference*, are those
evaluated. An extractor (`ebmkit.evaluation.features`) gives features and class probabilities of
both, and `ebmkit.evaluation.distances` the measures:

============== ====================================== ==================================
\               Inception of 2015                      a classifier of the user's
============== ====================================== ==================================
Frechet        ``FID``                                ``classifier-FD``
kernel         ``KID``                                ``classifier-KD``
score          ``IS`` (all samples at once)           ``classifier-score``
\               ``precision``, ``recall``              ``classifier-precision``, ``-recall``
============== ====================================== ==================================

A distance of few images is biased. So the same is measured of as many other real images as there
are samples, from the other split of the data set where it is found, else of halves of the reference
against each other: the *floor*, which a perfect model would come down to.

With labels that were asked for, and a classifier of the same classes as extractor, the *label
accuracy* is the share of samples that it gives that label. Of each class it is told, too, with its
own Frechet and kernel distance, ``diversity``, saturation and energy gap
(`ebmkit.evaluation.guided`). Saturation and, if the model evaluated is an energy model, the energy
gap under it are measured in all cases.

``generation.json`` holds, beside the common entries (``images`` is the reference): ``samples``:
``count``, ``left_out`` (not finite), ``source`` (fresh or buffer) and what else the file says;
``extractor``: ``kind``, ``run``, ``features`` (d), ``accuracy`` on the reference; ``measures`` and
``floor``, by name, with ``count`` and ``of``, what the floor is made of; ``saturation`` and
``energy_gap`` of all samples; ``labels``: ``accuracy``, ``means`` over classes and ``classes``. The
last three are as `ebmkit.evaluation.guided.measure_guided` has them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ebmkit.energy import EnergyModel, ScoreModel
from ebmkit.errors import UserError
from ebmkit.evaluation import distances, statistics
from ebmkit.evaluation.context import EvaluationContext, Suite
from ebmkit.evaluation.data import Batch, Images
from ebmkit.evaluation.features import Extractor, find_extractor, same_weights
from ebmkit.evaluation.generated import Generated, other_split, read_samples
from ebmkit.evaluation.generation_table import table
from ebmkit.evaluation.guided import by_class, class_means
from ebmkit.evaluation.guided_measures import (
    MOST_FEATURES,
    Columns,
    Features,
    columns_of_images,
    energy_gap,
    saturation,
)
from ebmkit.evaluation.statistics import Estimate
from ebmkit.evaluation.subset import check_one_size, class_name, columns_of

__all__ = ["GENERATION", "GenerationConfig", "draw", "run", "table"]

ENOUGH = 10
"""Samples for each feature, below which a Frechet distance is told to be biased."""

SHOWN = 24


class GenerationConfig(BaseModel):
    """Settings of the suite ``generation``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    samples: Path | None = Field(None, description="HDF5 file of `ebmkit sample`")
    extractor: str = Field(
        "inception", description="feature extractor: inception, or the run folder of a classifier"
    )
    weights: Path | None = Field(
        None, description="file of the Inception weights [default: downloaded by torch-fidelity]"
    )


def check(model: ScoreModel, images: Images) -> None:
    """Any model will do, and images of one size.

    Raises:
        UserError: if their sizes differ.
    """
    check_one_size("generation", images)


def ready(setting: EvaluationContext) -> None:
    """Whether samples and extractor are there.

    Raises:
        UserError: if they are not.
    """
    _samples(setting)
    if setting.world.first:
        _extractor(setting)  # which may fetch weights: one does it
    setting.world.broadcast(None)


def run(setting: EvaluationContext) -> dict[str, Any]:
    """Measure; see the module's text for what is returned.

    Raises:
        UserError: if a sample or a feature is missing or not finite.
    """
    generated, extractor = _samples(setting), _extractor(setting)
    images = setting.images
    samples = _columns(setting, _image_set(generated, images), extractor)
    real = _columns(setting, images, extractor)
    floor, of, spare = _floor(setting, extractor, len(generated.images), real)
    for name, columns in (("samples", samples), ("reference", real), ("floor", floor[0])):
        if not all(columns[part].isfinite().all() for part in ("features", "logits")):
            raise UserError(
                f"generation: the extractor gives values that are not finite of the {name}: "
                "name another by generation.extractor"
            )
    width = real["features"].shape[1]
    document: dict[str, Any] = {
        "sigmas": [],
        "samples": generated.description
        | {"count": len(generated.images), "left_out": generated.left_out},
        "extractor": {
            "kind": extractor.kind,
            "run": extractor.run,
            "features": width,
            "accuracy": _accuracy(setting, extractor, real),
        },
        "names": extractor.names,
        "measures": _measures(samples, real, extractor),
        "floor": _measures(*floor, extractor) | {"of": of, "count": len(floor[0]["features"])},
        **_pixels_and_energies(setting, generated, samples, real),
        "labels": _labels(setting, extractor, generated, samples, real, spare),
    }
    return document | {"warnings": _warnings(setting, extractor, generated, document)}


def _measures(samples: Columns, real: Columns, extractor: Extractor) -> dict[str, Any]:
    """By the extractor's names, each with its interval."""
    a, b = samples["features"], real["features"]
    if a.shape[1] <= MOST_FEATURES:
        frechet = distances.jackknife(distances.frechet_distance, a, b)
    else:
        unknown = float("nan")
        frechet = Estimate(distances.frechet_distance(a, b), unknown, unknown, len(a))
    precision, recall = distances.precision_recall(a, b)
    found = {
        "frechet": frechet,
        "kernel": distances.kernel_distance(a, b),
        "score": distances.jackknife(distances.score, samples["logits"]),
        "precision": precision,
        "recall": recall,
    }
    return {extractor.names[kind]: estimate.document() for kind, estimate in found.items()}


def _floor(
    setting: EvaluationContext, extractor: Extractor, count: int, real: Columns
) -> tuple[tuple[Columns, Columns], str, Features | None]:
    """Columns of other real images and of what they are compared with, what they are, and the same
    with labels, if they are no part of the reference."""
    other = other_split(setting.images, setting.data_dir)
    if other is not None:
        few = other.first(count)
        columns = _columns(setting, few, extractor)
        labels = None if few.labels is None else few.labels.cpu()
        return (columns, real), f"{few.split} images", Features(columns, labels)
    setting.skip(len(setting.images))
    halves = [{name: column[k::2] for name, column in real.items()} for k in (0, 1)]
    return (halves[0], halves[1]), "half of the reference, against the other half", None


def _pixels_and_energies(
    setting: EvaluationContext, generated: Generated, samples: Columns, real: Columns
) -> dict[str, Any]:
    """Saturation and energy gap, beside real images of the same labels where they are known."""
    labels, wanted = setting.images.labels, generated.labels
    if labels is None or wanted is None or not torch.isin(wanted, labels.cpu()).all():
        labels = wanted = None
    known = Features(real, None if labels is None else labels.cpu())
    return {
        "saturation": saturation(samples, known.among(wanted)),
        "energy_gap": energy_gap(Features(samples, wanted), known),
    }


def _labels(
    setting: EvaluationContext,
    extractor: Extractor,
    generated: Generated,
    samples: Columns,
    real: Columns,
    others: Features | None,
) -> dict[str, Any] | None:
    """How well samples show the labels that were asked for; None where nobody knows."""
    images, wanted = setting.images, generated.labels
    if wanted is None or images.labels is None or not _same_classes(setting, extractor):
        return None
    right = samples["logits"].argmax(dim=1) == wanted
    known = Features(real, images.labels.cpu())
    if others is not None and others.labels is None:
        others = None
    classes = by_class(Features(samples, wanted), known, others, images.class_names, True)
    return {
        "accuracy": _share(right).document(),
        "means": class_means(classes),
        "classes": classes,
    }


def _accuracy(
    setting: EvaluationContext, extractor: Extractor, real: Columns
) -> dict[str, Any] | None:
    labels = setting.images.labels
    if labels is None or not _same_classes(setting, extractor):
        return None
    return _share(real["logits"].argmax(dim=1) == labels.cpu()).document()


def _same_classes(setting: EvaluationContext, extractor: Extractor) -> bool:
    model = extractor.model
    return model is not None and model.num_classes == setting.images.num_classes


def _share(right: Tensor) -> Estimate:
    return statistics.proportion(int(right.sum()), len(right))


def _columns(setting: EvaluationContext, images: Images, extractor: Extractor) -> Columns:
    model = setting.model if isinstance(setting.model, EnergyModel) else None
    known = setting.images.num_classes

    def measure(batch: Batch) -> Columns:
        return columns_of_images(batch.x, extractor, model, known)

    return columns_of(setting, images, 0.0, measure)


def _warnings(
    setting: EvaluationContext, extractor: Extractor, generated: Generated, document: dict[str, Any]
) -> list[str]:
    found, names = [], extractor.names
    least = min(len(generated.images), len(setting.images))
    width = document["extractor"]["features"]
    if least < ENOUGH * width:
        found.append(
            f"{least} images are few for {width} features: {names['frechet']} is biased upwards; "
            "read it beside the floor, and compare with none of other numbers of images"
        )
    if generated.left_out:
        total = generated.left_out + len(generated.images)
        found.append(f"{generated.left_out} of {total} samples were not finite and are left out")
    if same_weights(extractor, setting.model):
        found.append(
            "the classifier is the model evaluated, so it does not judge independently: train "
            "another by ce alone"
        )
    if extractor.kind == "inception" and min(setting.images.image_size) < 32:
        height, width = setting.images.image_size
        found.append(
            f"Inception was trained on photographs, and these images have {height}x{width} pixels: "
            "a classifier trained on such images says more"
        )
    if generated.labels is not None and document["labels"] is None:
        found.append(
            "the samples have labels that were asked for; to see whether they show them, name a "
            "classifier of the same classes by generation.extractor"
        )
    return found


def draw(setting: EvaluationContext, document: dict[str, Any], folder: Path) -> None:
    """Write ``generation.png`` and, where labels were asked for, ``generation-classes.png``."""
    from ebmkit.plots import generation as pictures

    generated = _samples(setting)
    x = [image / 255 for image in generated.images[:SHOWN]]
    ((real, _),) = setting.images.first(SHOWN).batches(SHOWN)
    labels = generated.labels
    told = (
        [] if labels is None else [class_name(setting.images, c) for c in labels[:SHOWN].tolist()]
    )
    pictures.samples_beside_real(x, list(real), told, document, folder / "generation.png")
    if document["labels"] is not None:
        pictures.by_class(document, folder / "generation-classes.png")


def _samples(setting: EvaluationContext) -> Generated:
    path = setting.option(GenerationConfig).samples
    if path is None:
        raise UserError(
            "suite generation measures samples: make some by `ebmkit sample RUN --out DIR` and "
            "name their file by --set generation.samples=FILE.h5"
        )
    return read_samples(path, setting.images)


def _extractor(setting: EvaluationContext) -> Extractor:
    config = setting.option(GenerationConfig)
    return find_extractor(config.extractor, config.weights, setting.device)


def _image_set(generated: Generated, like: Images) -> Images:
    from ebmkit.data import ImageSet

    assert generated.images.shape[1:] == torch.Size((like.channels, *like.image_size))
    return ImageSet("samples", "test", generated.images)


GENERATION = Suite(
    description="samples against real images: FID, KID, IS, precision, recall, or their "
    "analogues for a classifier",
    check=check,
    passes=lambda setting: 3,
    run=run,
    draw=draw,
    table=table,
    options=GenerationConfig,
    needs="samples",
    ready=ready,
)
