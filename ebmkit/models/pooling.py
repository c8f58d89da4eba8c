r"""The mean over positions, with a gradient laid out in memory as its input is.

.. math:: f = \frac{1}{HW} \sum_{ij} h_{ij}, \qquad
    \frac{\partial f}{\partial h_{ij}}^{\!\top} g = \frac{g}{HW} .

PyTorch spreads g in its default layout. Where maps lie channels last, everything the score computes
behind it then mixes the two layouts, which on a CPU costs some percent of a score-matching step
(``benchmarks/layout.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["mean_over_positions"]


def mean_over_positions(h: Tensor) -> Tensor:
    """Mean of maps ``h`` (B, C, H, W) over H and W: (B, C); differentiable to any order."""
    if torch.compiler.is_compiling():  # a compiler chooses layouts itself
        return h.mean(dim=(2, 3))
    out: Tensor = _Mean.apply(h)  # type: ignore[no-untyped-call]
    return out


class _Mean(torch.autograd.Function):
    """(B, C, H, W) to (B, C)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor) -> Tensor:
        return h.mean(dim=(2, 3))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        (h,) = inputs
        last = h.is_contiguous(memory_format=torch.channels_last) and not h.is_contiguous()
        ctx.shape, ctx.last = h.shape, last

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        out: Tensor = _Spread.apply(g, ctx.shape, ctx.last)  # type: ignore[no-untyped-call]
        return out


class _Spread(torch.autograd.Function):
    """(B, C) to (B, C, H, W), each entry shared out evenly; the transpose of `_Mean`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, shape: torch.Size, last: bool) -> Tensor:
        even = (g / (shape[2] * shape[3]))[:, :, None, None].expand(shape)
        layout = torch.channels_last if last else torch.contiguous_format
        return even.contiguous(memory_format=layout)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return mean_over_positions(v), None, None
