r"""Backbones that are told the noise level by one more channel.

A classifier for every step of a diffusion, :math:`p_t(c \mid u_t)` (RCG section 2.3), must bear
noise of any level. In image units y grows with sigma, so the network sees what a diffusion network
sees, the variance-preserving image of :math:`2y - 1`, and a constant map that says the level,

.. math::
    u = \sqrt{\bar\alpha}\,(2y - 1), \qquad \bar\alpha = \frac{1}{1 + (2\sigma)^2}, \qquad
    m = \tfrac14 \log \max(\sigma, \sigma_0) .

:math:`\sigma_0 = 0.005` is the lowest level of the linear schedule, at which clean images are
taken: no others were seen in training. Up to :math:`\sigma = 79`, the highest, m lies between -1.4
and 1.1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ebmkit.energy import per_image
from ebmkit.models.parts import Backbone, Features, WindowedBackbone

__all__ = ["NoiseConditioned"]

LOWEST = 0.005
"""sigma_0, image units."""


class NoiseConditioned(nn.Module):
    """``backbone`` of one more channel than the images have, told sigma by it.

    Args:
        backbone: any, of C + 1 channels.
    """

    noise_conditional = True

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        assert isinstance(backbone, Backbone)
        self.backbone: nn.Module = backbone
        self.num_features = backbone.num_features

    def forward(self, y: Tensor, sigma: Tensor) -> Features:
        """Features of images ``y`` (B, C, H, W) with noise of ``sigma`` (B,), image units."""
        level = sigma.clamp_min(LOWEST)
        root_abar = per_image((1 + (2 * level).square()).rsqrt(), y)
        told = per_image(level.log() / 4, y) * torch.ones_like(y[:, :1])
        features: Features = self.backbone(torch.cat([root_abar * (2 * y - 1), told], dim=1))
        return features

    def pool(self, maps: tuple[Tensor, ...], grid: tuple[int, int]) -> Tensor:
        """Features of each window of ``grid`` (rows, columns): (B, rows * columns, K)."""
        assert isinstance(self.backbone, WindowedBackbone)
        return self.backbone.pool(maps, grid)

    @property
    def recompute(self) -> bool | None:
        """Whether the backbone recomputes its activations; None if it cannot."""
        return getattr(self.backbone, "recompute", None)

    @recompute.setter
    def recompute(self, on: bool) -> None:
        self.backbone.recompute = on  # type: ignore[assignment]
