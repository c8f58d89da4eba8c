r"""GELU, whose gradient is cheap to differentiate.

With the distribution :math:`\Phi` and the density :math:`\varphi` of a standard normal variable,

.. math:: y = x\,\Phi(x), \qquad y' = \Phi(x) + x\,\varphi(x), \qquad
    y'' = (2 - x^2)\,\varphi(x) .

PyTorch has a kernel of :math:`g\,y'`, but writes :math:`v\,g\,y''` as a chain of elementwise
operations; here it is one of fewer. Derivatives of third order are ordinary operations.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ebmkit.models.convolution import positional

SMALL = 1 << 17
"""Entries up to which PyTorch's own derivatives are taken: calling into Python takes longer than
what would be spared."""


class GELU(nn.GELU):
    """`torch.nn.GELU`, differentiated as the module's text says."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise; any shape."""
        return gelu(x) if self.approximate == "none" else super().forward(x)


def gelu(x: Tensor) -> Tensor:
    """`torch.nn.functional.gelu`; PyTorch's own where compiled, and on other devices than a CPU."""
    if (
        torch.compiler.is_compiling()
        or not torch.is_grad_enabled()
        or x.device.type != "cpu"
        or x.numel() <= SMALL
        or x.dtype not in (torch.float32, torch.float64)
    ):
        return nn.functional.gelu(x)
    out: Tensor = _Gelu.apply(x)
    return out


@positional
class _Gelu(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return nn.functional.gelu(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, moved: Tensor) -> Tensor:
        return _slope(moved, *ctx.saved_tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return _slope(g, *ctx.saved_tensors)


def _slope(g: Tensor, x: Tensor) -> Tensor:
    """g * y'."""
    if not torch.is_grad_enabled():
        values: Tensor = torch.ops.aten.gelu_backward.default(g, x)
        return values
    out: Tensor = _Slope.apply(g, x)
    return out


@positional
class _Slope(torch.autograd.Function):
    """g * y'."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.aten.gelu_backward.default(g, x)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, of_g: Tensor | None, of_x: Tensor | None) -> Tensor:
        g, x = ctx.saved_tensors
        moved = torch.zeros_like(x)
        if of_g is not None:
            moved = moved + _slope(of_g, x)
        if of_x is not None:
            moved = moved + _curvature(of_x, g, x)
        return moved

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        g, x = ctx.saved_tensors
        of_g = _slope(v, x) if ctx.needs_input_grad[0] else None
        return of_g, _curvature(v, g, x)


def _curvature(v: Tensor, g: Tensor, x: Tensor) -> Tensor:
    """v * g * y''."""
    squares = x * x
    exponent = torch.add(math.log(2 / math.sqrt(2 * math.pi)), squares, alpha=-0.5)
    if torch.is_grad_enabled():
        density = exponent.exp()
        return (density - 0.5 * squares * density) * g * v
    density = exponent.exp_()
    density.addcmul_(density, squares, value=-0.5)
    return density * g * v
