r"""Two-sided 95 % confidence intervals of statistics over n images.

- A proportion k/n (accuracy): Wilson's score interval, whose coverage also holds near 0 and 1.
- A mean over images (PSNR, gain in dB, log-density): :math:`\bar v \pm t_{n-1}\, s/\sqrt n`.
- A mean over images near a bound (NLL, Brier score, SSIM, a norm, a probability): the percentile
  bootstrap, which lies between the smallest and the largest value. The interval above can leave the
  range: a few large NLLs of an accurate classifier take it below 0.
- Other statistics (calibration error): the basic bootstrap,
  :math:`[2\hat\theta - q_{97.5},\; 2\hat\theta - q_{2.5}]` with the quantiles q of the statistic
  over resampled images. The usual percentile interval :math:`[q_{2.5}, q_{97.5}]` is wrong here:
  sampling noise moves every bin away from calibration, so a calibration error is biased upwards,
  and twice as much on resampled images. The basic interval removes this bias. In simulations with
  360 and 2000 images at errors of 3 and 10 %, it covers the true value in 85 to 95 % of draws (the
  percentile interval in 11 to 96 %), and in 60 % if the true value is 0, the boundary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LEVEL = 0.95
"""Confidence level of every interval."""

GROUPS = 10
"""Number of groups of the jackknife."""


@dataclass(frozen=True)
class Estimate:
    """An estimate with its 95 % confidence interval and the number of images."""

    value: float
    low: float
    high: float
    count: int

    def document(self) -> dict[str, Any]:
        """Convert to JSON types; NaN and Inf become null."""
        document: dict[str, Any] = to_json(self)
        return document


def finite(number: float) -> float | None:
    """Return ``number``, or None if it is NaN or Inf, which JSON cannot represent."""
    return number if math.isfinite(number) else None


def to_json(value: Any) -> Any:
    """Convert a document to JSON types: estimates become objects, NaN and Inf become null."""
    if isinstance(value, Estimate):
        return {key: finite(number) for key, number in asdict(value).items()}
    if isinstance(value, dict):
        return {key: to_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(entry) for entry in value]
    return finite(value) if isinstance(value, float) else value


def accuracy(right: Tensor) -> Estimate:
    """The share of true entries of ``right`` (n,), as a `proportion`."""
    return proportion(int(right.sum()), len(right))


def proportion(hits: int, count: int) -> Estimate:
    """``hits / count`` with Wilson's score interval; NaN if ``count`` is 0.

    Source: E. B. Wilson, J. Am. Stat. Assoc. 22 (1927); scipy's implementation.
    """
    from scipy.stats import binomtest

    if count == 0:
        return without_interval(math.nan, 0)
    interval = binomtest(hits, count).proportion_ci(LEVEL, method="wilson")
    return Estimate(hits / count, float(interval.low), float(interval.high), count)


def mean(values: Tensor) -> Estimate:
    """The mean of ``values`` (n,) with Student's t interval; the interval of one value is NaN."""
    numbers, count = values.double(), len(values)
    if count < 2:
        return without_interval(float(numbers.mean()), count)
    return student(float(numbers.mean()), float(numbers.std()), count - 1, count, math.sqrt(count))


def bounded_mean(values: Tensor) -> Estimate:
    """The mean of ``values`` (n,) of a bounded quantity with the percentile bootstrap interval, of
    1000 resamples with a fixed seed; the interval of one value, or with NaN or Inf, is NaN."""
    from scipy.stats import bootstrap as resample

    numbers = values.double().cpu().numpy()
    value = float(numbers.mean()) if len(numbers) else math.nan
    if len(numbers) < 2 or not math.isfinite(value):
        return without_interval(value, len(numbers))
    found = resample(
        (numbers,),
        np.mean,
        n_resamples=1000,
        batch=max(1, 2**20 // len(numbers)),
        confidence_level=LEVEL,
        method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval
    low, high = sorted((float(found.low), float(found.high)))
    return Estimate(value, min(low, value), max(high, value), len(numbers))


def student(
    value: float, spread: float, degrees_of_freedom: float, count: int, root: float = 1.0
) -> Estimate:
    """``value`` with Student's t interval, of standard error ``spread / root``."""
    from scipy.stats import t

    half = float(t.ppf((1 + LEVEL) / 2, degrees_of_freedom)) * spread / root
    return Estimate(value, value - half, value + half, count)


def without_interval(value: float, count: int) -> Estimate:
    """``value``, which may be NaN, with an unknown (NaN) interval."""
    return Estimate(value, math.nan, math.nan, count)


def bootstrap(
    statistic: Callable[[NDArray[np.intp]], float],
    count: int,
    seed: int = 0,
    resamples: int = 1000,
    lowest: float = -math.inf,
) -> Estimate:
    """A statistic of ``count`` images with the basic bootstrap interval.

    Args:
        statistic: function from image indices (n,), which may repeat, to the statistic.
        count: number of images n.
        seed: random seed of the resampling.
        resamples: number of resamples.
        lowest: lower bound of the interval's ends (0 for an error that cannot be negative).

    Source: A. Davison, D. Hinkley, Bootstrap Methods and their Application (1997), eq. 5.6.
    """
    from scipy.stats import bootstrap as resample

    value = statistic(np.arange(count))
    if count < 2:
        return Estimate(value, max(lowest, value), max(lowest, value), count)
    found = resample(
        (np.arange(count),),
        statistic,
        n_resamples=resamples,
        batch=100,
        vectorized=False,
        confidence_level=LEVEL,
        method="basic",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(value, max(lowest, float(found.low)), max(lowest, float(found.high)), count)


def jackknife(
    statistic: Callable[..., float], *parts: Tensor, lowest: float = -math.inf
) -> Estimate:
    """A statistic of independent samples ``parts`` (n_k, ...) with a grouped jackknife interval.

    ``lowest`` is the smallest possible value: the interval is cut there.

    For each sample, the jackknife omits one tenth at a time; the variances of the samples add up.
    The interval is Student's with 9 degrees of freedom. Bias is not corrected.

    Source: B. Efron, The Jackknife, the Bootstrap and Other Resampling Plans (1982), chapter 2.
    """
    value, variance = statistic(*parts), 0.0
    for k, part in enumerate(parts):
        if len(part) < 2 * GROUPS:
            return without_interval(value, len(parts[0]))
        group = torch.arange(len(part), device=part.device) % GROUPS
        values = torch.tensor(
            [statistic(*parts[:k], part[group != g], *parts[k + 1 :]) for g in range(GROUPS)],
            dtype=torch.float64,
        )
        variance += float((GROUPS - 1) / GROUPS * (values - values.mean()).square().sum())
    found = student(value, math.sqrt(variance), GROUPS - 1, len(parts[0]))
    return replace(found, low=max(lowest, found.low))
