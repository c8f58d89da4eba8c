r"""The constants of equation (4) for generative and discriminative fits, computed and measured.

For an estimator that minimises the mean of a loss :math:`\ell(\theta, x, c)` over n samples, and
the error :math:`\varepsilon(\theta) = E[KL(p(c|x) \| p_\theta(c|x))]` in nats,

.. math:: E[\varepsilon(\theta_n)] = b + \frac{v}{2n} + o(1/n).

With :math:`H = E[\nabla^2 \ell]`, :math:`S = Cov[\nabla \ell]`, :math:`\Sigma = H^+ S H^+`,
:math:`g = \nabla\varepsilon` and :math:`J = \nabla^2 \varepsilon`, all at the minimiser
:math:`\theta_*` of the expected loss, the paper (equations 20-27) has

.. math:: b = \varepsilon(\theta_*), \qquad v = \operatorname{Tr}(\Sigma J).

Its Taylor expansion omits a term. As :math:`E[\theta_n] - \theta_* = \beta / n + o(1/n)`,

.. math:: v = \operatorname{Tr}(\Sigma J) + 2\, g^\top \beta, \qquad
    \beta = H^+ \bigl( E[\nabla^2\ell\, H^+ \nabla\ell]
        - \tfrac12 \nabla \operatorname{Tr}(H \Sigma) \bigr)

(Cox and Snell, J. R. Stat. Soc. B 30, 1968). The gradient g vanishes for the discriminative
estimator, and for the generative one in a well-specified family. For a generative estimator in a
misspecified family it does not, and :math:`\operatorname{Tr}(\Sigma J)` alone depends on the
parameterisation :math:`\theta`. Both are computed here: ``variance`` is the complete expression,
``formula`` the paper's in the coordinates of the family.

If H is singular, :math:`H^+` is its pseudo-inverse: directions of theta that do not change p(c|x)
do not change the error either.

**Measurement.** For each number n of samples, many training sets are drawn, and both fits are made
on each set: the generative one in closed form, the discriminative one by Newton's method. The error
:math:`\varepsilon(\theta_n)` of each fit is computed by quadrature over the truth, without a test
set, so only the training sets are random.

At every n there is a small probability that a fit does not exist (a class without samples, a
singular covariance, separable classes); its error is infinite, and so is the expectation. Equation
(4) applies to fits that exist. Sets without a fit are counted and excluded from the mean.

**A control variate.** The generative fit is a function of the moments of its training set. The
error to first order in these moments, :math:`\nabla\varepsilon \cdot (M_n - M)`, has mean zero,
exactly and at every n, since moments are averages. Subtracting it does not change the mean, and
removes most of the variance if the family is misspecified.

**Estimates.** With the computed b, v + w / n is fitted to :math:`2n(\bar\varepsilon_n - b)` over
the largest n. Without any computed constant, b + v / 2n + w / n^2 is fitted to
:math:`\bar\varepsilon_n`. The standard deviation of :math:`2n\varepsilon` tends to a constant, so
it is pooled over the sizes, and the weight of a point is its number of training sets: weights from
the deviation of each point would favour low points.
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

RANK_TOLERANCE = 1e-9  # smallest nonzero eigenvalue, relative to the largest
FLAT_SLOPE = 1e-6  # a slope of smaller norm is zero up to quadrature and rounding
FLAT_CURVATURE = 1e-10  # smallest eigenvalue at a maximum, relative to the mean square of features
TOLERANCE = 1e-5  # of r in Newton's method; the last step is full, so the error is about r^2
STEPS = 40
BATCH = 2_000_000  # feature values at once

Loss = Callable[[Tensor, Tensor], Tensor]
"""Function from theta (m,) and x (N, d) to the loss of every x and class, (N, C)."""


class Expansion(NamedTuple):
    """The error of an estimator to first order in 1/n."""

    theta: Tensor  # (m,), the limit of the estimator
    bias: float  # b, nats
    variance: float  # v, with the drift term; nats times samples
    formula: float  # Tr(Sigma J), the paper's v
    rank: int  # of H, the Hessian of the expected loss
    covariance: Tensor  # Sigma (m, m), of sqrt(n) (theta_n - theta)
    drift: Tensor | None  # beta (m,), the limit of n (E[theta_n] - theta); None where g vanishes
    slope: Tensor  # g (m,), the gradient of the error at theta


def expand(loss: Loss, label_loss: Loss, theta: Tensor, nodes: Nodes) -> Expansion:
    """Expand the label error of the estimator that minimises ``loss``, to first order in 1/n.

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
        """Gradients of the loss of every node and class, (N, C, m)."""
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
    """Expansion of the fit of maximum joint likelihood, in closed form up to quadrature."""
    theta = family.parameters(family.fit(moments(nodes.x, nodes.shares)))
    return expand(lambda t, x: -family.log_joint(t, x), _label_loss(family), theta, nodes)


def discriminative(family: Family, nodes: Nodes) -> Expansion:
    """Expansion of the fit of maximum conditional likelihood, found by Newton's method.

    Raises:
        UserError: if Newton's method does not converge, because the classes hardly overlap.
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
    """Hessian by reverse over reverse mode; forward mode uses TorchScript, which is deprecated."""
    second: Callable[[Tensor], Tensor] = jacrev(grad(function))
    return second


class Regression(NamedTuple):
    """Weights of softmax regression; the last class has weights 0."""

    weights: Tensor  # (B, P, C)
    solved: Tensor  # (B,) bool


def softmax_regression(features: Tensor, shares: Tensor, start: Tensor | None = None) -> Regression:
    r"""Softmax regression on many training sets at once, by Newton's method.

    With weights relative to the last class the loss is strictly convex, so Newton's direction is
    unique. The full step is taken if it decreases the loss enough (Armijo's rule), else the step
    :math:`t = \log(1 + r) / r`, with r the largest change of a difference of logits over the
    samples of a set: the third derivative of the loss along a direction is at most r times the
    second (Bach, Electronic Journal of Statistics 4, 2010), so this t always decreases the loss.

    If the classes of a training set are separable, or one class from the rest, weights go to
    infinity and the likelihood has no maximum. Such a set is reported as unsolved; r does not
    decrease, or the Hessian becomes singular. scikit-learn's `LogisticRegression` solves one set at
    a time, and only warns if there is no maximum.

    Args:
        features: features of the samples, (B, n, P).
        shares: weight of each sample in each class, (B, n, C), with sum 1 in each set: one-hot
            labels divided by n, or the probabilities of nodes and classes.
        start: initial weights, (P, C); 0 by default.
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
            solved[active[done]] = _is_positive_definite(hessian[done], rows[done], mass[done])
        go = ~done & reach.isfinite()
        if not go.any():
            break
        if not go.all():
            active, rows, mass, target = active[go], rows[go], mass[go], target[go]
    return Regression(weights, solved)


def _probabilities(logits: Tensor) -> Tensor:
    """p(c|x) of all classes but the last, whose logit is 0; input and output (b, C-1, n)."""
    if logits.shape[1] == 1:
        return logits.sigmoid()
    top = logits.amax(1, keepdim=True).clamp(min=0)
    grown = (logits - top).exp()
    return grown / (grown.sum(1, keepdim=True) + (-top).exp())


def _normaliser(logits: Tensor) -> Tensor:
    """Log-sum-exp over classes, the last with logit 0; (b, C-1, n) to (b, n)."""
    if logits.shape[1] == 1:
        return torch.nn.functional.softplus(logits[:, 0])
    top = logits.amax(1).clamp(min=0)
    return ((logits - top[:, None]).exp().sum(1) + (-top).exp()).log() + top


def _is_positive_definite(hessian: Tensor, rows: Tensor, mass: Tensor) -> Tensor:
    """Whether the Hessian is positive definite up to tolerance, (b,)."""
    size = (rows.square() @ mass[..., None])[..., 0].sqrt()  # (b, P)
    size = size.repeat(1, hessian.shape[1] // size.shape[1])
    scaled = hessian / (size[:, :, None] * size[:, None])
    smallest: Tensor = torch.linalg.eigvalsh(scaled)[:, 0]
    return smallest > FLAT_CURVATURE


def _hessian(rows: Tensor, probability: Tensor, mass: Tensor) -> Tensor:
    """Hessian of the mean cross-entropy, (b, (C-1) P, (C-1) P)."""
    product = probability[:, :, None] * probability[:, None]  # (b, C-1, C-1, n)
    spread = rearrange(torch.diag_embed(probability.mT), "b n k l -> b k l n") - product
    blocks = torch.einsum("bpn,bkln,bqn->bkplq", rows, spread * mass[:, None, None], rows)
    return rearrange(blocks, "b k p l q -> b (k p) (l q)")


class Point(NamedTuple):
    """Mean excess error of an estimator at one size of training set."""

    n: int  # samples per training set
    sets: int  # training sets drawn
    without: int  # of these, sets without a fit, excluded from the mean
    excess: float  # mean of E[KL], nats; nan if no set has a fit
    error: float  # its standard error, nats


class Fitted(NamedTuple):
    """A least-squares estimate and its standard error."""

    value: float
    error: float


class ExcessError:
    """E[KL(p(c|x) || p_theta(c|x))] of many models, in nats.

    ``step`` and ``radius`` are as in `Truth.nodes`; the error of the defaults is below 1e-7 nats.
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
        """Excess errors (B,), in nats, for logit weights (B, P, C)."""
        if self._project:  # logits in `plane` with the same distribution
            slope = weights[..., 0] - weights[..., 1]  # (B, 1 + d)
            slope = torch.cat([slope[:, :2], slope[:, 2:].norm(dim=1, keepdim=True)], 1)
            weights = torch.stack([slope, torch.zeros_like(slope)], -1)
        contrasts = weights[:, :, :-1] - weights[:, :, -1:]
        logits = contrasts.mT @ self._rows  # (B, C-1, N)
        normaliser = _normaliser(logits) @ self._weights
        return normaliser - (contrasts * self._target[:, :-1]).sum((1, 2)) - self._entropy


def measure(setting: Setting, n: int, sets: int, start: Tensor, seed: int = 0) -> list[Point]:
    """Mean excess errors of the generative and the discriminative fit, over ``sets`` training sets.

    Each set has ``n`` samples; its seed depends on ``seed``, the setting's name and n. Newton's
    method starts at ``start`` (P, C), the weights of the limit.
    """
    family, truth = setting.family, setting.truth
    error = ExcessError(setting)
    linear = _first_order(setting, error)
    batch = max(1, BATCH // (n * len(start)))
    errors: tuple[list[Tensor], list[Tensor]] = ([], [])
    for number, first in enumerate(range(0, sets, batch)):
        # CRC-32, since `hash` of a text differs between processes
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
    """First-order term of the generative error in the moments, around those of the truth.

    The function returns (B,) nats, with mean zero over training sets.
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
    """Whether every class has samples and every covariance is positive definite, (B,)."""
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
    """Constant term of a polynomial in 1 / n, fitted to values with known, independent errors."""
    found, covariance = np.polyfit(1 / n, values, degree, w=1 / errors, cov="unscaled")
    return Fitted(float(found[-1]), math.sqrt(covariance[-1, -1]))
