r"""Suite ``corruptions``: accuracy, confidence and denoising on corrupted images.

Images x in [0, 1] are corrupted by the six `CORRUPTIONS` at five strengths, after Hendrycks and
Dietterich (arXiv 1903.12261), and clipped to [0, 1]. The constants are those of the scripts that
generated CIFAR-10-C and ImageNet-C (``make_cifar_c.py`` and ``make_imagenet_c.py`` of
github.com/hendrycks/robustness), under the names ``shot_noise``, ``speckle_noise``,
``impulse_noise``, ``gaussian_blur``, ``contrast`` and ``jpeg_compression``. The published images
are rounded down to 8 bits; ours are not, except by JPEG. Random numbers are drawn on the CPU from
one generator per (seed, corruption, image index), so the corruption of an image does not depend on
the batch or process. All strengths use the same random numbers: in ``speckle`` and
``salt-and-pepper`` a stronger corruption extends the weaker one.

The suite measures for each corrupted image y of x

- whether the predicted label is correct, and the confidence :math:`\max_c p(c \mid y)`; ``gap`` is
  mean confidence minus accuracy, ``ece`` the calibration error of the suite ``calibration``;
- the PSNR of y, and of :math:`D(y) = y + \hat\sigma^2 s(y)` clipped to [0, 1], with the noise level
  that the model estimates (not for noise-conditional models). D(y) of a plain denoiser is its
  output. Mean PSNRs are over the images that the corruption changed.

The *mean corruption error* is the mean error over corruptions and strengths, not divided by the
error of AlexNet. ``confidence_slope`` is the slope of the least-squares line of confidence on
accuracy, over the clean images and all corruptions: 1 if confidence falls with accuracy, 0 if
confidence does not react.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import AfterValidator, Field
from rich.table import Table
from torch import Tensor

from ebmkit import plots
from ebmkit.data.folders import to_image, to_pixels
from ebmkit.energy import EnergyModel, ScoreModel, classifies
from ebmkit.errors import UserError
from ebmkit.evaluation import statistics
from ebmkit.evaluation.calibration import calibration_error
from ebmkit.evaluation.suite import (
    EvaluationBatch,
    EvaluationContext,
    Images,
    NonEmptyUnique,
    Suite,
    SuiteConfig,
    new_table,
    noise_warnings,
    number,
)
from ebmkit.metrics import psnr
from ebmkit.randomness import hashed_generator
from ebmkit.registry import find

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LARGEST_CIFAR = 96
"""Image side from which the ImageNet-C constants are used."""

Columns = dict[str, Tensor]


class Corruption(NamedTuple):
    """A type of corruption."""

    description: str
    unit: str
    """meaning of the constant"""
    cifar: tuple[float, ...]
    """constants at strengths 1 to 5 for images of 32x32, as in CIFAR-10-C"""
    imagenet: tuple[float, ...]
    """constants at strengths 1 to 5 for images of 224x224, as in ImageNet-C"""
    apply: Callable[[Tensor, float, torch.Generator], Tensor]
    """function from an image (C, H, W) in [0, 1], a constant and a generator to the corrupted
    image"""


def corrupt(x: Tensor, name: str, constant: float, seed: int = 0, first: int = 0) -> Tensor:
    """Corrupt images.

    Args:
        x: images (B, C, H, W) in [0, 1].
        name: a key of `CORRUPTIONS`.
        constant: amount of corruption, in the unit of the corruption.
        seed: random seed.
        first: index of the first image in its set; the others follow.

    Returns:
        Images (B, C, H, W) in [0, 1], on the device and of the dtype of x.
    """
    apply = CORRUPTIONS[name].apply
    keys = [f"corruption {name} {seed} {first + i}" for i in range(len(x))]
    images = zip(x.cpu(), map(hashed_generator, keys), strict=True)
    return torch.stack([apply(image, constant, g).clamp(0, 1) for image, g in images]).to(x)


def constants_for(image_size: tuple[int, int]) -> Literal["cifar", "imagenet"]:
    """The published constants for ``image_size``: CIFAR-10-C's if a side is below 96 pixels."""
    return "cifar" if min(image_size) < LARGEST_CIFAR else "imagenet"


def _salt_and_pepper(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    hit = torch.rand(x.shape, generator=generator) < share
    salt = torch.rand(x.shape, generator=generator) < 0.5
    return torch.where(hit, salt.to(x.dtype), x)


def _blur(x: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    from scipy.ndimage import gaussian_filter

    return torch.from_numpy(
        gaussian_filter(x.numpy(), (0, deviation, deviation), mode="nearest", truncate=4.0)
    )


def _contrast(x: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    mean = x.mean(dim=(1, 2), keepdim=True)
    return mean + factor * (x - mean)


def _jpeg(x: Tensor, quality: float, generator: torch.Generator) -> Tensor:
    from PIL import Image

    if x.shape[0] not in (1, 3):
        raise UserError(f"JPEG holds 1 or 3 channels, not {x.shape[0]}: leave out corruption jpeg")
    buffer = io.BytesIO()
    to_image((255 * x).round().byte()).save(buffer, "JPEG", quality=int(quality))
    with Image.open(buffer) as image:
        return to_pixels(image, len(x)).to(x.dtype) / 255


CORRUPTIONS: dict[str, Corruption] = {
    "poisson": Corruption(
        "shot noise of counted photons", "photons at white",
        (500, 250, 100, 75, 50), (60, 25, 12, 5, 3),
        lambda x, photons, generator: torch.poisson(photons * x, generator=generator) / photons,
    ),
    "speckle": Corruption(
        "noise in proportion to brightness", "deviation at white",
        (0.06, 0.1, 0.12, 0.16, 0.2), (0.15, 0.2, 0.35, 0.45, 0.6),
        lambda x, std, generator: (
            x + std * x * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        ),
    ),
    "salt-and-pepper": Corruption(
        "values replaced by black or white", "share of values",
        (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27), _salt_and_pepper,
    ),
    "blur": Corruption(
        "Gaussian blur", "deviation in pixels",
        (0.4, 0.6, 0.7, 0.8, 1.0), (1, 2, 3, 4, 6), _blur,
    ),
    "contrast": Corruption(
        "less contrast", "factor",
        (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05), _contrast,
    ),
    "jpeg": Corruption(
        "JPEG compression", "quality",
        (80, 65, 58, 50, 40), (25, 18, 15, 10, 7), _jpeg,
    ),
}  # fmt: skip
"""Types of corruption by name."""


def _known(name: str) -> str:
    find("corruption", CORRUPTIONS, name)
    return name


class CorruptionsConfig(SuiteConfig):
    """Settings of the suite ``corruptions``."""

    corruptions: NonEmptyUnique[Annotated[str, AfterValidator(_known)]] = tuple(CORRUPTIONS)
    """poisson, speckle, salt-and-pepper, blur, contrast, jpeg"""
    strengths: NonEmptyUnique[Annotated[int, Field(ge=1, le=5)]] = (1, 2, 3, 4, 5)
    """severities: any of 1, 2, 3, 4, 5"""
    constants: Literal["auto", "cifar", "imagenet"] = "auto"
    """published constants: cifar (for 32x32), imagenet (for 224x224), or auto (by image size)"""


def check(model: ScoreModel, images: Images) -> None:
    """Raise `UserError` if images are neither gray nor colour, or the model can neither predict
    their labels nor estimate noise levels."""
    if images.channels not in (1, 3):
        raise UserError(
            f"suite corruptions corrupts gray or colour images, and {images.name!r} has "
            f"{images.channels} channels: leave the suite out"
        )
    if model.noise_conditional and not _compares_labels(model, images):
        raise UserError(
            "this model takes the noise level as an input, which is unknown for corrupted images, "
            "and has no labels to compare: leave out the suite corruptions"
        )


def measure(context: EvaluationContext) -> dict[str, Any]:
    """Measure and return the document."""
    options, images = context.option(CorruptionsConfig), context.images
    auto = options.constants == "auto"
    kind = constants_for(images.image_size) if auto else options.constants
    labelled = _compares_labels(context.model, images)
    clean = _columns(context, labelled, None)
    corruptions: dict[str, Any] = {}
    errors: list[Tensor] = []
    warnings = _warnings(context, labelled)
    for name in options.corruptions:
        corruption, rows = CORRUPTIONS[name], []
        for strength in sorted(options.strengths):
            constant = getattr(corruption, kind)[strength - 1]
            columns = _columns(context, labelled, name, constant)
            rows.append({"strength": strength, "constant": constant, **_row(columns, context.seed)})
            if labelled:
                errors.append((~columns["right"]).double())
            changed = columns["rmse"] > 0
            bad = int((~columns["psnr"].isfinite() & changed).sum()) if "psnr" in columns else 0
            if bad:
                warnings.append(
                    f"{name} at strength {strength}: the PSNR of the denoised image is NaN or Inf "
                    f"on {bad} images, so the mean is undefined: the model diverged"
                )
        corruptions[name] = {"about": corruption.description, "unit": corruption.unit, "rows": rows}
    document: dict[str, Any] = {
        "sigmas": [],
        "constants": kind,
        "clean": _row(clean, context.seed),
        "corruptions": corruptions,
        "warnings": warnings,
    }
    if labelled:
        error = torch.stack(errors).mean(dim=0)
        everything = [document["clean"], *(r for c in corruptions.values() for r in c["rows"])]
        document |= {
            "mean_corruption_error": statistics.bounded_mean(error),
            "mean_error_increase": statistics.bounded_mean(error - (~clean["right"]).double()),
            "confidence_slope": confidence_slope(everything),
        }
    return document


def _columns(
    context: EvaluationContext, labelled: bool, name: str | None, constant: float = 0.0
) -> Columns:
    """Measurements of each image, (N,), under the corruption ``name``; None: of clean images."""
    model = context.model

    def measure(batch: EvaluationBatch) -> Columns:
        x = y = batch.x
        if name is not None:
            y = corrupt(x, name, constant, context.seed, batch.number)
        columns: Columns = {
            "psnr_corrupted": psnr(y, x),
            "rmse": (y - x).square().flatten(1).mean(dim=1).sqrt(),
        }
        if labelled:
            assert isinstance(model, EnergyModel)
            assert batch.labels is not None
            energies = model.energies(y, 0.0 if model.noise_conditional else None)
            confidence, predicted = energies.log_posterior().exp().max(dim=1)
            columns |= {"confidence": confidence, "right": predicted.eq(batch.labels)}
        if not model.noise_conditional:
            clean, columns["estimated_sigma"] = model.denoise_blind(y)
            columns["psnr"] = psnr(clean.clamp(0, 1), x)
        return columns

    return context.columns(0.0, measure)


def _row(columns: Columns, seed: int) -> dict[str, Any]:
    """Means over images; of PSNR over the images that the corruption changed."""
    changed = columns["rmse"] > 0
    row: dict[str, Any] = {"rmse": statistics.bounded_mean(columns["rmse"])}
    if "right" in columns:
        right, confidence = columns["right"], columns["confidence"]
        row |= {
            "accuracy": statistics.accuracy(right),
            "confidence": statistics.bounded_mean(confidence),
            "gap": statistics.bounded_mean(confidence.double() - right.double()),
            "ece": calibration_error(confidence, right, seed=seed),
        }
    noisy = columns["psnr_corrupted"][changed]
    row["psnr_corrupted"] = statistics.mean(noisy)
    if "psnr" in columns:
        own = columns["psnr"]
        row["psnr"] = statistics.mean(own[changed] if changed.any() else own)
        row["gain"] = statistics.mean(own[changed] - noisy)
        row["estimated_sigma"] = statistics.bounded_mean(columns["estimated_sigma"])
    return row


def confidence_slope(rows: Sequence[dict[str, Any]]) -> float | None:
    """Slope of the least-squares line of confidence on accuracy; None if accuracy is constant."""
    points = [[row[name].value for row in rows] for name in ("accuracy", "confidence")]
    (variance, covariance), _ = np.cov(points)
    return float(covariance / variance) if variance > 1e-12 else None


def _compares_labels(model: ScoreModel, images: Images) -> bool:
    """Whether the model predicts the labels of the images."""
    same = images.labels is not None and images.num_classes == model.num_classes
    return same and classifies(model)


def _warnings(context: EvaluationContext, labelled: bool) -> list[str]:
    model, found = context.model, list[str]()
    if classifies(model) and not labelled:
        found.append(
            f"data set {context.images.name!r} does not have the {model.num_classes} classes of "
            "this model: accuracy and confidence are skipped"
        )
    if not model.noise_conditional:
        return found + noise_warnings(model, ())
    return [
        *found,
        "this model takes the noise level as an input and cannot estimate it: denoising is skipped",
    ]


def table(document: dict[str, Any]) -> Table:
    """By corruption and strength: accuracy, confidence, calibration error and PSNRs."""
    columns = {
        "accuracy": ("accuracy", "{:.1%}"),
        "confidence": ("confidence", "{:.1%}"),
        "ece": ("ECE", "{:.3f}"),
        "psnr_corrupted": ("PSNR dB", "{:.1f}"),
        "psnr": ("denoised", "{:.1f}"),
    }
    columns = {name: column for name, column in columns.items() if name in document["clean"]}
    result = new_table(document, ("corruption", "level", *(head for head, _ in columns.values())))
    blocks = {"clean": [{**document["clean"], "strength": ""}]}
    blocks |= {name: found["rows"] for name, found in document["corruptions"].items()}
    for name, rows in blocks.items():
        for i, row in enumerate(rows):
            values = (number(row[key], form) for key, (_, form) in columns.items())
            result.add_row("" if i else name, str(row["strength"]), *values)
        result.add_section()
    if "mean_corruption_error" in document:
        result.add_row("mean error", "", number(document["mean_corruption_error"], "{:.1%}"))
    return result


LINES = {
    "accuracy": ("accuracy", 100, plots.BLUE, "o", "-"),
    "confidence": ("mean confidence", 100, plots.ORANGE, "s", "--"),
    "psnr_corrupted": ("corrupted", 1, plots.GRAY, "o", "-"),
    "psnr": ("denoised", 1, plots.GREEN, "s", "--"),
}
"""Label, scale, colour, marker and line style in plots, by field of the document."""

COLUMNS = 3
LAST = 5.0
"""Width of the last panel and its legend, inches."""


def plot(context: EvaluationContext, document: dict[str, Any], folder: Path) -> None:
    """Write the plots that apply: ``corruptions.png`` (accuracy and confidence against strength and
    against each other), ``corruptions-psnr.png`` and ``corruptions-examples.png``."""
    if "accuracy" in document["clean"]:
        title = "Accuracy and confidence under corruption"
        figure, panels = _panels(document, title, ("accuracy", "confidence"), LAST)
        for axes in panels:
            chance = 100 / context.model.num_classes
            axes.axhline(chance, color=plots.GRAY, ls=":", lw=1, label="chance")
            axes.set_ylim(0, 104)
        _plot_slope(figure.axes[-1], document)
        figure.supylabel("accuracy, confidence (%)", fontsize=10)
        plots.save_figure(figure, folder / "corruptions.png", legend=3)
    title = "Denoising corrupted images, noise level estimated"
    figure, _ = _panels(document, title, ("psnr_corrupted", "psnr"))
    figure.supylabel("PSNR (dB), mean over changed images", fontsize=10)
    plots.save_figure(figure, folder / "corruptions-psnr.png", legend=3)
    ((x, _),) = context.images.first(1).batches(1)
    rows: list[list[tuple[Tensor | None, str]]] = []
    for name, found in document["corruptions"].items():
        rows.append([(x[0], f"{name}\n{found['unit']}")])
        for constant in (row["constant"] for row in found["rows"]):
            rows[-1].append((corrupt(x, name, constant, context.seed)[0], f"{constant:g}"))
    heads = ["clean", *(f"strength {row['strength']}" for row in found["rows"])]
    title = f"Corruptions and their constants: {plots.images_of(document, 1)}"
    plots.image_rows(rows, heads, folder / "corruptions-examples.png", title=title)


def _panels(
    document: dict[str, Any], title: str, measures: Sequence[str], last: float = 0.0
) -> tuple[Figure, list[Axes]]:
    """Plot ``measures`` against strength, one panel per corruption. If ``last`` is above 0, also
    plot clean images and add an empty panel, ``last`` inches wide."""
    corruptions = document["corruptions"]
    columns = min(COLUMNS, len(corruptions))
    lines = -(-len(corruptions) // columns)
    height = max(1.2 + 2.15 * lines, 4.2 if last else 0)
    figure = plots.new_figure(0.9 + 2.6 * columns + last, height, layout="constrained")
    ratios = [2.6] * columns + [last] * bool(last)
    grid = figure.add_gridspec(lines, len(ratios), width_ratios=ratios)
    panels: list[Axes] = []
    for i, (name, found) in enumerate(corruptions.items()):
        shared = panels[0] if panels else None
        axes = figure.add_subplot(grid[i // columns, i % columns], sharey=shared)
        panels.append(axes)
        rows = [{**document["clean"], "strength": "clean"}] * bool(last) + found["rows"]
        for measure in measures:
            if measure in document["clean"]:
                label, scale, colour, marker, style = LINES[measure]
                look = {"color": colour, "marker": marker, "ls": style, "ms": 4, "label": label}
                estimates = [row[measure] for row in rows]
                plots.plot_estimates(axes, range(len(rows)), estimates, scale, **look)
        axes.tick_params(labelleft=i % columns == 0)
        axes.set_title(name, fontsize=10)
        axes.grid(axis="y", color=plots.GRAY, alpha=0.25, lw=0.6)
        axes.set_xlim(-0.3, len(rows) - 0.7)
        axes.set_xticks(range(len(rows)), [str(row["strength"]) for row in rows])
        axes.set_xlabel("strength", labelpad=1)
    figure.suptitle(f"{title}: {plots.images_of(document)}", fontsize=11)
    if last:
        figure.add_subplot(grid[:, -1])
    return figure, panels


def _plot_slope(axes: Axes, document: dict[str, Any]) -> None:
    """Plot accuracy against mean confidence, one point per corruption and strength; points of
    higher strengths are larger."""
    axes.plot([0, 100], [0, 100], ls=":", color=plots.GRAY, lw=1)

    def points(rows: Sequence[dict[str, Any]], **look: Any) -> None:
        x, y = ([100 * row[name]["value"] for row in rows] for name in ("confidence", "accuracy"))
        axes.scatter(x, y, **look)

    for k, (name, found) in enumerate(document["corruptions"].items()):
        sizes = [8 + 9 * row["strength"] for row in found["rows"]]
        look = plots.look(k) | {"alpha": 0.8, "lw": 0.8, "label": name}
        del look["ls"]
        points(found["rows"], s=sizes, **look)
    points([document["clean"]], s=90, color="black", marker="*", label="clean", zorder=3)
    axes.set(xlim=(0, 102), ylim=(0, 102), xlabel="mean confidence (%)", ylabel="accuracy (%)")
    axes.set_box_aspect(1)
    slope = document["confidence_slope"]
    text = "undefined" if slope is None else f"{slope:.2f}"
    axes.set_title(f"Slope of confidence on accuracy: {text}", fontsize=10)
    place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)}
    axes.legend(frameon=False, fontsize=8, title="larger:\nstronger", **place)


def _passes(context: EvaluationContext) -> int:
    options = context.option(CorruptionsConfig)
    return 1 + len(options.corruptions) * len(options.strengths)


CORRUPTIONS_SUITE = Suite(
    description="accuracy, confidence and PSNR under six corruptions at five strengths",
    measure=measure,
    plot=plot,
    table=table,
    check=check,
    passes=_passes,
    options=CorruptionsConfig,
)
