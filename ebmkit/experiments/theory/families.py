r"""Families p_theta(x, c) with Gaussian classes, and the true distributions they are fitted to.

Every family is a set of Gaussian mixtures with labels,

.. math:: p_\theta(x, c) = \pi_c\, \mathcal N(x;\, \mu_c, \Sigma_c),
    \qquad \log p_\theta(c \mid x) = \phi(x)^\top w_c(\theta) - \log \sum_{c'} (\ldots),

with features :math:`\phi` that are linear, (1, x), or quadratic, (1, x, x_i x_j for i <= j). So the
generative fit is a function of moments, and the discriminative fit is softmax regression on
:math:`\phi`. The weights of softmax regression are identified up to a common shift:
(C - 1) P numbers, with P features.

==================  ==========================================  =========  ==================
family              Gaussians                                   features   parameters m
==================  ==========================================  =========  ==================
SharedCovariance    one covariance for all classes              linear     C-1 + Cd + d(d+1)/2
ClassCovariances    a covariance per class                      quadratic  C-1 + Cd + Cd(d+1)/2
NaiveBayes          one diagonal covariance for all classes     linear     C-1 + Cd + d
CentredMeans        covariance I, means that sum to 0           linear     (C-1)(d+1)
==================  ==========================================  =========  ==================

CentredMeans has as many parameters as p(c|x) has degrees of freedom, so its conditional Fisher
matrix is nonsingular. The others have parameter directions that do not change p(c|x).

Parameters :math:`\theta` are, in this order, log(pi_c / pi_C) for c < C, the means (for
CentredMeans all but the last), and the entries i >= j of the covariances, row by row.

**Expectations under a truth** p(x, c), a Gaussian mixture with labels, are sums over nodes,

.. math:: E[f(x, c)] \approx \sum_i \omega_i \sum_c p(c \mid x_i)\, f(x_i, c),

exact in c. In one or two dimensions the nodes are a grid in the whitened coordinates of each
component (the trapezoidal rule). Its error decreases as exp(-2 pi a / h) with the step h, where a
is the distance of the integrand's nearest pole from the real axis: about pi over the slope of the
logits (Trefethen and Weideman, SIAM Review 56, 2014). With h = 0.25 the constants of all settings
here are accurate to 1e-7.

In more dimensions the truth must be isotropic with its means on the first axis. For a family with
known covariance, all integrands are then functions of the first entry of x times a polynomial of
degree at most 3 in the others. The points at plus and minus sqrt(d - 1) on the d - 1 other axes,
equally weighted, are exact for these (Stroud's rule of degree 3). Families that estimate
covariances need degree 4, and so at most two dimensions.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ebmkit.analytic import GaussianMixture
from ebmkit.errors import UserError
from ebmkit.experiments.runs import read_data


class Gaussians(NamedTuple):
    """Weights and Gaussians of the classes, optionally of a batch of models."""

    log_prior: Tensor  # (..., C)
    means: Tensor  # (..., C, d)
    covariances: Tensor  # (..., C, d, d)


class Moments(NamedTuple):
    """Per class, sums over samples of 1, x and x x^T, divided by the number of samples."""

    mass: Tensor  # (..., C)
    first: Tensor  # (..., C, d)
    second: Tensor  # (..., C, d, d)


def moments(x: Tensor, shares: Tensor) -> Moments:
    """Moments of samples x (..., n, d).

    ``shares`` (..., n, C) is the weight of each sample in each class, with sum 1 over samples and
    classes: one-hot labels divided by n for a training set.
    """
    second = [(x * shares[..., c, None]).mT @ x for c in range(shares.shape[-1])]
    return Moments(shares.sum(-2), shares.mT @ x, torch.stack(second, -3))


class Family(ABC):
    """A parametric family p_theta(x, c) with C >= 2 Gaussian classes in d dimensions."""

    quadratic = False  # whether logits are quadratic in x

    def __init__(self, num_classes: int, dim: int) -> None:
        self.num_classes, self.dim = num_classes, dim
        self.free_means = num_classes
        self.lower = tuple(torch.tril_indices(dim, dim))

    @property
    def num_parameters(self) -> int:
        """m, the length of theta."""
        unit = torch.eye(self.dim).expand(self.num_classes, -1, -1)
        return self.num_classes - 1 + self.free_means * self.dim + self.entries(unit).numel()

    @abstractmethod
    def entries(self, covariances: Tensor) -> Tensor:
        """The free entries of the covariances (C, d, d), in their order in theta."""

    @abstractmethod
    def covariances(self, entries: Tensor) -> Tensor:
        """The covariances (C, d, d) with these free entries."""

    @abstractmethod
    def fit_covariances(self, moments: Moments, means: Tensor) -> Tensor:
        """Maximum-likelihood covariances (..., C, d, d), given moments and class means.

        If a class has no samples or a covariance is singular, there is no maximum: the result has
        NaN or Inf, or covariances that are not positive definite.
        """

    def fit_means(self, moments: Moments) -> Tensor:
        """Maximum-likelihood class means (..., C, d)."""
        return moments.first / moments.mass[..., None]

    def all_means(self, means: Tensor) -> Tensor:
        """All class means (C, d), from the free ones."""
        return means

    def fit(self, moments: Moments) -> Gaussians:
        """Maximum-likelihood model, given the samples' moments, in closed form."""
        means = self.fit_means(moments)
        return Gaussians(moments.mass.log(), means, self.fit_covariances(moments, means))

    def parameters(self, model: Gaussians) -> Tensor:
        """theta (m,) of a member of this family."""
        ratios = model.log_prior[:-1] - model.log_prior[-1]
        means = model.means[: self.free_means].flatten()
        return torch.cat([ratios, means, self.entries(model.covariances).flatten()])

    def gaussians(self, theta: Tensor) -> Gaussians:
        """The member with parameters theta (m,)."""
        first = self.num_classes - 1
        head = first + self.free_means * self.dim
        ratios = torch.cat([theta[:first], torch.zeros_like(theta[:1])])
        means = self.all_means(theta[first:head].reshape(self.free_means, self.dim))
        return Gaussians(ratios.log_softmax(-1), means, self.covariances(theta[head:]))

    def member(self, weights: Tensor) -> Gaussians:
        """A member with logits features(x) @ weights (P, C) and unit covariances."""
        means = weights[1:].mT
        log_prior = (weights[0] + 0.5 * means.square().sum(-1)).log_softmax(-1)
        return Gaussians(log_prior, means, self.same(torch.eye(self.dim).to(means)))

    def features(self, x: Tensor) -> Tensor:
        """phi(x): (..., d) to (..., P)."""
        parts = [torch.ones_like(x[..., :1]), x]
        if self.quadratic:
            i, j = torch.triu_indices(self.dim, self.dim)
            parts.append(x[..., i] * x[..., j])
        return torch.cat(parts, -1)

    def weights(self, model: Gaussians) -> Tensor:
        """Logit weights (..., P, C) of members of this family."""
        precision = torch.linalg.inv(model.covariances)
        slope = torch.einsum("...ij,...j->...i", precision, model.means)
        offset = (
            model.log_prior
            - 0.5 * (slope * model.means).sum(-1)
            - 0.5 * torch.logdet(model.covariances)
        )
        parts = [offset[..., None], slope]
        if self.quadratic:
            i, j = torch.triu_indices(self.dim, self.dim)
            parts.append(precision[..., i, j] * torch.where(i == j, -0.5, -1.0).to(precision))
        return torch.cat(parts, -1).mT

    def log_joint(self, theta: Tensor, x: Tensor) -> Tensor:
        """log p_theta(x, c) in nats, normalised: theta (m,), x (N, d) to (N, C)."""
        model = self.gaussians(theta)
        offsets = x[:, None] - model.means  # (N, C, d)
        white = torch.einsum("cij,ncj->nci", torch.linalg.inv(model.covariances), offsets)
        return (
            model.log_prior
            - 0.5 * (white * offsets).sum(-1)
            - 0.5 * torch.logdet(model.covariances)
            - 0.5 * self.dim * math.log(2 * math.pi)
        )

    def same(self, covariance: Tensor) -> Tensor:
        """One covariance (..., d, d) expanded to all classes, (..., C, d, d)."""
        return covariance.unsqueeze(-3).expand(*covariance.shape[:-2], self.num_classes, -1, -1)

    def symmetric(self, entries: Tensor) -> Tensor:
        """Symmetric matrices (..., d, d) from their entries i >= j, row by row."""
        place = torch.empty(self.dim, self.dim, dtype=torch.long, device=entries.device)
        i, j = self.lower
        place[i, j] = place[j, i] = torch.arange(len(i), device=entries.device)
        return entries[..., place]


class SharedCovariance(Family):
    """One covariance for all classes: linear discriminant analysis, and logistic regression."""

    def entries(self, covariances: Tensor) -> Tensor:
        i, j = self.lower
        return covariances[0, i, j]

    def covariances(self, entries: Tensor) -> Tensor:
        return self.same(self.symmetric(entries))

    def fit_covariances(self, moments: Moments, means: Tensor) -> Tensor:
        between = torch.einsum("...c,...ci,...cj->...ij", moments.mass, means, means)
        return self.same(moments.second.sum(-3) - between)


class ClassCovariances(Family):
    """A covariance per class: quadratic discriminant analysis, quadratic logistic regression."""

    quadratic = True

    def entries(self, covariances: Tensor) -> Tensor:
        i, j = self.lower
        return covariances[:, i, j]

    def covariances(self, entries: Tensor) -> Tensor:
        return self.symmetric(entries.reshape(self.num_classes, -1))

    def fit_covariances(self, moments: Moments, means: Tensor) -> Tensor:
        squares = moments.second / moments.mass[..., None, None]
        return squares - means[..., :, None] * means[..., None, :]

    def member(self, weights: Tensor) -> Gaussians:
        """The member whose largest variance is 1; a common quadratic form cancels in p(c|x)."""
        d = self.dim
        entries = weights[1 + d :].mT  # (C, d (d+1) / 2), of -x^T P x / 2
        precision = weights.new_zeros(self.num_classes, d, d)
        i, j = torch.triu_indices(d, d)
        precision[:, i, j] -= entries
        precision[:, j, i] -= entries
        shift = 1 - torch.linalg.eigvalsh(precision).min()
        precision = precision + shift * torch.eye(d).to(precision)
        covariances = torch.linalg.inv(precision)
        slope = weights[1 : 1 + d].mT
        means = torch.einsum("cij,cj->ci", covariances, slope)
        offset = weights[0] + 0.5 * (slope * means).sum(-1) + 0.5 * torch.logdet(covariances)
        return Gaussians(offset.log_softmax(-1), means, covariances)


class NaiveBayes(Family):
    """One diagonal covariance for all classes: Gaussian naive Bayes, and logistic regression."""

    def entries(self, covariances: Tensor) -> Tensor:
        return covariances[0].diagonal()

    def covariances(self, entries: Tensor) -> Tensor:
        return self.same(torch.diag_embed(entries))

    def fit_covariances(self, moments: Moments, means: Tensor) -> Tensor:
        squares = moments.second.diagonal(dim1=-2, dim2=-1).sum(-2)
        return self.covariances(squares - (moments.first * means).sum(-2))


class CentredMeans(Family):
    """Unit covariances, and class means that sum to zero: every parameter changes p(c|x)."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__(num_classes, dim)
        self.free_means = num_classes - 1

    def entries(self, covariances: Tensor) -> Tensor:
        return covariances[:0]

    def covariances(self, entries: Tensor) -> Tensor:
        return self.same(torch.eye(self.dim).to(entries))

    def fit_covariances(self, moments: Moments, means: Tensor) -> Tensor:
        return self.same(torch.eye(self.dim).to(means).expand(*means.shape[:-2], -1, -1))

    def fit_means(self, moments: Moments) -> Tensor:
        """The class means shifted by -lambda / mass_c so that they sum to 0.

        This is the Lagrange condition mass_c (mu_c - mean_c) = -lambda for all classes c.
        """
        means, inverse = super().fit_means(moments), 1 / moments.mass[..., None]
        return means - inverse * (means.sum(-2, True) / inverse.sum(-2, True))

    def all_means(self, means: Tensor) -> Tensor:
        return torch.cat([means, -means.sum(0, True)])

    def member(self, weights: Tensor) -> Gaussians:
        """The one member with these logits."""
        slope = weights[1:].mT
        centred = torch.cat([weights[:1], (slope - slope.mean(0)).mT])
        return super().member(centred)


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

    The arguments are means (K, d), covariances (K, d, d), weights (K,) with sum 1 and labels (K,)
    of the components; errors are as in `GaussianMixture`.
    """

    def __init__(self, means: Tensor, covariances: Tensor, weights: Tensor, labels: Tensor) -> None:
        super().__init__(means, covariances, weights, labels)
        self.covariances, self.weights, self.dim = covariances, weights, means.shape[1]

    def nodes(self, step: float = 0.25, radius: float = 8.0) -> Nodes:
        """A quadrature rule; ``step`` and ``radius`` of its grid are in standard deviations.

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
        """Marginal of the first two entries of an isotropic truth with means on the first axis.

        The distribution of a linear logit depends only on its weight along that axis and the norm
        of its other weights, so an excess error in d dimensions equals one in this plane.
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
                "first axis; a truth in one or two dimensions need not"
            )


@dataclass(frozen=True)
class Setting:
    """A truth and the family fitted to it."""

    name: str
    title: str  # of the panel
    description: str  # truth and family in a sentence
    truth: Truth
    family: Family
    well_specified: bool  # whether the truth is in the family
    smallest: int  # size of the smallest training set


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
    own = FAMILIES[family](truth.num_classes, dim)
    return Setting(name=name, truth=truth, family=own, **fields)


FAMILIES: dict[str, Callable[[int, int], Family]] = {
    kind.__name__: kind for kind in (SharedCovariance, ClassCovariances, NaiveBayes, CentredMeans)
}
_DATA = read_data("theory/settings.yaml")
PAPER: list[dict[str, Any]] = _DATA["paper"]
"""The assumed constants of the paper's figure 1, which plots b + v/n."""
SETTINGS = tuple(_setting(name, **fields) for name, fields in _DATA["settings"].items())
