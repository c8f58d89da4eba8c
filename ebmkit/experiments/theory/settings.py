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

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ebmkit.analytic import GaussianMixture
from ebmkit.errors import UserError
from ebmkit.experiments.scales import read_data
from ebmkit.experiments.theory import families
from ebmkit.experiments.theory.families import Family


class Nodes(NamedTuple):
    """A quadrature rule for a truth."""

    x: Tensor  # (N, d)
    weights: Tensor  # (N,), sum 1
    posterior: Tensor  # (N, C), p(c|x)

    @property
    def shares(self) -> Tensor:
        """The probability (N, C) of each node and class."""
        return self.weights[:, None] * self.posterior


class Truth(GaussianMixture):
    """A Gaussian mixture with labels on vectors (d,), in float64, and expectations under it.

    Args:
        means: (K, d) of the components.
        covariances: (K, d, d).
        weights: (K,), sum 1.
        labels: (K,) int64, the class of each component.

    Raises:
        UserError: as `GaussianMixture`.
    """

    def __init__(self, means: Tensor, covariances: Tensor, weights: Tensor, labels: Tensor) -> None:
        super().__init__(means, covariances, weights, labels)
        self.covariances, self.weights = covariances, weights

    @property
    def dim(self) -> int:
        """d."""
        return self.means.shape[1]

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
        return Nodes(x, spread, self.logits(x).log_softmax(1).exp())

    def plane(self) -> Truth:
        """The law of the first two entries of an isotropic truth with its means on the first axis.

        The law of any linear logit depends on its weights through their part along that axis and
        the length of the rest only, so an excess error in d dimensions is one in this plane.
        """
        self._check_isotropic()
        return Truth(self.means[:, :2], self.covariances[:, :2, :2], self.weights, self.labels)

    def training_sets(
        self, rng: np.random.Generator, shape: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
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


def _setting(
    name: str,
    means: list[list[float]],
    weights: list[float],
    family: str,
    covariances: Any = None,
    labels: list[int] | None = None,
    **fields: Any,
) -> Setting:
    centres = torch.tensor(means, dtype=torch.float64)
    count, dim = centres.shape
    spreads = torch.tensor(covariances or torch.eye(dim).tolist(), dtype=torch.float64)
    truth = Truth(
        centres,
        spreads.expand(count, dim, dim).contiguous(),
        torch.tensor(weights, dtype=torch.float64),
        torch.tensor(labels or range(count)),
    )
    own: type[Family] = getattr(families, family)
    return Setting(name=name, truth=truth, family=own(truth.num_classes, dim), **fields)


_DATA = read_data("theory/settings.yaml")
PAPER: list[dict[str, Any]] = _DATA["paper"]
"""The stylised constants of figure 1; its caption draws b + v/n."""
SETTINGS = tuple(_setting(name, **fields) for name, fields in _DATA["settings"].items())
