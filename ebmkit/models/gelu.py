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

from ebmkit.models.convolution import in_forward_mode, positional

SMALL = 1 << 17
"""Entries up to which PyTorch's own derivatives are taken: calling into Python takes longer than
what would be spared."""


class GELU(nn.GELU):
    """`torch.nn.GELU`, differentiated as the module's text says."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise; any shape."""
        return gelu(x) if self.approximate == "none" else super().forward(x)


def gelu(x: Tensor) -> Tensor:
    """`torch.nn.functional.gelu`; PyTorch's own where compiled, on other devices than a CPU, and in
    forward mode."""
    if (
        torch.compiler.is_compiling()
        or not torch.is_grad_enabled()
        or x.device.type != "cpu"
        or x.numel() <= SMALL
        or x.dtype not in (torch.float32, torch.float64)
        or in_forward_mode()
    ):
        return nn.functional.gelu(x)
    out: Tensor = _Gelu.apply(x, None)
    return out


@positional
class _Gelu(torch.autograd.Function):
    """y, or with a cotangent g the gradient g * y'."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, g: Tensor | None) -> Tensor:
        return nn.functional.gelu(x) if g is None else torch.ops.aten.gelu_backward.default(g, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        x, g = ctx.saved_tensors
        if g is None:
            return _slope(v, x), None
        of_g = _slope(v, x) if ctx.needs_input_grad[1] else None
        return _curvature(v, g, x), of_g


def _slope(g: Tensor, x: Tensor) -> Tensor:
    """g * y'."""
    if torch.is_grad_enabled():
        out: Tensor = _Gelu.apply(x, g)
    else:
        out = torch.ops.aten.gelu_backward.default(g, x)
    return out


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
