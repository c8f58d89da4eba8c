r"""Suite ``jacobian``: the spectrum of the denoiser's Jacobian at single noisy images.

At :math:`y = x + \sigma\epsilon` of the first images, eigenvalues and eigenvectors of

.. math:: J(y) = \nabla D_u(y) = I + \sigma^2\,\nabla^2\log p(y)

(CDN eq. 14, figures 3 and 5), by `ebmkit.evaluation.spectrum`. In float32, or in float64 if asked;
never in less, whatever precision the evaluation has.

If log p were the true density, :math:`\sigma^2 J` would be the covariance of the clean image given
the noisy one. So negative eigenvalues are a fault of the model, and the PSNR that the model
*expects*, :math:`-10\log_{10}(\sigma^2 \operatorname{tr} J / d)`, can be set beside the one it has.

A blind model has an eigenvalue near 2 that says nothing of the image. It reads sigma off the size
of the noise n, so that its score is about :math:`-d\,n/\|n\|^2`, which along n itself grows by
:math:`d/\|n\|^2 \approx 1/\sigma^2`: hence :math:`Jn \approx 2n`. What it removes lies along that
eigenvector.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from rich.table import Table
from torch import Tensor

from ebmkit import plots
from ebmkit.energy import EnergyModel, ScoreModel, classifies
from ebmkit.errors import UserError
from ebmkit.evaluation.context import Batch, EvaluationContext, Images
from ebmkit.evaluation.spectrum import DENSE, Method, jacobian, spectrum
from ebmkit.evaluation.suite import (
    Precision,
    Suite,
    SuiteConfig,
    add_note,
    class_name,
    new_table,
    noise_warnings,
    number,
)
from ebmkit.metrics import psnr
from ebmkit.noise import Sigma, in_255ths

PAPER = {
    "largest": [2.71, 2.16, 2.03],
    "smallest": [2.8e-5, -1.9e-5],
    "about": "figure 3: one CIFAR-10 image, sigma 50/255, width 64",
}
PAPER_FACTOR = 500
ASYMMETRY = 1e-3
"""Relative asymmetry of a gradient's Jacobian above which rounding is no excuse."""

KINDS = ("largest", "smallest")


UpTo20 = Annotated[int, Field(ge=1, le=20)]


class JacobianConfig(SuiteConfig):
    """Settings of the suite ``jacobian``."""

    sigma: Sigma = 50 / 255
    """noise level, image units"""
    images: UpTo20 = 3
    """number of images, from the first"""
    largest: UpTo20 = 3
    """number of largest eigenvalues and their eigenvectors"""
    smallest: UpTo20 = 2
    """number of eigenvalues of smallest magnitude and their eigenvectors"""
    method: Method = "auto"
    """dense (all eigenvalues), iterative, or auto (dense up to 3072 values per image)"""
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """maximum residual of an eigenpair without a warning, relative to the largest eigenvalue"""
    products: Annotated[int, Field(ge=100)] = 4000
    """iterative: approximate maximum number of products with J per image"""
    precision: Precision = "single"
    """precision: single (float32) or double (float64)"""


def check(model: ScoreModel, images: Images) -> None:
    """Raise `UserError` where the Jacobian is not symmetric and too large to be written out."""
    size = images.channels * math.prod(images.image_size)
    if not isinstance(model, EnergyModel) and size > DENSE:
        raise UserError(
            f"a plain denoiser's Jacobian is not symmetric and must be written out, which images "
            f"of {size} values are too large for: take images of up to {DENSE} values"
        )


def measure(context: EvaluationContext) -> dict[str, Any]:
    """Decompose the Jacobians; return the document.

    Raises:
        UserError: if the Jacobian has NaN or Inf, or has fewer eigenvalues than are asked for.
    """
    config = context.option(JacobianConfig)
    model = context.model_in(config.precision)

    def of_image(batch: Batch) -> dict[str, Tensor]:
        return _measure(model, batch, config, context.seed)

    columns = context.columns(config.sigma, of_image, context.first(config.images), batch_size=1)
    context.measured = columns
    per_image = [
        _document({name: column[i] for name, column in columns.items()}, i, context.images, config)
        for i in range(len(columns["x"]))
    ]
    return {
        "images": len(per_image),
        "sigmas": [config.sigma],
        "sigma": config.sigma,
        "dimensions": columns["x"][0].numel(),
        "method": "dense" if "eigenvalues" in columns else "iterative",
        "singular": not isinstance(model, EnergyModel),
        "classes": classifies(model),
        "per_image": per_image,
        "paper": PAPER,
        "warnings": noise_warnings(model, [config.sigma]) + _warnings(model, per_image),
    }


def _measure(
    model: ScoreModel, batch: Batch, config: JacobianConfig, seed: int
) -> dict[str, Tensor]:
    """Of one image, each (1, ...)."""
    dtype = torch.float64 if config.precision == "double" else batch.y.dtype
    x, y = batch.x.to(dtype), batch.y.to(dtype)
    options = config.model_dump(include={*KINDS, "method", "tolerance", "products"})
    found = spectrum(jacobian(model, y[0], config.sigma), seed=seed, **options)
    clean = model.denoise(y, config.sigma)
    columns = {"x": x, "y": y, "unconditional": clean, "psnr": psnr(clean, x)}
    for kind in KINDS:
        pairs = getattr(found, kind)._asdict()
        columns |= {f"{kind} {name}": value[None] for name, value in pairs.items()}
    if found.values is not None:
        columns["eigenvalues"] = found.values[None]
    for name in ("trace", "trace_error", "asymmetry", "products"):
        columns[name] = torch.tensor([getattr(found, name)], dtype=torch.float64)
    columns["converged"] = torch.tensor([found.converged(config.tolerance)])
    if classifies(model):
        confidence, predicted = model.energies(y, config.sigma).log_posterior().exp().max(dim=1)
        columns |= {"confidence": confidence, "predicted": predicted}
        columns["conditional"] = model.denoise(y, config.sigma, predicted)
    return columns


def _document(
    own: dict[str, Tensor], number: int, images: Images, config: JacobianConfig
) -> dict[str, Any]:
    """What the JSON file holds of the image with this ``number``, of its entries of columns."""
    trace, size = float(own["trace"]), own["x"].numel()
    expected = config.sigma**2 * trace / size
    document: dict[str, Any] = {
        "label": None if images.labels is None else class_name(images, int(images.labels[number])),
        "predicted": None,
        "converged": bool(own["converged"]),
        **{name: float(own[name]) for name in ("trace", "trace_error", "asymmetry")},
        "products": int(own["products"]),
        "psnr": float(own["psnr"]),
        "expected_psnr": -10 * math.log10(expected) if trace > 0 else None,
    }
    if "predicted" in own:
        difference = own["conditional"] - own["unconditional"]
        document["predicted"] = class_name(images, int(own["predicted"]))
        document["confidence"] = float(own["confidence"])
        document["difference"] = float(difference.square().mean().sqrt())
    removed = (own["unconditional"] - own["y"]).double().flatten()
    for kind in KINDS:
        along = (own[f"{kind} vectors"].flatten(1) @ removed).square() / removed.square().sum()
        entries = zip(own[f"{kind} values"], own[f"{kind} residuals"], along, strict=True)
        document[kind] = [
            {"value": float(value), "residual": float(residual), "noise": float(share)}
            for value, residual, share in entries
        ]
    if "eigenvalues" in own:
        values = own["eigenvalues"]
        document["above_half"] = int((values > 0.5).sum())
        document["negative"] = int((values < 0).sum())
        document["eigenvalues"] = [float(f"{value:.6g}") for value in values.tolist()]
    return document


def _warnings(model: ScoreModel, per_image: list[dict[str, Any]]) -> list[str]:
    found = []
    left = sum(not one["converged"] for one in per_image)
    if left:
        found.append(
            f"of {left} of {len(per_image)} images not all eigenpairs converged: see their "
            "residuals, within which some eigenvalue lies; give more products, or a larger "
            "tolerance"
        )
    worst = max(one["asymmetry"] for one in per_image)
    if isinstance(model, EnergyModel) and worst > ASYMMETRY:
        found.append(
            f"the Jacobian is asymmetric by {worst:.1e} of its norm, which is more than rounding: "
            "the density is not twice differentiable, or its derivative is wrong"
        )
    return found


def plot(context: EvaluationContext, document: dict[str, Any], folder: Path) -> None:
    """Write ``jacobian.png`` and, if dense, ``spectrum.png``."""
    plot_images(context.measured, document, folder / "jacobian.png")
    if "eigenvalues" in context.measured:
        plot_spectra(document, folder / "spectrum.png")


def plot_images(columns: dict[str, Tensor], document: dict[str, Any], path: Path) -> None:
    """The paper's figure 3: denoised images, their difference, eigenvectors of the Jacobian; of the
    columns (N, ...) that `measure` leaves in the context."""
    heads = ["image", f"noisy, {plots.sigma_label(document['sigma'])}", "$D_u$"]
    if document["classes"]:
        heads += ["$D_c$, predicted label", "$D_c - D_u$"]
    first, largest = len(heads), len(document["per_image"][0]["largest"])
    rows = []
    for i, one in enumerate(document["per_image"]):
        x, y, clean = (columns[name][i] for name in ("x", "y", "unconditional"))
        row = [(x, one["label"] or ""), (y, "")]
        row.append((clean, f"{one['psnr']:.1f} dB" if one["psnr"] else ""))
        if document["classes"]:
            change = columns["conditional"][i] - clean
            factor = magnification(change)
            note = f"x{factor:g}" + (" (x500 saturates)" if factor < PAPER_FACTOR else "")
            predicted = f"{one['predicted']} ({100 * one['confidence']:.0f} %)"
            row += [
                (columns["conditional"][i], predicted),
                (plots.around_gray(change, factor), note),
            ]
        for kind, form in zip(KINDS, ("{:.2f}", "{:.1e}"), strict=True):
            for vector, pair in zip(columns[f"{kind} vectors"][i], one[kind], strict=True):
                value = form.format(pair["value"])
                if pair["residual"] > 0.1 * abs(pair["value"]):
                    value += f" ± {pair['residual']:.0e}"
                row.append((plots.around_gray(vector), value + " (noise)" * (pair["noise"] > 0.5)))
        rows.append(row)
    what = "right singular vectors" if document["singular"] else "eigenvectors"
    plots.image_rows(
        rows,
        heads + [""] * (len(rows[0]) - first),
        path,
        {2: "", first: "largest", first + largest: "smallest in magnitude"},
        f"{plots.images_of(document)}: denoising, and {what} of the Jacobian (value, ± residual)",
        "Differences and vectors are shown around gray, each vector scaled to the full range. "
        '"noise": most of what $D_u$ removes lies along it.',
    )


def magnification(difference: Tensor, factor: float = PAPER_FACTOR) -> float:
    """``factor``, or the largest of 1, 2, 5, 10, ... below it that does not saturate.

    An image saturates where more than 1 % of the values of ``factor * difference`` leave
    [-1/2, 1/2].
    """
    most = float(difference.abs().flatten().double().quantile(0.99))
    if most * factor <= 0.5:
        return factor
    exponent = math.floor(math.log10(0.5 / most))
    steps = [m * 10.0**exponent for m in (1, 2, 5)]
    return max(step for step in steps if step * most <= 0.5 * (1 + 1e-9))


def plot_spectra(document: dict[str, Any], path: Path) -> None:
    """All eigenvalues of each image: sorted, and their magnitudes on a logarithmic axis."""
    figure = plots.new_figure(9.6, 4.1, layout="constrained")
    left, right = figure.subplots(1, 2)
    kind = "singular value" if document["singular"] else "eigenvalue"
    for i, one in enumerate(document["per_image"]):
        values = np.asarray(one["eigenvalues"])
        rank = np.arange(1, len(values) + 1)
        name = one["label"] or f"image {i}"
        note = f"{name}: trace {one['trace']:.1f}, {one['above_half']} above 1/2"
        look = plots.look(i) | {"marker": "", "lw": 1.4}
        left.plot(rank, values, label=note, **look)
        right.plot(rank, np.sort(np.abs(values))[::-1], **look)
    for axes, level in ((left, 0), (left, 1), (right, 1)):
        axes.axhline(level, color=plots.GRAY, lw=0.8, ls=":")
    size = document["dimensions"]
    plots.annotate(left, "Sorted: 1 keeps, 0 discards", f"rank, of {size}", kind)
    x = f"rank by magnitude, of {size}"
    plots.annotate(right, "Magnitudes", x, "magnitude", yscale="log")
    left.legend(fontsize=7.5, frameon=False)
    title = f"Spectrum of the denoiser's Jacobian at {plots.sigma_label(document['sigma'])}"
    plots.save_figure(figure, path, f"{title}: {plots.images_of(document)}")


def table(document: dict[str, Any]) -> Table:
    """Of each image: trace, eigenvalues, asymmetry, PSNR.

    Below, the paper's eigenvalues, where data, noise level and quantity are the paper's; its
    network and image are its own, as the caption says.
    """
    heads = ("image", "trace", "> 1/2", "largest", "smallest", "asym.", "PSNR", "exp.")
    result = new_table(document, heads)

    def values(largest: list[float], smallest: list[float]) -> tuple[str, str]:
        return (
            " ".join(f"{value:.2f}" for value in largest[:3]),
            " ".join(f"{value:.1e}" for value in smallest[:2]),
        )

    for i, one in enumerate(document["per_image"]):
        result.add_row(
            str(i),
            f"{one['trace']:.1f}",
            number(one.get("above_half"), "{:d}"),
            *values(*([pair["value"] for pair in one[kind]] for kind in KINDS)),
            f"{one['asymmetry']:.0e}",
            number(one["psnr"], "{:.1f}"),
            number(one["expected_psnr"], "{:.1f}"),
        )
    same = document["dataset"] == "cifar10" and in_255ths(document["sigma"]) == "50"
    if same and not document["singular"]:
        paper = document["paper"]
        result.add_section()
        result.add_row("paper", "", "", *values(paper["largest"], paper["smallest"]))
        add_note(result, f"paper: its network, {paper['about']}")
    return result


JACOBIAN = Suite(
    description="eigenvalues and eigenvectors of the denoiser's Jacobian at a few images",
    measure=measure,
    plot=plot,
    table=table,
    check=check,
    options=JacobianConfig,
    exact=True,
)
