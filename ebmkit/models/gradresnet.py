r"""GradResNet: a residual network whose gradient is a good denoiser (CDN section 3.2, figure 2).

A classifier maps an image to features; the gradient of a scalar function of the features is an
image again. The forward pass and this backward pass form a UNet, with the forward pass as encoder
and the backward pass as decoder. Four changes to ResNet make the decoder a good denoiser:

- GELU instead of ReLU, so that the gradient is smooth;
- one group normalisation at the end of each block instead of a batch normalisation after each
  convolution;
- no biases, so that the denoiser generalises over noise levels;
- *side connections*: average-pooled outputs of stages 1-3 are concatenated with that of stage 4,
  :math:`f = [A_1 \bar h_1, A_2 \bar h_2, A_3 \bar h_3, \bar h_4]`. In the gradient they are the
  skip connections of the UNet.

A block is :math:`\operatorname{norm}(\operatorname{gelu}(P x + C_2 \operatorname{gelu}(C_1 x)))`,
where P is the identity or, if the shape changes, a 1x1 convolution followed by a norm.

With the option ``noise_embedding`` sigma is an input: the norm of each block is followed by a scale
and a shift that depend on sigma (`ebmkit.models.noise_embedding`).

**Scale.** The output of the norms does not depend on the scale of their input, so that of the
network hardly depends on the scale of y, and its score is nearly orthogonal to y. But at a large
sigma, p is nearly the Gaussian :math:`N(m, (\sigma^2 + s^2) I)`, whose score points from y to the
mean m: a blind network, or a noise-conditional one on y itself, cannot represent it. In a
`ebmkit.models.PreconditionedModel` the Gaussian is a term of its own, and the network only adds the
difference of log p from it, as a function of :math:`u = (y - m)/\sqrt{\sigma^2 + s^2}`, whose
entries are of order one at every sigma. At a large sigma this difference vanishes.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ebmkit.compute import to_weights, upcast, without_autocast
from ebmkit.models.base import BackboneConfig, Features, mean_over_windows
from ebmkit.models.convolution import Conv2d
from ebmkit.models.layers import GELU, NormName, make_norm
from ebmkit.models.noise_embedding import NoiseEmbedding, scale_shift
from ebmkit.models.recompute import recompute

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": GELU, "relu": nn.ReLU}


class GradResNetConfig(BackboneConfig):
    """Configuration of a GradResNet, including the paper's ablations (table 3)."""

    kind: Literal["gradresnet"] = "gradresnet"
    PRESETS: ClassVar = {
        "gradresnet18": ("the paper's network for 32x32 images", {"depth": 18}),
        "gradresnet10": (
            "the same with one block per stage: twice the steps for the same FLOPs",
            {"depth": 10},
        ),
        "gradresnet18-sigma": (
            "the paper's network with sigma as an input, for preconditioned models",
            {"depth": 18, "noise_embedding": 64},
        ),
        "gradresnet34": ("the same, deeper (3-4-6-3 blocks)", {"depth": 34}),
        "gradresnet18-imagenet": (
            "the paper's network for 224x224 images: 7x7 stem of stride 2, no max-pool",
            {"depth": 18, "stem_kernel": 7, "strides": (2, 1, 2, 2, 2)},
        ),
    }
    depth: Literal[10, 18, 34] = Field(
        18, description="depth: 10 (1-1-1-1 blocks), 18 (2-2-2-2) or 34 (3-4-6-3)"
    )
    width: int = Field(
        64, ge=1, description="channels of stage 1; stages 2 to 4 have 2, 4, 8 times as many"
    )
    stem_kernel: Literal[3, 5, 7] = Field(3, description="kernel size of the first convolution")
    strides: tuple[int, int, int, int, int] = Field(
        (1, 1, 2, 2, 2), description="strides of the stem and the stages; ImageNet: 2,1,2,2,2"
    )
    activation: Literal["gelu", "relu"] = Field(
        "gelu", description="activation; relu is an ablation of the paper"
    )
    norm: NormName = Field(
        "group",
        description="norm: group (the paper), scale (scale-keeping), batch (ablation of the "
        "paper), none",
    )
    norm_everywhere: bool = Field(
        False, description="put a norm after every convolution, as in ResNet"
    )
    shortcut_norm: bool = Field(
        True, description="put a norm after the 1x1 convolution of shortcuts"
    )
    channels_per_group: int = Field(8, ge=1, description="channels per group of the group norm")
    bias: bool = Field(
        False, description="biases in convolutions and norms; an ablation of the paper"
    )
    side_connections: bool = Field(
        True,
        description="side connections: features of all stages are pooled, not only of the last",
    )
    noise_embedding: int = Field(
        0,
        ge=0,
        description="width of an embedding of log sigma, for a scale and a shift after the norm "
        "of each block; 0: blind to sigma",
    )

    @model_validator(mode="after")
    def _check(self) -> GradResNetConfig:
        if any(stride not in (1, 2, 4) for stride in self.strides):
            raise ValueError(f"strides {self.strides} must each be 1, 2 or 4")
        grouped = self.norm in ("group", "scale")
        if grouped and self.width % self.channels_per_group:
            raise ValueError(
                f"width {self.width} is no multiple of channels_per_group "
                f"{self.channels_per_group}: choose a multiple, or set "
                "model.backbone.channels_per_group"
            )
        if self.side_connections and self.width % 2:
            raise ValueError(f"width {self.width} must be even for the side connections")
        if self.noise_embedding and (self.norm_everywhere or not grouped):
            raise ValueError(
                f"noise_embedding {self.noise_embedding} needs a group norm at the end of each "
                "block: leave norm at group or scale, and norm_everywhere at false"
            )
        return self

    @property
    def noise_conditional(self) -> bool:
        """Whether sigma is an input of the network."""
        return self.noise_embedding > 0

    def build(self, in_channels: int) -> GradResNet:
        return GradResNet(in_channels, self)


class Block(nn.Module):
    """Two convolutions and a shortcut, activation, norm: (B, C, H, W) -> (B, C', H/s, W/s)."""

    def __init__(self, channels: int, out: int, stride: int, config: GradResNetConfig) -> None:
        super().__init__()

        def norm(present: bool = True) -> nn.Module:
            name = config.norm if present else "none"
            return make_norm(name, out, config.channels_per_group, config.bias)

        self.conv1 = Conv2d(channels, out, 3, stride, 1, bias=config.bias)
        self.norm1 = norm(config.norm_everywhere)
        self.conv2 = Conv2d(out, out, 3, 1, 1, bias=config.bias)
        self.norm2 = norm(config.norm_everywhere)
        self.activation = ACTIVATIONS[config.activation]()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            project = Conv2d(channels, out, 1, stride, bias=config.bias)
            self.shortcut = nn.Sequential(project, norm(config.shortcut_norm))
        self.norm = norm(not config.norm_everywhere)
        if config.noise_embedding:
            self.modulation = scale_shift(config.noise_embedding, out)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        residual = self.norm2(self.conv2(self.activation(self.norm1(self.conv1(x)))))
        h = self.activation(self.shortcut(x) + residual)
        out: Tensor = (
            self.norm(h) if embedding is None else self.norm(h, self.modulation(embedding))
        )
        return out


class GradResNet(nn.Module):
    """The paper's backbone. K = 11.5 * width features with side connections, else 8 * width.

    Args:
        in_channels: 1 for gray, 3 for colour.
        config: configuration; see the fields of `GradResNetConfig`.

    Attributes:
        noise_conditional: whether `forward` needs sigma.
        recompute: whether to use activation checkpointing in training mode, with one tensor kept
            per block (`ebmkit.models.recompute`).
    """

    def __init__(self, in_channels: int, config: GradResNetConfig | None = None) -> None:
        super().__init__()
        self.recompute = False
        config = config or GradResNetConfig()
        blocks = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}[config.depth]
        widths = [config.width * 2**i for i in range(4)]
        self.in_channels = in_channels
        kernel, stride = config.stem_kernel, config.strides[0]
        self.stem = Conv2d(in_channels, config.width, kernel, stride, kernel // 2, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]()
        self.stages = nn.ModuleList()
        channels = config.width
        for width, count, stride in zip(widths, blocks, config.strides[1:], strict=True):
            layers = [Block(channels, width, stride, config)]
            layers += [Block(width, width, 1, config) for _ in range(count - 1)]
            self.stages.append(nn.Sequential(*layers))
            channels = width
        self.side = nn.ModuleList()
        if config.side_connections:
            self.side.extend(nn.Linear(w, w // 2, bias=config.bias) for w in widths[:3])
        self.num_features = widths[3] + sum(w // 2 for w in widths[:3] if config.side_connections)
        self.noise_conditional = config.noise_conditional
        if config.noise_embedding:
            self.embedding = NoiseEmbedding(config.noise_embedding)

    def forward(self, y: Tensor, sigma: Tensor | None = None) -> Features:
        """Features of images ``y`` (B, C, H, W), H and W of any size from 1.

        ``sigma`` (B,), image units, is ignored by the blind network; None: images are clean.
        """
        inputs: tuple[Tensor, ...] = ()
        if self.noise_conditional:
            inputs = (self.embedding(y.new_zeros(len(y)) if sigma is None else sigma),)
        h = self.activation(self.stem(y))
        maps = []
        for stage in self.stages:
            assert isinstance(stage, nn.Sequential)
            for block in stage:
                again = self.recompute and self.training
                h = recompute(block, h, *inputs) if again else block(h, *inputs)
            maps.append(h)
        used = tuple(maps) if self.side else (h,)
        return Features(self.pool(used, (1, 1)).squeeze(1), used)

    def pool(self, maps: tuple[Tensor, ...], grid: tuple[int, int]) -> Tensor:
        """Features of each window of ``grid`` (rows, columns): (B, rows * columns, K), float32."""
        pooled = []
        with without_autocast(maps[0]):
            for i, h in enumerate(maps):
                mean = mean_over_windows(h, grid)
                if i < len(maps) - 1:
                    mean = upcast(self.side[i](to_weights(mean, self)))
                pooled.append(mean)
            return torch.cat(pooled, dim=2)
