r"""Sharpness-aware minimisation: the gradient from where the loss is larger.

.. math::
    \hat\epsilon = \rho\, \frac{\nabla L(\theta)}{\|\nabla L(\theta)\|}, \qquad
    \theta \leftarrow \theta - \eta\, \nabla L(\theta + \hat\epsilon)

(SAM, Foret et al., arXiv 2010.01412, eq. 2-4), at twice the cost of a step. In the adaptive form
(ASAM, Kwon et al., arXiv 2102.11600, eq. 8) each weight is moved in units of its own size,
:math:`\hat\epsilon = \rho\, \theta^2 \nabla L / \| |\theta| \nabla L \|`. SADA-JEM
(arXiv 2209.07959) trains JEM so, adaptively with rho 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ebmkit.training.config import OptimizerConfig

__all__ = ["Sharpness"]


@dataclass(frozen=True)
class Sharpness:
    """How far uphill, and in which units.

    Attributes:
        rho: length of the move.
        adaptive: whether it is measured in units of each weight's size.
    """

    rho: float
    adaptive: bool = False

    @classmethod
    def of(cls, config: OptimizerConfig) -> Sharpness | None:
        """As ``config`` has it; None where there is none."""
        rho = config.sharpness
        return None if rho is None else cls(rho, config.sharpness_adaptive)

    @contextmanager
    def perturbed(self, module: nn.Module) -> Iterator[None]:
        """Within, the parameters of ``module`` lie uphill along their gradients.

        Afterwards they are what they were, to the bit. Running statistics of BatchNorm do not move.
        """
        moved = [(p, p.grad) for p in module.parameters() if p.grad is not None]
        sizes = [p.detach().abs() if self.adaptive else torch.ones_like(p) for p, _ in moved]
        norm = nn.utils.get_total_norm([s * g for s, (_, g) in zip(sizes, moved, strict=True)])
        scale = self.rho / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        before = [p.detach().clone() for p, _ in moved]
        kinds = nn.modules.batchnorm._BatchNorm
        momenta = [(m, m.momentum) for m in module.modules() if isinstance(m, kinds)]
        with torch.no_grad():
            for (p, gradient), size in zip(moved, sizes, strict=True):
                p.add_(scale * size.square() * gradient)
        for norm_layer, _ in momenta:
            norm_layer.momentum = 0.0
        try:
            yield
        finally:
            for norm_layer, momentum in momenta:
                norm_layer.momentum = momentum
            with torch.no_grad():
                for (p, _), old in zip(moved, before, strict=True):
                    p.copy_(old)
