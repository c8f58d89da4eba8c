r"""A convolution whose gradient is cheap to differentiate.

With images x, weights w and a cotangent g of the output, a convolution has one trilinear form

.. math:: L(x, w, g) = \langle g,\; w * x \rangle ,

whose derivatives by one of the three are the convolution :math:`F(x, w) = \partial_g L`, its input
gradient :math:`I(g, w) = \partial_x L` and its weight gradient :math:`W(g, x) = \partial_w L`. As L
is linear in each, differentiating any of the three gives the other two again. A score is made of
F and I, and score matching differentiates it: with the cotangent v of I,

.. math:: \partial_g \langle v, I(g, w)\rangle = F(v, w), \qquad
    \partial_w \langle v, I(g, w)\rangle = W(g, v) .

PyTorch has kernels for F, I and W, but takes W(g, v) in the derivative of I as a convolution whose
kernel is the whole image. `Conv2d` takes the kernel of W, at every order.

A Python function in PyTorch's graph is not told which of its gradients are wanted, so a score would
pay for the gradients of the weights as well. Each weight therefore enters through a node of its
own, with the value 0 and the derivative W, which the engine does not visit unless the gradient of
that weight is wanted.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Conv2d", "conv2d"]

SMALL = 3e7
"""Multiplications on a CPU up to which PyTorch's own derivatives are taken: calling into Python
takes longer than what would be spared."""


@dataclass(frozen=True)
class _Options:
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """PyTorch's kernel of F."""
        return torch.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d`, whose gradient by the images is cheaper to differentiate by the weights.

    The parameters, the values and the derivatives of every order are those of the base class.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of ``x`` (B, C, H, W) or (C, H, W)."""
        if self.padding_mode != "zeros" or isinstance(self.padding, str) or x.ndim != 4:
            return super().forward(x)
        out: Tensor = conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )
        return out


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] = (0, 0),
    dilation: tuple[int, ...] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv2d` of a batch, differentiated as the module's text says.

    Args:
        x: (B, C, H, W).
        weight: (C', C / groups, h, w).
        bias: (C',) or None.
        stride: of rows and columns, as are the next two.
        padding: zeros on each side.
        dilation: spacing of the kernel.
        groups: of channels.
    """
    options = _Options(tuple(stride), tuple(padding), tuple(dilation), groups)
    frozen = isinstance(weight, nn.Parameter) and not weight.requires_grad
    work = x.numel() * weight.numel() // (x.shape[1] * stride[0] * stride[1])
    small = x.device.type == "cpu" and work < SMALL
    if frozen or small or not torch.is_grad_enabled():
        return options.apply(x, weight, bias)
    kind = x.device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        if x.dtype != torch.float64:  # as PyTorch does
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
    return _convolve(x, weight, bias, options)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, options: _Options) -> Tensor:
    """F(x, w) + bias."""
    if not torch.is_grad_enabled():
        return options.apply(x, weight, bias)
    shape = _output_shape(x, weight, options)
    links = [_WeightLink.apply(weight, (x,), shape, options, False)]
    if bias is not None:
        links.append(bias[:, None, None].expand(shape))
    out: Tensor = _Convolution.apply(x, weight, bias, options, *links)
    return out


def _output_shape(x: Tensor, weight: Tensor, options: _Options) -> tuple[int, ...]:
    window = zip(
        x.shape[2:],
        weight.shape[2:],
        options.stride,
        options.padding,
        options.dilation,
        strict=True,
    )
    sizes = (
        (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, padding, dilation in window
    )
    return (x.shape[0], weight.shape[0], *sizes)


def _input_gradient(gradient: Tensor, weight: Tensor, x: Tensor, options: _Options) -> Tensor:
    """I(g, w), of the shape of ``x``, whose values do not matter."""
    if not torch.is_grad_enabled():
        return _backward(gradient, x, weight, options, of_weight=False)
    link = _WeightLink.apply(weight, (gradient,), x.shape, options, True)
    out: Tensor = _InputGradient.apply(gradient, weight, x, options, link)
    return out


def _weight_gradient(gradient: Tensor, x: Tensor, weight: Tensor, options: _Options) -> Tensor:
    """W(g, x), of the shape of ``weight``, whose values do not matter."""
    if not torch.is_grad_enabled():
        return _backward(gradient, x, weight, options, of_weight=True)
    out: Tensor = _WeightGradient.apply(gradient, x, weight, options)
    return out


def _backward(
    gradient: Tensor, x: Tensor, weight: Tensor, options: _Options, of_weight: bool
) -> Tensor:
    """PyTorch's kernel of I, or of W."""
    found = torch.ops.aten.convolution_backward.default(
        gradient,
        x,
        weight,
        None,
        options.stride,
        options.padding,
        options.dilation,
        False,
        [0] * len(options.stride),
        options.groups,
        [not of_weight, of_weight, False],
    )
    gradients: Tensor = found[int(of_weight)]
    return gradients


_POSITIONAL = inspect.Signature([inspect.Parameter("inputs", inspect.Parameter.VAR_POSITIONAL)])


def positional(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """Spare `apply` the binding of arguments, which takes as long as a small convolution."""
    function.forward.__signature__ = _POSITIONAL  # type: ignore[attr-defined]
    return function


@positional
class _Convolution(torch.autograd.Function):
    """F(x, w) + bias, whose gradients by weights and bias go by the links."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        options: _Options,
        *links: Tensor,
    ) -> Tensor:
        return options.apply(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.options, *links = inputs
        ctx.links = len(links)
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def jvp(
        ctx: Any, x: Tensor | None, weight: Tensor | None, bias: Tensor | None, *_: Any
    ) -> Tensor:
        at_x, at_weight = ctx.saved_tensors
        moved = []
        if x is not None:
            moved.append(_convolve(x, at_weight, None, ctx.options))
        if weight is not None:
            moved.append(_convolve(at_x, weight, None, ctx.options))
        if bias is not None:
            moved.append(bias[:, None, None].expand(_output_shape(at_x, at_weight, ctx.options)))
        return sum(moved[1:], start=moved[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = _input_gradient(gradient, weight, x, ctx.options)
        return (of_x, None, None, None, *(gradient for _ in range(ctx.links)))


@positional
class _InputGradient(torch.autograd.Function):
    """I(g, w), whose gradient by the weights goes by the link."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        gradient: Tensor,
        weight: Tensor,
        x: Tensor,
        options: _Options,
        link: Tensor,
    ) -> Tensor:
        return _backward(gradient, x, weight, options, of_weight=False)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        gradient, weight, x, ctx.options, *_ = inputs
        ctx.save_for_backward(weight)
        ctx.save_for_forward(gradient, weight, x)

    @staticmethod
    def jvp(ctx: Any, gradient: Tensor | None, weight: Tensor | None, *_: Any) -> Tensor:
        at_gradient, at_weight, x = ctx.saved_tensors
        moved = []
        if gradient is not None:
            moved.append(_input_gradient(gradient, at_weight, x, ctx.options))
        if weight is not None:
            moved.append(_input_gradient(at_gradient, weight, x, ctx.options))
        return sum(moved, start=torch.zeros_like(x))

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        of_gradient = None
        if ctx.needs_input_grad[0]:
            of_gradient = _convolve(v, weight, None, ctx.options)
        return (of_gradient, None, None, None, v)


@positional
class _WeightGradient(torch.autograd.Function):
    """W(g, x)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, x: Tensor, weight: Tensor, options: _Options) -> Tensor:
        return _backward(gradient, x, weight, options, of_weight=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        gradient, x, weight, ctx.options = inputs
        ctx.save_for_backward(gradient, x)
        ctx.save_for_forward(gradient, x, weight)

    @staticmethod
    def jvp(ctx: Any, gradient: Tensor | None, x: Tensor | None, *_: Any) -> Tensor:
        at_gradient, at_x, weight = ctx.saved_tensors
        moved = []
        if gradient is not None:
            moved.append(_weight_gradient(gradient, at_x, weight, ctx.options))
        if x is not None:
            moved.append(_weight_gradient(at_gradient, x, weight, ctx.options))
        return sum(moved, start=torch.zeros_like(weight))

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
        gradient, x = ctx.saved_tensors
        of_gradient = of_x = None
        if ctx.needs_input_grad[0]:
            of_gradient = _convolve(x, u, None, ctx.options)
        if ctx.needs_input_grad[1]:
            of_x = _input_gradient(gradient, u, x, ctx.options)
        return of_gradient, of_x, None, None


@positional
class _WeightLink(torch.autograd.Function):
    """0, in the shape of F(x, w) or I(g, w), with their derivative by w.

    The other factor comes within a tuple, which autograd does not look into: so the link leads to
    the weights alone, and is not on the way to the images.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: Tensor, other: tuple[Tensor], shape: tuple[int, ...], options: _Options, of_i: bool
    ) -> Tensor:
        return other[0].new_zeros(()).expand(shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, (other,), ctx.shape, ctx.options, ctx.of_input_gradient = inputs
        ctx.save_for_backward(weight, other)

    @staticmethod
    def jvp(ctx: Any, weight: Tensor, *_: Any) -> Tensor:
        """0: forwards, `_Convolution` and `_InputGradient` see to the weights themselves."""
        return weight.new_zeros(()).expand(ctx.shape)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        weight, other = ctx.saved_tensors
        if ctx.of_input_gradient:
            of_weight = _weight_gradient(other, cotangent, weight, ctx.options)
        else:
            of_weight = _weight_gradient(cotangent, other, weight, ctx.options)
        return of_weight, None, None, None, None
