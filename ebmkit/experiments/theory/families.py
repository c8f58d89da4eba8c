r"""Families p_theta(x, c) with Gaussian classes, each both a generative and a discriminative model.

Every family is a set of Gaussian mixtures with labels,

.. math:: p_\theta(x, c) = \pi_c\, \mathcal N(x;\, \mu_c, \Sigma_c),
    \qquad \log p_\theta(c \mid x) = \phi(x)^\top w_c(\theta) - \log \sum_{c'} (\ldots),

with features :math:`\phi` that are linear, (1, x), or quadratic, (1, x, x_i x_j for i <= j). So the
generative maximum of likelihood is a function of moments, and the discriminative one is softmax
regression on :math:`\phi`. The weights of softmax regression are identified up to a common shift:
(C - 1) P numbers, with P features.

==================  ==========================================  =========  ==================
family              Gaussians                                   features   parameters m
==================  ==========================================  =========  ==================
SharedCovariance    one covariance for all classes              linear     C-1 + Cd + d(d+1)/2
ClassCovariances    a covariance per class                      quadratic  C-1 + Cd + Cd(d+1)/2
NaiveBayes          one diagonal covariance for all classes     linear     C-1 + Cd + d
CentredMeans        covariance I, means that sum to 0           linear     (C-1)(d+1)
==================  ==========================================  =========  ==================

CentredMeans has as many parameters as its conditionals have degrees of freedom, so its conditional
Fisher matrix is nonsingular. The others have directions that no label shows.

Parameters :math:`\theta` are, in this order, log(pi_c / pi_C) for c < C, the means (for
CentredMeans all but the last), and the entries i >= j of the covariances, row by row.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "CentredMeans",
    "ClassCovariances",
    "Family",
    "Gaussians",
    "Moments",
    "NaiveBayes",
    "SharedCovariance",
    "linear_features",
    "moments",
    "quadratic_features",
]


class Gaussians(NamedTuple):
    """Weights and Gaussians of the classes; leading dimensions are many models at once."""

    log_prior: Tensor  # (..., C)
    means: Tensor  # (..., C, d)
    covariances: Tensor  # (..., C, d, d)


class Moments(NamedTuple):
    """Per class, sums over samples of 1, x and x x^T, divided by the number of samples."""

    mass: Tensor  # (..., C)
    first: Tensor  # (..., C, d)
    second: Tensor  # (..., C, d, d)


def moments(x: Tensor, shares: Tensor) -> Moments:
    """Moments of samples.

    Args:
        x: (..., n, d).
        shares: (..., n, C), the weight of each sample in each class; they sum to 1 over samples and
            classes. For a training set, one-hot labels over n.
    """
    second = [(x * shares[..., c, None]).mT @ x for c in range(shares.shape[-1])]
    return Moments(shares.sum(-2), shares.mT @ x, torch.stack(second, -3))


def linear_features(x: Tensor) -> Tensor:
    """(1, x): (..., d) to (..., 1 + d)."""
    return torch.cat([torch.ones_like(x[..., :1]), x], -1)


def quadratic_features(x: Tensor) -> Tensor:
    """(1, x, x_i x_j for i <= j): (..., d) to (..., 1 + d + d (d+1) / 2)."""
    i, j = torch.triu_indices(x.shape[-1], x.shape[-1])
    return torch.cat([linear_features(x), x[..., i] * x[..., j]], -1)


class Family(ABC):
    """A parametric family p_theta(x, c) with Gaussian classes.

    Args:
        num_classes: C, at least 2.
        dim: d, the number of entries of x.
    """

    quadratic = False
    """Whether logits are quadratic in x."""

    def __init__(self, num_classes: int, dim: int) -> None:
        self.num_classes = num_classes
        self.dim = dim

    @property
    @abstractmethod
    def num_parameters(self) -> int:
        """m, the length of theta."""

    @property
    def num_contrasts(self) -> int:
        """Degrees of freedom of log p_theta(c|x): the rank of the conditional Fisher matrix."""
        features = 1 + self.dim
        if self.quadratic:
            features += self.dim * (self.dim + 1) // 2
        return (self.num_classes - 1) * features

    @abstractmethod
    def fit(self, moments: Moments) -> Gaussians:
        """The maximum of likelihood given the samples' moments, in closed form.

        Where a class has no sample, or a covariance is singular, there is none: the result holds
        infinities, or covariances that are not positive definite.
        """

    @abstractmethod
    def parameters(self, model: Gaussians) -> Tensor:
        """theta (m,) of a member of this family."""

    @abstractmethod
    def gaussians(self, theta: Tensor) -> Gaussians:
        """The member with parameters theta (m,)."""

    @abstractmethod
    def member(self, weights: Tensor) -> Gaussians:
        """A member whose p(c|x) has the logits features(x) @ weights.

        Args:
            weights: (P, C).
        """

    def features(self, x: Tensor) -> Tensor:
        """phi(x): (..., d) to (..., P)."""
        return quadratic_features(x) if self.quadratic else linear_features(x)

    def weights(self, model: Gaussians) -> Tensor:
        """The weights (..., P, C) of the logits of members of this family."""
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

    def _split(self, theta: Tensor, means: int) -> tuple[Tensor, Tensor, Tensor]:
        """log prior (C,), means (means, d) and the rest of theta."""
        first, head = self.num_classes - 1, self._head(means)
        ratios, centres, rest = theta[:first], theta[first:head], theta[head:]
        padded = torch.cat([ratios, torch.zeros_like(theta[:1])])
        return padded.log_softmax(-1), centres.reshape(means, self.dim), rest

    def _head(self, means: int) -> int:
        return self.num_classes - 1 + means * self.dim

    def _join(self, model: Gaussians, means: int, *rest: Tensor) -> Tensor:
        ratios = model.log_prior[:-1] - model.log_prior[-1]
        return torch.cat([ratios, model.means[:means].flatten(), *(r.flatten() for r in rest)])

    def _same(self, covariance: Tensor) -> Tensor:
        """One covariance (..., d, d) for every class, (..., C, d, d)."""
        shape = (*covariance.shape[:-2], self.num_classes, self.dim, self.dim)
        return covariance[..., None, :, :].expand(shape)

    def _isotropic(self, weights: Tensor, means: Tensor) -> Gaussians:
        """The member with unit covariances and these means whose offsets are weights[0]."""
        log_prior = (weights[0] + 0.5 * means.square().sum(-1)).log_softmax(-1)
        return Gaussians(log_prior, means, self._same(torch.eye(self.dim).to(means)))


class SharedCovariance(Family):
    """One covariance for all classes: linear discriminant analysis, and logistic regression."""

    @property
    def num_parameters(self) -> int:
        """C - 1 + C d + d (d + 1) / 2."""
        return self._head(self.num_classes) + self.dim * (self.dim + 1) // 2

    def fit(self, moments: Moments) -> Gaussians:
        """Class frequencies, class means, and the pooled covariance."""
        means = moments.first / moments.mass[..., None]
        between = torch.einsum("...c,...ci,...cj->...ij", moments.mass, means, means)
        covariance = moments.second.sum(-3) - between
        return Gaussians(moments.mass.log(), means, self._same(covariance))

    def parameters(self, model: Gaussians) -> Tensor:
        """theta of a member."""
        i, j = torch.tril_indices(self.dim, self.dim)
        return self._join(model, self.num_classes, model.covariances[0, i, j])

    def gaussians(self, theta: Tensor) -> Gaussians:
        """The member with parameters theta."""
        log_prior, means, entries = self._split(theta, self.num_classes)
        return Gaussians(log_prior, means, self._same(_symmetric(entries, self.dim)))

    def member(self, weights: Tensor) -> Gaussians:
        """The member with unit covariances."""
        return self._isotropic(weights, weights[1:].mT)


class ClassCovariances(Family):
    """A covariance per class: quadratic discriminant analysis, quadratic logistic regression."""

    quadratic = True

    @property
    def num_parameters(self) -> int:
        """C - 1 + C d + C d (d + 1) / 2."""
        entries = self.dim * (self.dim + 1) // 2
        return self._head(self.num_classes) + self.num_classes * entries

    def fit(self, moments: Moments) -> Gaussians:
        """Class frequencies, class means and class covariances."""
        means = moments.first / moments.mass[..., None]
        squares = moments.second / moments.mass[..., None, None]
        covariances = squares - means[..., :, None] * means[..., None, :]
        return Gaussians(moments.mass.log(), means, covariances)

    def parameters(self, model: Gaussians) -> Tensor:
        """theta of a member."""
        i, j = torch.tril_indices(self.dim, self.dim)
        return self._join(model, self.num_classes, model.covariances[:, i, j])

    def gaussians(self, theta: Tensor) -> Gaussians:
        """The member with parameters theta."""
        log_prior, means, entries = self._split(theta, self.num_classes)
        rows = entries.reshape(self.num_classes, -1)
        return Gaussians(log_prior, means, _symmetric(rows, self.dim))

    def member(self, weights: Tensor) -> Gaussians:
        """The member whose largest variance is 1: a common quadratic form shows in no label."""
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

    @property
    def num_parameters(self) -> int:
        """C - 1 + C d + d."""
        return self._head(self.num_classes) + self.dim

    def fit(self, moments: Moments) -> Gaussians:
        """Class frequencies, class means, and the pooled variance of each entry."""
        means = moments.first / moments.mass[..., None]
        squares = moments.second.diagonal(dim1=-2, dim2=-1).sum(-2)
        variances = squares - (moments.first * means).sum(-2)
        return Gaussians(moments.mass.log(), means, self._same(torch.diag_embed(variances)))

    def parameters(self, model: Gaussians) -> Tensor:
        """theta of a member."""
        return self._join(model, self.num_classes, model.covariances[0].diagonal())

    def gaussians(self, theta: Tensor) -> Gaussians:
        """The member with parameters theta."""
        log_prior, means, variances = self._split(theta, self.num_classes)
        return Gaussians(log_prior, means, self._same(torch.diag_embed(variances)))

    def member(self, weights: Tensor) -> Gaussians:
        """The member with unit covariances."""
        return self._isotropic(weights, weights[1:].mT)


class CentredMeans(Family):
    """Unit covariances and class means that sum to zero: no parameter that labels do not show."""

    @property
    def num_parameters(self) -> int:
        """(C - 1)(d + 1)."""
        return self._head(self.num_classes - 1)

    def fit(self, moments: Moments) -> Gaussians:
        """Class frequencies, and the class means moved by lambda / frequency so that they sum to 0.

        The Lagrange condition mass_c (mu_c - mean_c) = -lambda, the same for every class.
        """
        means = moments.first / moments.mass[..., None]
        inverse = 1 / moments.mass[..., None]
        means = means - inverse * (means.sum(-2, True) / inverse.sum(-2, True))
        covariance = torch.eye(self.dim).to(means).expand(*means.shape[:-2], self.dim, self.dim)
        return Gaussians(moments.mass.log(), means, self._same(covariance))

    def parameters(self, model: Gaussians) -> Tensor:
        """theta of a member."""
        return self._join(model, self.num_classes - 1)

    def gaussians(self, theta: Tensor) -> Gaussians:
        """The member with parameters theta."""
        log_prior, means, _ = self._split(theta, self.num_classes - 1)
        means = torch.cat([means, -means.sum(0, True)])
        return Gaussians(log_prior, means, self._same(torch.eye(self.dim).to(means)))

    def member(self, weights: Tensor) -> Gaussians:
        """The one member with these logits."""
        slope = weights[1:].mT
        return self._isotropic(weights, slope - slope.mean(0))


def _symmetric(entries: Tensor, dim: int) -> Tensor:
    """Symmetric matrices (..., d, d) from their entries i >= j, row by row."""
    place = torch.empty(dim, dim, dtype=torch.long, device=entries.device)
    i, j = torch.tril_indices(dim, dim)
    place[i, j] = place[j, i] = torch.arange(len(i), device=entries.device)
    return entries[..., place]
