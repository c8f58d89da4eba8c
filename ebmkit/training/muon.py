r"""Muon: momentum whose matrices are orthogonalised (Jordan et al., 2024; Liu et al., 2502.16982).

A weight of shape (R, ...) is a matrix W of R rows and C columns. Its rows are a layer's outputs, or
a transposed convolution's inputs, as its weight is (in, out, h, w). With gradient G,

.. math::
    M \leftarrow \mu M + (1 - \mu) G, \qquad U = \mu M + (1 - \mu) G, \qquad
    W \leftarrow (1 - \eta\lambda) W - 0.2 \sqrt{\max(R, C)}\; \eta\, \operatorname{NS}(U) ,

without Nesterov's momentum :math:`U = M`. NS brings every singular value near 1 by five steps of
:math:`X \leftarrow a X + (b A + c A^2) X,\ A = X X^\top`, from :math:`X = U / \|U\|_F`; the factor
makes the update as large as AdamW's, 0.2 for each entry. Everything else is moved by AdamW.

As :math:`X_{k+1} = P_k X_k` with :math:`P_k = aI + bA_k + cA_k^2`, and
:math:`A_{k+1} = P_k A_k P_k`, a matrix twice as long as wide is multiplied twice instead of ten
times: by its transpose for :math:`A_0`, and by :math:`P_4 \cdots P_0`. This takes float32: in
bfloat16, on CUDA, :math:`A_0` would lose too much, and the products are taken one by one.

Elementwise work is done on all weights as one vector, ordered by shape, so that equal shapes lie
side by side and are multiplied as one batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Muon", "as_matrix", "by_products", "orthogonalize"]

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
EPS = 1e-7


class Muon(torch.optim.Optimizer):
    """Muon for matrices, fused AdamW for the rest; neither moves where ``found_inf`` is set.

    Args:
        matrices: weights of at least two dimensions; the first is the rows.
        rest: groups for AdamW.
        lr: learning rate of the matrices.
        momentum: mu.
        nesterov: whether the gradient is added to the momentum once more.
        weight_decay: lambda, decoupled.
        betas: of AdamW.

    Attributes:
        found_inf: scalar on the device, above 0 to leave parameters and states as they are.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        rest: Sequence[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        own = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov}
        adamw = torch.optim.AdamW(rest, lr=lr, betas=betas, fused=True) if rest else None
        self.adamw, self.found_inf = adamw, torch.zeros(())
        groups = adamw.param_groups if adamw else []
        super().__init__([{"params": [*matrices], **own}, *groups], {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        group, *rest = self.param_groups
        self._move(group)
        if self.adamw is not None:  # a state that was loaded is made of new containers
            self.adamw.param_groups, self.adamw.state = rest, self.state
            self.adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
            self.adamw.step()

    def _move(self, group: dict[str, Any]) -> None:
        weights = sorted((p for p in group["params"] if p.grad is not None), key=as_matrix)
        for p in (p for p in weights if "momentum_buffer" not in self.state[p]):
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        if not weights:
            return
        buffers = [self.state[p]["momentum_buffer"] for p in weights]
        gradients = [p.grad for p in weights]
        w, m, g = (torch.cat([t.flatten() for t in own]) for own in (weights, buffers, gradients))
        mu, lr = group["momentum"], group["lr"]
        momentum = m.lerp(g, 1 - mu)
        update = g.lerp_(momentum, mu) if group["nesterov"] else momentum.clone()
        left = update
        for (rows, columns), same in itertools.groupby(weights, as_matrix):
            count = len(list(same)) * rows * columns
            part, left = left[:count].view(-1, rows, columns), left[count:]
            part.copy_(orthogonalize(part)).mul_(0.2 * max(rows, columns) ** 0.5)
        moved = (w * (1 - lr * group["weight_decay"])).sub_(update, alpha=lr)
        failed = self.found_inf.to(w.device) > 0
        for targets, new, old in ((weights, moved, w), (buffers, momentum, m)):
            parts = torch.split(torch.where(failed, old, new), [t.numel() for t in targets])
            shaped = [part.view(t.shape) for part, t in zip(parts, targets, strict=True)]
            torch._foreach_copy_(targets, shaped)


def orthogonalize(x: Tensor) -> Tensor:
    """Matrices (N, R, C) with the same singular vectors, and singular values of 0.7 to 1.2.

    The smallest, below about a thousandth of the matrix's norm, remain smaller. On CUDA products
    are of bfloat16.
    """
    if x.shape[1] > x.shape[2]:
        return orthogonalize(x.mT).mT
    a, b, c = COEFFICIENTS
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_min(EPS)
    if by_products(x, *x.shape[1:]):
        gram, product = x @ x.mT, torch.empty(0)
        for left in reversed(range(STEPS)):
            factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            factor.diagonal(dim1=1, dim2=2).add_(a)
            product = factor @ product if left < STEPS - 1 else factor
            gram = factor @ gram @ factor if left else gram
        return product @ x
    x = x.bfloat16() if x.is_cuda else x
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def by_products(x: Tensor, small: int, large: int) -> bool:
    """Whether NS multiplies matrices like ``x`` by a product of the five factors."""
    return not x.is_cuda and large >= 2 * small


def as_matrix(weight: Tensor) -> tuple[int, int]:
    """Rows and columns."""
    return weight.shape[0], weight[0].numel()
