r"""Suite ``adversarial``: adversarial gradients as differences of denoisers (CDN eq. 9).

.. math:: \nabla_y \log p(c \mid y) = \frac{D_c(y, c) - D_u(y)}{\sigma^2} .

The difference between the conditional and the unconditional denoiser is the direction of an attack
on the classifier. As sigma goes to 0, the gradient stays bounded only if the difference shrinks
like sigma^2, which nothing enforces: the instability of sections 2.2 and 5.1.

The suite measures, at :math:`y = x + \sigma\epsilon` of the first images, in float32, for the
*targets*, the most probable labels at y after the predicted one:

- ``norm``: l2 norm of the gradient, nats per image unit; ``norm_predicted``, the same for the
  predicted label; ``score_norm``, :math:`\|\nabla\log p(y)\|`, about :math:`\sqrt d/\sigma` for a
  good denoiser;
- ``identity_error``: relative difference of the two sides of the equation; the left side is a
  separate gradient. It is rounding divided by sigma^2; ``rounding`` is the error expected in
  float32, :math:`2^{-24}\|y\|/\sigma^2` relative to the norm;
- ``steps``: for a step of each length along the gradient, the increase of log p(c|y) (``gain``),
  its linear prediction, length times norm (``promised``), and the share of (image, target) pairs
  whose prediction is then the target (``reached``).

For a blind model, which needs no sigma, the suite also measures at the clean image, as level 0.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, PositiveFloat
from rich.table import Table
from torch import Tensor

from ebmkit import plots
from ebmkit.compile import in_float32
from ebmkit.energy import EnergyModel, ScoreModel
from ebmkit.errors import UserError
from ebmkit.evaluation import statistics
from ebmkit.evaluation.suite import (
    EvaluationBatch,
    EvaluationContext,
    Images,
    NonEmptyUnique,
    Precision,
    Suite,
    SuiteConfig,
    check_classifies,
    class_name,
    new_table,
    noise_warnings,
    noisy_batches,
    number,
)
from ebmkit.metrics import predict
from ebmkit.noise import Sigma, in_255ths

ROWS = 4
"""Number of images in the plot."""

STEP = ("gain", "promised", "reached")

NOTE = (
    "Targets: the most probable labels after the predicted one at the lowest noise. Gradients: "
    "gray is 0, each scaled to the full range; numbers are l2 norms, nats per image unit."
)


class AdversarialSuiteConfig(SuiteConfig):
    """Settings of the suite ``adversarial``."""

    sigmas: NonEmptyUnique[Sigma] = tuple(s / 255 for s in (1, 2, 5, 10, 20, 50, 100))
    """noise levels, image units"""
    labels: Annotated[int, Field(ge=1, le=6)] = 2
    """number of target labels: the most likely ones after the predicted label"""
    images: Annotated[int, Field(ge=2)] = 64
    """number of images, from the first; the plot shows 4"""
    lengths: NonEmptyUnique[PositiveFloat] = (0.05, 0.25, 1.0)
    """l2 lengths of the steps along the gradient, image units"""
    precision: Precision = "single"
    """precision: single (float32) or double (float64)"""


def difference(model: EnergyModel, y: Tensor, c: Tensor, sigma: float) -> Tensor:
    """grad log p(c|y) = (D_c - D_u) / sigma^2 (CDN eq. 9), for labels ``c`` (B,): shape of the
    noisy images ``y`` (B, C, H, W) at level ``sigma``, image units."""
    return (model.denoise(y, sigma, c) - model.denoise(y, sigma)) / sigma**2


def measure(context: EvaluationContext) -> dict[str, Any]:
    """Measure gradients at every noise level; return the document."""
    config = context.option(AdversarialSuiteConfig)
    model = context.model_in(config.precision)
    assert isinstance(model, EnergyModel)
    targets = min(config.labels, model.num_classes - 1)
    images = context.first(config.images)
    batch_size = min(context.batch_size, math.ceil(len(images) / context.world.size))
    levels = []
    for sigma in _sigmas(context):

        def of_batch(batch: EvaluationBatch, sigma: float = sigma) -> dict[str, Tensor]:
            y = batch.y.double() if config.precision == "double" else batch.y
            return _measure(model, y, sigma, targets, config.lengths)

        columns = context.columns(sigma, of_batch, images, batch_size)
        means: dict[str, Any] = {n: statistics.bounded_mean(v) for n, v in columns.items()}
        steps = [
            {"length": length, **{name: means.pop(f"{name} {i}") for name in STEP}}
            for i, length in enumerate(config.lengths)
        ]
        level = {"sigma": sigma, "identity_error": None, "rounding": None, **means, "steps": steps}
        levels.append(level)
    return {
        "images": len(images),
        "sigmas": config.sigmas,
        "targets": targets,
        "lengths": config.lengths,
        "levels": levels,
        "warnings": noise_warnings(model, config.sigmas),
    }


def _sigmas(context: EvaluationContext) -> list[float]:
    """The noise levels of the settings, ascending; first 0 (clean) if the model is blind."""
    levels = sorted(set(context.option(AdversarialSuiteConfig).sigmas))
    return levels if context.model.noise_conditional else [0.0, *levels]


def _norm(images: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(images.flatten(1), dim=1)
    return norm


def _measure(
    model: EnergyModel, y: Tensor, sigma: float, targets: int, lengths: tuple[float, ...]
) -> dict[str, Tensor]:
    """Columns (B,); quantities of a target label are means over the ``targets`` labels."""
    level = sigma or None
    order = model.energies(y, level).logits.argsort(dim=1, descending=True)
    columns = {
        "norm_predicted": _norm(model.label_score(y, order[:, 0], level)),
        "score_norm": _norm(model.score(y, sigma=level)),
    }
    by_target = []
    for c in order[:, 1 : 1 + targets].T:
        gradient = model.label_score(y, c, level)
        norm = _norm(gradient)
        own = {"norm": norm}
        safe = norm.clamp_min(torch.finfo(norm.dtype).tiny)
        if sigma:
            own["identity_error"] = _norm(difference(model, y, c, sigma) - gradient) / safe
            own["rounding"] = torch.finfo(y.dtype).eps / 2 * _norm(y) / sigma**2 / safe
        before = model.energies(y, level).at_label(c)
        for i, length in enumerate(lengths):
            after = model.energies(y + length * gradient / safe.reshape(-1, 1, 1, 1), level)
            own[f"gain {i}"] = after.at_label(c) - before
            own[f"promised {i}"] = length * norm
            own[f"reached {i}"] = (predict(after.logits) == c).to(norm)
        by_target.append(own)
    return columns | {
        name: torch.stack([own[name] for own in by_target]).mean(0) for name in by_target[0]
    }


def plot(context: EvaluationContext, document: dict[str, Any], folder: Path) -> None:
    """Write ``adversarial.png``, gradients at some noise levels, and ``adversarial-norms.png``."""
    _plot_gradients(context, document, folder / "adversarial.png")
    _plot_norms(document, folder / "adversarial-norms.png")


def _plot_gradients(context: EvaluationContext, document: dict[str, Any], path: Path) -> None:
    """One row per image: clean image, then noisy image and gradients at three noise levels."""
    config = context.option(AdversarialSuiteConfig)
    model = context.model_in(config.precision)
    assert isinstance(model, EnergyModel)
    sigmas, images = sorted(set(config.sigmas)), context.first(ROWS)

    def name(label: Tensor) -> str:
        return class_name(images, int(label))

    rows: list[list[tuple[Tensor, str]]] = []
    heads, groups, targets = ["clean"], dict[int, str](), None
    for i in sorted({0, (len(sigmas) - 1) // 2, len(sigmas) - 1}):
        sigma = sigmas[i]
        ((x, y, labels, _),) = noisy_batches(images, sigma, context.seed, ROWS, context.device)
        y = y.double() if config.precision == "double" else y
        if not rows:
            below = [""] * len(x) if labels is None else map(name, labels)
            rows = [[cell] for cell in zip(x, below, strict=True)]
        with in_float32(context.device):
            posterior = model.energies(y, sigma).log_posterior().exp()
            if targets is None:  # the same at all levels, so that gradients are comparable
                most_probable = posterior.argsort(dim=1, descending=True)
                targets = most_probable[:, 1 : 1 + document["targets"]]
            gradients = [difference(model, y, c, sigma) for c in targets.T]
        groups[len(heads)] = plots.sigma_label(sigma)
        heads += ["noisy, predicted", *(f"target {k + 1}" for k in range(len(gradients)))]
        for j, (row, p) in enumerate(zip(rows, posterior, strict=True)):
            row.append((y[j], f"{name(p.argmax())} ({100 * float(p.max()):.0f} %)"))
            for c, gradient in zip(targets[j], gradients, strict=True):
                own = gradient[j]
                row.append((plots.around_gray(own), f"{name(c)}: {float(own.norm()):.2g}"))
    of = plots.images_of(document, len(images))
    title = "Adversarial gradients as differences of denoisers: "
    title += f"$\\nabla \\log p(c|y) = (D_c - D_u) / \\sigma^2$ ({of})"
    plots.image_rows(rows, heads, path, groups, title, NOTE)


def _plot_norms(document: dict[str, Any], path: Path) -> None:
    """Norms of gradients, and gains of steps along them, against the noise level."""
    figure = plots.new_figure(9.6, 5.0, layout="constrained")
    left, right = figure.subplots(1, 2)
    noisy = [level for level in document["levels"] if level["sigma"]]
    clean = [level for level in document["levels"] if not level["sigma"]]
    x = [255 * level["sigma"] for level in noisy]
    series = {
        "norm_predicted": "predicted label",
        "norm": "targets",
        "score_norm": "score $\\nabla\\log p(y)$",
    }
    # an interval of a mean may reach 0, which a logarithmic axis cannot show
    values = [level[name]["value"] for level in noisy for name in series]
    floor = min([value for value in values if value], default=1.0) / 5
    for k, (name, label) in enumerate(series.items()):
        look = plots.look(k) | {"ls": "-", "ms": 4, "label": label}
        plots.plot_estimates(left, x, [level[name] for level in noisy], **look)
        for level in clean:
            left.axhline(level[name]["value"], color=look["color"], ls=":", lw=1)
    if clean:
        left.plot([], [], color=plots.GRAY, ls=":", lw=1, label="at the clean image")
    title, y = "Gradients of log p(c|y), mean over images", "l2 norm (nats per image unit)"
    plots.annotate(left, title, plots.SIGMA, y, xscale="log", yscale="log", ylim=(floor, None))
    rises: list[float] = []
    for k, length in enumerate(document["lengths"]):
        gains, promised = (
            [level["steps"][k][name]["value"] for level in noisy] for name in ("gain", "promised")
        )
        rises += gains
        look = plots.look(k) | {"ls": "-", "ms": 4, "label": f"step {length:g}"}
        right.plot(x, gains, **look)
        right.plot(x, promised, "--", color=look["color"], lw=1)
    right.plot([], [], "--", color=plots.GRAY, lw=1, label="linear prediction")
    title = "A step along the gradient of a target (l2 length)"
    plots.annotate(right, title, plots.SIGMA, "rise of log p(c|y) (nats)", xscale="log")
    if min(rises) <= 0:
        right.set_yscale("symlog", linthresh=0.1)
    else:
        right.set_yscale("log")
    for axes in (left, right):
        plots.legend_below(axes, columns=2)
    plots.save_figure(figure, path, f"Adversarial gradients: {plots.images_of(document)}")


def table(document: dict[str, Any]) -> Table:
    """By noise level: norms, identity error, and gain of the longest step."""
    gain = f"gain at {document['lengths'][-1]:g}"
    heads = ("sigma", "norm", "predicted", "score", "eq. 9 error", gain, "promised")
    result = new_table(document, heads)
    forms = {"norm": "{:.3g}", "norm_predicted": "{:.3g}", "score_norm": "{:.3g}"}
    forms |= {"identity_error": "{:.1e}", "gain": "{:+.2f}", "promised": "{:+.2f}"}
    for level in document["levels"]:
        sigma, values = level["sigma"], level | level["steps"][-1]
        cells = (number(values[name], form) for name, form in forms.items())
        result.add_row(f"{in_255ths(sigma)}/255" if sigma else "clean", *cells)
    return result


def check(model: ScoreModel, images: Images) -> None:
    """Raise `UserError` if the model cannot classify the images, or has a single class."""
    check_classifies(model, images)
    if model.num_classes < 2:
        raise UserError("a model of one class has no adversarial gradients: they are all 0")


ADVERSARIAL = Suite(
    description="adversarial gradients as differences of denoisers (eq. 9), and their "
    "norm against noise",
    measure=measure,
    plot=plot,
    table=table,
    check=check,
    passes=lambda context: len(_sigmas(context)),
    options=AdversarialSuiteConfig,
    exact=True,
)
