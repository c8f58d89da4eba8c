r"""Plain denoisers: networks that estimate the clean image and model no density.

A network D trained to minimise :math:`\|D(y) - x\|^2` estimates :math:`E[x \mid y]`, so that by the
identity of Tweedie and Miyasawa (CDN eq. 6)

.. math:: s(y) = \frac{D(y) - y}{\sigma^2}, \qquad
    \|\sigma s(y) + \epsilon\|^2 = \frac{\|D(y) - x\|^2}{\sigma^2} .

Denoising score matching of such a model is the regression that denoisers are always trained by,
each image weighted by :math:`1/\sigma^2`. The vector field s is the gradient of no log-density:
nothing makes its Jacobian symmetric.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from ebmkit.core import Estimate, Linearization, Noise, ScoreModel
from ebmkit.errors import UserError
from ebmkit.models.parts import check_images
from ebmkit.onednn import subsample_before_1x1

__all__ = ["DirectDenoiser"]


class DirectDenoiser(ScoreModel):
    """A network that denoises directly, as a `ScoreModel`: trained, evaluated and used as such.

    Args:
        network: noisy images (B, C, H, W) and sigma, None or a float or (B,), to estimates of the
            clean ones.
        in_channels: channels C that images must have; None does not check.
        noise_conditional: whether the network needs sigma.
    """

    differentiates = False

    def __init__(
        self, network: nn.Module, in_channels: int | None = None, noise_conditional: bool = False
    ) -> None:
        super().__init__()
        self.network = network
        subsample_before_1x1(self)
        self.in_channels = in_channels
        self.noise_conditional = noise_conditional
        self.denoises_unaided = not noise_conditional

    def forward(self, y: Tensor, sigma: Noise | None = None) -> Tensor:
        """Estimates of the clean images, the shape of ``y``, not clipped.

        Raises:
            UserError: if ``y`` is no batch of images or has other channels, or sigma is needed.
        """
        check_images(y, self.in_channels)
        if sigma is None and self.noise_conditional:
            raise UserError("this model takes the noise level as an input: give sigma")
        clean: Tensor = self.network(y, sigma)
        return clean

    if TYPE_CHECKING:  # what nn.Module does not say of calling it

        def __call__(self, y: Tensor, sigma: Noise | None = None) -> Tensor: ...

    def at(
        self,
        y: Tensor,
        sigma: Noise | None = None,
        differentiate: bool = True,
        recorded: bool = False,
    ) -> Linearization:
        return Estimate(y, self(y, sigma).to(y.dtype), sigma)
