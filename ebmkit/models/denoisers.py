r"""Denoisers without labels: plain denoisers and gradient-step denoisers.

A network D trained to minimise :math:`\|D(y) - x\|^2` estimates :math:`E[x \mid y]`. By the
Tweedie-Miyasawa identity (CDN eq. 6) its score is

.. math:: s(y) = \frac{D(y) - y}{\sigma^2}, \qquad
    \|\sigma s(y) + \epsilon\|^2 = \frac{\|D(y) - x\|^2}{\sigma^2} .

For such a model, denoising score matching is the usual regression of denoisers, with weight
:math:`1/\sigma^2` for each image.

A **plain denoiser** (`DirectDenoiser`) is such a network. In general its score is not the gradient
of a log-density, because its Jacobian need not be symmetric.

A **gradient-step denoiser** (`GradientStep`), an energy model that the paper discusses, has a
scalar potential :math:`g_\sigma`, smooth because training differentiates D:

.. math:: D(y, \sigma) = y - \nabla g_\sigma(y), \qquad
    \log p_\sigma(y) = -\,\frac{g_\sigma(y)}{\sigma^2} - \log Z .

Both denoise without sigma if their network is blind. In d dimensions
:math:`\|\sigma \nabla \log p\|^2 \approx d`, so D implies the noise level
:math:`\hat\sigma = \|D - y\| / \sqrt d`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ebmkit.blind import calibrated
from ebmkit.compute import subsample_before_1x1, to_weights, upcast
from ebmkit.energy import Energies, EnergyModel, Noise, ScoreModel, per_image
from ebmkit.errors import UserError
from ebmkit.models.base import check_images
from ebmkit.noise import require_sigma


class ImpliedLevelModel(ScoreModel):
    """A model that, if blind, estimates the noise level from its denoiser."""

    def _configure(self, in_channels: int | None, noise_conditional: bool) -> None:
        """Set the attributes that both kinds share, after the network is assigned."""
        subsample_before_1x1(self)
        self.in_channels = in_channels
        self.noise_conditional = noise_conditional
        self.ignores_sigma = not noise_conditional

    @abstractmethod
    def _clean_and_change(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """D(y) and D(y) - y of a blind network."""

    def denoise_blind(
        self,
        y: Tensor,
        c: Tensor | int | None = None,
        sigma_range: tuple[float, float] | None = None,
    ) -> tuple[Tensor, Tensor]:
        self._check_blind()
        y, *_ = self.inputs(y, None, c)
        clean, change = self._clean_and_change(y)
        sigma = calibrated(implied_sigma(change), y, self.card, by_score=False)
        return clean, sigma if sigma_range is None else sigma.clamp(*sigma_range)


class DirectDenoiser(ImpliedLevelModel):
    """A `ScoreModel` from a network that maps noisy images to clean images.

    Args:
        network: maps noisy images (B, C, H, W) and sigma (None, a float or (B,)) to estimates of
            the clean images.
        in_channels: required number of channels C; None: any.
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
        """Estimates of the clean images, shape of ``y``, not clipped.

        Raises:
            UserError: if ``y`` is not a batch of images with C channels, or sigma is missing.
        """
        check_images(y, self.in_channels)
        if self.noise_conditional:
            require_sigma(sigma)
        clean: Tensor = self.network(to_weights(y, self), sigma)
        return clean

    if TYPE_CHECKING:  # nn.Module does not declare the type of its call

        def __call__(self, y: Tensor, sigma: Noise | None = None) -> Tensor: ...

    def _score(self, y: Tensor, sigma: Noise | None, c: Tensor | None) -> Tensor:
        change = self(y, sigma).to(y.dtype) - y
        level = implied_sigma(change) if sigma is None else sigma
        return change / per_image(level, y) ** 2

    def denoise(
        self, y: Tensor, sigma: Noise | None = None, c: Tensor | int | None = None
    ) -> Tensor:
        """Estimates of the clean images, shape of ``y``, not clipped.

        Raises:
            UserError: if sigma is missing or not above 0, or a label is given.
        """
        if sigma is None and not self.noise_conditional:
            return self._denoise_blind_checked(y, c)
        y, sigma, _ = self.inputs(y, sigma, c)
        return self(y, sigma).to(y.dtype)

    def _clean_and_change(self, y: Tensor) -> tuple[Tensor, Tensor]:
        clean = self(y).to(y.dtype)
        return clean, clean - y


class GradientStep(ImpliedLevelModel, EnergyModel):
    """Gradient-step denoiser D = y - grad g, with log p(y) = -g(y, sigma) / sigma^2; no labels.

    Args:
        potential: maps noisy images (B, C, H, W) and sigma (None, a float or (B,)) to g (B,), in
            squared image units.
        noise_conditional: whether the potential needs sigma.
        in_channels: required number of channels C; None: any.
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
            UserError: if ``y`` is not a batch of images with C channels, or sigma is missing.
        """
        check_images(y, self.in_channels)
        if sigma is None:
            raise UserError("the log-density of this model is -g(y) / sigma^2: give sigma")
        g = upcast(self.potential(to_weights(y, self), sigma))
        variance = sigma.to(g) ** 2 if isinstance(sigma, Tensor) else sigma**2
        return Energies(g.new_zeros(len(y), 0), -g / variance)

    def _score(self, y: Tensor, sigma: Noise | None, c: Tensor | None) -> Tensor:
        if sigma is not None:
            return super()._score(y, sigma, c)
        self._check_blind()
        step = self._clean_and_change(y)[1]
        return step / per_image(implied_sigma(step), y) ** 2

    def _clean_and_change(self, y: Tensor) -> tuple[Tensor, Tensor]:
        step = super()._score(y, 1.0, None)  # -grad g, the score at sigma = 1
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
        UserError: naming the first parameter that is missing, unknown or of another shape.
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
    """Noise level ||D(y) - y|| / sqrt(d), (B,), from ``change``, D(y) - y (B, ...)."""
    flat = change.flatten(1)
    norm = torch.linalg.vector_norm(flat, dim=1) / math.sqrt(flat.shape[1])
    level: Tensor = norm.clamp_min(torch.finfo(change.dtype).eps)
    return level
