r"""Excess errors of real fits, over many training sets.

For a number n of samples, many training sets are drawn and fitted, generatively in closed form and
discriminatively by Newton's method, on the same sets. The error of each fit,
:math:`\varepsilon(\theta_n) = E[KL(p(c|x) \| p_{\theta_n}(c|x))]`, is a quadrature over the truth:
there is no test set and no noise of one, so the only spread is that of the training sets.

At any n there is a small probability that a fit does not exist (a class without samples, a singular
covariance, separable classes), where the error is infinite. Strictly, then, so is its expectation:
equation (4) is about fits that exist. Such sets are counted and left out of the mean.

**A control variate.** The generative fit is a function of the moments of its training set. The
error to first order in these moments, :math:`\nabla\varepsilon \cdot (M_n - M)`, has mean zero,
exactly and at every n, since moments are averages; subtracting it leaves the mean where it was and
takes away most of the spread where the family is misspecified.

**What is estimated from it.** With the computed b, the points :math:`2n(\bar\varepsilon_n - b)` are
fitted by v + w / n over the largest n. Without any computed constant, the points
:math:`\bar\varepsilon_n` are fitted by b + v / 2n + w / n^2. The spread of
:math:`2n\varepsilon` tends to a constant, so it is pooled over the sizes and a point weighs as its
number of training sets: a weight from its own spread would favour points that came out low.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import grad

from ebmkit.experiments.theory.families import Gaussians, Moments, moments
from ebmkit.experiments.theory.regression import softmax_regression
from ebmkit.experiments.theory.settings import Setting
from ebmkit.experiments.theory.truth import Truth

__all__ = ["ExcessError", "Fitted", "Point", "fit_bias", "fit_variance", "measure"]

BATCH = 2_000_000  # numbers of features at once


@dataclass(frozen=True)
class Point:
    """Mean excess error of an estimator at one size of training set.

    Attributes:
        n: samples per training set.
        sets: training sets drawn.
        without: of them, those where the estimator does not exist, left out of the mean.
        excess: mean of E[KL], nats; nan if no set has a fit.
        error: its standard error, nats.
    """

    n: int
    sets: int
    without: int
    excess: float
    error: float


@dataclass(frozen=True)
class Fitted:
    """A least-squares estimate and its standard error."""

    value: float
    error: float

    def interval(self) -> tuple[float, float]:
        """At 95 %."""
        return self.value - 1.96 * self.error, self.value + 1.96 * self.error


class ExcessError:
    """E[KL(p(c|x) || p_theta(c|x))] of many models, in nats.

    Args:
        setting: its truth, and whether its features are quadratic.
        step: of the quadrature grid, in standard deviations (`Truth.nodes`).
        radius: half the width of the grid. The defaults err by less than 1e-7 nats here.
    """

    def __init__(self, setting: Setting, step: float = 0.3, radius: float = 6.0) -> None:
        truth = setting.truth
        self._project = truth.dim > 2
        nodes = (truth.plane() if self._project else truth).nodes(step, radius)
        self._rows = setting.family.features(nodes.x).mT.contiguous()  # (P, N)
        self._weights = nodes.weights
        self._target = self._rows @ nodes.shares  # (P, C)
        self._entropy = -float(torch.xlogy(nodes.shares, nodes.posterior).sum())

    def __call__(self, weights: Tensor) -> Tensor:
        """(B, P, C) weights of the logits to (B,) nats."""
        if self._project:
            weights = _on_the_plane(weights)
        contrasts = weights[:, :, :-1] - weights[:, :, -1:]
        logits = contrasts.mT @ self._rows  # (B, C-1, N)
        top = logits.amax(1).clamp(min=0)
        total = (logits - top[:, None]).exp().sum(1) + (-top).exp()
        normaliser = (total.log() + top) @ self._weights
        return normaliser - (contrasts * self._target[:, :-1]).sum((1, 2)) - self._entropy


def _on_the_plane(weights: Tensor) -> Tensor:
    """Linear logits of two classes in d dimensions to those with the same law in `Truth.plane`."""
    contrast = weights[..., 0] - weights[..., 1]  # (B, 1 + d)
    first = torch.cat([contrast[:, :2], contrast[:, 2:].norm(dim=1, keepdim=True)], 1)
    return torch.stack([first, torch.zeros_like(first)], -1)


def measure(setting: Setting, n: int, sets: int, start: Tensor, seed: int = 0) -> list[Point]:
    """Excess errors of the generative and the discriminative fit, in this order.

    Args:
        n: samples per training set.
        sets: training sets.
        start: (P, C) weights at which Newton's method begins: those of the limit.
        seed: with the setting's name and n, the key of the training sets.
    """
    family, truth = setting.family, setting.truth
    error = ExcessError(setting)
    linear = _FirstOrder(setting, error)
    batch = max(1, BATCH // (n * len(start)))
    generative: list[Tensor] = []
    discriminative: list[Tensor] = []
    for number, first in enumerate(range(0, sets, batch)):
        rng = np.random.default_rng([seed, zlib.crc32(setting.name.encode()), n, number])
        count = min(batch, sets - first)
        x, shares = _training_sets(truth, rng, count, n)
        sums = moments(x, shares)
        model = family.fit(sums)
        usable = _exists(model)
        model = Gaussians(*(part[usable] for part in model))
        generative.append(error(family.weights(model)) - linear(sums)[usable])
        found = softmax_regression(family.features(x), shares, start)
        discriminative.append(error(found.weights[found.solved]))
    return [_point(n, sets, torch.cat(errors)) for errors in (generative, discriminative)]


class _FirstOrder:
    """The generative error to first order in the moments of the training set, about the truth's."""

    def __init__(self, setting: Setting, error: ExcessError) -> None:
        nodes = setting.truth.nodes()
        family = setting.family
        self._centre = moments(nodes.x, nodes.shares)

        def at(*sums: Tensor) -> Tensor:
            weights: Tensor = family.weights(family.fit(Moments(*sums)))
            total: Tensor = error(weights[None]).sum()
            return total

        self._slopes: tuple[Tensor, ...] = grad(at, argnums=(0, 1, 2))(*self._centre)

    def __call__(self, sums: Moments) -> Tensor:
        """(B,) nats, with mean zero over training sets."""
        total = torch.zeros(len(sums.mass), dtype=sums.mass.dtype)
        for slope, sum_, centre in zip(self._slopes, sums, self._centre, strict=True):
            change: Tensor = slope * (sum_ - centre)
            total = total + change.flatten(1).sum(1)
        return total


def _training_sets(
    truth: Truth, rng: np.random.Generator, count: int, n: int
) -> tuple[Tensor, Tensor]:
    """x (count, n, d), and one-hot labels over n (count, n, C)."""
    x, labels = truth.sample(rng, (count, n))
    return x, torch.nn.functional.one_hot(labels, truth.num_classes).double() / n


def _exists(model: Gaussians) -> Tensor:
    """(B,) whether every class has samples and every covariance is positive definite."""
    finite = model.log_prior.isfinite().all(-1) & model.means.flatten(1).isfinite().all(-1)
    covariances = torch.where(finite[:, None, None, None], model.covariances, 0.0)
    failed: Tensor = torch.linalg.cholesky_ex(covariances)[1]
    return finite & (failed == 0).all(-1)


def _point(n: int, sets: int, errors: Tensor) -> Point:
    count = len(errors)
    return Point(
        n=n,
        sets=sets,
        without=sets - count,
        excess=float(errors.mean()) if count else math.nan,
        error=float(errors.std()) / math.sqrt(count) if count > 1 else math.nan,
    )


def fit_variance(points: Sequence[Point], bias: float) -> Fitted:
    """v from 2 n (excess - bias) = v + w / n.

    Args:
        points: at two sizes or more.
        bias: the computed b, nats.
    """
    n, excess, error = _columns(points)
    design = np.stack([np.ones_like(n), 1 / n], 1)
    return _least_squares(design, 2 * n * (excess - bias), 2 * n * error)[0]


def fit_bias(points: Sequence[Point]) -> Fitted:
    """b from excess = b + v / 2n + w / n^2, at three sizes or more."""
    n, excess, error = _columns(points)
    design = np.stack([np.ones_like(n), 0.5 / n, 1 / n**2], 1)
    return _least_squares(design, excess, error)[0]


def _columns(points: Sequence[Point]) -> tuple[NDArray[np.float64], ...]:
    """n, mean errors, and their standard errors from the pooled spread of 2 n times the error."""
    table = np.array([(p.n, p.sets - p.without, p.excess, p.error) for p in points], np.float64)
    n, sets, excess, error = table.T
    pooled = np.sqrt(np.mean((2 * n * error) ** 2 * sets))
    return n, excess, pooled / np.sqrt(sets) / (2 * n)


def _least_squares(
    design: NDArray[np.float64], values: NDArray[np.float64], errors: NDArray[np.float64]
) -> list[Fitted]:
    """Coefficients of a regression with known, independent errors."""
    scaled = design / errors[:, None]
    size = np.abs(scaled).max(0)
    inverse = np.linalg.pinv(scaled / size)
    found = inverse @ (values / errors) / size
    spread = np.sqrt(np.einsum("ij,ij->i", inverse, inverse)) / size
    return [Fitted(float(v), float(e)) for v, e in zip(found, spread, strict=True)]
