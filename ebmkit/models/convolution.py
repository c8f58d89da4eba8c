r"""A convolution whose gradient is fast to differentiate.

With images x, weights w and a cotangent g of the output, a convolution has the trilinear form

.. math:: L(x, w, g) = \langle g,\; w * x \rangle .

Its derivatives with respect to the three arguments are the convolution
:math:`F(x, w) = \partial_g L`, its input gradient :math:`I(g, w) = \partial_x L` and its weight
gradient :math:`W(g, x) = \partial_w L`. L is linear in each argument, so the derivatives of each of
the three are the other two. A score consists of F and I, and score matching differentiates it: with
the cotangent v of I,

.. math:: \partial_g \langle v, I(g, w)\rangle = F(v, w), \qquad
    \partial_w \langle v, I(g, w)\rangle = W(g, v) .

PyTorch has kernels for F, I and W, but in the derivative of I it computes W(g, v) as a convolution
whose kernel is the whole image. `Conv2d` uses the kernel of W at every order. The derivative of a
loss of the score by w has a second term, through F: :math:`W(g', x)` with the cotangent g' of the
output. It is a call of its own; both batches are not stacked in one call.

A `torch.autograd.Function` does not know which of its gradients are needed, so a score would also
compute the gradients of the weights. Each weight therefore enters through a graph node of its own,
with value 0 and derivative W, which the engine visits only if that weight's gradient is needed.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ebmkit.compute import compiler_is_prepared, opaque_to_compilers

SMALL = 3e7
"""Number of multiplications on a CPU below which PyTorch's own derivatives are faster than a call
into Python."""


@dataclass(frozen=True)
class _Options:
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def output_shape(self, x: Tensor, weight: Tensor) -> tuple[int, ...]:
        """Shape of F(x, w)."""
        window = (x.shape[2:], weight.shape[2:], self.stride, self.padding, self.dilation)
        sizes = (
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in zip(*window, strict=True)
        )
        return (x.shape[0], weight.shape[0], *sizes)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """F, by PyTorch's kernel."""
        return torch.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def gradient(self, by: int, x: Tensor, weight: Tensor, g: Tensor) -> Tensor:
        """I or W, by PyTorch's kernels."""
        layout = (self.stride, self.padding, self.dilation, False, [0, 0], self.groups)
        mask = [by == X, by == W, False]
        found = torch.ops.aten.convolution_backward.default(g, x, weight, None, *layout, mask)
        gradient: Tensor = found[by]
        return gradient


X, W, G = range(3)
"""Arguments of L; `_derivative` differentiates L with respect to one of them."""


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` with an input gradient that is faster to differentiate by the weights.

    Parameters, values and derivatives of every order are those of the base class. In your own
    `torch.compile` the base class is used, unless `ebmkit.compute.prepare_compiler` was called
    before; `ebmkit.optimize` and training call it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x`` (B, C, H, W) or (C, H, W)."""
        if self.padding_mode != "zeros" or isinstance(self.padding, str) or x.ndim != 4:
            return super().forward(x)
        if torch.compiler.is_compiling() and not compiler_is_prepared():
            return super().forward(x)
        out: Tensor = conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )
        return out


@opaque_to_compilers
def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] = (0, 0),
    dilation: tuple[int, ...] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv2d` of a batch; its input gradient is fast to differentiate.

    Args:
        x: (B, C, H, W).
        weight: (C', C / groups, h, w).
        bias: (C',) or None.
        stride: stride of rows and columns.
        padding: number of zeros on each side of rows and columns.
        dilation: spacing of the kernel in rows and columns.
        groups: number of channel groups.
    """
    options = _Options(tuple(stride), tuple(padding), tuple(dilation), groups)
    frozen = isinstance(weight, nn.Parameter) and not weight.requires_grad
    work = x.numel() * weight.numel() // (x.shape[1] * stride[0] * stride[1])
    small = x.device.type == "cpu" and work < SMALL
    if frozen or small or not torch.is_grad_enabled() or in_forward_mode():
        return options.convolve(x, weight, bias)
    kind = x.device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        if x.dtype != torch.float64:  # as in PyTorch
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
    return _derivative(G, x, weight, None, bias, options)


def _derivative(
    by: int, x: Tensor, weight: Tensor, g: Tensor | None, bias: Tensor | None, options: _Options
) -> Tensor:
    """F(x, w) + bias (``g`` None), I(g, w) or W(g, x); uses only the shape of argument ``by``."""
    if not torch.is_grad_enabled():
        if g is None:
            return options.convolve(x, weight, bias)
        return options.gradient(by, x, weight, g)
    links = []
    if by != W:
        factor = x if by == G else g
        shape = options.output_shape(x, weight) if by == G else x.shape
        links.append(_WeightLink.apply(weight, (factor,), shape, options, by))
        if bias is not None:
            links.append(bias[:, None, None].expand(shape))
    out: Tensor = _Convolution.apply(by, options, x, weight, g, bias, *links)
    return out


_PROBE = torch.empty(0)


def in_forward_mode() -> bool:
    """Whether forward-mode AD is active, as in `torch.func.jvp`: layers with custom second
    derivatives then use PyTorch's own."""
    primal: Tensor = forward_ad.unpack_dual(_PROBE).primal  # type: ignore[no-untyped-call]
    return primal is not _PROBE


_POSITIONAL = inspect.Signature([inspect.Parameter("inputs", inspect.Parameter.VAR_POSITIONAL)])


def positional(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """Make `apply` skip the binding of arguments, which takes as long as a small convolution."""
    function.forward.__signature__ = _POSITIONAL  # type: ignore[attr-defined]
    return function


@positional
class _Convolution(torch.autograd.Function):
    """`_derivative`; the gradients of weights and bias flow through ``links``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        by: int,
        options: _Options,
        x: Tensor,
        weight: Tensor,
        g: Tensor | None,
        bias: Tensor | None,
        *links: Tensor,
    ) -> Tensor:
        if g is None:
            return options.convolve(x, weight, bias)
        return options.gradient(by, x, weight, g)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.by, ctx.options, x, weight, g, _, *links = inputs
        ctx.links = len(links)
        ctx.save_for_backward(
            None if ctx.by == X else x, None if ctx.by == W else weight, g if ctx.by == W else None
        )

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, g = (v if i == ctx.by else t for i, t in enumerate(ctx.saved_tensors))
        of_x = of_g = None
        if ctx.by != G and ctx.needs_input_grad[2 + G]:
            of_g = _derivative(G, x, weight, None, None, ctx.options)
        if ctx.by != X and ctx.needs_input_grad[2 + X]:
            of_x = _derivative(X, x, weight, g, None, ctx.options)
        return (None, None, of_x, None, of_g, None, *(v for _ in range(ctx.links)))


@positional
class _WeightLink(torch.autograd.Function):
    """Zeros in the shape of F(x, w) or I(g, w), with the derivative of that function by w.

    The other factor is passed in a tuple, which autograd does not inspect. So the node is connected
    to the weights only, not to the images.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: Tensor, other: tuple[Tensor], shape: tuple[int, ...], options: _Options, by: int
    ) -> Tensor:
        return other[0].new_zeros(()).expand(shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, (other,), ctx.shape, ctx.options, ctx.by = inputs
        ctx.save_for_backward(weight, other)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        weight, other = ctx.saved_tensors
        x, g = (other, v) if ctx.by == G else (v, other)
        return _derivative(W, x, weight, g, None, ctx.options), None, None, None, None
