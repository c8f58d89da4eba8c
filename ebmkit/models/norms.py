r"""Normalisation layers.

A group normalisation splits the channels of ``x`` (B, C, H, W) into groups g, and with the mean
:math:`m_g` and deviation :math:`s_g` of each group over its channels and positions returns

.. math::
    \text{plain:} \quad w\,\frac{x - m_g}{s_g}, \qquad
    \text{scale-keeping:} \quad w\,(x - m_g)\,\frac{\bar s}{s_g},
    \quad \bar s = \operatorname{mean}_g s_g .

The plain form (Wu & He, 2018; the paper's choice, section 3.2) is homogeneous of degree 0: it
forgets the scale of its input. After a positively homogeneous activation a network made of such
norms does not change with the scale of the image either, so its score is orthogonal to the image.
The scale-keeping form (arXiv 2506.05310) is homogeneous of degree 1. There is no bias, so that the
network stays bias-free (Mohan et al., 2020).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ebmkit.compute import upcast, without_autocast
from ebmkit.models.groupnorm import group_norm

NormName = Literal["group", "scale", "batch", "none"]


class GroupNorm(nn.Module):
    """Group normalisation with a learned weight and, by default, no bias.

    Args:
        num_channels: channels C of the input (B, C, H, W).
        channels_per_group: channels in a group; the paper takes 8. It must divide C.
        keep_scale: multiply the mean deviation over the groups back in (see the module's text).
        bias: add a learned bias (the paper's ablation "biases").
        eps: added to the variances; for images in [0, 1] far below any variance met.

    Attributes:
        plain: whether to take PyTorch's own derivatives, not those of `ebmkit.models.groupnorm`.
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

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` (B, C, H, W); same shape and type, statistics in float32 or better."""
        with without_autocast(x):
            wide = upcast(x)
            norm = nn.functional.group_norm if self.keep_scale or self.plain else group_norm
            y = norm(wide, self.num_groups, self.weight, self.bias, self.eps)
            if self.keep_scale:
                groups = wide.reshape(x.shape[0], self.num_groups, -1)
                deviation = (groups.var(dim=2, unbiased=False) + self.eps).sqrt()
                y = y * deviation.mean(dim=1).reshape(-1, 1, 1, 1)
            return y.to(x.dtype)


def make_norm(name: NormName, num_channels: int, channels_per_group: int, bias: bool) -> nn.Module:
    """Build the norm called ``name`` for ``num_channels`` channels.

    ``group`` is the paper's, ``scale`` keeps the scale, ``batch`` is the paper's ablation (with the
    affine bias only if ``bias``), ``none`` is the identity.
    """
    if name == "none":
        return nn.Identity()
    if name == "batch":
        norm = nn.BatchNorm2d(num_channels)
        if not bias:
            norm.register_parameter("bias", None)
        return norm
    return GroupNorm(num_channels, channels_per_group, keep_scale=name == "scale", bias=bias)
