r"""A labelled UNet energy: log-density and class logits from one UNet with sigma as an input.

With a UNet F from images to images and the pooled features f of its coarsest level,

.. math::
    \log p_\sigma(u) = \tfrac12 \langle u, F(u, \sigma) \rangle, \qquad
    \operatorname{logits} = W f, \qquad
    \nabla_u \log p_\sigma(u) = \tfrac12 \bigl( F + J_F^\top u \bigr) .

The log-density is a sum over pixels, so it is extensive: that of two distant parts of an image is
the sum of theirs, and its score does not depend on the size of the image. It takes no constant
factors of the number of pixels, unlike a head on averaged features. F consists of the blocks of a
`ebmkit.models.GradResNet`, whose norms make it nearly independent of the scale of u; the inner
product is then homogeneous of degree 1, so the density does depend on the scale. This is the form
of dual score matching (arXiv 2506.05310) with the joint labels of EGC (arXiv 2304.02012).

With ``frequencies`` K, further input channels are :math:`e^{-(\omega\nu)^2/2} \sin\omega u` and
the same with cosines, :math:`\omega = 2^k\pi` for k < K, as in Kingma et al. (arXiv 2107.00630).
With noise of deviation :math:`\nu = \sigma / \sqrt{\sigma^2 + s^2}` in u, the exponential is the
part of a wave that remains in its mean; without it, high frequencies would be noise at most levels.
With s = `STD` it fits a `ebmkit.models.PreconditionedModel`.

F is 0 at the start. In a `ebmkit.models.PreconditionedModel` the density then begins as a Gaussian
at every sigma.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ebmkit.compute import subsample_before_1x1, to_weights, upcast, without_autocast
from ebmkit.energy import Energies, EnergyModel, Noise, per_image
from ebmkit.models.base import DenoiserConfig, check_images, mean_over_windows
from ebmkit.models.convolution import Conv2d
from ebmkit.models.gradresnet import Block, GradResNetConfig
from ebmkit.models.layers import GELU
from ebmkit.models.noise_embedding import NoiseEmbedding
from ebmkit.models.recompute import recompute

STD = 0.35
"""Standard deviation of images, image units, from which the noise in u is estimated."""


class UNetEnergyConfig(DenoiserConfig):
    """Configuration of a UNet energy."""

    kind: Literal["unet-energy"] = "unet-energy"
    PRESETS: ClassVar = {
        "unet-energy": ("log p = <u, UNet(u)> / 2 with labels, sigma as an input", {}),
    }
    width: int = Field(
        32, ge=1, description="channels of the finest level; each further level has twice as many"
    )
    levels: int = Field(3, ge=1, description="number of levels; each halves the image")
    blocks: int = Field(1, ge=1, description="blocks per level, on the way down and up")
    frequencies: int = Field(
        0,
        ge=0,
        le=12,
        description="number of frequencies 2^k pi of sines and cosines of the pixels, as further "
        "input channels: fine structure of few gray levels",
    )
    noise_embedding: int = Field(64, ge=1, description="width of the embedding of log sigma")
    channels_per_group: int = Field(8, ge=1, description="channels per group of the group norm")

    @model_validator(mode="after")
    def _check(self) -> UNetEnergyConfig:
        if self.width % self.channels_per_group:
            raise ValueError(
                f"width {self.width} is no multiple of channels_per_group "
                f"{self.channels_per_group}: choose a multiple, or set "
                "model.backbone.channels_per_group"
            )
        return self

    @property
    def noise_conditional(self) -> bool:
        """Whether sigma is an input of the network: yes."""
        return True

    def of_blocks(self) -> GradResNetConfig:
        """Configuration of the blocks."""
        own = self.model_dump(include={"width", "noise_embedding", "channels_per_group"})
        return GradResNetConfig(**own, side_connections=False)

    def build_model(self, in_channels: int, num_classes: int = 0) -> UNetEnergy:
        return UNetEnergy(in_channels, num_classes, self)


class UNetEnergy(EnergyModel):
    """log p(u, c) from a UNet; noise-conditional.

    Args:
        in_channels: 1 for gray, 3 for colour.
        num_classes: number of labels C; 0: no labels.
        config: configuration; see the fields of `UNetEnergyConfig`.

    Attributes:
        recompute: whether to use activation checkpointing in training mode, with one tensor kept
            per block (`ebmkit.models.recompute`).
    """

    noise_conditional = True

    def __init__(
        self, in_channels: int, num_classes: int = 0, config: UNetEnergyConfig | None = None
    ) -> None:
        super().__init__()
        self.recompute = False
        config = config or UNetEnergyConfig()
        self.in_channels, self.num_classes = in_channels, num_classes
        widths = [config.width * 2**i for i in range(config.levels)]
        of_blocks = config.of_blocks()

        def level(channels: int, out: int, stride: int = 1) -> nn.ModuleList:
            rest = (Block(out, out, 1, of_blocks) for _ in range(config.blocks - 1))
            return nn.ModuleList([Block(channels, out, stride, of_blocks), *rest])

        self.embedding = NoiseEmbedding(config.noise_embedding)
        self.frequencies = config.frequencies
        channels = in_channels * (1 + 2 * config.frequencies)
        self.stem = Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.activation = GELU()
        self.down = nn.ModuleList([level(widths[0], widths[0])])
        self.down.extend(level(w, 2 * w, 2) for w in widths[:-1])
        self.up = nn.ModuleList(level(3 * w, w) for w in reversed(widths[:-1]))
        self.out = Conv2d(widths[0], in_channels, 3, padding=1, bias=False)
        nn.init.zeros_(self.out.weight)
        self.classifier = nn.Linear(widths[-1], num_classes, False) if num_classes else None
        subsample_before_1x1(self)

    def forward(self, y: Tensor, sigma: Noise | None = None) -> Energies:
        """Energies of images ``y`` (B, C, H, W), H and W of any size from 1.

        ``sigma`` is a float or (B,); None: images are clean.

        Raises:
            UserError: if ``y`` is not a batch of images with C channels.
        """
        check_images(y, self.in_channels)
        level = torch.as_tensor(0.0 if sigma is None else sigma, dtype=y.dtype, device=y.device)
        embedding = self.embedding(level.reshape(-1).expand(len(y)))
        h = self.activation(self.stem(to_weights(self._channels(y, level), self)))
        maps = []
        for blocks in self.down:
            h = self._level(blocks, h, embedding)
            maps.append(h)
        pooled = mean_over_windows(maps.pop()).squeeze(1)
        for blocks in self.up:
            skip = maps.pop()
            h = nn.functional.interpolate(h, size=skip.shape[2:], mode="nearest")
            h = self._level(blocks, torch.cat([h, skip], dim=1), embedding)
        image = self.out(h)
        with without_autocast(y):
            log_density = 0.5 * (upcast(y) * upcast(image)).flatten(1).sum(dim=1)
            if self.classifier is None:
                return Energies(pooled.new_zeros(len(y), 0), log_density)
            logits = nn.functional.linear(pooled, upcast(self.classifier.weight))
            return Energies(logits, log_density)

    def _channels(self, y: Tensor, sigma: Tensor) -> Tensor:
        """``y``, and its sines and cosines with the amplitude that noise of level sigma leaves."""
        noise = per_image((1 + (STD / sigma.clamp_min(1e-6)).square()).rsqrt(), y)
        found = [y]
        for k in range(self.frequencies):
            frequency = 2**k * math.pi
            amplitude = (-0.5 * (frequency * noise).square()).exp()
            found += [amplitude * (frequency * y).sin(), amplitude * (frequency * y).cos()]
        return torch.cat(found, dim=1)

    def set_recompute(self, on: bool) -> None:
        """Switch activation checkpointing in training on or off."""
        self.recompute = on

    def _level(self, blocks: nn.Module, h: Tensor, embedding: Tensor) -> Tensor:
        assert isinstance(blocks, nn.ModuleList)
        for block in blocks:
            again = self.recompute and self.training
            h = recompute(block, h, embedding) if again else block(h, embedding)
        return h
