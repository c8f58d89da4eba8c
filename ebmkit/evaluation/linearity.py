r"""Suite ``linearity``: whether :math:`D(y) = \nabla D(y)\,y`, as CDN section 4.2 says.

Measured on :math:`y = x + \sigma\epsilon` (`ebmkit.jacobian.linearity`), with J the Jacobian of the
unconditional denoiser, given sigma:

- ``error`` :math:`\|D - Jy\| / \|D\|`, the claim's own;
- ``of_change`` :math:`\|D - Jy\| / \|D - y\|`: the same by what the denoiser changes. At low noise
  every denoiser is close to the identity and the first error small, whatever the network;
- ``degree``, the k for which :math:`D - Jy = (2 - k)(D - y)` fits best, for log p homogeneous of
  degree k satisfies that exactly;
- what is left where each image has its own k: ``unexplained``, relative to :math:`\|D\|`, and
  ``explained``, the share of :math:`\|D - Jy\|^2` that k accounts for (null where the error is
  rounding);
- ``euler_degree`` :math:`\langle y, s\rangle / \log p`: k by Euler's identity, where log p has no
  unknown constant, as the linear-quadratic head's :math:`-\frac12 (w^\top f)^2`; else null.

``error``, ``unexplained`` and ``explained`` are means over images. The other three have
denominators that may be near 0 at single images, where a mean of ratios would be one image's. So
they are *pooled*: numerator and denominator are summed over images first,

.. math:: k = 2 - \frac{\sum \langle D - Jy,\; D - y\rangle}{\sum \|D - y\|^2}

(the least-squares fit to all images), :math:`\sum\langle y, s\rangle / \sum\log p`, and
``of_change`` :math:`(\sum\|D - Jy\|^2 / \sum\|D - y\|^2)^{1/2}`. Their intervals are the
bootstrap's, over images.

`theory` says which k a network must have.

``linearity.json`` holds, beside the common entries (``images`` is the number measured): ``levels``,
by noise level the estimates above with their 95 % intervals and ``sigma``; ``theory``, its
``degree`` (or null) and the reason ``why``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ebmkit.compile import in_float32
from ebmkit.energy import ScoreModel
from ebmkit.evaluation import statistics
from ebmkit.evaluation.context import SIGMAS, EvaluationContext, Suite
from ebmkit.evaluation.data import Batch, Images
from ebmkit.evaluation.subset import first_columns, noise_warnings
from ebmkit.evaluation.tables import interval, new_table, number
from ebmkit.jacobian import linearity
from ebmkit.models import GradResNet, JointModel, LinearQuadraticHead
from ebmkit.models.norms import GroupNorm
from ebmkit.noise import Sigma, in_255ths

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "LINEARITY",
    "LinearityConfig",
    "Theory",
    "check",
    "draw",
    "run",
    "table",
    "theory",
    "theory_of",
]

ROUNDING = 1e-5
"""Relative error below which what is left of float32 is rounding."""

MAX_BATCH = 64
"""Images at a time: derivatives of derivatives take several times a forward pass's memory."""


class LinearityConfig(BaseModel):
    """Settings of the suite ``linearity``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sigmas: tuple[Sigma, ...] = Field(SIGMAS, min_length=1, description="noise levels, image units")
    images: int = Field(64, ge=2, description="number of images, from the first")


class Theory(NamedTuple):
    """The degree k of homogeneity that log p must have, None if it has none, and one sentence
    why."""

    degree: float | None
    why: str


def theory(
    norm: str,
    activation: str,
    bias: bool,
    head: str = "linear-quadratic",
    input_mean: float | tuple[float, ...] = 0.0,
) -> Theory:
    """The degree of homogeneity of log p of a GradResNet, and so its local linearity.

    Up to what a norm's eps and rounding break.

    Args:
        norm: group, scale, batch or none, as in the backbone's configuration.
        activation: relu or gelu.
        bias: whether convolutions and norms have biases.
        head: the head's kind.
        input_mean: what is subtracted from images, one number or one per channel.

    >>> theory("scale", "relu", bias=False).degree
    2.0
    """
    if head != "linear-quadratic":
        return Theory(None, "logsumexp of the logits is not homogeneous")
    if bias:
        return Theory(None, "biases do not scale with the image")
    if any(input_mean) if isinstance(input_mean, tuple) else input_mean:
        return Theory(None, "the input mean acts as a bias")
    if norm == "batch":
        return Theory(None, "the running mean of a batch norm acts as a bias")
    if activation != "relu":
        if norm == "group":
            why = "GELU is not homogeneous; the plain norm forgets all scale behind the first block"
            return Theory(None, f"{why}, so k is near 0")
        return Theory(None, "GELU is not homogeneous; for large inputs it is ReLU, and k nears 2")
    if norm == "group":
        return Theory(0.0, "a plain norm forgets the scale of its input: f is of degree 0")
    return Theory(2.0, "every layer is of degree 1, so f is, and log p = -(w f)^2 / 2 of degree 2")


def check(model: ScoreModel, images: Images) -> None:
    """Every model that denoises can be measured."""


def theory_of(model: ScoreModel) -> Theory | None:
    """`theory` of a GradResNet with one of our heads, by its modules; None for other models."""
    if not isinstance(model, JointModel) or not isinstance(model.backbone, GradResNet):
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


def run(setting: EvaluationContext) -> dict[str, Any]:
    """Measure; see the module's text for what is returned."""
    config, model = setting.option(LinearityConfig), setting.exact_model
    used = min(config.images, len(setting.images))
    rows = min(setting.batch_size, MAX_BATCH, math.ceil(used / setting.world.size))
    levels = []
    with in_float32(setting.device):
        for sigma in config.sigmas:
            measure = partial(_measure, model, sigma)
            columns = first_columns(setting, used, sigma, measure, rows)
            levels.append({"sigma": sigma, **_level(columns, setting.seed)})
    predicted = theory_of(model)
    return {
        "images": used,
        "precision": "fp32",
        "compiled": False,
        "sigmas": list(config.sigmas),
        "levels": levels,
        "theory": predicted and predicted._asdict(),
        "warnings": noise_warnings(model, config.sigmas),
    }


def _measure(model: ScoreModel, sigma: float, batch: Batch) -> dict[str, Tensor]:
    columns = linearity(model, batch.y, sigma)._asdict()
    change = (model.denoise(batch.y, sigma) - batch.y).flatten(1).double()
    columns["moved"] = change.square().sum(1)  # ||D - y||^2, by which ratios are pooled
    # log p up to no constant: the linear-quadratic head says -(w f)^2 / 2
    if isinstance(model, JointModel) and isinstance(model.head, LinearQuadraticHead):
        columns["log_density"] = model.log_density(batch.y, sigma).double()
    return columns


def _level(columns: dict[str, Tensor], seed: int) -> dict[str, Any]:
    level: dict[str, Any] = {
        name: statistics.mean(columns[name]).document()
        for name in ("error", "unexplained", "explained")
    }
    if not level["error"]["value"] or level["error"]["value"] < ROUNDING:
        level["explained"] = None
    moved = columns["moved"]
    squares = _pooled(columns["of_change"].square() * moved, moved, seed, math.sqrt, lowest=0)
    level["of_change"] = squares.document()
    missing = (2 - columns["degree"]) * moved  # <D - J y, D - y>
    level["degree"] = _pooled(missing, moved, seed, lambda ratio: 2 - ratio).document()
    level["euler_degree"] = None
    if "log_density" in columns and columns["log_density"].any():
        level["euler_degree"] = _pooled(columns["along"], columns["log_density"], seed).document()
    return level


def _pooled(
    top: Tensor,
    bottom: Tensor,
    seed: int,
    of_ratio: Callable[[float], float] = float,
    lowest: float = -math.inf,
) -> statistics.Estimate:
    """``of_ratio`` of the sum of ``top`` (n,) by that of ``bottom`` (n,), no end below ``lowest``;
    undefined (nan) where the latter is 0, its interval for a single image."""
    over, under = top.numpy(), bottom.numpy()

    def ratio(rows: NDArray[np.intp]) -> float:
        whole = float(under[rows].sum())
        return of_ratio(float(over[rows].sum()) / whole) if whole else math.nan

    if len(under) < 2:
        return statistics.Estimate(ratio(np.arange(len(under))), math.nan, math.nan, len(under))
    return statistics.bootstrap(ratio, len(under), seed, lowest=lowest)


def draw(setting: EvaluationContext, document: dict[str, Any], folder: Path) -> None:
    """Write ``linearity.png``: errors and degree against the noise level."""
    from ebmkit.plots import jacobian as pictures

    pictures.linearity_curves(document, folder / "linearity.png")


def table(document: dict[str, Any]) -> Table:
    """By noise level: errors, the degree that fits best and Euler's, with the theory's below."""
    result = new_table(
        document, ("sigma", "error", "95 % interval", "of change", "degree k", "Euler's", "rest")
    )
    for level in document["levels"]:
        error, euler = level["error"], level["euler_degree"]
        result.add_row(
            f"{in_255ths(level['sigma'])}/255",
            number(error["value"], "{:.3g}"),
            interval(error["low"], error["high"], "{:.2g}"),
            number(level["of_change"]["value"], "{:.3g}"),
            number(level["degree"]["value"], "{:.3f}"),
            number(euler and euler["value"], "{:.3f}"),
            number(level["unexplained"]["value"], "{:.3g}"),
        )
    if document["theory"]:
        result.add_section()
        degree = number(document["theory"]["degree"], "{:.0f}")
        result.add_row("theory", "", "", "", degree, degree)
    return result


LINEARITY = Suite(
    description="local linearity D(y) = J(y) y, and the best-fitting degree of "
    "homogeneity of log p",
    check=check,
    passes=lambda setting: len(setting.option(LinearityConfig).sigmas),
    run=run,
    draw=draw,
    table=table,
    options=LinearityConfig,
)
