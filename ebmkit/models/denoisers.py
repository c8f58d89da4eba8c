r"""Plain denoisers: networks that estimate the clean image and model no density.

A network D trained to minimise :math:`\|D(y) - x\|^2` estimates :math:`E[x \mid y]`, so that by the
identity of Tweedie and Miyasawa (CDN eq. 6)

.. math:: s(y) = \frac{D(y) - y}{\sigma^2}, \qquad
    \|\sigma s(y) + \epsilon\|^2 = \frac{\|D(y) - x\|^2}{\sigma^2} .

Denoising score matching of such a model is the regression that denoisers are always trained by,
each image weighted by :math:`1/\sigma^2`. The vector field s is the gradient of no log-density:
nothing makes its Jacobian symmetric. The noise level that it implies is
:math:`\hat\sigma = \|D - y\|/\sqrt d`, which stands in where sigma is not given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ebmkit.compute import subsample_before_1x1
from ebmkit.energy import Noise, ScoreModel, check_sigma, per_image
from ebmkit.errors import UserError
from ebmkit.models.base import check_images


class DirectDenoiser(ScoreModel):
    """A network that denoises directly, as a `ScoreModel`: trained, evaluated and used as such.

    Args:
        network: noisy images (B, C, H, W) and sigma, None or a float or (B,), to estimates of the
            clean ones.
        in_channels: channels C that images must have; None does not check.
        noise_conditional: whether the network needs sigma.
    """

    is_energy_based = False

    def __init__(
        self, network: nn.Module, in_channels: int | None = None, noise_conditional: bool = False
    ) -> None:
        super().__init__()
        self.network = network
        subsample_before_1x1(self)
        self.in_channels = in_channels
        self.noise_conditional = noise_conditional
        self.ignores_sigma = not noise_conditional

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

    def _score(self, y: Tensor, sigma: Noise | None, c: Tensor | None) -> Tensor:
        change = self(y, sigma).to(y.dtype) - y
        level = implied_sigma(change) if sigma is None else sigma
        return change / per_image(level, y) ** 2

    def denoise(
        self, y: Tensor, sigma: Noise | None = None, c: Tensor | int | None = None
    ) -> Tensor:
        """The network's estimate of the clean images, shape of y, not clipped.

        Raises:
            UserError: if sigma is needed and not given, or not above 0, or a label is given.
        """
        check_sigma(sigma)
        self._labels(c, y)
        return self(y, sigma).to(y.dtype)

    def denoise_blind(
        self,
        y: Tensor,
        c: Tensor | int | None = None,
        sigma_range: tuple[float, float] | None = None,
    ) -> tuple[Tensor, Tensor]:
        self._check_blind()
        clean = self.denoise(y, None, c)
        sigma = implied_sigma(clean - y)
        return clean, sigma if sigma_range is None else sigma.clamp(*sigma_range)

    def estimate_sigma(self, y: Tensor) -> Tensor:
        return self.denoise_blind(y)[1]


def check_published(
    state: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    network: str,
    channels: int,
    width: int,
) -> None:
    """Check that a published ``state`` has the names and shapes of the ``expected`` one.

    Raises:
        UserError: naming the first parameter that is missing or odd.
    """
    for name, value in expected.items():
        if name not in state:
            raise UserError(f"{name!r} is missing from the weights: a published {network} has it")
        if state[name].shape != value.shape:
            raise UserError(
                f"{name!r} is {tuple(state[name].shape)} and would be {tuple(value.shape)} in a "
                f"{network} of {channels} channel(s) and width {width}"
            )
    for name in state:
        if name not in expected:
            raise UserError(f"{name!r} is no parameter of a published {network}")


def implied_sigma(change: Tensor) -> Tensor:
    """The noise level ||D(y) - y|| / sqrt(d) that a ``change`` D(y) - y (B, ...) implies, (B,)."""
    flat = change.flatten(1)
    norm = torch.linalg.vector_norm(flat, dim=1) / math.sqrt(flat.shape[1])
    level: Tensor = norm.clamp_min(torch.finfo(change.dtype).eps)
    return level
