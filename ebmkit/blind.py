r"""Blind denoising: correction of estimated noise levels, and warnings where they are unreliable.

A blind model estimates the noise level from its own output: :math:`\sqrt d / \|s(y)\|` from a
score, :math:`\|D(y) - y\| / \sqrt d` from a denoiser (the *raw estimate*). Even an exact score has
:math:`E\|s\|^2 = d/\sigma^2 - E\|D - x\|^2/\sigma^4`, so the raw estimate of a score is too high,
most at low noise, where little of the noise can be removed. Two steps correct it:

1. **Calibration.** At the end of training, known noise is added to held-out images, at levels that
   are uniform in :math:`\log\sigma` over the trained range. The calibrated level is
   :math:`\sqrt{E[\sigma^2 \mid \text{raw}]}`, the one with the least squared error of
   :math:`y + \sigma^2 s(y)` for an exact score. It is fitted by isotonic regression, and
   interpolated linearly between a few points in the logarithms of both.
2. **Bound.** Independent noise has the same variance in all frequencies, also in the finest
   diagonal details :math:`(y_{i,j} - y_{i+1,j} - y_{i,j+1} + y_{i+1,j+1})/2`, and an image adds to
   their variance. So their root mean square, plus 3 standard errors, bounds the noise level of any
   image, whatever the model says.

A denoiser removes noise, so the residual y - D(y) is not larger than that bound, and it is white
or, as it lacks what the denoiser could not separate from the image, weakest at low frequencies:
neighbouring entries are not positively correlated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ebmkit.card import ModelCard
from ebmkit.noise import format_sigma

POINTS = 16
"""Maximum number of points of a calibration."""

MARGIN = 1.25
"""Factor by which an estimate exceeds its bound, or leaves the trained range, before it is called
unreliable: in images like those of training estimates vary by about a tenth."""

MAX_CORRELATION = 0.1
"""Correlation of neighbouring entries of a residual, beside 3 standard errors, up to which it is
taken for noise."""

ADVICE = "give sigma if you know it, or use a model trained on such images"


def fit_calibration(raw: ArrayLike, sigma: ArrayLike) -> list[tuple[float, float]]:
    """Points (raw estimate, calibrated level) from raw estimates of known levels ``sigma``, (N,).

    Both increase, and the levels may repeat. Empty if there are none, or one is NaN or Inf.
    """
    from scipy.optimize import isotonic_regression

    raw, sigma = np.asarray(raw, dtype=float), np.asarray(sigma, dtype=float)
    if not len(raw) or not np.isfinite(raw).all():
        return []
    bins = np.array_split(raw.argsort(kind="stable"), min(POINTS, len(raw)))
    at = [float(np.exp(np.log(raw[own]).mean())) for own in bins]
    variances = isotonic_regression(
        [float((sigma[own] ** 2).mean()) for own in bins], weights=[len(own) for own in bins]
    ).x
    points = dict(zip(at, np.sqrt(variances).tolist(), strict=True))  # equal estimates: the last
    return sorted(points.items())


def calibrated(raw: Tensor, y: Tensor, card: ModelCard | None, by_score: bool = True) -> Tensor:
    """Noise levels (B,) of ``y`` (B, C, H, W) from ``raw`` estimates (B,), in image units.

    They are calibrated and bounded if the ``card`` has a calibration, or else ``raw``. Outside the
    fitted points the correction is the factor of the nearest one. Raw estimates from scores
    (``by_score``) depend on the image size, so at another size than that of training they are
    bounded alone.
    """
    if card is None or not card.sigma_calibration:
        return raw
    level, bound = _interpolated(raw, y, card, by_score), noise_bound(y)
    return level if bound is None else torch.minimum(level, bound.to(raw))


def _other_size(y: Tensor, card: ModelCard, by_score: bool) -> bool:
    """Whether scores of ``y`` depend on a size other than that of training."""
    return by_score and card.image_size is not None and tuple(card.image_size) != y.shape[-2:]


def _interpolated(raw: Tensor, y: Tensor, card: ModelCard, by_score: bool) -> Tensor:
    """Calibrated levels (B,) without the bound; ``raw`` if no calibration applies."""
    if not card.sigma_calibration or _other_size(y, card, by_score):
        return raw
    points = [(math.log(a), math.log(b)) for a, b in card.sigma_calibration]
    slopes = [(d - b) / (c - a) for (a, b), (c, d) in itertools.pairwise(points)]
    slopes = [1.0, *slopes, 1.0]
    u = raw.log()
    level = points[0][1] + u - points[0][0]
    for (knot, _), (before, after) in zip(points, itertools.pairwise(slopes), strict=True):
        level = level + (after - before) * (u - knot).clamp_min(0)
    return level.exp()


def noise_bound(y: Tensor) -> Tensor | None:
    """Highest noise level (B,) that the finest details of ``y`` (B, C, H, W) allow, image units.

    None if height or width is 1.
    """
    if y.ndim != 4 or min(y.shape[-2:]) < 2:
        return None
    rows = y[..., 1:, :] - y[..., :-1, :]
    details = ((rows[..., 1:] - rows[..., :-1]) / 2).flatten(1)
    # the squares of overlapping differences correlate by 1/4 (4 neighbours) and 1/16 (4): factor
    # 9/4 in the variance of their mean, 2/n; half of that is the relative variance of the root
    error = math.sqrt(9 / 8 / details.shape[1])
    bound: Tensor = (1 + 3 * error) * details.square().mean(1).sqrt()
    return bound


def reliability_warnings(
    card: ModelCard | None, y: Tensor, clean: Tensor, sigma: Tensor, by_score: bool
) -> list[str]:
    """Sentences on why results of blind denoising are unreliable, and what to do; mostly none.

    Args:
        card: card of the model; None: nothing is known of its training, and nothing is checked.
        y: noisy images (B, C, H, W).
        clean: denoised images, not clipped.
        sigma: estimated noise levels (B,).
        by_score: whether the model denoises by Tweedie's formula, as joint models do. Their scores
            depend on the image size, and the raw estimate is sigma^2 / ||y - D(y)||.
    """
    if card is None:
        return []
    found: list[str] = []

    def check(bad: Tensor, sentence: Callable[[int], str]) -> None:
        numbers = torch.nonzero(bad).flatten().tolist()
        if numbers:
            which = f" ({len(numbers)} of {len(y)} images)" if len(y) > 1 else ""
            found.append(f"{sentence(numbers[0])}{which}; {ADVICE}")

    level, residual = sigma.float(), (y - clean).float()
    rms = residual.flatten(1).square().mean(1).sqrt()
    if (bound := noise_bound(y.float())) is not None:
        tiny = torch.finfo(rms.dtype).tiny
        raw = level.square() / rms.clamp_min(tiny) if by_score else rms
        claim = torch.maximum(_interpolated(raw.clamp_min(tiny), y, card, by_score), rms)
        check(
            claim > MARGIN * bound,
            lambda k: (
                f"the model takes {format_sigma(float(claim[k]))} for noise, and the finest "
                f"details allow at most {format_sigma(float(bound[k]))}: the result may be worse "
                "than the input"
            ),
        )
    if card.sigma_range is not None:
        low, high = card.sigma_range
        check(
            (level < low / MARGIN) | (level > high * MARGIN),
            lambda k: (
                f"the estimated noise level {format_sigma(float(level[k]))} is outside the range "
                f"this model was trained for, {format_sigma(low)} to {format_sigma(high)}"
            ),
        )
    if card.sigma_calibration:
        lowest = card.sigma_calibration[0][1]
        check(
            level <= MARGIN * lowest,
            lambda k: (
                f"the model estimates {format_sigma(float(level[k]))}, and does not tell levels "
                f"below about {format_sigma(lowest)} apart: if there is less noise, the result may "
                "be worse than the input"
            ),
        )
    pairs = residual[..., 1:] * residual[..., :-1], residual[..., 1:, :] * residual[..., :-1, :]
    products = torch.cat([own.flatten(1) for own in pairs], dim=1)
    if products.shape[1]:
        correlation = products.mean(1) / rms.square().clamp_min(torch.finfo(rms.dtype).tiny)
        check(
            correlation > MAX_CORRELATION + 3 / math.sqrt(products.shape[1]),
            lambda k: (
                f"what the model removed is not white noise: neighbouring pixels correlate by "
                f"{float(correlation[k]):.2f}"
            ),
        )
    if _other_size(y, card, by_score) and card.image_size is not None:
        height, width = card.image_size
        found.append(
            f"the noise level of an image of {y.shape[-2]}x{y.shape[-1]} is estimated by a model "
            f"trained at {height}x{width}, which is less reliable; {ADVICE}"
        )
    return found
