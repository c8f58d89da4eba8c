r"""The constants of equation (4), by automatic differentiation and quadrature.

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
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

from ebmkit.errors import UserError
from ebmkit.experiments.theory.families import Family, moments
from ebmkit.experiments.theory.fits import softmax_regression
from ebmkit.experiments.theory.settings import Nodes

RANK_TOLERANCE = 1e-9  # of eigenvalues, relative to the largest
FLAT = 1e-6  # norm of a slope that is zero but for quadrature and rounding


@dataclass(frozen=True)
class Expansion:
    """The error of an estimator to first order in 1/n.

    Attributes:
        theta: (m,), the limit of the estimator.
        bias: b, nats.
        variance: v, with the drift; nats times samples.
        formula: Tr(Sigma J), the paper's v.
        rank: of H, the Hessian of the expected loss.
        covariance: Sigma (m, m), of sqrt(n) (theta_n - theta).
        drift: beta (m,), the limit of n (E[theta_n] - theta); None where g vanishes and no drift
            is needed.
        slope: g (m,), the gradient of the error at theta.
    """

    theta: Tensor
    bias: float
    variance: float
    formula: float
    rank: int
    covariance: Tensor
    drift: Tensor | None
    slope: Tensor


Loss = Callable[[Tensor, Tensor], Tensor]
"""theta (m,) and x (N, d) to the loss of every x and class, (N, C)."""


def expand(loss: Loss, label_loss: Loss, theta: Tensor, nodes: Nodes) -> Expansion:
    """The expansion of an estimator that minimises ``loss``, for the error of the labels.

    Args:
        loss: what is minimised, in nats.
        label_loss: -log p_theta(c|x), in nats.
        theta: (m,), the minimiser of the expected loss.
        nodes: the truth.
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
    hessian = _hessian(mean_loss)(theta)
    inverse: Tensor = torch.linalg.pinv(
        0.5 * (hessian + hessian.mT), rtol=RANK_TOLERANCE, hermitian=True
    )
    covariance = inverse @ spread @ inverse
    steps = scores @ inverse

    def curvature(t: Tensor) -> Tensor:
        return (_hessian(mean_loss)(t) * covariance).sum()

    def mixed(t: Tensor) -> Tensor:
        return (shares[..., None] * gradients(t) * steps).sum()

    slope = grad(error)(theta)
    flat = bool(slope.norm() < FLAT)
    drift = None if flat else inverse @ (grad(mixed)(theta) - 0.5 * grad(curvature)(theta))
    formula = float((covariance * _hessian(error)(theta)).sum())
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

    def loss(t: Tensor, x: Tensor) -> Tensor:
        return -family.log_joint(t, x)

    return expand(loss, _label_loss(family), theta, nodes)


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
    def label_loss(t: Tensor, x: Tensor) -> Tensor:
        return -family.log_joint(t, x).log_softmax(1)

    return label_loss


def _hessian(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Reverse over reverse: torch scripts the rules of forward mode, which is deprecated."""
    second: Callable[[Tensor], Tensor] = jacrev(grad(function))
    return second
