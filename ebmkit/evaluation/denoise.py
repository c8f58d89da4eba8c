r"""Suite ``denoise``: how close the denoisers come to the clean image.

Of :math:`y = x + \sigma\epsilon` are estimated (CDN eq. 7)

- ``unconditional``: :math:`D_u(y) = y + \sigma^2 s(y)`, given the true sigma;
- ``conditional_true``: :math:`D_c(y, c) = y + \sigma^2 s(y, c)` with the true label;
- ``conditional_predicted``: the same with the label predicted from y, which anyone can do;
- ``blind``: :math:`y + \hat\sigma^2 s(y)` with the model's own
  :math:`\hat\sigma = \sqrt d/\|s(y)\|` (not for noise-conditional models, which are told sigma).

A plain denoiser has one estimate, ``unconditional``. A blind one makes it without the true sigma,
which the formula of Tweedie needs: ``knows_sigma`` says of each denoiser whether it was told
(``true``), estimates the level itself (``estimated``) or has no use for it (``unused``).

Beside them stand the ``noisy`` input and the ``clipped`` one: on images with much black or white,
clipping alone gains decibels, which no model should be given credit for.

Protocol. PSNR is the mean over images of the PSNR of each image,
:math:`-10 \log_{10}(\text{mean squared error over its pixels and channels})` dB for images in [0,
1]. A denoiser's output is clipped to [0, 1]; the noisy input is not, neither for the denoiser nor
for its own PSNR (so about 24.6, 20.2 and 14.2 dB at 15, 25 and 50/255). Noise is drawn from a fixed
seed, the same for every model (`ebmkit.evaluation.data`). SSIM is torchmetrics', mean over channels
and images, with a Gaussian window of 11 x 11 pixels and deviation 1.5; on smaller images the
largest odd window that fits, its deviation scaled alike. Intervals are of the mean over images;
those of a gain, of the mean difference to the noisy input on the same image.

``denoise.json`` holds, beside the common entries, plain numbers by noise level in 255ths: ``psnr``
(unconditional) and ``psnr_noisy``, as in ``{"15": 30.1, "25": 27.2, "50": 23.0}``, and ``ssim`` and
``ssim_noisy`` likewise; ``psnr_interval`` and ``ssim_interval``; ``denoisers``, by name all of the
above, with ``psnr``, ``gain`` (dB) and ``ssim`` by noise level; ``estimated_sigma``;
``predicted_labels``, the accuracy of the labels used; ``knows_sigma``; and ``ssim_window``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

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
from ebmkit.evaluation.context import Batch, EvaluationContext, Images, noisy_batches
from ebmkit.evaluation.suite import Suite, interval, new_table, number
from ebmkit.metrics import predict, psnr
from ebmkit.noise import format_sigma, in_255ths

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "DENOISE",
    "Estimates",
    "estimates",
    "knows_sigma",
    "measure",
    "plot",
    "ssim",
    "ssim_window",
    "table",
]

LABELS = {
    "noisy": "noisy input",
    "clipped": "noisy input, clipped",
    "unconditional": "unconditional",
    "conditional_true": "conditional, true",
    "conditional_predicted": "conditional, predicted",
    "blind": "blind, sigma estimated",
}
SHOWN = 5
NOTE = (
    "$D_u$: unconditional denoiser; $D_c$: conditional on the predicted label; "
    "both are given sigma. Below: PSNR."
)

Estimates = dict[str, Tensor]
"""Estimated clean images (B, C, H, W) by the name of the denoiser, clipped to [0, 1]."""


def estimates(
    model: ScoreModel, y: Tensor, sigma: float, labels: Tensor | None = None
) -> tuple[Estimates, Tensor | None, Tensor | None]:
    """Every denoiser's estimate of the clean images, from one forward pass.

    Args:
        model: in evaluation mode.
        y: noisy images (B, C, H, W).
        sigma: their noise level, image units.
        labels: the true ones (B,); None leaves ``conditional_true`` out.

    Returns:
        The estimates; the labels predicted from y (B,), -1 where
        logits are not finite, or None if the model has none; and the
        estimated noise level (B,), or None if the model is noise-conditional.
    """
    if not classifies(model):
        labels = None
    predicted = noise = None
    if classifies(model):
        conditional: dict[str, Target] = {}
        if labels is not None:
            conditional["conditional_true"] = LogDensity(labels)
        conditional["conditional_predicted"] = PredictedLogDensity()
        targets = [LogDensity(), *conditional.values()]
        energies, (score, *scores) = model.value_and_grads(y, sigma, *targets)
        found = {"unconditional": tweedie(y, score, sigma)}
        found |= {n: tweedie(y, s, sigma) for n, s in zip(conditional, scores, strict=True)}
        predicted = predict(energies.logits)
    elif model.is_energy_based and not model.ignores_sigma:
        score = model.score(y, sigma)
        found = {"unconditional": tweedie(y, score, sigma)}
    else:
        found = {"unconditional": model.denoise(y, sigma)}
        if not (model.noise_conditional or model.ignores_sigma):
            found["blind"], noise = model.denoise_blind(y)
        return {name: x.clamp(0, 1) for name, x in found.items()}, None, noise
    if not model.noise_conditional:
        noise = sigma_of_score(score)
        found["blind"] = tweedie(y, score, noise)
    return {name: x.clamp(0, 1) for name, x in found.items()}, predicted, noise


class PredictedLogDensity(NamedTuple):
    """log p(y|c) up to a constant, of the label c that the model predicts from y."""

    def __call__(self, energies: Energies) -> Tensor:
        return LogDensity(energies.logits.argmax(dim=1))(energies)


def ssim_window(image_size: tuple[int, int]) -> dict[str, Any]:
    """The Gaussian window of SSIM for images of ``image_size``: its side and deviation."""
    side = min(11, *(n if n % 2 else n - 1 for n in image_size if n > 0))
    return {"side": side, "deviation": 1.5 * side / 11}


def ssim(estimate: Tensor, clean: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of images (B, C, H, W) in [0, 1]: (B,), up to 1."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    # torchmetrics takes the side of a Gaussian window from its deviation: 2 int(3.5 s + 0.5) + 1
    window = ssim_window((clean.shape[-2], clean.shape[-1]))
    values = structural_similarity_index_measure(
        estimate, clean, sigma=window["deviation"], reduction="none", data_range=1.0
    )
    assert isinstance(values, Tensor)
    return values.reshape(len(clean))


def check(model: ScoreModel, images: Images) -> None:
    """Every model can denoise; one that never learnt to gets a warning in its results."""


def measure(context: EvaluationContext) -> dict[str, Any]:
    """Measure; see the module's text for what is returned."""
    denoisers: dict[str, dict[str, Any]] = {}
    sigmas: dict[str, Any] = {}
    accuracies: dict[str, Any] = {}
    unfinished: list[str] = []
    for sigma in context.sigmas:
        key = in_255ths(sigma)
        values = context.columns(sigma, partial(_measure, context, sigma))
        for name in [n for n, measure in values if measure == "psnr"]:
            rows = denoisers.setdefault(
                name, {"about": LABELS[name], "psnr": {}, "gain": {}, "ssim": {}}
            )
            bad = int((~values[name, "psnr"].isfinite()).sum())
            if bad:
                unfinished.append(
                    f"{LABELS[name]} at {key}/255: PSNR is not finite on {bad} images (restored "
                    "exactly, or the model diverged), so the mean is left out"
                )
            gain = values[name, "psnr"] - values["noisy", "psnr"]
            rows["psnr"][key] = statistics.mean(values[name, "psnr"]).document()
            rows["gain"][key] = statistics.mean(gain).document()
            rows["ssim"][key] = statistics.mean(values[name, "ssim"]).document()
        if ("", "sigma") in values:
            noise = values["", "sigma"]
            sigmas[key] = {
                "true": sigma,
                "std": statistics.finite(float(noise.std())) if len(noise) > 1 else None,
                **statistics.mean(noise).document(),
            }
        if ("", "right") in values:
            right = values["", "right"]
            accuracies[key] = statistics.proportion(int(right.sum()), len(right)).document()
    document: dict[str, Any] = {"sigmas": list(context.sigmas)}
    for measure in ("psnr", "ssim"):
        plain, noisy = denoisers["unconditional"][measure], denoisers["noisy"][measure]
        document[measure] = {key: e["value"] for key, e in plain.items()}
        document[f"{measure}_noisy"] = {key: e["value"] for key, e in noisy.items()}
        document[f"{measure}_interval"] = {key: [e["low"], e["high"]] for key, e in plain.items()}
    return document | {
        "denoisers": denoisers,
        "estimated_sigma": sigmas,
        "predicted_labels": accuracies,
        "knows_sigma": {name: knows_sigma(context.model, name) for name in denoisers},
        "ssim_window": ssim_window(context.images.image_size),
        "warnings": _warnings(context) + unfinished,
    }


def knows_sigma(model: ScoreModel, denoiser: str) -> str:
    """What ``denoiser`` of ``model`` is told of the noise level: true, estimated or unused."""
    if denoiser in ("noisy", "clipped"):
        return "unused"
    if denoiser == "blind":
        return "estimated"
    return "unused" if model.ignores_sigma else "true"


def _measure(
    context: EvaluationContext, sigma: float, batch: Batch
) -> dict[tuple[str, str], Tensor]:
    """By denoiser and measure, and by "" and what else is known of each image: (B,)."""
    x, y, labels = batch
    if context.images.num_classes != context.model.num_classes:
        labels = None
    found, predicted, noise = estimates(context.model, y, sigma, labels)
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
    from ebmkit import plots

    plots.psnr_bars(document["denoisers"], folder / "psnr.png")
    few = context.images.first(SHOWN)
    clean = None
    levels = []
    for sigma in context.sigmas:
        shared = noisy_batches(few, sigma, context.seed, SHOWN, context.device)
        clean, y = _middles(list(shared))
        found, _, _ = estimates(context.model, y, sigma)
        shown = {"noisy": y, "$D_u$": found["unconditional"]}
        if "conditional_predicted" in found:
            shown["$D_c$"] = found["conditional_predicted"]
        levels.append(plots.DenoisedLevel(sigma, shown))
    if clean is not None:
        plots.denoising_grid(clean, levels, folder / "denoising.png", NOTE)


def _middles(batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """Clean and noisy images of all ``batches``; the middles, where pictures have several sizes."""
    height = min(batch.x.shape[-2] for batch in batches)
    width = min(batch.x.shape[-1] for batch in batches)
    pairs = [(_center_crop(b.x, height, width), _center_crop(b.y, height, width)) for b in batches]
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def _center_crop(images: Tensor, height: int, width: int) -> Tensor:
    """The middle of images (B, C, H, W)."""
    top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
    return images[..., top : top + height, left : left + width]


def table(document: dict[str, Any]) -> Table:
    """PSNR of every denoiser beside the noisy input's, with intervals, gain and SSIM."""
    result = new_table(
        document, ("sigma", "denoiser", "PSNR dB", "95 % interval", "gain dB", "SSIM")
    )
    result.columns[1].justify = "left"
    for sigma in document["sigmas"]:
        key = in_255ths(sigma)
        for i, (name, measures) in enumerate(document["denoisers"].items()):
            value, gain, likeness = (measures[m][key] for m in ("psnr", "gain", "ssim"))
            result.add_row(
                "" if i else f"{key}/255",
                LABELS[name],
                number(value["value"], "{:.2f}"),
                interval(value, "{:.2f}"),
                "" if name == "noisy" else number(gain["value"], "{:+.2f}"),
                number(likeness["value"], "{:.3f}"),
            )
        result.add_section()
    return result


def _warnings(context: EvaluationContext) -> list[str]:
    card = context.model.card
    if card is None:
        return []
    if card.sigma_range is None:
        return [
            f"this model was not trained to denoise (its objective is {card.objective!r}): its "
            "score means little; add dsm to the objective"
        ]
    low, high = card.sigma_range
    outside = [s for s in context.sigmas if not low * (1 - 1e-6) <= s <= high * (1 + 1e-6)]
    if not outside:
        return []
    levels = ", ".join(format_sigma(s) for s in outside)
    return [
        f"noise at {levels} is outside the range that this model was trained for, "
        f"{format_sigma(low)} to {format_sigma(high)}"
    ]


DENOISE = Suite(
    description="PSNR and SSIM of the unconditional, conditional and blind denoisers",
    check=check,
    passes=lambda context: len(context.sigmas),
    measure=measure,
    plot=plot,
    table=table,
    standard=True,
)
