r"""WideResNet (Zagoruyko & Komodakis, arXiv 1605.07146) and its variant in JEM.

A 3x3 convolution to 16 channels, followed by three groups of (depth - 4) / 6 blocks with widths w,
2w, 4w and strides 1, 2, 2. A block applies norm and activation *before* each convolution. With
:math:`a(x) = \operatorname{act}(\operatorname{norm}(x))` and the shortcut P, the identity or, if
the shape changes, a 1x1 convolution:

===========  =====================================================  ===============================
block        output                                                 stride in
===========  =====================================================  ===============================
wrn          :math:`P\,a(x) + C_2\,a(C_1\,a(x))`; x if P is identity   :math:`C_1`
jem          :math:`P\,x + C_2\,a(C_1\,a(x))`                       :math:`C_2`
===========  =====================================================  ===============================

JEM (arXiv 1912.03263 and its released code) uses the second form without norms, with biases in the
convolutions and a leaky ReLU of slope 0.2: ``norm=none, bias=true, activation=leaky_relu,
block=jem``. The features are the spatial means of the last activation, K = 4 w.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from ebmkit.models.base import BackboneConfig, Features, MeanPooled
from ebmkit.models.convolution import Conv2d
from ebmkit.models.layers import make_norm
from ebmkit.models.recompute import recompute

STEM_CHANNELS = 16
WRN_28_10: dict[str, Any] = {"depth": 28, "width": 160}
JEM: dict[str, Any] = {"norm": "none", "activation": "leaky_relu", "bias": True, "block": "jem"}
"""JEM's variant, as fields of `WideResNetConfig`."""


class WideResNetConfig(BackboneConfig):
    """Configuration of a WideResNet; the defaults are WRN-28-10."""

    kind: Literal["wideresnet"] = "wideresnet"
    PRESETS: ClassVar = {
        "wideresnet28-10": ("classifier (Zagoruyko and Komodakis 2016)", WRN_28_10),
        "wideresnet28-10-jem": ("the variant of JEM: no norm, leaky ReLU, biases", JEM | WRN_28_10),
        "wideresnet10-jem": (
            "the variant of JEM, small enough to train on a CPU",
            JEM | {"depth": 10, "width": 32},
        ),
    }
    depth: int = Field(28, ge=10, description="depth, 6n + 4 with n blocks per group")
    width: int = Field(
        160, ge=1, description="channels of group 1 (16 k); groups 2 and 3 have 2, 4 times as many"
    )
    norm: Literal["batch", "group", "none"] = Field(
        "batch", description="norm: batch (as published), group (8 channels per group), none (JEM)"
    )
    activation: Literal["relu", "leaky_relu"] = Field(
        "relu", description="activation: relu (as published) or leaky_relu of slope 0.2 (JEM)"
    )
    bias: bool = Field(False, description="biases in convolutions (JEM); norms always have biases")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout probability between the convolutions of a block"
    )
    block: Literal["wrn", "jem"] = Field(
        "wrn",
        description="block: wrn (as published) or jem (stride in the second convolution, "
        "shortcut from the block's plain input)",
    )

    @model_validator(mode="after")
    def _check(self) -> WideResNetConfig:
        if (self.depth - 4) % 6:
            raise ValueError(f"depth {self.depth} must be 6n + 4, as in 10, 16, 22, 28, 40")
        if self.norm == "group" and self.width % 8:
            raise ValueError(f"width {self.width} must be a multiple of 8 for norm 'group'")
        return self

    def build(self, in_channels: int) -> WideResNet:
        return WideResNet(in_channels, self)


class WideResNetBlock(nn.Module):
    """Two pre-activated convolutions and a shortcut: (B, C, H, W) -> (B, C', H/s, W/s)."""

    def __init__(self, channels: int, out: int, stride: int, config: WideResNetConfig) -> None:
        super().__init__()
        strides = (1, stride) if config.block == "jem" else (stride, 1)
        self.norm1 = make_norm(config.norm, channels, 8, bias=True)
        self.conv1 = Conv2d(channels, out, 3, strides[0], 1, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.norm2 = make_norm(config.norm, out, 8, bias=True)
        self.conv2 = Conv2d(out, out, 3, strides[1], 1, bias=config.bias)
        self.activation = _activation(config)
        self.shortcut: nn.Module | None = None
        if stride != 1 or channels != out:
            self.shortcut = Conv2d(channels, out, 1, stride, bias=config.bias)
        self.shortcut_activated = config.block == "wrn"

    def forward(self, x: Tensor) -> Tensor:
        active = self.activation(self.norm1(x))
        residual = self.activation(self.norm2(self.dropout(self.conv1(active))))
        short = x
        if self.shortcut is not None:
            short = self.shortcut(active if self.shortcut_activated else x)
        out: Tensor = short + self.conv2(residual)
        return out


class WideResNet(MeanPooled):
    """A WideResNet without its classifier; K = 4 * width features.

    Args:
        in_channels: 1 for gray, 3 for colour.
        config: configuration; see the fields of `WideResNetConfig`.

    Attributes:
        recompute: whether to use activation checkpointing in training mode, with one tensor kept
            per block (`ebmkit.models.recompute`); not with norm ``batch``.
    """

    def __init__(self, in_channels: int, config: WideResNetConfig | None = None) -> None:
        super().__init__()
        self.recompute = False
        config = config or WideResNetConfig()
        self.stem = Conv2d(in_channels, STEM_CHANNELS, 3, 1, 1, bias=config.bias)
        count = (config.depth - 4) // 6
        blocks, channels = [], STEM_CHANNELS
        for width, stride in zip((1, 2, 4), (1, 2, 2), strict=True):
            for i in range(count):
                blocks.append(
                    WideResNetBlock(channels, config.width * width, stride if i == 0 else 1, config)
                )
                channels = config.width * width
        self.blocks = nn.ModuleList(blocks)
        self.norm = make_norm(config.norm, channels, 8, bias=True)
        self.activation = _activation(config)
        self.num_features = channels
        if config.norm != "none":  # without a norm, PyTorch's smaller weights keep sums bounded
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, y: Tensor) -> Features:
        """Features of images ``y`` (B, C, H, W), H and W of any size from 1."""
        h = self.stem(y)
        for block in self.blocks:
            h = recompute(block, h) if self.recompute and self.training else block(h)
        h = self.activation(self.norm(h))
        return self.features(h)


def _activation(config: WideResNetConfig) -> nn.Module:
    return nn.LeakyReLU(0.2) if config.activation == "leaky_relu" else nn.ReLU()
