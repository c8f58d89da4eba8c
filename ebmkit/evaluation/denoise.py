r"""Suite ``denoise``: PSNR and SSIM of the denoisers.

The suite computes these estimates of x from :math:`y = x + \sigma\epsilon` (CDN eq. 7):

- ``unconditional``: :math:`D_u(y) = y + \sigma^2 s(y)`, with the true sigma;
- ``conditional_true``: :math:`D_c(y, c) = y + \sigma^2 s(y, c)` with the true label;
- ``conditional_predicted``: the same with the label predicted from y;
- ``blind``: :math:`y + \hat\sigma^2 s(y)` with the estimate
  :math:`\hat\sigma = \sqrt d/\|s(y)\|`, calibrated by `ebmkit.blind` (not for noise-conditional
  models, which take sigma as an input).

A plain denoiser has one estimate, ``unconditional``. For comparison the suite reports the ``noisy``
input and the ``clipped`` input: on images with much black or white, clipping alone raises PSNR,
which is no merit of the model.

PSNR is the mean over images of the PSNR of each image (`psnr`). A denoiser's output is clipped to
[0, 1]; the noisy input is not, neither for the denoiser nor for its own PSNR. SSIM is that of
torchmetrics, mean over channels and images, with a Gaussian window of 11 x 11 pixels and standard
deviation 1.5; on smaller images with the largest odd window that fits and its deviation scaled
alike. Intervals are of means over images; a gain is a mean per-image difference to the noisy input.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from ebmkit import plots
from ebmkit.blind import calibrated
from ebmkit.energy import (
    Energies,
    LogDensity,
    ScoreModel,
    Target,
    classifies,
    sigma_of_score,
    tweedie,
)
from ebmkit.evaluation import statistics
from ebmkit.evaluation.suite import (
    EvaluationBatch,
    EvaluationContext,
    Suite,
    SuiteConfig,
    Unique,
    interval,
    new_table,
    noise_warnings,
    noisy_batches,
    number,
)
from ebmkit.metrics import predict, psnr
from ebmkit.noise import Sigma, in_255ths

LABELS = {
    "noisy": "noisy input",
    "clipped": "noisy input, clipped",
    "unconditional": "unconditional",
    "conditional_true": "conditional, true",
    "conditional_predicted": "conditional, predicted",
    "blind": "blind, sigma estimated",
}
COLOURS = (plots.GRAY, plots.SKY, plots.BLUE, plots.GREEN, plots.ORANGE, plots.PURPLE)
HATCHES = ("", "", "", "//", "\\\\", "..")
SHOWN = 5
NOTE = (
    "$D_u$: unconditional denoiser; $D_c$: conditional on the predicted label; "
    "both are given sigma. Below: PSNR."
)


class PredictedLogDensity(NamedTuple):
    """log p(y|c) up to a constant, for the label c that the model predicts from y."""

    def __call__(self, energies: Energies) -> Tensor:
        return LogDensity(energies.logits.argmax(dim=1))(energies)


def estimates(
    model: ScoreModel, y: Tensor, sigma: float, labels: Tensor | None = None
) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
    """Compute every denoiser's estimate of the clean images from one forward pass.

    Args:
        model: the model, in evaluation mode.
        y: noisy images (B, C, H, W).
        sigma: noise level of y, image units.
        labels: true labels (B,); None skips ``conditional_true``.

    Returns:
        The estimates (B, C, H, W) by denoiser name, clipped to [0, 1]; the labels predicted from y
        (B,), -1 where logits are NaN, or None if the model has no labels; and the estimated noise
        level (B,), or None if the model cannot estimate it.
    """
    scores: dict[str, Tensor] = {}
    predicted = noise = None
    if classifies(model):
        targets: dict[str, Target] = {"unconditional": LogDensity()}
        if labels is not None:
            targets["conditional_true"] = LogDensity(labels)
        targets["conditional_predicted"] = PredictedLogDensity()
        energies, gradients = model.value_and_grads(y, sigma, *targets.values())
        scores = dict(zip(targets, gradients, strict=True))
        predicted = predict(energies.logits)
    elif model.is_energy_based and not model.ignores_sigma:
        scores = {"unconditional": model.score(y, sigma)}
    if scores:
        found = {name: tweedie(y, score, sigma) for name, score in scores.items()}
        if not model.noise_conditional:
            noise = calibrated(sigma_of_score(scores["unconditional"]), y, model.card)
            found["blind"] = tweedie(y, scores["unconditional"], noise)
    else:
        found = {"unconditional": model.denoise(y, sigma)}
        if not (model.noise_conditional or model.ignores_sigma):
            found["blind"], noise = model.denoise_blind(y)
    return {name: x.clamp(0, 1) for name, x in found.items()}, predicted, noise


def knows_sigma(model: ScoreModel, denoiser: str) -> str:
    """Which noise level ``denoiser`` of ``model`` uses: ``true``, ``estimated`` or ``unused``."""
    if denoiser == "blind":
        return "estimated"
    return "unused" if denoiser in ("noisy", "clipped") or model.ignores_sigma else "true"


def ssim_window(image_size: tuple[int, int]) -> dict[str, Any]:
    """Side and standard deviation, pixels, of the SSIM window for images of ``image_size``."""
    side = min(11, *(n if n % 2 else n - 1 for n in image_size if n > 0))
    return {"side": side, "deviation": 1.5 * side / 11}


def ssim(estimate: Tensor, clean: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004), (B,) up to 1, of images (B, C, H, W) in [0, 1]."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    # torchmetrics derives the side of the window from its deviation s: 2 int(3.5 s + 0.5) + 1
    window = ssim_window((clean.shape[-2], clean.shape[-1]))
    values = structural_similarity_index_measure(
        estimate, clean, sigma=window["deviation"], reduction="none", data_range=1.0
    )
    assert isinstance(values, Tensor)
    return values.reshape(len(clean))


class DenoiseConfig(SuiteConfig):
    """Settings of the suite ``denoise``."""

    sigmas: Unique[Sigma] = ()
    """noise levels, image units; empty: 15/255, 25/255 and 50/255"""


def levels(context: EvaluationContext) -> tuple[float, ...]:
    """Noise levels of the suite, image units."""
    return context.option(DenoiseConfig).sigmas or context.sigmas


def measure(context: EvaluationContext) -> dict[str, Any]:
    """Measure PSNR and SSIM at every noise level; return the document."""
    denoisers: dict[str, dict[str, Any]] = {}
    sigmas: dict[str, Any] = {}
    accuracies: dict[str, Any] = {}
    warnings = noise_warnings(context.model, levels(context))
    for sigma in levels(context):
        key = in_255ths(sigma)
        columns = context.columns(sigma, partial(_measure, context, sigma))
        for name in [name for name, quantity in columns if quantity == "psnr"]:
            own, likeness = columns[name, "psnr"], columns[name, "ssim"]
            if bad := int((~own.isfinite()).sum()):
                warnings.append(
                    f"{LABELS[name]} at {key}/255: PSNR is NaN or Inf on {bad} images (restored "
                    "exactly, or the model diverged), so the mean is undefined"
                )
            context.image_values[f"{name}/{key}"] = own
            gain = own - columns["noisy", "psnr"]
            entry = denoisers.setdefault(name, {"about": LABELS[name]})
            for quantity, values in (("psnr", own), ("gain", gain)):
                entry.setdefault(quantity, {})[key] = statistics.mean(values)
            entry.setdefault("ssim", {})[key] = statistics.bounded_mean(likeness)
        if ("blind", "psnr") in columns:
            blind, clipped = (columns[name, "psnr"].mean() for name in ("blind", "clipped"))
            if blind < clipped:
                warnings.append(
                    f"{LABELS['blind']} at {key}/255: {blind:.2f} dB, below the clipped input's "
                    f"{clipped:.2f} dB: give sigma"
                )
        if (noise := columns.get(("", "sigma"))) is not None:
            std = float(noise.std()) if len(noise) > 1 else None
            sigmas[key] = {"true": sigma, "std": std, **statistics.bounded_mean(noise).document()}
        if (right := columns.get(("", "right"))) is not None:
            accuracies[key] = statistics.accuracy(right)
    document: dict[str, Any] = {"sigmas": levels(context)}
    for quantity in ("psnr", "ssim"):
        plain, noisy = (denoisers[name][quantity] for name in ("unconditional", "noisy"))
        document[quantity] = {key: e.value for key, e in plain.items()}
        document[f"{quantity}_noisy"] = {key: e.value for key, e in noisy.items()}
        document[f"{quantity}_interval"] = {key: (e.low, e.high) for key, e in plain.items()}
    return document | {
        "denoisers": denoisers,
        "estimated_sigma": sigmas,
        "predicted_labels": accuracies,
        "knows_sigma": {name: knows_sigma(context.model, name) for name in denoisers},
        "ssim_window": ssim_window(context.images.image_size),
        "warnings": warnings,
    }


def _measure(
    context: EvaluationContext, sigma: float, batch: EvaluationBatch
) -> dict[tuple[str, str], Tensor]:
    """Columns (B,) by (denoiser, metric), and by ("", name) for predictions and estimated sigma."""
    model, x, y = context.model, batch.x, batch.y
    labels = batch.labels if context.images.num_classes == model.num_classes else None
    found, predicted, noise = estimates(model, y, sigma, labels)
    columns = {}
    for name, estimate in {"noisy": y, "clipped": y.clamp(0, 1), **found}.items():
        columns[name, "psnr"] = psnr(estimate, x)
        columns[name, "ssim"] = ssim(estimate, x)
    if predicted is not None and labels is not None:
        columns["", "right"] = predicted == labels
    if noise is not None:
        columns["", "sigma"] = noise
    return columns


def plot(context: EvaluationContext, document: dict[str, Any], folder: Path) -> None:
    """Write ``denoising.png``, the first images under each denoiser, and ``psnr.png``."""
    from torchvision.transforms.functional import center_crop

    plot_psnr(document["denoisers"], folder / "psnr.png")
    first, shown = context.images.first(SHOWN), {}
    for sigma in levels(context):
        batches = list(noisy_batches(first, sigma, context.seed, SHOWN, context.device))
        # images of different sizes come in batches of one; crop their centres to a common size
        size = [min(batch.x.shape[side] for batch in batches) for side in (-2, -1)]
        pairs = [center_crop(torch.stack([batch.x, batch.y]), size) for batch in batches]
        clean, y = torch.cat(pairs, dim=1)
        found, _, _ = estimates(context.model, y, sigma)
        shown[sigma] = {"noisy": y, "$D_u$": found["unconditional"]}
        if "conditional_predicted" in found:
            shown[sigma]["$D_c$"] = found["conditional_predicted"]
    plot_images(clean, shown, folder / "denoising.png", NOTE)


def plot_images(
    clean: Tensor, levels: dict[float, dict[str, Tensor]], path: Path, note: str = ""
) -> None:
    """Plot one row per image: the ``clean`` image (B, C, H, W), then at each sigma the images of
    ``levels`` by column title, with their PSNR; images are clipped for display, not for PSNR."""
    rows = [[(image, "")] for image in clean]
    heads, groups = ["clean"], {}
    for sigma, shown in levels.items():
        groups[len(heads)] = plots.sigma_label(sigma)
        heads += shown
        for images in shown.values():
            for row, image, value in zip(rows, images, psnr(images, clean).tolist(), strict=True):
                row.append((image, f"{value:.1f} dB"))
    plots.image_rows(rows, heads, path, groups, note=note)


def plot_psnr(denoisers: dict[str, dict[str, Any]], path: Path) -> None:
    """Plot PSNR of each denoiser at each noise level, with 95 % intervals."""
    figure = plots.new_figure(7.2, 3.9, layout="constrained")
    axes = figure.add_subplot()
    width, values = 0.82 / len(denoisers), [0.0]
    keys = list(next(iter(denoisers.values()))["psnr"])
    looks = zip(denoisers.values(), COLOURS, HATCHES, strict=False)
    for i, (denoiser, colour, hatch) in enumerate(looks):
        estimates = [denoiser["psnr"][key] for key in keys]
        at = [k + (i - (len(denoisers) - 1) / 2) * width for k in range(len(keys))]
        known = [k for k, e in enumerate(estimates) if e["value"] is not None]
        own = [estimates[k]["value"] for k in known]
        look: dict[str, Any] = {"color": colour, "hatch": hatch, "edgecolor": "white", "lw": 0}
        bars = axes.bar([at[k] for k in known], own, 0.92 * width, label=denoiser["about"], **look)
        plots.bars_within(axes, at, estimates, plots.ANY, fmt="none", ecolor="black", lw=0.8)
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=6.5)
        values += own
    axes.set_xticks(range(len(keys)), [f"{key}/255" for key in keys])
    axes.set_ylim(min(values), max(values) * 1.1 or None)
    plots.annotate(axes, "Denoising", "noise level sigma", "PSNR (dB), mean over images")
    plots.save_figure(figure, path, legend=3)


def table(document: dict[str, Any]) -> Table:
    """PSNR with intervals, gain and SSIM of every denoiser and of the noisy input."""
    heads = ("sigma", "denoiser", "PSNR dB", "95 % interval", "gain dB", "SSIM")
    result = new_table(document, heads)
    result.columns[1].justify = "left"
    for key in map(in_255ths, document["sigmas"]):
        for i, (name, found) in enumerate(document["denoisers"].items()):
            result.add_row(
                "" if i else f"{key}/255",
                LABELS[name],
                number(found["psnr"][key], "{:.2f}"),
                interval(found["psnr"][key], "{:.2f}"),
                "" if name == "noisy" else number(found["gain"][key], "{:+.2f}"),
                number(found["ssim"][key], "{:.3f}"),
            )
        result.add_section()
    return result


DENOISE = Suite(
    description="PSNR and SSIM of the unconditional, conditional and blind denoisers",
    measure=measure,
    plot=plot,
    table=table,
    passes=lambda context: len(levels(context)),
    options=DenoiseConfig,
    standard=True,
)
