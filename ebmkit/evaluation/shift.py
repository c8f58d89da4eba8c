r"""Suite ``shift``: what is left of accuracy, confidence and denoising on corrupted images.

Images are corrupted in six ways at five strengths (`ebmkit.evaluation.corruptions`). Of each
corrupted image y of x are measured

- whether its label is predicted right, and the confidence :math:`\max_c p(c \mid y)`. Their mean
  difference, ``gap``, is how much more the model promises than it keeps; ``ece`` is the calibration
  error of suite ``calibration``;
- the PSNR of y, and that of :math:`D(y) = y + \hat\sigma^2 s(y)`, clipped to [0, 1], where the
  model estimates the noise level itself, for nobody knows it (not for noise-conditional models). A
  plain denoiser gives its D(y). PSNR is a mean over those images that the corruption changed.

The *mean corruption error* is the mean of the error over corruptions and strengths. It is not
divided by that of AlexNet, which for images other than ImageNet's nobody knows; as is usual on
CIFAR-10-C. ``confidence_slope`` is that of the least-squares line of confidence on accuracy, over
the clean images and all corruptions: 1 if confidence falls as accuracy does, 0 if the model does
not notice.

``shift.json`` holds, beside the common entries: ``constants`` (cifar or imagenet), ``clean``, one
row; ``corruptions``, by name ``about``, ``unit`` and ``rows``, one for each strength;
``mean_corruption_error``, its difference ``mean_error_increase`` to the error on the clean images,
image by image, and ``confidence_slope``. A row has ``strength`` and ``constant``; ``accuracy``,
``confidence``, ``gap``, ``ece`` if the model classifies; ``psnr_corrupted``, ``psnr``, ``gain``
(dB), ``estimated_sigma`` and ``rmse``, the root mean square of y - x in image units.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from torch import Tensor

from ebmkit.energy import EnergyModel, ScoreModel, classifies
from ebmkit.errors import UserError
from ebmkit.evaluation import statistics
from ebmkit.evaluation.calibration import calibration_error
from ebmkit.evaluation.context import EvaluationContext, Suite
from ebmkit.evaluation.corruptions import (
    CORRUPTIONS,
    STRENGTHS,
    Constants,
    constants_for,
    corrupt,
)
from ebmkit.evaluation.data import Batch, Images
from ebmkit.evaluation.tables import new_table, number
from ebmkit.metrics import psnr
from ebmkit.registry import find

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["SHIFT", "ShiftConfig", "draw", "run", "table"]

Columns = dict[str, Tensor]


def _known(name: str) -> str:
    find("corruption", CORRUPTIONS, name)
    return name


class ShiftConfig(BaseModel):
    """Settings of the suite ``shift``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    corruptions: tuple[Annotated[str, AfterValidator(_known)], ...] = Field(
        tuple(CORRUPTIONS), min_length=1, description=", ".join(CORRUPTIONS)
    )
    strengths: tuple[Annotated[int, Field(ge=1, le=5)], ...] = Field(
        STRENGTHS, min_length=1, description="severities: any of 1, 2, 3, 4, 5"
    )
    constants: Literal["auto", "cifar", "imagenet"] = Field(
        "auto",
        description="published constants: cifar (for 32x32), imagenet (for 224x224), or "
        "auto (by image size)",
    )


def check(model: ScoreModel, images: Images) -> None:
    """Whether the images can be corrupted, and there is anything to measure then.

    Raises:
        UserError: if images are neither gray nor colour, or the model neither predicts their labels
            nor estimates noise levels.
    """
    if images.channels not in (1, 3):
        raise UserError(
            f"suite shift corrupts gray or colour images, and {images.name!r} has "
            f"{images.channels} channels: leave the suite out"
        )
    if model.noise_conditional and not _compares_labels(model, images):
        raise UserError(
            "this model takes the noise level as an input, which nobody knows of a corrupted "
            "image, and has no labels to compare: leave out the suite shift"
        )


def run(setting: EvaluationContext) -> dict[str, Any]:
    """Measure; see the module's text for what is returned."""
    options, images = setting.option(ShiftConfig), setting.images
    kind = _constants(options, images)
    labelled = _compares_labels(setting.model, images)
    clean = _columns(setting, labelled, lambda x, first: x)
    corruptions: dict[str, Any] = {}
    errors: list[Tensor] = []
    unfinished: list[str] = []
    for name in options.corruptions:
        corruption = CORRUPTIONS[name]
        rows = []
        for strength in sorted(set(options.strengths)):
            constant = corruption.constant(strength, kind)

            def corrupted(x: Tensor, first: int, name: str = name, c: float = constant) -> Tensor:
                return corrupt(x, name, c, setting.seed, first)

            columns = _columns(setting, labelled, corrupted)
            rows.append({"strength": strength, "constant": constant, **_row(columns, setting.seed)})
            if labelled:
                errors.append((~columns["right"]).double())
            bad = _not_finite(columns)
            if bad:
                unfinished.append(
                    f"{name} at strength {strength}: the PSNR of the denoised image is not finite "
                    f"on {bad} images, so the mean is left out: the model diverged"
                )
        corruptions[name] = {"about": corruption.description, "unit": corruption.unit, "rows": rows}
    document: dict[str, Any] = {
        "sigmas": [],
        "constants": kind,
        "clean": _row(clean, setting.seed),
        "corruptions": corruptions,
    }
    if labelled:
        error = torch.stack(errors).mean(dim=0)
        increase = error - (~clean["right"]).double()
        everything = [document["clean"], *(r for c in corruptions.values() for r in c["rows"])]
        document |= {
            "mean_corruption_error": statistics.mean(error).document(),
            "mean_error_increase": statistics.mean(increase).document(),
            "confidence_slope": _slope(everything),
        }
    return document | {"warnings": _warnings(setting, labelled) + unfinished}


def _columns(
    setting: EvaluationContext, labelled: bool, corrupted: Callable[[Tensor, int], Tensor]
) -> Columns:
    """Measures of each image, (N,), under one corruption, a function of images and the number of
    the first."""
    world, size = setting.world, setting.batch_size
    batches = itertools.count(world.rank, world.size)

    def measure(batch: Batch) -> Columns:
        y = corrupted(batch.x, next(batches) * size)
        return _measure(setting.model, batch.x, y, batch.labels if labelled else None)

    return setting.columns(0.0, measure)


def _measure(model: ScoreModel, x: Tensor, y: Tensor, labels: Tensor | None) -> Columns:
    posterior = clean = sigma = None
    if labels is not None:
        assert isinstance(model, EnergyModel)
        energies = model.energies(y, 0.0 if model.noise_conditional else None)
        posterior = energies.log_posterior().exp()
    if not model.noise_conditional:
        clean, sigma = model.denoise_blind(y)
    columns = {
        "psnr_corrupted": psnr(y, x),
        "rmse": (y - x).square().flatten(1).mean(dim=1).sqrt(),
    }
    if posterior is not None and labels is not None:
        confidence, predicted = posterior.max(dim=1)
        columns |= {"confidence": confidence, "right": predicted == labels}
    if clean is not None and sigma is not None:
        columns |= {"psnr": psnr(clean.clamp(0, 1), x), "estimated_sigma": sigma}
    return columns


def _row(columns: Columns, seed: int) -> dict[str, Any]:
    """Means over images; PSNRs over those that were changed."""
    changed = columns["rmse"] > 0
    row: dict[str, Any] = {"rmse": statistics.mean(columns["rmse"]).document()}
    if "right" in columns:
        right, confidence = columns["right"], columns["confidence"]
        row |= {
            "accuracy": statistics.proportion(int(right.sum()), len(right)).document(),
            "confidence": statistics.mean(confidence).document(),
            "gap": statistics.mean(confidence.double() - right.double()).document(),
            "ece": calibration_error(confidence, right, seed=seed).document(),
        }
    noisy = columns["psnr_corrupted"][changed]
    row["psnr_corrupted"] = statistics.mean(noisy).document()
    if "psnr" in columns:
        own = columns["psnr"]
        row["psnr"] = statistics.mean(own[changed] if changed.any() else own).document()
        row["gain"] = statistics.mean(own[changed] - noisy).document()
        row["estimated_sigma"] = statistics.mean(columns["estimated_sigma"]).document()
    return row


def draw(setting: EvaluationContext, document: dict[str, Any], folder: Path) -> None:
    """Write ``shift.png``, ``shift-psnr.png`` and ``shift-examples.png``, as far as they apply."""
    from ebmkit.plots import shift as pictures

    if "accuracy" in document["clean"]:
        chance = 1 / setting.model.num_classes
        pictures.accuracy_and_confidence(document, folder / "shift.png", chance)
    pictures.psnr_against_strength(document, folder / "shift-psnr.png")
    ((x, _),) = setting.images.first(1).batches(1)
    shown = {
        name: [corrupt(x, name, row["constant"], setting.seed)[0] for row in found["rows"]]
        for name, found in document["corruptions"].items()
    }
    pictures.corrupted_examples(x[0], shown, document, folder / "shift-examples.png")


def table(document: dict[str, Any]) -> Table:
    """Of each corruption and strength: accuracy, confidence, calibration error and PSNRs."""
    forms = {
        "accuracy": "{:.1%}",
        "confidence": "{:.1%}",
        "ece": "{:.3f}",
        "psnr_corrupted": "{:.1f}",
        "psnr": "{:.1f}",
    }
    heads = {"ece": "ECE", "psnr_corrupted": "PSNR dB", "psnr": "denoised"}
    measures = [name for name in forms if name in document["clean"]]
    result = new_table(document, ("corruption", "level", *(heads.get(m, m) for m in measures)))
    blocks = {"clean": [{**document["clean"], "strength": ""}]}
    blocks |= {name: found["rows"] for name, found in document["corruptions"].items()}
    for name, rows in blocks.items():
        for i, row in enumerate(rows):
            values = (number(row[m]["value"], forms[m]) for m in measures)
            result.add_row("" if i else name, str(row["strength"]), *values)
        result.add_section()
    if "mean_corruption_error" in document:
        error = document["mean_corruption_error"]
        result.add_row("mean error", "", f"{error['value']:.1%}")
    return result


def _constants(options: ShiftConfig, images: Images) -> Constants:
    return constants_for(images.image_size) if options.constants == "auto" else options.constants


def _compares_labels(model: ScoreModel, images: Images) -> bool:
    """Whether the model predicts the labels that the images have."""
    same = images.labels is not None and images.num_classes == model.num_classes
    return same and classifies(model)


def _not_finite(columns: Columns) -> int:
    """Of how many changed images the denoised one has no finite PSNR."""
    bad = ~columns["psnr"].isfinite() if "psnr" in columns else torch.tensor(False)
    return int((bad & (columns["rmse"] > 0)).sum())


def _slope(rows: list[dict[str, Any]]) -> float | None:
    """Of the least-squares line of confidence on accuracy; None where accuracy is all the same."""
    x, y = (
        torch.tensor([row[name]["value"] for row in rows], dtype=torch.float64)
        for name in ("accuracy", "confidence")
    )
    spread = float((x - x.mean()).square().sum())
    if spread < 1e-12:
        return None
    return statistics.finite(float(((x - x.mean()) * y).sum()) / spread)


def _passes(setting: EvaluationContext) -> int:
    options = setting.option(ShiftConfig)
    return 1 + len(options.corruptions) * len(set(options.strengths))


def _warnings(setting: EvaluationContext, labelled: bool) -> list[str]:
    model, images, found = setting.model, setting.images, []
    if classifies(model) and not labelled:
        found.append(
            f"data set {images.name!r} has not the {model.num_classes} classes that this model "
            "knows: accuracy and confidence are left out"
        )
    if model.noise_conditional:
        found.append(
            "this model takes the noise level as an input and cannot estimate it: denoising is "
            "left out"
        )
    elif model.card is not None and model.card.sigma_range is None:
        found.append(
            f"this model was not trained to denoise (its objective is {model.card.objective!r}): "
            "its PSNR means little; add dsm to the objective"
        )
    return found


SHIFT = Suite(
    description="accuracy, confidence and PSNR under six corruptions at five strengths",
    check=check,
    passes=_passes,
    run=run,
    draw=draw,
    table=table,
    options=ShiftConfig,
)
