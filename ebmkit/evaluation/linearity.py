r"""Suite ``linearity``: does :math:`D(y) = \nabla D(y)\,y` hold, as CDN section 4.2 claims?

The claim holds if D is homogeneous of degree 1 (Mohan et al., 2020, arXiv 1906.05478). If log p is
homogeneous of degree k, the score has degree k - 1, and by Euler's identity

.. math:: D(y) - J(y)\,y = (2 - k)\, \sigma^2 \nabla\log p(y) = (2 - k)\,(D(y) - y) ,

so it holds only for k = 2 (`theory` returns k for a network). The suite computes the errors and
degrees of `Linearity` at :math:`y = x + \sigma\epsilon`, with J the Jacobian of the unconditional
denoiser given sigma, and ``euler_degree`` :math:`\langle y, s\rangle / \log p`, which is k by
Euler's identity. It is null unless log p has no unknown constant, as with the linear-quadratic
head's :math:`-\frac12 (w^\top f)^2`.

``error``, ``unexplained`` and ``explained`` are means over images. The other three have
denominators that may be near 0 for single images, which would dominate a mean of ratios. They are
*pooled*: numerator and denominator are summed over images before the division,

.. math:: k = 2 - \frac{\sum \langle D - Jy,\; D - y\rangle}{\sum \|D - y\|^2}

(the least-squares fit to all images), :math:`\sum\langle y, s\rangle / \sum\log p`, and
``of_change`` :math:`(\sum\|D - Jy\|^2 / \sum\|D - y\|^2)^{1/2}`. Their intervals are bootstraps
over images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from rich.table import Table
from torch import Tensor

from ebmkit import plots
from ebmkit.energy import DensityModel, ScoreModel, jvp, vjp
from ebmkit.evaluation import statistics
from ebmkit.evaluation.statistics import Estimate
from ebmkit.evaluation.suite import (
    SIGMAS,
    EvaluationBatch,
    EvaluationContext,
    NonEmptyUnique,
    Suite,
    SuiteConfig,
    interval,
    new_table,
    noise_warnings,
    number,
)
from ebmkit.models import GradResNet, JointModel, LinearQuadraticHead, LogitHead
from ebmkit.models.layers import GroupNorm
from ebmkit.noise import Sigma, in_255ths

SHOWN = {
    "of_change": "{:.3g}",
    "degree": "{:.3f}",
    "euler_degree": "{:.3f}",
    "unexplained": "{:.3g}",
}
"""Formats of the table's columns after the error."""

ROUNDING = 1e-5
"""Relative error below which ``explained`` is not reported: float32 rounding dominates."""

MAX_BATCH = 64
"""Maximum batch size: second derivatives need several times the memory of a forward pass."""


class LinearityConfig(SuiteConfig):
    """Settings of the suite ``linearity``."""

    sigmas: NonEmptyUnique[Sigma] = SIGMAS
    """noise levels, image units"""
    images: Annotated[int, Field(ge=2)] = 64
    """number of images, from the first"""


class Linearity(NamedTuple):
    """Deviation of a denoiser from D(y) = J(y) y at each image; all (B,).

    Attributes:
        error: ||D - J y|| / ||D||.
        of_change: ||D - J y|| / ||D - y||, which is |2 - k| if log p is homogeneous of degree k.
        degree: best-fitting k, 2 - <D - J y, D - y> / ||D - y||^2.
        unexplained: ||D - J y - (2 - degree)(D - y)|| / ||D||, the remaining error.
        explained: share of ||D - J y||^2 that the degree explains; only rounding if the error is
            below about 1e-6.
        along: <y, D - y> / sigma^2 = <y, score>, which is k log p by Euler's identity.
        moved: ||D - y||^2, the denominator of pooled ratios.
    """

    error: Tensor
    of_change: Tensor
    degree: Tensor
    unexplained: Tensor
    explained: Tensor
    along: Tensor
    moved: Tensor


def linearity(model: ScoreModel, y: Tensor, sigma: float) -> Linearity:
    """Measure the local linearity of ``model``'s unconditional denoiser at ``y`` (CDN section 4.2).

    Args:
        model: a model in evaluation mode.
        y: noisy images (B, C, H, W).
        sigma: noise level of the images, image units.
    """
    symmetric = isinstance(model, DensityModel)
    clean, product = directional(lambda images: model.denoise(images, sigma), y, y, symmetric)
    D, Jy, flat = (t.flatten(1).double() for t in (clean, product, y))
    rest, change = D - Jy, D - flat
    tiny = torch.finfo(torch.float64).tiny
    moved = change.square().sum(1).clamp_min(tiny)
    missing = (rest * change).sum(1) / moved  # 2 - k
    left = (rest - missing[:, None] * change).norm(dim=1)
    size, error = D.norm(dim=1).clamp_min(tiny), rest.norm(dim=1)
    return Linearity(
        error=error / size,
        of_change=error / moved.sqrt(),
        degree=2 - missing,
        unexplained=left / size,
        explained=1 - (left / error.clamp_min(tiny)).square().clamp(max=1),
        along=(flat * change).sum(1) / sigma**2,
        moved=change.square().sum(1),
    )


def directional(
    denoise: Callable[[Tensor], Tensor], y: Tensor, v: Tensor, symmetric: bool = True
) -> tuple[Tensor, Tensor]:
    """Return D(y) and J(y) v for images ``y`` and directions ``v``, one direction per image.

    Args:
        denoise: function from images (B, C, H, W) to images.
        y: images (B, C, H, W).
        v: directions (B, C, H, W).
        symmetric: whether J is symmetric; then J v is a VJP, which needs one derivative less.
    """
    if not symmetric:
        return jvp(denoise, y.contiguous(), v)
    clean, product = vjp(denoise, y.contiguous(), once=True)
    return clean, product(v)


class Theory(NamedTuple):
    """Theoretical degree k of homogeneity of log p (None if not homogeneous), and the reason."""

    degree: float | None
    why: str


def theory(
    norm: str,
    activation: str,
    bias: bool,
    head: str = "linear-quadratic",
    input_mean: float | tuple[float, ...] = 0.0,
) -> Theory:
    """Degree of homogeneity of log p of a GradResNet, apart from rounding and the norms' eps.

    Args:
        norm: group, scale, batch or none, as in the backbone's configuration.
        activation: relu or gelu.
        bias: whether convolutions and norms have biases.
        head: kind of the head.
        input_mean: mean that is subtracted from images, one number or one per channel.

    >>> theory("scale", "relu", bias=False).degree
    2.0
    """
    gelu, group = activation != "relu", norm == "group"
    offset = any(input_mean) if isinstance(input_mean, tuple) else bool(input_mean)
    forgets = "GELU is not homogeneous; the plain norm forgets all scale behind the first block"
    cases = (
        (head != "linear-quadratic", None, "logsumexp of the logits is not homogeneous"),
        (bias, None, "biases do not scale with the image"),
        (offset, None, "the input mean acts as a bias"),
        (norm == "batch", None, "the running mean of a batch norm acts as a bias"),
        (gelu and group, None, f"{forgets}, so k is near 0"),
        (gelu, None, "GELU is not homogeneous; for large inputs it is ReLU, and k nears 2"),
        (group, 0.0, "a plain norm forgets the scale of its input: f is of degree 0"),
        (True, 2.0, "every layer is of degree 1, so f is, and log p = -(w f)^2 / 2 of degree 2"),
    )
    return next(Theory(degree, why) for holds, degree, why in cases if holds)


def theory_of(model: ScoreModel) -> Theory | None:
    """`theory` for a GradResNet with an ebmkit head, from its modules; None for other models."""
    if not isinstance(model, JointModel) or not isinstance(model.backbone, GradResNet):
        return None
    if not isinstance(model.head, (LinearQuadraticHead, LogitHead)):
        return None
    modules = list(model.modules())
    norm = "none"
    if model.has_batch_norm:
        norm = "batch"
    elif kinds := {m.keep_scale for m in modules if isinstance(m, GroupNorm)}:
        norm = "scale" if all(kinds) else "group"
    return theory(
        norm,
        "gelu" if any(isinstance(m, torch.nn.GELU) for m in modules) else "relu",
        any(name.endswith("bias") for name, _ in model.named_parameters()),
        "linear-quadratic" if isinstance(model.head, LinearQuadraticHead) else "logit",
        model.input_mean,
    )


def measure(context: EvaluationContext) -> dict[str, Any]:
    """Measure linearity at every noise level; return the document."""
    config, model = context.option(LinearityConfig), context.exact_model
    images = context.first(config.images)
    batch_size = min(context.batch_size, MAX_BATCH, math.ceil(len(images) / context.world.size))
    levels = []
    for sigma in config.sigmas:

        def of_batch(batch: EvaluationBatch, sigma: float = sigma) -> dict[str, Tensor]:
            columns = linearity(model, batch.y, sigma)._asdict()
            # the linear-quadratic head's log p, -(w f)^2 / 2, has no unknown constant
            if isinstance(model, JointModel) and isinstance(model.head, LinearQuadraticHead):
                columns["log_density"] = model.log_density(batch.y, sigma).double()
            return columns

        columns = context.columns(sigma, of_batch, images, batch_size)
        levels.append({"sigma": sigma, **_level(columns, context.seed)})
    predicted = theory_of(model)
    return {
        "images": len(images),
        "sigmas": config.sigmas,
        "levels": levels,
        "theory": predicted and predicted._asdict(),
        "warnings": noise_warnings(model, config.sigmas),
    }


def _level(columns: dict[str, Tensor], seed: int) -> dict[str, Any]:
    def pooled(
        top: Tensor,
        bottom: Tensor,
        of_ratio: Callable[[float], float] = float,
        lowest: float = -math.inf,
    ) -> Estimate:
        """``of_ratio(sum(top) / sum(bottom))`` with an interval cut at ``lowest``; nan if the
        denominator is 0. A single image has no interval."""
        over, under = top.numpy(), bottom.numpy()

        def ratio(rows: NDArray[np.intp]) -> float:
            whole = float(under[rows].sum())
            return of_ratio(float(over[rows].sum()) / whole) if whole else math.nan

        if len(under) < 2:
            return statistics.without_interval(ratio(np.arange(len(under))), len(under))
        return statistics.bootstrap(ratio, len(under), seed, lowest=lowest)

    means = {n: statistics.bounded_mean(columns[n]) for n in ("error", "unexplained", "explained")}
    error, moved = statistics.finite(means["error"].value), columns["moved"]
    missing = (2 - columns["degree"]) * moved  # <D - J y, D - y>
    density = columns.get("log_density", torch.zeros(1))
    return {
        **means,
        "explained": means["explained"] if error and error >= ROUNDING else None,
        "of_change": pooled(columns["of_change"].square() * moved, moved, math.sqrt, 0),
        "degree": pooled(missing, moved, lambda ratio: 2 - ratio),
        "euler_degree": pooled(columns["along"], density) if density.any() else None,
    }


def plot(context: EvaluationContext, document: dict[str, Any], folder: Path) -> None:
    """Write ``linearity.png``: errors and degree against the noise level."""
    figure = plots.new_figure(9.2, 4.7, layout="constrained")
    left, right = figure.subplots(1, 2)
    levels = sorted(document["levels"], key=lambda level: float(level["sigma"]))
    errors = {
        "error": "$\\|D - Jy\\| / \\|D\\|$",
        "of_change": "$\\|D - Jy\\| / \\|D - y\\|$, pooled",
        "unexplained": "rest of $D - Jy$ for the best k, by $\\|D\\|$",
    }
    degrees = {"degree": "best fit", "euler_degree": "Euler's, $\\langle y, s\\rangle / \\log p$"}
    for axes, series, limits_of in ((left, errors, _log_limits), (right, degrees, _degree_limits)):
        limits = limits_of([level[name] for level in levels for name in series if level[name]])
        for k, (name, label) in enumerate(series.items()):
            known = [(255 * level["sigma"], level[name]) for level in levels if level[name]]
            if known:
                x, estimates = zip(*known, strict=True)
                look = plots.look(k) | {"ls": "-", "label": label}
                plots.bars_within(axes, x, estimates, limits, ms=4, **look)
    right.axhline(2, color=plots.GRAY, ls=":", lw=1, label="2: locally linear")
    theory = document["theory"]
    if theory and theory["degree"] is not None:
        label = f"theory: {theory['degree']:.0f}"
        right.axhline(theory["degree"], color="black", ls="--", lw=0.8, label=label)
    title, y = "Degree of homogeneity of log p", "degree k, pooled over images"
    plots.annotate(left, "Is D(y) = J(y) y?", plots.SIGMA, "relative error", yscale="log")
    plots.annotate(right, title, plots.SIGMA, y)
    plots.legend_below(left)
    plots.legend_below(right, columns=2)
    title = f"Local linearity of the denoiser: {plots.images_of(document)}"
    plots.save_figure(figure, folder / "linearity.png", title)


def linearity_grid(cells: Sequence[dict[str, Any]], path: Path, data: str = "") -> None:
    """Plot local linearity and theory of networks that differ in norm, activation and biases.

    Args:
        cells: one dictionary per network: ``norm`` (group or scale), ``activation`` (gelu or relu),
            ``bias`` (bool), and ``levels`` and ``theory`` as in ``linearity.json``.
        path: PNG file.
        data: description of the images, for the title.
    """
    figure = plots.new_figure(max(6.4, 1.15 * len(cells) + 1.4), 6.2, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    sigmas = [level["sigma"] for level in cells[0]["levels"]]
    for axes, name, limits_of in ((top, "error", _log_limits), (bottom, "degree", _degree_limits)):
        limits = limits_of([level[name] for cell in cells for level in cell["levels"]])
        for k, sigma in enumerate(sigmas):
            at = np.arange(len(cells)) + (k - (len(sigmas) - 1) / 2) * 0.6 / len(sigmas)
            found = [cell["levels"][k][name] for cell in cells]
            label = plots.sigma_label(sigma) if axes is top else None
            look = plots.look(k) | {"ls": ""}
            plots.bars_within(axes, list(at), found, limits, lw=1, ms=5, label=label, **look)
        for i in range(len(cells) - 1):
            axes.axvline(i + 0.5, color=plots.GRAY, lw=0.4)
    names = {"group": "plain norm", "scale": "scale-keeping", "batch": "batch norm"}
    names |= {"relu": "ReLU", "gelu": "GELU", "True": "biases", "False": "no bias"}
    ticks, label = [], "theory"
    for i, cell in enumerate(cells):
        degree = cell["theory"] and cell["theory"]["degree"]
        if degree is not None:
            bottom.plot([i - 0.42, i + 0.42], [degree] * 2, color="black", lw=1.2, label=label)
            label = "_theory"
        lines = [names.get(str(cell[key]), cell[key]) for key in ("norm", "activation", "bias")]
        ticks.append(
            "\n".join([*lines, f"theory: {'no k' if degree is None else f'k = {degree:.0f}'}"])
        )
    bottom.set_xticks(range(len(cells)), ticks, fontsize=8)
    title = "Local linearity D(y) = J(y) y: relative error (0: as section 4.2 claims)"
    error = "$\\|D - Jy\\| / \\|D\\|$"
    plots.annotate(top, title + (data and f", {data}"), y=error, yscale="log")
    title = "Degree of homogeneity of log p (locally linear: 2)"
    plots.annotate(bottom, title, y="degree k, best fit, pooled")
    figure.legend(loc="outside lower center", ncols=len(sigmas) + 2, frameon=False, fontsize=8.5)
    plots.save_figure(figure, path)


def _log_limits(estimates: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Limits of a logarithmic axis for ``estimates``, whose intervals may contain 0."""
    values, highs = ([e[key] for e in estimates if e[key]] for key in ("value", "high"))
    return min(values, default=0.1) / 5, max([*values, *highs], default=1.0)


def _degree_limits(estimates: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Limits of the axis for degrees: contain 0 and 2, and lie within [-2, 5]."""
    ends = [e[k] for e in estimates for k in ("value", "low", "high") if e[k] is not None]
    return max(-2.0, min([-0.5, *ends])), min(5.0, max([2.5, *ends]))


def table(document: dict[str, Any]) -> Table:
    """Errors, best-fitting degree and Euler's degree by noise level; theory in the last row."""
    heads = ("sigma", "error", "95 % interval", "of change", "degree k", "Euler's", "rest")
    result = new_table(document, heads)
    for level in document["levels"]:
        result.add_row(
            f"{in_255ths(level['sigma'])}/255",
            number(level["error"], "{:.3g}"),
            interval(level["error"], "{:.2g}"),
            *(number(level[name], form) for name, form in SHOWN.items()),
        )
    if document["theory"]:
        result.add_section()
        degree = number(document["theory"]["degree"], "{:.0f}")
        result.add_row("theory", "", "", "", degree, degree)
    return result


LINEARITY = Suite(
    description="local linearity D(y) = J(y) y, and the best-fitting degree of "
    "homogeneity of log p",
    measure=measure,
    plot=plot,
    table=table,
    passes=lambda context: len(context.option(LinearityConfig).sigmas),
    options=LinearityConfig,
    exact=True,
)
