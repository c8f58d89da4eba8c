r"""DnCNN, a convolutional network that estimates the noise, and GraDnCNN, a potential.

**DnCNN** (Zhang et al., arXiv 1608.03981):

.. math:: D(y) = y - C_L\,r_{L-1} \circ \dots \circ r_1(y), \qquad
    r_1 = \operatorname{relu} C_1, \quad r_l = \operatorname{relu} N_l\,C_l ,

with 3x3 convolutions C of 64 channels and batch normalisation N; L = 17 for one noise level, 20 for
blind and colour denoising. Sigma is not an input. ``norm`` and ``bias`` determine the additive
constants of the network:

=======  ======  ==========================================================================
norm     bias    additive constants
=======  ======  ==========================================================================
batch    true    in the first convolution, and mean and bias of the norms (as published)
none     true    in every convolution: a network whose norms are folded into the
                 convolutions, as most published weights are
batch    false   none: the norm divides by the standard deviation and subtracts no mean
none     false   none
=======  ======  ==========================================================================

Without additive constants (Mohan et al., arXiv 1906.05478) the network in evaluation mode is
homogeneous, :math:`D(a y) = a D(y)` for a > 0, and generalises to noise levels beyond the training
range.

**GraDnCNN** (Cohen et al., "It has potential", NeurIPS 2021) is the potential of a
`ebmkit.models.denoisers.GradientStep`: a convolutional network with one output channel, blind to
sigma, with the image as an input of every layer,

.. math:: z_1 = a(C_0\,y), \quad z_{l+1} = a(A_l z_l + C_l\,y), \quad
    g(y) = \textstyle\sum_{ij} (A_L z_L + C_L\,y)_{ij} .

We know of no code by its authors. The layers follow the code released with arXiv 2505.04820, which
states that it uses their model: six inner layers, 128 channels, a = ELU. That code averages over
positions. Ours sums, so that D at a pixel does not depend on the size of the image, and
log-densities grow with the number of pixels; at a fixed size the two differ by a constant factor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ebmkit.compute import upcast, without_autocast
from ebmkit.energy import Noise
from ebmkit.errors import UserError
from ebmkit.models.base import DenoiserConfig
from ebmkit.models.convolution import Conv2d
from ebmkit.models.denoisers import DirectDenoiser, GradientStep, check_published

PUBLISHED_DEPTHS = (17, 20)
NORM_PARTS = ("weight", "bias", "running_mean", "running_var")


class DnCNNConfig(DenoiserConfig):
    """Configuration of a DnCNN."""

    kind: Literal["dncnn"] = "dncnn"
    PRESETS: ClassVar = {
        "dncnn": ("Zhang et al. 2017: 17 layers, residual, blind", {"depth": 17}),
        "dncnn20": ("the same with 20 layers, as for colour", {"depth": 20}),
        "dncnn20-bias-free": (
            "BF-CNN of Mohan et al. 2020: no additive constant",
            {"depth": 20, "bias": False},
        ),
    }
    depth: int = Field(
        17,
        ge=3,
        description="number of convolutions; published: 17, or 20 for blind and colour models",
    )
    width: int = Field(64, ge=1, description="hidden channels")
    norm: Literal["batch", "none"] = Field(
        "batch", description="batch (as published) or none (norms folded into the convolutions)"
    )
    bias: bool = Field(True, description="additive constants; false: bias-free")

    def build(self, in_channels: int) -> DnCNN:
        """Build the network for images of ``in_channels`` channels."""
        return DnCNN(in_channels, self)

    def build_model(self, in_channels: int, num_classes: int = 0) -> DirectDenoiser:
        return DirectDenoiser(self.build(in_channels), in_channels)


class BiasFreeBatchNorm(nn.BatchNorm2d):
    r"""Batch normalisation without additive constants, :math:`w\,x/\sqrt{v + \epsilon}`.

    v is the variance of the channel over the batch; in evaluation mode, its running average (Mohan
    et al., 2020, and their released code). No mean is subtracted and no bias added.

    Args:
        num_channels: channels C of the input (B, C, H, W).
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__(num_channels)
        self.register_parameter("bias", None)  # the running mean stays at 0

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` (B, C, H, W); same shape and type."""
        if not self.training:
            return super().forward(x)
        variance = x.to(self.weight.dtype).var(dim=(0, 2, 3), unbiased=False)
        assert self.running_var is not None
        assert self.momentum is not None
        with torch.no_grad():
            self.running_var.lerp_(variance.detach(), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return x * scale.to(x.dtype)[:, None, None]


class DnCNN(nn.Module):
    """The DnCNN network, from noisy images to estimates of the clean images."""

    def __init__(self, in_channels: int, config: DnCNNConfig | None = None) -> None:
        super().__init__()
        config = config or DnCNNConfig()
        width, folded = config.width, config.bias and config.norm == "none"
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, width, 3, padding=1, bias=config.bias),
            nn.ReLU(inplace=True),
        ]
        for _ in range(config.depth - 2):
            layers.append(nn.Conv2d(width, width, 3, padding=1, bias=folded))
            if config.norm == "batch":
                layers.append(nn.BatchNorm2d(width) if config.bias else BiasFreeBatchNorm(width))
            layers.append(nn.ReLU(inplace=True))
        layers.append(nn.Conv2d(width, in_channels, 3, padding=1, bias=folded))
        self.layers = nn.Sequential(*layers)
        # Kaiming normal weights, and the small norm weights of the released training code
        spread, least = math.sqrt(2 / (9 * width)), 0.025
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                with torch.no_grad():
                    drawn = torch.randn_like(module.weight) * spread
                    module.weight.copy_(drawn.sign() * drawn.abs().clamp_min(least))

    def forward(self, y: Tensor, sigma: Noise | None = None) -> Tensor:
        """Estimates of the clean images of ``y`` (B, C, H, W), same shape; ``sigma`` is ignored."""
        noise: Tensor = self.layers(y)
        return y - noise


def convert_dncnn(
    state: Mapping[str, Tensor], eps: float | None = None
) -> tuple[DnCNNConfig, int, dict[str, Tensor]]:
    """Convert published DnCNN weights to a configuration and a state dict of `DnCNN`.

    Three naming schemes are supported: ``model.0.weight`` ... (KAIR), ``dncnn.0.weight`` ... (the
    training codes of cszn/DnCNN and SaoYan/DnCNN-PyTorch), and ``in_conv.weight``,
    ``conv_list.0.weight`` ..., ``out_conv.weight`` (deepinv, whose network *adds* its last
    convolution: its sign is changed). 17 or 20 convolutions, gray or colour, with or without
    biases. Batch normalisations are folded into the convolutions: the same function in evaluation
    mode.

    Args:
        state: parameter names to tensors; a leading ``module.`` (of DataParallel) is removed.
        eps: epsilon of the batch normalisations, which files do not contain. None: 1e-5 (PyTorch's)
            for ``dncnn`` without a bias in the first convolution, as in SaoYan's code, else 1e-4.

    Returns:
        The configuration, ``in_channels``, and the state dict for ``DnCNN(in_channels, config)``.

    Raises:
        UserError: if a parameter is missing, unknown or of another shape.

    >>> config, channels, weights = convert_dncnn(torch.load("dncnn_25.pth"))  # doctest: +SKIP
    >>> network = DnCNN(channels, config)                                      # doctest: +SKIP
    >>> network.load_state_dict(weights)                                       # doctest: +SKIP
    """
    state = {
        name.removeprefix("module."): value
        for name, value in state.items()
        if not name.endswith("num_batches_tracked")
    }
    first = next(iter(state), "nothing")
    prefix = first.partition(".")[0]
    convs: dict[str, str | None] = {}  # each convolution, and the norm after it
    if prefix in ("model", "dncnn"):
        at, last = 0, max(map(_position, state))
        while at <= last:  # convolution, norm if any, activation
            normed = f"{prefix}.{at + 1}.weight" in state
            convs[f"{prefix}.{at}"] = f"{prefix}.{at + 1}" if normed else None
            at += 3 if normed else 2
    elif prefix in ("in_conv", "conv_list", "out_conv"):
        indices = [_position(name) for name in state if name.startswith("conv_list.")]
        inner = [f"conv_list.{i}" for i in range(1 + max(indices, default=-1))]
        convs = dict.fromkeys(["in_conv", *inner, "out_conv"])
    else:
        raise UserError(
            f"{first!r} is no parameter of a published DnCNN: their names begin with model.0, "
            "dncnn.0 or in_conv"
        )
    names = list(convs)
    name = f"{names[0]}.weight"
    if name not in state:
        raise UserError(f"{name!r} is missing from the weights: a published DnCNN has it")
    if state[name].ndim != 4:
        raise UserError(
            f"{name!r} is {tuple(state[name].shape)} and in a published DnCNN the weight of a "
            "convolution"
        )
    if len(convs) not in PUBLISHED_DEPTHS:
        raise UserError(
            f"these weights have {len(convs)} convolutions, the last {names[-1]!r}, and a "
            "published DnCNN has 17 or 20"
        )
    width, channels = state[name].shape[:2]
    widths = [channels, *[width] * (len(convs) - 1), channels]
    expected = {}
    for (conv, norm), inputs, outputs in zip(convs.items(), widths, widths[1:], strict=False):
        vectors = [f"{norm}.{part}" for part in NORM_PARTS] if norm else []
        vectors += [f"{conv}.bias"] if f"{conv}.bias" in state else []
        expected[f"{conv}.weight"] = torch.empty(outputs, inputs, 3, 3, device="meta")
        expected |= {name: torch.empty(outputs, device="meta") for name in vectors}
    check_published(state, expected, "DnCNN", channels, width)
    if eps is None:
        eps = 1e-5 if prefix == "dncnn" and "dncnn.0.bias" not in state else 1e-4
    ours = {}
    for i, (conv, norm) in enumerate(convs.items()):
        weight = state[f"{conv}.weight"]
        bias = state.get(f"{conv}.bias", weight.new_zeros(len(weight)))
        if norm:
            scale, shift, mean, variance = (state[f"{norm}.{part}"].double() for part in NORM_PARTS)
            fused = fuse_conv_bn_weights(
                weight.double(), bias.double(), mean, variance, eps, scale, shift
            )
            weight, bias = (value.detach().to(weight) for value in fused)
        sign = -1 if conv == "out_conv" else 1
        ours[f"layers.{2 * i}.weight"], ours[f"layers.{2 * i}.bias"] = sign * weight, sign * bias
    return DnCNNConfig(depth=len(convs), width=width, norm="none"), channels, ours


def _position(name: str) -> int:
    """The layer number in a name, such as 5 in ``model.5.weight``; at most three digits."""
    match = re.match(r"\w+\.(\d{1,3})\.", name)
    if match is None:
        raise UserError(f"{name!r} is no parameter of a published DnCNN")
    return int(match[1])


class GraDnCNNConfig(DenoiserConfig):
    """Configuration of a GraDnCNN."""

    kind: Literal["gradncnn"] = "gradncnn"
    PRESETS: ClassVar = {
        "gradncnn": (
            "Cohen et al. 2021: y - gradient of a scalar network, an energy model",
            {"width": 128},
        )
    }
    layers: int = Field(6, ge=1, description="number of layers between the first and the last")
    width: int = Field(128, ge=1, description="hidden channels")
    activation: Literal["elu", "softplus"] = Field(
        "elu", description="elu or softplus; smooth, because training differentiates twice"
    )
    bias: bool = Field(True, description="biases in the convolutions that take the image")

    def build_model(self, in_channels: int, num_classes: int = 0) -> GradientStep:
        return GradientStep(ScalarConvNet(in_channels, self), False, in_channels)


class ScalarConvNet(nn.Module):
    """GraDnCNN's potential g: every layer has the image as an input; summed over positions."""

    def __init__(self, in_channels: int, config: GraDnCNNConfig | None = None) -> None:
        super().__init__()
        config = config or GraDnCNNConfig()
        width = config.width
        self.first = Conv2d(in_channels, width, 3, padding=1, bias=config.bias)
        self.onward = nn.ModuleList(
            Conv2d(width, width, 3, padding=1, bias=False) for _ in range(config.layers)
        )
        self.fed = nn.ModuleList(
            Conv2d(in_channels, width, 3, padding=1, bias=config.bias) for _ in range(config.layers)
        )
        self.last = Conv2d(width, 1, 3, padding=1, bias=False)
        self.last_fed = Conv2d(in_channels, 1, 3, padding=1, bias=False)
        self.activation = nn.ELU() if config.activation == "elu" else nn.Softplus()

    def forward(self, y: Tensor, sigma: Noise | None = None) -> Tensor:
        """g of each image in ``y`` (B, C, H, W): (B,); ``sigma`` is ignored."""
        z = self.activation(self.first(y))
        for onward, fed in zip(self.onward, self.fed, strict=True):
            z = self.activation(onward(z) + fed(y))
        map_ = self.last(z) + self.last_fed(y)
        with without_autocast(y):
            return upcast(map_).flatten(1).sum(dim=1)
