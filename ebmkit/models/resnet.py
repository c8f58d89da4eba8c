r"""ResNet (He et al., arXiv 1512.03385), the paper's baseline classifier.

With a basic block :math:`B(x) = \operatorname{relu}(P x + N C_2 \operatorname{relu}(N C_1 x))`, N a
batch normalisation and P the identity or a 1x1 convolution followed by N,

=========  ======================================  ======================================
stem       imagenet (as published)                 cifar (CDN section 4.1, for 32x32)
=========  ======================================  ======================================
first      7x7 convolution of stride 2             3x3 convolution of stride 1
pooling    3x3 max-pool of stride 2                none
stages     strides 1, 2, 2, 2; widths w to 8w      the same
=========  ======================================  ======================================

The features are the spatial means of the last stage. The blocks are torchvision's.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from ebmkit.models.base import BackboneConfig, Features, MeanPooled
from ebmkit.models.convolution import Conv2d

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


class ResNetConfig(BackboneConfig):
    """Configuration of a ResNet."""

    kind: Literal["resnet"] = "resnet"
    PRESETS: ClassVar = {
        "resnet18": (
            "classifier (He et al. 2016) adapted to 32x32 images: 3x3 stem, no max-pool",
            {"depth": 18, "stem": "cifar"},
        ),
        "resnet18-imagenet": (
            "classifier (He et al. 2016) for 224x224 images",
            {"depth": 18, "stem": "imagenet"},
        ),
        "resnet50": (
            "classifier (He et al. 2016), 50 layers, adapted to 32x32 images like resnet18",
            {"depth": 50, "stem": "cifar"},
        ),
        "resnet50-imagenet": (
            "classifier (He et al. 2016) for 224x224 images",
            {"depth": 50, "stem": "imagenet"},
        ),
    }
    depth: Literal[18, 34, 50] = Field(
        18, description="depth: 18 (2-2-2-2 blocks), 34 (3-4-6-3) or 50 (3-4-6-3 bottleneck blocks)"
    )
    width: int = Field(
        64, ge=1, description="channels of stage 1; stages 2 to 4 have 2, 4, 8 times as many"
    )
    stem: Literal["cifar", "imagenet"] = Field(
        "cifar",
        description="first layers: cifar (3x3, stride 1) or imagenet (7x7, stride 2, and a "
        "max-pool)",
    )

    def build(self, in_channels: int) -> ResNet:
        return ResNet(in_channels, self)


class ResNet(MeanPooled):
    """A ResNet without its classifier; K = 8 * width features (32 * width at depth 50).

    Parameter names are those of torchvision, so its published weights (without ``fc``) fit at width
    64 with ``stem="imagenet"``.
    """

    def __init__(self, in_channels: int, config: ResNetConfig | None = None) -> None:
        from torchvision.models.resnet import BasicBlock, Bottleneck

        super().__init__()
        config = config or ResNetConfig()
        block = Bottleneck if config.depth == 50 else BasicBlock
        kernel, stride = (7, 2) if config.stem == "imagenet" else (3, 1)
        self.conv1 = Conv2d(in_channels, config.width, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(config.width)
        self.relu = nn.ReLU(inplace=True)
        pooled = config.stem == "imagenet"
        self.maxpool = nn.MaxPool2d(3, 2, 1) if pooled else nn.Identity()
        channels, stages = config.width, []
        for stage, count in enumerate(BLOCKS[config.depth]):
            width = config.width * 2**stage
            layers = []
            for first in [True] + [False] * (count - 1):
                stride = 2 if first and stage else 1
                shortcut = None
                if stride != 1 or channels != width * block.expansion:
                    shortcut = nn.Sequential(
                        Conv2d(channels, width * block.expansion, 1, stride, bias=False),
                        nn.BatchNorm2d(width * block.expansion),
                    )
                layers.append(block(channels, width, stride, shortcut))
                channels = width * block.expansion
            stages.append(nn.Sequential(*layers))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.num_features = channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, y: Tensor) -> Features:
        """Features of images ``y`` (B, C, H, W), H and W of any size from 1."""
        h = self.maxpool(self.relu(self.bn1(self.conv1(y))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            h = stage(h)
        return self.features(h)
