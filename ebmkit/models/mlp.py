r"""Multi-layer perceptron on points or on all patches of an image; blind or noise-conditional.

With the k x k patch :math:`y_{ij}` around each position (zero padding),

.. math::
    h_1 = W_1 y_{ij} + b_1, \qquad
    h_{l+1} = W_{l+1} \operatorname{act}\bigl((1 + \gamma_l) \odot h_l + \beta_l\bigr) + b_{l+1},

and the features are the mean of :math:`h_L` over positions. With k = 1 and images of one pixel
this is a plain perceptron on vectors of channels, used for mixtures in the plane. On images it is a
small network with a receptive field of k pixels, for any image size.

The *blind* form has :math:`\gamma = \beta = 0`. The noise-conditional form computes both by

.. math::
    (\gamma_l, \beta_l) = A_l\,\phi(u), \quad
    \phi(u) = \bigl(1, u, \cos u, \sin u, \dots, \cos F u, \sin F u\bigr), \quad
    u = \tfrac12 \log(\sigma^2 + \sigma_0^2) - \log \sigma_1

with :math:`\sigma_0 = 10^{-3}`, so that u is finite for clean images, and :math:`\sigma_1 = 0.1`.
Trained by denoising score matching over a distribution of sigma, its score is a noise-conditional
score network (Song & Ermon, arXiv 1907.05600) that is the gradient of a log-density.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ebmkit.compute import to_weights, upcast, without_autocast
from ebmkit.models.base import BackboneConfig, Features, MeanPooled

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
}
SIGMA_0, SIGMA_1 = 1e-3, 0.1  # sigma_0 and sigma_1, image units


class MLPConfig(BackboneConfig):
    """Configuration of a multi-layer perceptron."""

    kind: Literal["mlp"] = "mlp"
    PRESETS: ClassVar = {
        "mlp": (
            "perceptron on 7x7 patches (kernel=1: on points), blind to sigma",
            {"kernel": 7, "width": 128},
        ),
        "mlp-sigma": (
            "the same with sigma as an input; with dsm an NCSN (Song & Ermon 2019)",
            {"kernel": 7, "width": 128, "noise_conditional": True},
        ),
    }
    width: int = Field(128, ge=1, description="width of every layer")
    depth: int = Field(3, ge=1, description="number of layers, including the one on patches")
    kernel: int = Field(1, ge=1, description="height and width of the patches, odd; 1 for points")
    activation: Literal["silu", "gelu", "softplus"] = Field(
        "silu", description="silu, gelu or softplus; smooth, because training differentiates scores"
    )
    bias: bool = Field(True, description="biases in the layers")
    noise_conditional: bool = Field(False, description="sigma is an input of the network")
    frequencies: int = Field(
        4, ge=0, le=1000, description="F, the number of Fourier frequencies of log sigma"
    )

    @model_validator(mode="after")
    def _check(self) -> MLPConfig:
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel {self.kernel} must be odd, as in 1, 5, 7")
        return self

    def build(self, in_channels: int) -> MLP:
        return MLP(in_channels, self)


class MLP(MeanPooled):
    """Multi-layer perceptron with K = ``width`` features.

    Args:
        in_channels: channels of images, or dimension of points (B, C, 1, 1).
        config: configuration; see the fields of `MLPConfig`.

    Attributes:
        noise_conditional: whether `forward` needs sigma.
    """

    def __init__(self, in_channels: int, config: MLPConfig | None = None) -> None:
        super().__init__()
        config = config or MLPConfig()
        self.num_features = config.width
        self.noise_conditional = config.noise_conditional
        if config.kernel == 1:
            self.first: nn.Module = nn.Linear(in_channels, config.width, config.bias)
        else:
            pad = config.kernel // 2
            self.first = nn.Conv2d(
                in_channels, config.width, config.kernel, padding=pad, bias=config.bias
            )
        self.patches = config.kernel > 1
        self.onward = nn.ModuleList(
            nn.Linear(config.width, config.width, config.bias) for _ in range(config.depth - 1)
        )
        for layer in (self.first, *self.onward):
            assert isinstance(layer, (nn.Linear, nn.Conv2d))
            nn.init.kaiming_normal_(layer.weight)
        self.activation = ACTIVATIONS[config.activation]()
        self.frequencies = config.frequencies
        self.told: nn.ModuleList | None = None
        if config.noise_conditional:
            numbers = 2 + 2 * config.frequencies
            self.told = nn.ModuleList(
                nn.Linear(numbers, 2 * config.width, bias=False) for _ in self.onward
            )

    def forward(self, y: Tensor, sigma: Tensor | None = None) -> Features:
        """Features of images ``y`` (B, C, H, W) of any size.

        ``sigma`` (B,), image units, is ignored by the blind form; None: images are clean.
        """
        # features last: matrix products, whose higher derivatives are the fastest
        h = self.first(y).movedim(1, -1) if self.patches else self.first(y.movedim(1, -1))
        if self.told is None:
            for layer in self.onward:
                h = layer(self.activation(h))
        else:
            level = self._of_sigma(y.new_zeros(len(y)) if sigma is None else sigma)
            for layer, read in zip(self.onward, self.told, strict=True):
                scale, shift = read(level)[:, None, None].chunk(2, dim=-1)
                h = layer(self.activation((1 + scale) * h + shift))
        return self.features(h.movedim(-1, 1))

    def _of_sigma(self, sigma: Tensor) -> Tensor:
        """phi of noise levels (B,): (B, 2 + 2 F)."""
        with without_autocast(sigma):
            level = upcast(sigma)
            u = 0.5 * (level.square() + SIGMA_0**2).log() - math.log(SIGMA_1)
            waves = u[:, None] * torch.arange(1, self.frequencies + 1, device=u.device).to(u)
            plain = torch.stack([torch.ones_like(u), u], dim=1)
            return to_weights(torch.cat([plain, waves.cos(), waves.sin()], dim=1), self)
