r"""Softmax regression, by Newton's method on many training sets at once.

With weights relative to the last class the loss is strictly convex, so Newton's direction is
unique. Its full step is taken where it decreases the loss enough (Armijo's rule), else the step
:math:`t = \log(1 + r) / r`, with r the largest change of a difference of logits over the samples of
a set: since the third derivative of the loss along a direction is at most r times the second (Bach,
Electronic Journal of Statistics 4, 2010), this t always decreases the loss.

Where the classes of a training set are separable, or one of them is from the rest, weights go to
infinity: there is no maximum of likelihood. Such a set is reported as unsolved, and is known by r,
which does not fall, or by a second derivative that has vanished in some direction.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Regression", "softmax_regression"]

TOLERANCE = 1e-5  # of r; the last step is full, so the error left is about its square
STEPS = 40
FLAT = 1e-10  # smallest second derivative at a maximum, relative to the mean square of features


class Regression(NamedTuple):
    """Weights of softmax regression; the last class has weights 0."""

    weights: Tensor  # (B, P, C)
    solved: Tensor  # (B,) bool


def softmax_regression(features: Tensor, shares: Tensor, start: Tensor | None = None) -> Regression:
    """Minimise the cross-entropy of each training set.

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
    return smallest > FLAT


def _hessian(rows: Tensor, probability: Tensor, mass: Tensor) -> Tensor:
    """The second derivative of the mean cross-entropy, (b, (C-1) P, (C-1) P)."""
    classes, size = probability.shape[1], rows.shape[1]
    blocks = rows.new_empty(len(rows), classes, size, classes, size)
    for k in range(classes):
        for l in range(k + 1):
            spread = -probability[:, k] * probability[:, l]
            if k == l:
                spread = spread + probability[:, k]
            block = (rows * (spread * mass)[:, None]) @ rows.mT
            blocks[:, k, :, l] = block
            blocks[:, l, :, k] = block
    return blocks.reshape(len(rows), classes * size, classes * size)
