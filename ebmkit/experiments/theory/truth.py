r"""The true distribution p(x, c): a Gaussian mixture with labels; its integrals and its samples.

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

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ebmkit.analytic import GaussianMixture
from ebmkit.errors import UserError

__all__ = ["Nodes", "Truth"]


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
            white = torch.cat(
                [
                    line.repeat_interleave(len(across))[:, None],
                    across.repeat(len(line), 1),
                ],
                1,
            )
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
        eye = torch.eye(self.dim, dtype=torch.float64)
        if self.means[:, 1:].any() or not torch.equal(
            self.covariances, eye.expand_as(self.covariances)
        ):
            raise UserError(
                f"a truth in {self.dim} dimensions must have unit covariances and means on the "
                "first axis; in one or two dimensions it is free"
            )
