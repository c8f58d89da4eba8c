r"""DRUNet, a bias-free UNet of residual blocks, and GS-DRUNet, a potential made from it.

**DRUNet** (Zhang et al., arXiv 2008.13751) has head and tail convolutions :math:`C_0, C_1`, four
scales with ``blocks`` residual blocks :math:`x + C\,\operatorname{act}(C\,x)` each, 2x2
convolutions of stride 2 for downsampling, transposed convolutions for upsampling, and additive skip
connections:

.. math::
    x_1 = C_0\,[y, \sigma], \quad x_{i+1} = \operatorname{down}_i(x_i), \quad
    D = C_1\,(x_1 + \operatorname{up}_1(x_2 + \operatorname{up}_2(x_3 + \operatorname{up}_3(x_4 +
    \operatorname{body}(x_4))))) .

Sigma is one more input channel, constant over the image. With ReLU, D is homogeneous in image and
sigma, :math:`D(a y, a\sigma) = a D(y, \sigma)` for a > 0; the blind form, without that channel, is
homogeneous in y.

**GS-DRUNet** (Hurault et al., arXiv 2110.03220) is a `ebmkit.models.denoisers.GradientStep` whose
potential is half the squared residual of a denoising network,

.. math:: g_\sigma(y) = \tfrac12 \|y - N(y, \sigma)\|^2, \quad
    D = N + J_N^\top (y - N), \quad N \text{ a DRUNet with ELU and two blocks per scale.}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ebmkit.compute import to_weights, upcast, without_autocast
from ebmkit.energy import Noise, per_image
from ebmkit.errors import UserError
from ebmkit.models.base import DenoiserConfig, pad_to_multiple
from ebmkit.models.convolution import Conv2d
from ebmkit.models.denoisers import DirectDenoiser, GradientStep, check_published
from ebmkit.noise import require_sigma

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "elu": nn.ELU, "softplus": nn.Softplus}


class DRUNetBaseConfig(DenoiserConfig):
    """Fields of all DRUNet configurations."""

    width: int = Field(
        64, ge=1, description="channels of scale 1; scales 2 to 4 have 2, 4, 8 times as many"
    )
    blocks: int = Field(
        4, ge=1, description="residual blocks per scale, on the way down and on the way up"
    )
    noise_map: bool = Field(
        True, description="sigma as an input channel (as published); false: blind"
    )
    activation: Literal["relu", "elu", "softplus"] = Field(
        "relu", description="relu (as published), elu or softplus (smooth)"
    )

    def build(self, in_channels: int) -> DRUNet:
        """Build the network for images of ``in_channels`` channels."""
        return DRUNet(in_channels, self)


class DRUNetConfig(DRUNetBaseConfig):
    """Configuration of a DRUNet as a plain denoiser."""

    kind: Literal["drunet"] = "drunet"
    PRESETS: ClassVar = {
        "drunet": ("Zhang et al. 2021: UNet of residual blocks, sigma as input", {}),
        "drunet-blind": ("the same without the noise map", {"noise_map": False}),
    }

    def build_model(self, in_channels: int, num_classes: int = 0) -> DirectDenoiser:
        network = self.build(in_channels)
        return DirectDenoiser(network, in_channels, noise_conditional=self.noise_map)


class GSDRUNetConfig(DRUNetBaseConfig):
    """Configuration of a GS-DRUNet."""

    kind: Literal["gs-drunet"] = "gs-drunet"
    PRESETS: ClassVar = {
        "gs-drunet": (
            "Hurault et al. 2022: y - grad |y - DRUNet(y)|^2 / 2, an energy model",
            {},
        ),
        "gs-drunet-blind": ("the same without the noise map", {"noise_map": False}),
    }
    blocks: int = Field(
        2, ge=1, description="residual blocks per scale, on the way down and on the way up"
    )
    activation: Literal["elu", "softplus"] = Field(
        "elu",
        description="elu (as published) or softplus; smooth, because training differentiates twice",
    )

    def build_model(self, in_channels: int, num_classes: int = 0) -> GradientStep:
        potential = HalfSquaredResidual(self.build(in_channels))
        return GradientStep(potential, self.noise_map, in_channels)


class HalfSquaredResidual(nn.Module):
    """Potential g(y, sigma) = 1/2 ||y - N(y, sigma)||^2 of an image-to-image network N."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, y: Tensor, sigma: Noise | None = None) -> Tensor:
        """g of each image in ``y`` (B, C, H, W): (B,)."""
        residual = y - self.network(y, sigma)
        with without_autocast(y):
            return 0.5 * upcast(residual).square().flatten(1).sum(dim=1)


class DRUNetBlock(nn.Module):
    """Residual block x + conv(act(conv(x))); same shape."""

    def __init__(self, channels: int, activation: str) -> None:
        super().__init__()
        self.res = nn.Sequential(
            _conv(channels, channels), ACTIVATIONS[activation](), _conv(channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.res(x)
        return out


class DRUNet(nn.Module):
    """The DRUNet network, from noisy images and noise level to estimates of the clean images.

    Parameter names are those of the released code (cszn/DPIR), so its weights fit.
    """

    def __init__(self, in_channels: int, config: DRUNetBaseConfig | None = None) -> None:
        super().__init__()
        config = config or DRUNetConfig()
        self.noise_map = config.noise_map
        widths = [config.width * 2**i for i in range(4)]

        def blocks(channels: int) -> list[nn.Module]:
            return [DRUNetBlock(channels, config.activation) for _ in range(config.blocks)]

        def down(i: int) -> nn.Sequential:
            stride = Conv2d(widths[i], widths[i + 1], 2, 2, bias=False)
            return nn.Sequential(*blocks(widths[i]), stride)

        def up(i: int) -> nn.Sequential:
            stride = nn.ConvTranspose2d(widths[i + 1], widths[i], 2, 2, bias=False)
            return nn.Sequential(stride, *blocks(widths[i]))

        self.m_head = _conv(in_channels + config.noise_map, widths[0])
        self.m_down1, self.m_down2, self.m_down3 = down(0), down(1), down(2)
        self.m_body = nn.Sequential(*blocks(widths[3]))
        self.m_up3, self.m_up2, self.m_up1 = up(2), up(1), up(0)
        self.m_tail = _conv(widths[0], in_channels)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.orthogonal_(module.weight, gain=0.2)  # as the released training code

    def forward(self, y: Tensor, sigma: Noise | None = None) -> Tensor:
        """Estimates of the clean images, shape of ``y``.

        Args:
            y: noisy images (B, C, H, W) of any size; they are padded to multiples of 8 by
                replication, and the output is cropped.
            sigma: noise level, a float or (B,); the blind form ignores it.

        Raises:
            UserError: if sigma is missing.
        """
        x = y
        if self.noise_map:
            sigma = require_sigma(sigma)
            x = torch.cat([y, per_image(sigma, y) * torch.ones_like(y[:, :1])], dim=1)
        x1 = self.m_head(pad_to_multiple(x, 8))  # halved three times
        x2 = self.m_down1(x1)
        x3 = self.m_down2(x2)
        x4 = self.m_down3(x3)
        h = self.m_up3(self.m_body(x4) + x4)
        h = self.m_up1(self.m_up2(h + x3) + x2) + x1
        with without_autocast(h):  # bfloat16 is too coarse for images
            clean: Tensor = self.m_tail(to_weights(upcast(h), self))
        return clean[..., : y.shape[-2], : y.shape[-1]]


def convert_drunet(state: Mapping[str, Tensor]) -> tuple[DRUNetConfig, int, dict[str, Tensor]]:
    """Convert published DRUNet weights to a configuration and a state dict of `DRUNet`.

    cszn/DPIR, KAIR and deepinv use the same parameter names (``m_head.weight`` ...). Files do not
    contain the activation; ReLU is assumed.

    Args:
        state: parameter names to tensors; a leading ``module.`` (of DataParallel) is removed.

    Returns:
        The configuration, ``in_channels``, and the state dict for ``DRUNet(in_channels, config)``.

    Raises:
        UserError: if a parameter is missing, unknown or of another shape.
    """
    ours = {name.removeprefix("module."): value for name, value in state.items()}
    for name in ("m_head.weight", "m_tail.weight"):
        if name not in ours or ours[name].ndim != 4:
            raise UserError(f"{name!r} is missing from the weights: a published DRUNet has it")
    head, tail = ours["m_head.weight"], ours["m_tail.weight"]
    channels = len(tail)
    config = DRUNetConfig(
        width=len(head),
        blocks=max(1, len({n.split(".")[1] for n in ours if n.startswith("m_body.")})),
        noise_map=head.shape[1] != channels,
    )
    with torch.device("meta"):
        expected = DRUNet(channels, config).state_dict()
    check_published(ours, expected, "DRUNet", channels, config.width)
    return config, channels, ours


def _conv(channels: int, out: int) -> Conv2d:
    return Conv2d(channels, out, 3, padding=1, bias=False)
