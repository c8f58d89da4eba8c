r"""Denoisers that step down the gradient of a potential: energy models that the paper argues with.

With a scalar potential :math:`g_\sigma`, :math:`D(y, \sigma) = y - \nabla g_\sigma(y)`. Tweedie's
formula (CDN eq. 6) makes it an energy model,

.. math:: \log p_\sigma(y) = -\,\frac{g_\sigma(y)}{\sigma^2} - \log Z .

Training differentiates D, so g must be smooth. Two potentials:

**GS-DRUNet** (Hurault et al., arXiv 2110.03220): half the squared residual of a denoising network,

.. math:: g_\sigma(y) = \tfrac12 \|y - N(y, \sigma)\|^2, \quad
    D = N + J_N^\top (y - N), \quad N \text{ a DRUNet with ELU and two blocks per scale.}

**GraDnCNN** (Cohen et al., "It has potential", NeurIPS 2021): a convolutional network of one output
channel, blind to sigma, into whose every layer the image is fed,

.. math:: z_1 = a(C_0\,y), \quad z_{l+1} = a(A_l z_l + C_l\,y), \quad
    g(y) = \textstyle\sum_{ij} (A_L z_L + C_L\,y)_{ij} .

We know of no code of its authors. The layers are those of the code released with arXiv 2505.04820,
which says that it works on their model: six layers between, 128 channels, a = ELU. It averages over
positions. Ours sums, so that D does not change with the size of the image around a pixel, and
log-densities grow with the number of pixels; at one size the two differ by a constant factor.

A blind potential does not need sigma to denoise: it cancels. From :math:`\|\sigma \nabla \log p\|^2
\approx d` the noise level that D implies is :math:`\hat\sigma = \|y - D(y)\| / \sqrt d`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from ebmkit.compute import subsample_before_1x1, upcast, without_autocast
from ebmkit.energy import Energies, EnergyModel, Noise, per_image
from ebmkit.errors import UserError
from ebmkit.models.base import DenoiserConfig, check_images
from ebmkit.models.convolution import Conv2d
from ebmkit.models.denoisers import implied_sigma
from ebmkit.models.drunet import DRUNetShape
from ebmkit.registry import Preset

SMOOTH: dict[str, type[nn.Module]] = {"elu": nn.ELU, "softplus": nn.Softplus}


class GradientStep(EnergyModel):
    """log p(y) = -g(y, sigma) / sigma^2 of a potential g, so that D = y - grad g; without labels.

    Args:
        potential: noisy images (B, C, H, W) and sigma, None or a float or (B,), to g (B,), in
            squared image units.
        noise_conditional: whether the potential needs sigma.
        in_channels: channels C that images must have; None does not check.
    """

    def __init__(
        self, potential: nn.Module, noise_conditional: bool, in_channels: int | None = None
    ) -> None:
        super().__init__()
        self.potential = potential
        subsample_before_1x1(self)
        self.noise_conditional = noise_conditional
        self.ignores_sigma = not noise_conditional
        self.in_channels = in_channels

    def forward(self, y: Tensor, sigma: Noise | None = None) -> Energies:
        """Energies of noisy images ``y`` (B, C, H, W) at ``sigma``; no logits, (B, 0).

        Raises:
            UserError: if ``y`` is no batch of images or has other channels, or sigma is not given.
        """
        check_images(y, self.in_channels)
        if sigma is None:
            raise UserError(
                "this model's log-density is -g(y) / sigma^2 and needs the noise level: give sigma"
            )
        g: Tensor = self.potential(y, sigma)
        variance = sigma.to(g) ** 2 if isinstance(sigma, Tensor) else sigma**2
        return Energies(g.new_zeros(len(y), 0), -g / variance)

    def _score(self, y: Tensor, sigma: Noise | None, c: Tensor | None) -> Tensor:
        if sigma is not None:
            return super()._score(y, sigma, c)
        self._check_blind()
        step = self._step(y)
        return step / per_image(implied_sigma(step), y) ** 2

    def denoise_blind(
        self,
        y: Tensor,
        c: Tensor | int | None = None,
        sigma_range: tuple[float, float] | None = None,
    ) -> tuple[Tensor, Tensor]:
        self._check_blind()
        self._labels(c, y)
        step = self._step(y)
        sigma = implied_sigma(step)
        return y + step, sigma if sigma_range is None else sigma.clamp(*sigma_range)

    def estimate_sigma(self, y: Tensor) -> Tensor:
        return self.denoise_blind(y)[1]

    def _step(self, y: Tensor) -> Tensor:
        """-grad g of a blind potential: the score at any noise level, times its square."""
        return super()._score(y, 1.0, None)


class HalfSquaredResidual(nn.Module):
    """g(y, sigma) = 1/2 ||y - N(y, sigma)||^2 of a network N from images to images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, y: Tensor, sigma: Noise | None = None) -> Tensor:
        """g of each of the images ``y`` (B, C, H, W): (B,)."""
        residual = y - self.network(y, sigma)
        with without_autocast(y):
            return 0.5 * upcast(residual).square().flatten(1).sum(dim=1)


class ScalarConvNet(nn.Module):
    """GraDnCNN's g: convolutions into each of which the image is fed, summed over positions.

    Args:
        in_channels: 1 for gray, 3 for colour.
        config: the shape.
    """

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
        self.activation = SMOOTH[config.activation]()

    def forward(self, y: Tensor, sigma: Noise | None = None) -> Tensor:
        """g of each of the images ``y`` (B, C, H, W): (B,); ``sigma`` is ignored."""
        z = self.activation(self.first(y))
        for onward, fed in zip(self.onward, self.fed, strict=True):
            z = self.activation(onward(z) + fed(y))
        map_ = self.last(z) + self.last_fed(y)
        with without_autocast(y):
            return upcast(map_).flatten(1).sum(dim=1)


class GSDRUNetConfig(DRUNetShape):
    """Shape of a GS-DRUNet."""

    kind: Literal["gs-drunet"] = "gs-drunet"
    blocks: int = Field(
        2, ge=1, description="residual blocks per scale, on the way down and on the way up"
    )
    activation: Literal["elu", "softplus"] = Field(
        "elu",
        description="elu (as published) or softplus; smooth, because training differentiates twice",
    )

    @classmethod
    def presets(cls) -> dict[str, Preset[GSDRUNetConfig]]:
        """The published network, and its blind form."""
        return {
            "gs-drunet": Preset(
                cls(), "Hurault et al. 2022: y - grad |y - DRUNet(y)|^2 / 2, an energy model"
            ),
            "gs-drunet-blind": Preset(cls(noise_map=False), "the same without the noise map"),
        }

    def build_model(self, in_channels: int, num_classes: int = 0) -> GradientStep:
        potential = HalfSquaredResidual(self.build(in_channels))
        return GradientStep(potential, self.noise_map, in_channels)


class GraDnCNNConfig(DenoiserConfig):
    """Shape of a GraDnCNN."""

    kind: Literal["gradncnn"] = "gradncnn"
    layers: int = Field(6, ge=1, description="number of layers between the first and the last")
    width: int = Field(128, ge=1, description="hidden channels")
    activation: Literal["elu", "softplus"] = Field(
        "elu", description="elu or softplus; smooth, because training differentiates twice"
    )
    bias: bool = Field(True, description="biases in the convolutions that take the image")

    @classmethod
    def presets(cls) -> dict[str, Preset[GraDnCNNConfig]]:
        """The network of the released code."""
        return {
            "gradncnn": Preset(
                cls(width=128),
                "Cohen et al. 2021: y - gradient of a scalar network, an energy model",
            )
        }

    def build_model(self, in_channels: int, num_classes: int = 0) -> GradientStep:
        return GradientStep(ScalarConvNet(in_channels, self), False, in_channels)
