r"""Denoisers without labels, as models: those that estimate the image, and those of a potential.

A network D trained to minimise :math:`\|D(y) - x\|^2` estimates :math:`E[x \mid y]`, so that by the
identity of Tweedie and Miyasawa (CDN eq. 6)

.. math:: s(y) = \frac{D(y) - y}{\sigma^2}, \qquad
    \|\sigma s(y) + \epsilon\|^2 = \frac{\|D(y) - x\|^2}{\sigma^2} .

Denoising score matching of such a model is the regression that denoisers are always trained by,
each image weighted by :math:`1/\sigma^2`.

A **plain denoiser** (`DirectDenoiser`) is such a network. Its score is the gradient of no
log-density: nothing makes its Jacobian symmetric.

A **gradient-step denoiser** (`GradientStep`), the energy model that the paper argues with, has a
scalar potential :math:`g_\sigma`, smooth because training differentiates D:

.. math:: D(y, \sigma) = y - \nabla g_\sigma(y), \qquad
    \log p_\sigma(y) = -\,\frac{g_\sigma(y)}{\sigma^2} - \log Z .

Neither needs sigma to denoise if its network is blind to it. From :math:`\|\sigma \nabla \log p\|^2
\approx d` the noise level that D implies is :math:`\hat\sigma = \|D - y\| / \sqrt d`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ebmkit.compute import subsample_before_1x1
from ebmkit.energy import Energies, EnergyModel, Noise, ScoreModel, check_sigma, per_image
from ebmkit.errors import UserError
from ebmkit.models.base import check_images


class ImpliedLevelModel(ScoreModel):
    """A model whose denoiser implies the noise level, where it is blind to it."""

    def _configure(self, in_channels: int | None, noise_conditional: bool) -> None:
        """Set what both kinds know of their network, which is in place."""
        subsample_before_1x1(self)
        self.in_channels = in_channels
        self.noise_conditional = noise_conditional
        self.ignores_sigma = not noise_conditional

    @abstractmethod
    def _clean_and_change(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """D(y) of a blind network, and D(y) - y."""

    def denoise_blind(
        self,
        y: Tensor,
        c: Tensor | int | None = None,
        sigma_range: tuple[float, float] | None = None,
    ) -> tuple[Tensor, Tensor]:
        self._check_blind()
        self._labels(c, y)
        clean, change = self._clean_and_change(y)
        sigma = implied_sigma(change)
        return clean, sigma if sigma_range is None else sigma.clamp(*sigma_range)


class DirectDenoiser(ImpliedLevelModel):
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
        self._configure(in_channels, noise_conditional)

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

    def _clean_and_change(self, y: Tensor) -> tuple[Tensor, Tensor]:
        clean = self.denoise(y)
        return clean, clean - y


class GradientStep(ImpliedLevelModel, EnergyModel):
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
        self._configure(in_channels, noise_conditional)

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
        step = self._clean_and_change(y)[1]
        return step / per_image(implied_sigma(step), y) ** 2

    def _clean_and_change(self, y: Tensor) -> tuple[Tensor, Tensor]:
        step = super()._score(y, 1.0, None)  # -grad g: the score at any level, times its square
        return y + step, step


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
