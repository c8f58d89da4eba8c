r"""True distributions p(x, c), Gaussian mixtures with labels, and the families fitted to them.

Expectations under the truth are sums over nodes,

.. math:: E[f(x, c)] \approx \sum_i \omega_i \sum_c p(c \mid x_i)\, f(x_i, c),

exact in c. In one or two dimensions the nodes are a grid in the whitened coordinates of each
component (the trapezoidal rule), whose error falls as exp(-2 pi a / h) with the step h, where a is
the distance of the integrand's nearest pole from the real axis: about pi over the slope of the
logits (Trefethen and Weideman, SIAM Review 56, 2014). With h = 0.25 the constants of all settings
here are right to 1e-7.

In more dimensions the truth must be isotropic with its means on the first axis. Everything the
constants of a family with known covariance need is then a function of the first entry of x times a
polynomial of degree at most 3 in the others, for which the points at plus and minus sqrt(d - 1) on
the d - 1 other axes, equally weighted, are exact (Stroud's rule of degree 3). Families that
estimate covariances need degree 4: for them, two dimensions it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ebmkit.analytic import GaussianMixture
from ebmkit.errors import UserError
from ebmkit.experiments.theory.families import (
    CentredMeans,
    ClassCovariances,
    Family,
    NaiveBayes,
    SharedCovariance,
)


class Nodes(NamedTuple):
    """A quadrature rule for a truth."""

    x: Tensor  # (N, d)
    weights: Tensor  # (N,), sum 1
    posterior: Tensor  # (N, C), p(c|x)

    @property
    def shares(self) -> Tensor:
        """The probability (N, C) of each node and class."""
        return self.weights[:, None] * self.posterior


@dataclass(frozen=True)
class Truth:
    """A Gaussian mixture with labels, in float64.

    Attributes:
        means: (K, d) of the components.
        covariances: (K, d, d).
        weights: (K,), sum 1.
        labels: (K,) int64, the class of each component.
    """

    means: Tensor
    covariances: Tensor
    weights: Tensor
    labels: Tensor

    @property
    def dim(self) -> int:
        """d."""
        return self.means.shape[1]

    @property
    def num_classes(self) -> int:
        """C."""
        return int(self.labels.max()) + 1

    @cached_property
    def mixture(self) -> GaussianMixture:
        """The same as an exact model."""
        return GaussianMixture(self.means, self.covariances, self.weights, self.labels)

    def log_posterior(self, x: Tensor) -> Tensor:
        """log p(c|x) in nats: (N, d) to (N, C)."""
        return self.mixture.logits(x).log_softmax(1)

    def nodes(self, step: float = 0.25, radius: float = 8.0) -> Nodes:
        """A quadrature rule.

        Args:
            step: of the grid, in standard deviations.
            radius: half the width of the grid, in standard deviations.

        Raises:
            UserError: in more than two dimensions, if a covariance is not I or a mean is off the
                first axis.
        """
        line = torch.arange(-round(radius / step), round(radius / step) + 1).double() * step
        density = torch.exp(-0.5 * line.square())
        density = density / density.sum()
        if self.dim == 1:
            white, weights = line[:, None], density
        elif self.dim == 2:
            white = torch.cartesian_prod(line, line)
            weights = torch.outer(density, density).flatten()
        else:
            self._check_isotropic()
            across = torch.eye(self.dim - 1, dtype=torch.float64) * (self.dim - 1) ** 0.5
            across = torch.cat([across, -across])
            first = line.repeat_interleave(len(across))[:, None]
            white = torch.cat([first, across.repeat(len(line), 1)], 1)
            weights = density.repeat_interleave(len(across)) / len(across)
        factors = torch.linalg.cholesky(self.covariances)
        x = self.means[:, None] + torch.einsum("kij,nj->kni", factors, white)
        spread = (self.weights[:, None] * weights).flatten()
        keep = spread > 1e-17
        x, spread = x.flatten(0, 1)[keep], spread[keep] / spread[keep].sum()
        return Nodes(x, spread, self.log_posterior(x).exp())

    def plane(self) -> Truth:
        """The law of the first two entries of an isotropic truth with its means on the first axis.

        The law of any linear logit depends on its weights through their part along that axis and
        the length of the rest only, so an excess error in d dimensions is one in this plane.
        """
        self._check_isotropic()
        return Truth(self.means[:, :2], self.covariances[:, :2, :2], self.weights, self.labels)

    def sample(self, rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Draw x (*shape, d) and labels (*shape) int64."""
        ends = np.cumsum(self.weights.numpy())
        component = torch.from_numpy(np.searchsorted(ends[:-1], rng.random(shape), side="right"))
        x = torch.from_numpy(rng.standard_normal((*shape, self.dim)))
        for k, factor in enumerate(torch.linalg.cholesky(self.covariances)):
            own = component == k
            x[own] = x[own] @ factor.mT + self.means[k]
        return x, self.labels[component]

    def _check_isotropic(self) -> None:
        eye = torch.eye(self.dim, dtype=torch.float64).expand_as(self.covariances)
        if self.means[:, 1:].any() or not torch.equal(self.covariances, eye):
            raise UserError(
                f"a truth in {self.dim} dimensions must have unit covariances and means on the "
                "first axis; in one or two dimensions it is free"
            )


@dataclass(frozen=True)
class Setting:
    """A truth and the family fitted to it.

    Attributes:
        name: a short key.
        title: of a panel, one line.
        description: truth and family in a sentence.
        truth: p(x, c).
        family: p_theta(x, c).
        well_specified: whether the truth is in the family.
        smallest: the smallest training set that is measured.
    """

    name: str
    title: str
    description: str
    truth: Truth
    family: Family
    well_specified: bool
    smallest: int


PAPER = (
    {"title": "Paper, left: bias dominates", "b_gen": 5.0, "b_dis": 1.0, "v_gen": 20.0,
     "v_dis": 100.0},
    {"title": "Paper, right: variance dominates", "b_gen": 1.0, "b_dis": 1.0, "v_gen": 100.0,
     "v_dis": 10000.0},
)  # fmt: skip
"""The stylised constants of figure 1; its caption draws b + v/n."""


def _truth(
    means: Any, covariances: Any, weights: Sequence[float], labels: Sequence[int] | None = None
) -> Truth:
    """Covariances: one for each component, or one for all."""
    centres = torch.as_tensor(means, dtype=torch.float64)
    spreads = torch.as_tensor(covariances, dtype=torch.float64)
    return Truth(
        means=centres,
        covariances=spreads.expand(len(centres), *centres.shape[1:] * 2).contiguous(),
        weights=torch.tensor(weights, dtype=torch.float64),
        labels=torch.tensor(range(len(centres)) if labels is None else labels),
    )


# fmt: off
SETTINGS = (
    Setting(
        "many-parameters", "Opposite means, d = 20",
        "Two unit Gaussians in 20 dimensions, 3 standard deviations apart; family: unit "
        "covariances, opposite means.",
        _truth(torch.eye(20)[0] * torch.tensor([[1.5], [-1.5]]), torch.eye(20), [0.5, 0.5]),
        CentredMeans(2, 20), well_specified=True, smallest=50,
    ),
    Setting(
        "naive-bayes", "Naive Bayes, correlated features",
        "Two Gaussians in the plane, correlation 0.3; family: one diagonal covariance.",
        _truth([[1.2, 1.2], [-1.2, -1.2]], [[1.0, 0.3], [0.3, 1.0]], [0.5, 0.5]),
        NaiveBayes(2, 2), well_specified=False, smallest=25,
    ),
    Setting(
        "centred-means", "Centred means, C = 3",
        "Three unit Gaussians in the plane whose means sum to zero; family: the same.",
        _truth([[2.0, 0.0], [-1.0, 1.5], [-1.0, -1.5]], torch.eye(2), [0.4, 0.3, 0.3]),
        CentredMeans(3, 2), well_specified=True, smallest=50,
    ),
    Setting(
        "shared-covariance", "Shared covariance, C = 3",
        "Three Gaussians in the plane with one covariance; family: the same.",
        _truth([[1.8, 0.2], [-1.0, 1.6], [-0.6, -1.6]], [[1.0, 0.4], [0.4, 0.8]],
               [0.3, 0.4, 0.3]),
        SharedCovariance(3, 2), well_specified=True, smallest=50,
    ),
    Setting(
        "class-covariances", "Class covariances",
        "Two Gaussians in the plane with a covariance each; family: the same.",
        _truth([[0.8, 0.0], [-0.8, 0.4]],
               [[[1.0, 0.3], [0.3, 0.6]], [[0.7, -0.2], [-0.2, 1.4]]], [0.5, 0.5]),
        ClassCovariances(2, 2), well_specified=True, smallest=100,
    ),
    Setting(
        "unequal-covariances", "Shared covariance, truth unequal",
        "Two Gaussians in the plane, one with about three times the other's variances; family: "
        "one covariance.",
        _truth([[1.0, 0.0], [-1.0, 0.0]],
               [[[2.0, 0.3], [0.3, 1.2]], [[0.6, 0.0], [0.0, 0.6]]], [0.4, 0.6]),
        SharedCovariance(2, 2), well_specified=False, smallest=25,
    ),
    Setting(
        "two-humps", "Shared covariance, truth not Gaussian",
        "Two classes in the plane, one with a fifth of its mass in a hump of its own; family: one "
        "covariance.",
        _truth([[1.0, 0.0], [1.0, 3.5], [-1.0, 0.0]], torch.eye(2), [0.4, 0.1, 0.5], [0, 0, 1]),
        SharedCovariance(2, 2), well_specified=False, smallest=25,
    ),
)
# fmt: on
