r"""The constants of equation (4), computed and measured, of generative and discriminative fits.

For an estimator that minimises the mean of a loss :math:`\ell(\theta, x, c)` over n samples, and
the error :math:`\varepsilon(\theta) = E[KL(p(c|x) \| p_\theta(c|x))]` in nats,

.. math:: E[\varepsilon(\theta_n)] = b + \frac{v}{2n} + o(1/n).

With :math:`H = E[\nabla^2 \ell]`, :math:`S = Cov[\nabla \ell]`, :math:`\Sigma = H^+ S H^+`,
:math:`g = \nabla\varepsilon` and :math:`J = \nabla^2 \varepsilon`, all at the minimiser
:math:`\theta_*` of the expected loss, the paper (equations 20-27) has

.. math:: b = \varepsilon(\theta_*), \qquad v = \operatorname{Tr}(\Sigma J).

Its Taylor expansion leaves out a term: :math:`E[\theta_n] - \theta_* = \beta / n + o(1/n)`, so

.. math:: v = \operatorname{Tr}(\Sigma J) + 2\, g^\top \beta, \qquad
    \beta = H^+ \bigl( E[\nabla^2\ell\, H^+ \nabla\ell]
        - \tfrac12 \nabla \operatorname{Tr}(H \Sigma) \bigr)

(Cox and Snell, J. R. Stat. Soc. B 30, 1968). The gradient g vanishes for the discriminative
estimator, and for the generative one in a well-specified family. For a generative estimator in a
misspecified family it does not, and :math:`\operatorname{Tr}(\Sigma J)` alone is not even a
property of the family: it changes with the coordinates :math:`\theta`. Both are computed here;
``variance`` is the complete one, ``formula`` the paper's in the coordinates of the family.

Where H is singular, :math:`H^+` is its pseudo-inverse: directions of theta that change no label's
probability change no error either.

**Measurement.** For a number n of samples, many training sets are drawn and fitted, generatively in
closed form and discriminatively by Newton's method, on the same sets. The error of each fit,
:math:`\varepsilon(\theta_n)`, is a quadrature over the truth: there is no test set and no noise of
one, so the only spread is that of the training sets.

At any n there is a small probability that a fit does not exist (a class without samples, a singular
covariance, separable classes), where the error is infinite. Strictly, then, so is its expectation:
equation (4) is about fits that exist. Such sets are counted and excluded from the mean.

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
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor
from torch.func import grad, jacrev, vmap

from ebmkit.errors import UserError
from ebmkit.experiments.theory.families import Family, Gaussians, Moments, Nodes, Setting, moments

RANK_TOLERANCE = 1e-9  # of eigenvalues, relative to the largest
FLAT_SLOPE = 1e-6  # norm of a slope that is zero but for quadrature and rounding
FLAT_CURVATURE = 1e-10  # smallest at a maximum, relative to the mean square of features
TOLERANCE = 1e-5  # of r in Newton's method; the last step is full, so the error is about its square
STEPS = 40
BATCH = 2_000_000  # numbers of features at once

Loss = Callable[[Tensor, Tensor], Tensor]
"""theta (m,) and x (N, d) to the loss of every x and class, (N, C)."""


class Expansion(NamedTuple):
    """The error of an estimator to first order in 1/n."""

    theta: Tensor  # (m,), the limit of the estimator
    bias: float  # b, nats
    variance: float  # v, with the drift; nats times samples
    formula: float  # Tr(Sigma J), the paper's v
    rank: int  # of H, the Hessian of the expected loss
    covariance: Tensor  # Sigma (m, m), of sqrt(n) (theta_n - theta)
    drift: Tensor | None  # beta (m,), the limit of n (E[theta_n] - theta); None where g vanishes
    slope: Tensor  # g (m,), the gradient of the error at theta


def expand(loss: Loss, label_loss: Loss, theta: Tensor, nodes: Nodes) -> Expansion:
    """The expansion of an estimator that minimises ``loss``, for the error of the labels.

    Both losses are in nats, ``label_loss`` is -log p_theta(c|x), and ``theta`` (m,) minimises the
    expected loss under the truth ``nodes``.
    """
    shares = nodes.shares
    entropy = -torch.xlogy(shares, nodes.posterior).sum()

    def mean_loss(t: Tensor) -> Tensor:
        return (shares * loss(t, nodes.x)).sum()

    def error(t: Tensor) -> Tensor:
        return (shares * label_loss(t, nodes.x)).sum() - entropy

    def gradients(t: Tensor) -> Tensor:
        """Of the loss of every node and class, (N, C, m)."""
        each: Tensor = vmap(lambda x: jacrev(lambda u: loss(u, x[None])[0])(t))(nodes.x)
        return each

    scores = gradients(theta)
    centre = torch.einsum("nc,nci->i", shares, scores)
    spread = torch.einsum("nc,nci,ncj->ij", shares, scores, scores) - torch.outer(centre, centre)
    hessian = _second_derivative(mean_loss)(theta)
    inverse: Tensor = torch.linalg.pinv(
        0.5 * (hessian + hessian.mT), rtol=RANK_TOLERANCE, hermitian=True
    )
    covariance = inverse @ spread @ inverse
    steps = scores @ inverse

    def curvature(t: Tensor) -> Tensor:
        return (_second_derivative(mean_loss)(t) * covariance).sum()

    def mixed(t: Tensor) -> Tensor:
        return (shares[..., None] * gradients(t) * steps).sum()

    slope = grad(error)(theta)
    flat = bool(slope.norm() < FLAT_SLOPE)
    drift = None if flat else inverse @ (grad(mixed)(theta) - 0.5 * grad(curvature)(theta))
    formula = float((covariance * _second_derivative(error)(theta)).sum())
    return Expansion(
        theta=theta,
        bias=float(error(theta)),
        variance=formula if drift is None else formula + 2 * float(slope @ drift),
        formula=formula,
        rank=int(torch.linalg.matrix_rank(hessian, rtol=RANK_TOLERANCE, hermitian=True)),
        covariance=covariance,
        drift=drift,
        slope=slope,
    )


def generative(family: Family, nodes: Nodes) -> Expansion:
    """The expansion of the maximum of the joint likelihood, in closed form up to quadrature."""
    theta = family.parameters(family.fit(moments(nodes.x, nodes.shares)))
    return expand(lambda t, x: -family.log_joint(t, x), _label_loss(family), theta, nodes)


def discriminative(family: Family, nodes: Nodes) -> Expansion:
    """The expansion of the maximum of the conditional likelihood, found by Newton's method.

    Raises:
        UserError: if it is not found: the classes of this truth hardly overlap.
    """
    found = softmax_regression(family.features(nodes.x)[None], nodes.shares[None])
    if not found.solved:
        raise UserError(
            "softmax regression on this truth does not converge; give classes that overlap more"
        )
    theta = family.parameters(family.member(found.weights[0]))
    loss = _label_loss(family)
    return expand(loss, loss, theta, nodes)


def _label_loss(family: Family) -> Loss:
    return lambda t, x: -family.log_joint(t, x).log_softmax(1)


def _second_derivative(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Reverse over reverse: torch scripts the rules of forward mode, which is deprecated."""
    second: Callable[[Tensor], Tensor] = jacrev(grad(function))
    return second


class Regression(NamedTuple):
    """Weights of softmax regression; the last class has weights 0."""

    weights: Tensor  # (B, P, C)
    solved: Tensor  # (B,) bool


def softmax_regression(features: Tensor, shares: Tensor, start: Tensor | None = None) -> Regression:
    r"""Softmax regression on many training sets at once, by Newton's method.

    With weights relative to the last class the loss is strictly convex, so Newton's direction is
    unique. Its full step is taken where it decreases the loss enough (Armijo's rule), else the step
    :math:`t = \log(1 + r) / r`, with r the largest change of a difference of logits over the
    samples of a set: since the third derivative of the loss along a direction is at most r times
    the second (Bach, Electronic Journal of Statistics 4, 2010), this t always decreases the loss.

    Where the classes of a training set are separable, or one of them is from the rest, weights go
    to infinity: there is no maximum of likelihood. Such a set is reported as unsolved, and is known
    by r, which does not fall, or by a second derivative that has vanished in some direction. No
    library solves many sets at once: scikit-learn's `LogisticRegression` takes one, and warns
    where there is no maximum.

    Args:
        features: (B, n, P).
        shares: (B, n, C), the weight of each sample in each class, with sum 1 in each set: one-hot
            labels over n, or the probabilities of nodes and classes.
        start: (P, C) weights to begin at; 0 by default.
    """
    count, size, classes = len(features), features.shape[2], shares.shape[2] - 1
    rows = features.mT.contiguous()  # (B, P, n)
    mass = shares.sum(2)  # (B, n)
    target = (features.mT @ shares)[:, :, :-1]  # (B, P, C-1)
    weights = features.new_zeros(count, size, classes + 1)
    if start is not None:
        weights += start - start[:, -1:]
    solved = torch.zeros(count, dtype=torch.bool, device=features.device)
    active = torch.arange(count, device=features.device)
    for _ in range(STEPS):
        now = weights[active, :, :-1]
        logits = now.mT @ rows
        probability = _probabilities(logits)
        gradient = (probability * mass[:, None]) @ rows.mT - target.mT  # (b, C-1, P)
        hessian = _hessian(rows, probability, mass)
        ridge = 1e-14 * hessian.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
        hessian = hessian + ridge * torch.eye(hessian.shape[1]).to(hessian)
        step = torch.linalg.solve_ex(hessian, gradient.flatten(1))[0].reshape(gradient.shape)
        change = step @ rows  # (b, C-1, n)
        widest = change.amax(1).clamp(min=0) - change.amin(1).clamp(max=0)
        reach = widest.amax(1)
        done = reach < TOLERANCE
        slope = (gradient * step).sum((1, 2))
        gain = ((_normaliser(logits) - _normaliser(logits - change)) * mass).sum(1)
        gain = gain - (target.mT * step).sum((1, 2))
        damping = torch.where(done | (gain > 0.25 * slope), 1.0, torch.log1p(reach) / reach)
        weights[active, :, :-1] = now - (damping[:, None, None] * step).mT
        if done.any():
            solved[active[done]] = _curved(hessian[done], rows[done], mass[done])
        go = ~done & reach.isfinite()
        if not go.any():
            break
        if not go.all():
            active, rows, mass, target = active[go], rows[go], mass[go], target[go]
    return Regression(weights, solved)


def _probabilities(logits: Tensor) -> Tensor:
    """p(c|x) of all classes but the last, whose logit is 0: (b, C-1, n) to the same."""
    if logits.shape[1] == 1:
        return logits.sigmoid()
    top = logits.amax(1, keepdim=True).clamp(min=0)
    grown = (logits - top).exp()
    return grown / (grown.sum(1, keepdim=True) + (-top).exp())


def _normaliser(logits: Tensor) -> Tensor:
    """log of the sum over classes, (b, C-1, n) to (b, n)."""
    if logits.shape[1] == 1:
        return torch.nn.functional.softplus(logits[:, 0])
    top = logits.amax(1).clamp(min=0)
    return ((logits - top[:, None]).exp().sum(1) + (-top).exp()).log() + top


def _curved(hessian: Tensor, rows: Tensor, mass: Tensor) -> Tensor:
    """(b,) whether the second derivative is away from zero in every direction."""
    size = (rows.square() @ mass[..., None])[..., 0].sqrt()  # (b, P)
    size = size.repeat(1, hessian.shape[1] // size.shape[1])
    scaled = hessian / (size[:, :, None] * size[:, None])
    smallest: Tensor = torch.linalg.eigvalsh(scaled)[:, 0]
    return smallest > FLAT_CURVATURE


def _hessian(rows: Tensor, probability: Tensor, mass: Tensor) -> Tensor:
    """The second derivative of the mean cross-entropy, (b, (C-1) P, (C-1) P)."""
    product = probability[:, :, None] * probability[:, None]  # (b, C-1, C-1, n)
    spread = rearrange(torch.diag_embed(probability.mT), "b n k l -> b k l n") - product
    blocks = torch.einsum("bpn,bkln,bqn->bkplq", rows, spread * mass[:, None, None], rows)
    return rearrange(blocks, "b k p l q -> b (k p) (l q)")


class Point(NamedTuple):
    """Mean excess error of an estimator at one size of training set."""

    n: int  # samples per training set
    sets: int  # training sets drawn
    without: int  # of them, those where the estimator does not exist, excluded from the mean
    excess: float  # mean of E[KL], nats; nan if no set has a fit
    error: float  # its standard error, nats


class Fitted(NamedTuple):
    """A least-squares estimate and its standard error."""

    value: float
    error: float


class ExcessError:
    """E[KL(p(c|x) || p_theta(c|x))] of many models, in nats.

    ``step`` and ``radius`` are those of `Truth.nodes`; the defaults err by less than 1e-7 nats.
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
        if self._project:  # linear logits of two classes to those with the same law in `plane`
            slope = weights[..., 0] - weights[..., 1]  # (B, 1 + d)
            slope = torch.cat([slope[:, :2], slope[:, 2:].norm(dim=1, keepdim=True)], 1)
            weights = torch.stack([slope, torch.zeros_like(slope)], -1)
        contrasts = weights[:, :, :-1] - weights[:, :, -1:]
        logits = contrasts.mT @ self._rows  # (B, C-1, N)
        normaliser = _normaliser(logits) @ self._weights
        return normaliser - (contrasts * self._target[:, :-1]).sum((1, 2)) - self._entropy


def measure(setting: Setting, n: int, sets: int, start: Tensor, seed: int = 0) -> list[Point]:
    """Excess errors of the generative and the discriminative fit, of ``sets`` sets of n samples.

    Newton's method begins at the weights ``start`` (P, C), those of the limit. The key of the
    training sets is ``seed`` with the setting's name and n.
    """
    family, truth = setting.family, setting.truth
    error = ExcessError(setting)
    linear = _first_order(setting, error)
    batch = max(1, BATCH // (n * len(start)))
    errors: tuple[list[Tensor], list[Tensor]] = ([], [])
    for number, first in enumerate(range(0, sets, batch)):
        rng = np.random.default_rng([seed, zlib.crc32(setting.name.encode()), n, number])
        count = min(batch, sets - first)
        x, labels = truth.training_sets(rng, (count, n))
        shares = torch.nn.functional.one_hot(labels, truth.num_classes).double() / n
        sums = moments(x, shares)
        model = family.fit(sums)
        usable = _exists(model)
        model = Gaussians(*(part[usable] for part in model))
        errors[0].append(error(family.weights(model)) - linear(sums)[usable])
        found = softmax_regression(family.features(x), shares, start)
        errors[1].append(error(found.weights[found.solved]))
    return [_point(n, sets, torch.cat(own)) for own in errors]


def _first_order(setting: Setting, error: ExcessError) -> Callable[[Moments], Tensor]:
    """The generative error to first order in the moments of a training set, about the truth's.

    (B,) nats, with mean zero over training sets.
    """
    family, nodes = setting.family, setting.truth.nodes()
    centre = moments(nodes.x, nodes.shares)

    def at(*sums: Tensor) -> Tensor:
        total: Tensor = error(family.weights(family.fit(Moments(*sums)))[None]).sum()
        return total

    slopes: tuple[Tensor, ...] = grad(at, argnums=(0, 1, 2))(*centre)

    def first_order(sums: Moments) -> Tensor:
        total = torch.zeros(len(sums.mass), dtype=sums.mass.dtype)
        for slope, own, mean in zip(slopes, sums, centre, strict=True):
            total = total + (slope * (own - mean)).flatten(1).sum(1)
        return total

    return first_order


def _exists(model: Gaussians) -> Tensor:
    """(B,) whether every class has samples and every covariance is positive definite."""
    finite = model.log_prior.isfinite().all(-1) & model.means.flatten(1).isfinite().all(-1)
    covariances = torch.where(finite[:, None, None, None], model.covariances, 0.0)
    failed: Tensor = torch.linalg.cholesky_ex(covariances)[1]
    return finite & (failed == 0).all(-1)


def _point(n: int, sets: int, errors: Tensor) -> Point:
    count = len(errors)
    mean = float(errors.mean()) if count else math.nan
    error = float(errors.std()) / math.sqrt(count) if count > 1 else math.nan
    return Point(n, sets, sets - count, mean, error)


def fit_variance(points: Sequence[Point], bias: float) -> Fitted:
    """v from 2 n (excess - bias) = v + w / n, at two sizes or more; ``bias`` is the computed b."""
    n, excess, error = _columns(points)
    return _constant_term(n, 2 * n * (excess - bias), 2 * n * error, 1)


def fit_bias(points: Sequence[Point]) -> Fitted:
    """b from excess = b + v / 2n + w / n^2, at three sizes or more."""
    n, excess, error = _columns(points)
    return _constant_term(n, excess, error, 2)


def _columns(points: Sequence[Point]) -> tuple[NDArray[np.float64], ...]:
    """n, mean errors, and their standard errors from the pooled spread of 2 n times the error."""
    table = np.array([(p.n, p.sets - p.without, p.excess, p.error) for p in points], np.float64)
    n, sets, excess, error = table.T
    pooled = np.sqrt(np.mean((2 * n * error) ** 2 * sets))
    return n, excess, pooled / np.sqrt(sets) / (2 * n)


def _constant_term(
    n: NDArray[np.float64], values: NDArray[np.float64], errors: NDArray[np.float64], degree: int
) -> Fitted:
    """That of a polynomial in 1 / n, fitted to values with known, independent errors."""
    found, covariance = np.polyfit(1 / n, values, degree, w=1 / errors, cov="unscaled")
    return Fitted(float(found[-1]), math.sqrt(covariance[-1, -1]))
