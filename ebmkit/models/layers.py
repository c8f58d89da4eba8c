r"""Normalisation layers; group normalisation and GELU with fast second derivatives.

A group normalisation splits the channels of ``x`` (B, C, H, W) into groups g, and with the mean
:math:`m_g` and standard deviation :math:`s_g` of each group over its channels and positions returns

.. math::
    \text{plain:} \quad w\,\frac{x - m_g}{s_g}, \qquad
    \text{scale-keeping:} \quad w\,(x - m_g)\,\frac{\bar s}{s_g},
    \quad \bar s = \operatorname{mean}_g s_g .

The plain form (Wu & He, 2018; the paper's choice, section 3.2) is homogeneous of degree 0: the
output does not depend on the scale of the input. With positively homogeneous activations, the
output of a network of such norms does not depend on the scale of the image either, so the score is
orthogonal to the image. The scale-keeping form (arXiv 2506.05310) is homogeneous of degree 1. By
default there is no bias, so that the network is bias-free (Mohan et al., 2020).

**Derivatives.** For one image and one group of n entries (the channels of the group at all
positions), let :math:`\mu` be the mean over the group, m and
:math:`s = \sqrt{\operatorname{var} + \epsilon}` mean and standard deviation of x,
:math:`\hat x = (x - m)/s`, and

.. math:: P z = z - \mu(z) - \hat x\,\mu(z \hat x) .

With weight w, cotangent g of the output :math:`w \hat x` and :math:`a = w g`, the gradient by x is
:math:`P a / s`. Its vector-Jacobian products with a cotangent v, by g, by w and by x, are

.. math::
    w\,\frac{P v}{s}, \qquad \sum g\,\frac{P v}{s}, \qquad
    -\frac{1}{s^2}\bigl[\hat x\,\mu(a\, P v) + \mu(v \hat x)\, P a + \mu(a \hat x)\, P v\bigr] ,

where the sum is over images and positions. PyTorch's kernel of the first derivative computes
:math:`Pv/s` and, if each channel of each image is passed as a separate channel, the sums over
positions as well. If a graph of the first derivative is needed, PyTorch itself uses a chain of
elementwise operations and differentiates each.

**GELU.** With the distribution function :math:`\Phi` and the density :math:`\varphi` of a standard
normal variable,

.. math:: y = x\,\Phi(x), \qquad y' = \Phi(x) + x\,\varphi(x), \qquad
    y'' = (2 - x^2)\,\varphi(x) .

PyTorch has a kernel of :math:`g\,y'`, but computes :math:`v\,g\,y''` by a chain of elementwise
operations; this module uses fewer. Third derivatives of both layers use ordinary operations.

The closed forms of norm and GELU are separate, each several PyTorch operations, not one kernel.
They are used on a CPU for tensors with more than `SMALL` entries, and not in compiled code.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ebmkit.compute import upcast, without_autocast
from ebmkit.models.convolution import in_forward_mode, positional

NormName = Literal["group", "scale", "batch", "none"]

SMALL = 1 << 17
"""Number of entries up to which PyTorch's own derivatives are faster than a call into Python."""


class GroupNorm(nn.Module):
    """Group normalisation with a learned weight and, by default, no bias.

    Args:
        num_channels: channels C of the input (B, C, H, W).
        channels_per_group: channels per group, 8 in the paper. It must divide C.
        keep_scale: use the scale-keeping form (see the module docstring).
        bias: add a learned bias (the paper's ablation "biases").
        eps: added to the variances; far below those that occur for images in [0, 1].

    Attributes:
        plain: whether to use PyTorch's own derivatives instead of those of `group_norm`.
    """

    plain = False

    def __init__(
        self,
        num_channels: int,
        channels_per_group: int = 8,
        keep_scale: bool = False,
        bias: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if num_channels % channels_per_group:
            raise ValueError(
                f"{num_channels} channels cannot be split into groups of {channels_per_group}"
            )
        self.num_groups = num_channels // channels_per_group
        self.keep_scale = keep_scale
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels)) if bias else None

    def forward(self, x: Tensor, modulation: Tensor | None = None) -> Tensor:
        """Normalise ``x`` (B, C, H, W); same shape and type, statistics in float32 or better.

        ``modulation`` (B, 2C) are scales a and shifts b of each image: the output is
        :math:`(1 + a)\\operatorname{norm}(x) + b`. It has no effect where it is 0.
        """
        with without_autocast(x):
            wide = upcast(x)
            plain = self.keep_scale or self.plain
            weight = upcast(self.weight)
            bias = None if self.bias is None else upcast(self.bias)
            if modulation is None or plain:
                norm = nn.functional.group_norm if plain else group_norm
                y = norm(wide, self.num_groups, weight, bias, self.eps)
            else:  # weights of each image: no more operations on maps than without modulation
                scale, shift = upcast(modulation).chunk(2, dim=1)
                shift = shift if bias is None else shift + bias * (1 + scale)
                y = group_norm(wide, self.num_groups, weight * (1 + scale), shift, self.eps)
            if self.keep_scale:
                groups = wide.reshape(x.shape[0], self.num_groups, -1)
                deviation = (groups.var(dim=2, unbiased=False) + self.eps).sqrt()
                y = y * deviation.mean(dim=1).reshape(-1, 1, 1, 1)
            if modulation is not None and plain:
                scale, shift = upcast(modulation).chunk(2, dim=1)
                y = y * _to_channels(1 + scale) + _to_channels(shift)
            return y.to(x.dtype)


def make_norm(name: NormName, num_channels: int, channels_per_group: int, bias: bool) -> nn.Module:
    """Build the norm called ``name`` for ``num_channels`` channels.

    ``group`` is the paper's norm, ``scale`` the scale-keeping form, ``batch`` the paper's ablation
    (with a bias only if ``bias``), ``none`` the identity.
    """
    if name == "none":
        return nn.Identity()
    if name == "batch":
        norm = nn.BatchNorm2d(num_channels)
        if not bias:
            norm.register_parameter("bias", None)
        return norm
    return GroupNorm(num_channels, channels_per_group, keep_scale=name == "scale", bias=bias)


def _use_custom_derivatives(x: Tensor) -> bool:
    """Whether to use the derivatives of this module for ``x`` instead of PyTorch's own."""
    return (
        not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.numel() > SMALL
        and not in_forward_mode()
    )


def group_norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """`torch.nn.functional.group_norm` of a batch, with a fast second derivative.

    PyTorch's own function is used in compiled code, forward mode and no-grad mode, on devices other
    than a CPU, for small or channels-last inputs, and for frozen weights.

    Args:
        x: (B, C, H, W).
        groups: number of channel groups.
        weight: (C,), or (B, C) for weights of each image.
        bias: same shape, or None.
        eps: added to the variances.
    """
    frozen = isinstance(weight, nn.Parameter) and not weight.requires_grad
    if not _use_custom_derivatives(x) or frozen or not x.is_contiguous():
        if weight.ndim == 1:
            return nn.functional.group_norm(x, groups, weight, bias, eps)
        if x.is_contiguous():  # each channel of each image as a channel of one image
            flat = weight.reshape(-1), None if bias is None else bias.reshape(-1)
            return nn.functional.group_norm(_rows(x), groups * len(x), *flat, eps).reshape(x.shape)
        y = _to_channels(weight) * nn.functional.group_norm(x, groups, eps=eps)
        return y if bias is None else y + _to_channels(bias)
    # one weight per image: autograd computes the sum over images, if it is needed
    weights = weight.expand(x.shape[0], -1)
    biases = None if bias is None else bias.expand(x.shape[0], -1)
    out: Tensor = _GroupNormFunction.apply(x, weights, biases, groups, eps)[0]
    return out


def _rows(x: Tensor) -> Tensor:
    """Reshape (B, C, H, W) to one image of B * C channels."""
    return x.reshape(1, -1, *x.shape[2:])


def _group_norm_backward(
    g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's kernel: P(w g) / s, and per image and channel the sums of g * xhat and of g.

    ``g`` and ``x`` are (1, channels, H, W), ``mean`` and ``rstd`` (1, groups).
    """
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_group_norm_backward.default(
        g, x, mean, rstd, weight, 1, x.shape[1], x.shape[2] * x.shape[3], mean.shape[1], mask
    )
    return found


@positional
class _GroupNormFunction(torch.autograd.Function):
    """Group normalisation: the output, and mean and 1/s of each group, (1, B * groups)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weights: Tensor, biases: Tensor | None, groups: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        bias = None if biases is None else biases.reshape(-1)
        sizes = 1, weights.numel(), x.shape[2] * x.shape[3], groups * x.shape[0]
        out, mean, rstd = torch.native_group_norm(_rows(x), weights.reshape(-1), bias, *sizes, eps)
        return out.reshape(x.shape), mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weights, _, ctx.groups, ctx.eps = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, weights, *output[1:])

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            found = _Gradient.apply(g, *ctx.saved_tensors, ctx.groups, ctx.eps)
        else:
            found = _group_norm_vjp(g, *ctx.saved_tensors)
        of_x, of_weights, of_biases = found
        return of_x, of_weights, (of_biases if ctx.needs_input_grad[2] else None), None, None


@positional
class _Gradient(torch.autograd.Function):
    """P(w g) / s, and per image and channel the sums of g * xhat and of g, (B, C) each."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        g: Tensor, x: Tensor, weights: Tensor, mean: Tensor, rstd: Tensor, groups: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _group_norm_vjp(g, x, weights, mean, rstd)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        g, x, weights, mean, rstd, ctx.groups, ctx.eps = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, x, weights, mean, rstd, output[1], output[2])

    @staticmethod
    def backward(
        ctx: Any, v: Tensor | None, by_weights: Tensor | None, by_biases: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        g, x, weights, *_ = ctx.saved_tensors
        rest = (None, None, None, None)
        of_sums = by_weights is not None or by_biases is not None
        if not torch.is_grad_enabled():
            found: tuple[Tensor | None, ...] = (None, None, None)
            if v is not None:
                found = _group_norm_vjp_backward(v, *ctx.saved_tensors)
            if of_sums:
                own = _sums_vjp(by_weights, by_biases, ctx.groups, ctx.eps, *ctx.saved_tensors)
                of_g, of_x = (
                    a if b is None else a + b for a, b in zip(own, found[:2], strict=True)
                )
                found = of_g, of_x, found[2]
            return *found, *rest
        at = _DifferentiableGroupNorm(x, ctx.groups, ctx.eps)
        of_g, of_x, of_weights = torch.zeros_like(x), torch.zeros_like(x), None
        if v is not None:
            projected = at.project(v)
            of_g = of_g + _to_channels(weights) * projected
            of_x = of_x + at.second(_to_channels(weights) * g, v)
            of_weights = (g * projected).sum((2, 3))
        if by_weights is not None:
            of_g = of_g + _to_channels(by_weights) * at.xhat
            of_x = of_x + at.project(_to_channels(by_weights) * g)
        if by_biases is not None:
            of_g = of_g + _to_channels(by_biases)
        return of_g, of_x, of_weights, *rest


def _group_norm_vjp(
    g: Tensor, x: Tensor, weights: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs of `_Gradient`, without a graph."""
    weight = weights.reshape(-1)
    of_x, *sums = _group_norm_backward(_rows(g), _rows(x), mean, rstd, weight, [True, True, True])
    sum_gx, sum_g = (each.reshape(weights.shape) for each in sums)
    return of_x.reshape(x.shape), sum_gx, sum_g


def _group_norm_vjp_backward(v: Tensor, *saved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """VJP of P(w g) / s with ``v``, by g, x and w, without a graph and in few passes."""
    g, x, weights, mean, rstd, sum_gx, sum_g = saved
    x_rows, g_rows = _rows(x), _rows(g)
    q, sum_vx, _ = _group_norm_backward(_rows(v), x_rows, mean, rstd, None, [True, True, False])
    zero, one = torch.zeros_like(mean), torch.ones_like(rstd)
    sum_gq = _group_norm_backward(g_rows, q, zero, one, None, [False, True, False])[1]

    by_group, by_channel = (mean.shape[1], -1), (weights.numel(), -1)
    n = x.numel() // mean.shape[1]
    w = weights.reshape(by_group)
    m, r = mean.reshape(-1, 1), rstd.reshape(-1, 1)
    mean_vx = sum_vx.reshape(by_group).sum(1, keepdim=True) / n
    sums = torch.stack([each.reshape(by_group) for each in (sum_gx, sum_g, sum_gq)])
    mean_ax, mean_a, mean_aq = ((sums * w).sum(2, keepdim=True) / n).unbind()
    of_q = r * mean_ax
    of_a = r * r * mean_vx
    of_x = r * r * mean_aq - of_a * of_q
    out = q.reshape(by_group) * -of_q
    out.add_(of_a * mean_a + of_x * m)
    out.addcmul_(x.reshape(by_group), of_x, value=-1)
    out = out.reshape(by_channel)
    out.addcmul_(g.reshape(by_channel), (of_a * w).reshape(by_channel), value=-1)
    of_g = q.reshape(by_channel) * weights.reshape(by_channel)
    return of_g.reshape(x.shape), out.reshape(x.shape), sum_gq.reshape(weights.shape)


def _sums_vjp(
    by_weights: Tensor | None, by_biases: Tensor | None, groups: int, eps: float, *saved: Tensor
) -> tuple[Tensor, Tensor]:
    """VJP of the sums of g * xhat and of g, (B, C) each, by g and x, without a graph.

    By g it is a group norm of x with the two cotangents as weights and biases.
    """
    g, x, weights, mean, rstd, *_ = saved
    w, b = (torch.zeros_like(weights) if v is None else v for v in (by_weights, by_biases))
    of_g = _GroupNormFunction.forward(x, w, b, groups, eps)[0]
    rows = _rows(g), _rows(x), mean, rstd, w.reshape(-1)
    return of_g, _group_norm_backward(*rows, [True, False, False])[0].reshape(x.shape)


class _DifferentiableGroupNorm:
    """Derivatives at x (B, C, H, W) in differentiable operations, for third derivatives."""

    def __init__(self, x: Tensor, groups: int, eps: float) -> None:
        self.groups = groups
        centred = x - self.mean(x)
        self.rstd = (self.mean(centred * centred) + eps).rsqrt()
        self.xhat = centred * self.rstd

    def mean(self, z: Tensor) -> Tensor:
        """Mean over each group, (B, C, 1, 1)."""
        mean = z.reshape(z.shape[0], self.groups, -1).mean(2)
        return _to_channels(mean.repeat_interleave(z.shape[1] // self.groups, dim=1))

    def project(self, z: Tensor) -> Tensor:
        """P z / s."""
        return (z - self.mean(z) - self.xhat * self.mean(z * self.xhat)) * self.rstd

    def second(self, a: Tensor, v: Tensor) -> Tensor:
        """The derivative of P(a) / s by x along v; it is symmetric."""
        p, q = self.project(a), self.project(v)
        along_v, along_a = (self.mean(z * self.xhat) * self.rstd for z in (v, a))
        return -(self.xhat * self.mean(a * q) * self.rstd + along_v * p + along_a * q)


def _to_channels(values: Tensor) -> Tensor:
    """Reshape (B, C) to (B, C, 1, 1)."""
    return values[:, :, None, None]


class GELU(nn.GELU):
    """`torch.nn.GELU` with a fast second derivative on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise; any shape."""
        return gelu(x) if self.approximate == "none" else super().forward(x)


def gelu(x: Tensor) -> Tensor:
    """`torch.nn.functional.gelu` with a fast second derivative; PyTorch's own function for small
    inputs, on devices other than a CPU, in compiled code, forward mode and no-grad mode."""
    if not _use_custom_derivatives(x) or x.dtype not in (torch.float32, torch.float64):
        return nn.functional.gelu(x)
    out: Tensor = _Gelu.apply(x, None)
    return out


@positional
class _Gelu(torch.autograd.Function):
    """y, or, given a cotangent g, the gradient g * y'."""

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
