r"""Noise-conditional energies that are normalised at every noise level.

With the mean m of the data, their standard deviation s (image units), d entries, and
:math:`\tau^2 = \sigma^2 + s^2`, a `PreconditionedModel` is

.. math::
    \log p_\sigma(y) = \log \mathcal N(y;\, m,\, \tau^2 I) + a(\sigma)\, P\, n(u, \sigma) + b,
    \qquad u = \frac{y - m}{\tau}, \qquad
    a(\sigma) = \frac{s}{\tau} \Bigl(\frac{\tau}{\sigma}\Bigr)^\gamma ,

where n and the class logits are the output of a network whose input u has unit variance at every
noise level (the input scale of Karras et al. 2022, arXiv 2206.00364), and P is the number of
positions over which it averages, so that the second term is a sum over positions. The scores are

.. math::
    \sigma\, s(y) = -\frac{\sigma}{\tau}\, u + \frac{\sigma a}{\tau}\, P\, \nabla_u n, \qquad
    \frac{\partial \log p_\sigma}{\partial \log\sigma}
        = \frac{\sigma^2}{\tau^2} (\|u\|^2 - d) + P \frac{\partial (a n)}{\partial \log\sigma} .

The first terms are the Gaussian's. The second ones are what the data add: at low noise, up to one
standard deviation of the noise and d nats; at high noise, a share that vanishes as
:math:`s/\sigma`. So the density is then the Gaussian's whatever the network computes, even if
normalisation layers remove the scale of u. At the start n = 0.

**Gaussians of the classes.** With a `ebmkit.models.class_reference.ClassReference` q in the place
of the Gaussian,

.. math::
    \log p_\sigma(y) = \log \sum_c q_\sigma(y, c) + a(\sigma)\, P\, n(u, \sigma) + b, \qquad
    a(\sigma) = \Bigl(\frac{s}{\tau}\Bigr)^3 \Bigl(\frac{\tau}{\sigma}\Bigr)^\gamma, \qquad
    \text{logits} = \text{network's} + \frac{\sigma^2}{\tau^2} \log q_\sigma(y, c) .

The first two moments of each class are then nearly the data's, up to a floor and the rank. What
else is missing vanishes with the third power, so a does, too, and p(c|y) at high noise need not be
learned. At low noise, where the Gaussians are far too certain, the network alone classifies.

With :math:`\gamma = 1`, entries of :math:`P \nabla_u n` are of order 1 at every level (the
output scale of Karras et al.), but an error of n counts :math:`s/\sigma` times in the time score.
It suits networks whose n is an inner product with u, and data on thin surfaces. With
:math:`\gamma = 0`, n is in nats at low noise, and does not depend on sigma once p is smooth; a
network with mean-pooled features learns it faster (docs, "Densities").

**Constant.** Score matching determines log p up to a constant per noise level. Objectives that
compare noise levels (`ebmkit.objectives.time_score`) leave one constant b for all levels. It
follows from one level, sigma_max: the Kullback-Leibler divergence of the noisy data from the
Gaussian is :math:`E_y[\log p_\sigma(y) - \log \mathcal N(y; m, \tau^2 I)]`, so

.. math::
    b = \mathrm{KL} - a\,P\,E_y[n], \qquad
    \mathrm{KL} = \frac{\|\mu - m\|^2}{2\tau^2} + \frac{\|\Sigma - s^2 I\|_F^2}{4\tau^4}
                  + O(\tau^{-6})

with mean and covariance :math:`\mu, \Sigma` of the data (`PreconditionedModel.anchor`); with
Gaussians of the classes, their mean and covariance take the place of m and :math:`s^2 I`. The
mean over y is one over training images with noise, which has a standard error. The terms that are
left out are of the size

.. math::
    \tau^{-6} \bigl( E\langle x - \mu, x' - \mu \rangle^3 / 12 + \|\Sigma - s^2 I\|_F^3 / 6 \bigr)

with two independent images x and x': the skewness of the data, and the next term of a Gaussian.
Both are in `constant_error`, which does not include errors of the network at lower noise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ebmkit.compute import upcast, without_autocast
from ebmkit.energy import Energies, EnergyModel, Noise, per_image
from ebmkit.errors import UserError
from ebmkit.models.base import check_images
from ebmkit.models.class_reference import FLOOR, ClassReference

LOWEST = 0.002
"""Default of the lowest noise level, image units."""

FAR = 5.0
"""Lowest ratio of the highest noise level to the standard deviation of the data at which the
constant is fixed."""

ANCHOR_BATCH, ANCHOR_DRAWS = 100, 4000
"""Number of images at a time, and of noisy images, for the constant."""


class PreconditionedModel(EnergyModel):
    """log p_sigma(y, c): a Gaussian, and a network that vanishes at high noise.

    Args:
        network: noise-conditional `EnergyModel` from ``(u, sigma)`` to class logits and n (B,).
        mean: mean m of the data, one number or one per channel, image units.
        std: standard deviation s of the data, image units.
        sigma_min: lowest noise level, image units. No sigma, and lower levels, mean this one.
        positions: P, the number of positions over which the network averages n; 1: it is a sum.
        gamma: exponent of a(sigma).
        reference: Gaussians of the classes, as many as the network has (one if it has none); None:
            one isotropic Gaussian.

    Raises:
        UserError: if the network takes no sigma, or ``std`` or ``sigma_min`` is not above 0.

    Attributes:
        constant: b, nats.
        constant_error: estimated error of b, nats; Inf: it was not fixed (`anchor`).
        label_shares: p(c), (C,).
    """

    noise_conditional = True
    constant: Tensor
    constant_error: Tensor
    label_shares: Tensor
    mean: Tensor

    def __init__(
        self,
        network: EnergyModel,
        mean: float | tuple[float, ...] = 0.0,
        std: float = 1.0,
        sigma_min: float = LOWEST,
        positions: int = 1,
        gamma: float = 1.0,
        reference: ClassReference | None = None,
    ) -> None:
        super().__init__()
        if not network.noise_conditional:
            raise UserError(
                "a preconditioned model needs a network that takes sigma as an input: take a "
                "noise-conditional backbone, such as mlp-sigma"
            )
        if not (0 < std < math.inf and 0 < sigma_min < math.inf):
            raise UserError(
                f"std {std:g} and sigma_min {sigma_min:g} must be above 0, as in 0.3 and 0.002"
            )
        self.network, self.reference = network, reference
        self.std, self.sigma_min, self.positions, self.gamma = std, sigma_min, positions, gamma
        self.in_channels, self.num_classes = network.in_channels, network.num_classes
        values = torch.tensor(mean).reshape(-1, *[1] * (2 if isinstance(mean, tuple) else 0))
        self.register_buffer("mean", values, persistent=False)
        self.register_buffer("constant", torch.zeros((), dtype=torch.float64))
        self.register_buffer("constant_error", torch.tensor(math.inf, dtype=torch.float64))
        shares = torch.full((self.num_classes,), 1 / max(1, self.num_classes))
        self.register_buffer("label_shares", shares)

    def forward(self, y: Tensor, sigma: Noise | None = None) -> Energies:
        """Energies of ``y`` (B, C, H, W) at ``sigma``, a float or (B,), image units.

        Raises:
            UserError: if ``y`` is not a batch of images with C channels.
        """
        check_images(y, self.in_channels)
        logits, gaussian, residual = self._parts(y, sigma)
        return Energies(logits, gaussian + residual + self.constant.to(gaussian))

    def _parts(self, y: Tensor, sigma: Noise | None) -> tuple[Tensor, Tensor, Tensor]:
        """Class logits, the Gaussian's log-density, (B,), and what the network adds to it, (B,)."""
        with without_autocast(y):
            level = torch.as_tensor(
                self.sigma_min if sigma is None else sigma, dtype=y.dtype, device=y.device
            )
            level = upcast(level.reshape(-1).expand(len(y))).clamp_min(self.sigma_min)
            y = upcast(y)
            variance = level.square() + self.std**2
            u = (y - self.mean.to(y)) / per_image(variance.sqrt(), y)
            joint = None
            if self.reference is None:
                log_norm = y[0].numel() / 2 * (2 * math.pi * variance).log()
                gaussian = -0.5 * u.square().flatten(1).sum(1) - log_norm
            else:
                joint = self.reference.log_joint(y, level)
                gaussian = joint.logsumexp(1)
        energies = self.network(u, level)
        with without_autocast(y):
            logits = energies.logits
            if joint is not None and self.num_classes:
                logits = upcast(logits) + (level.square() / variance)[:, None] * joint
            return logits, gaussian, self.scale(level) * upcast(energies.log_density)

    @torch.no_grad()
    def fit_reference(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Fit the Gaussians of the classes to training images (N, C, H, W), labels (N,).

        Raises:
            UserError: if a class has fewer than two images.
        """
        assert self.reference is not None
        self.reference.fit(images, labels if self.num_classes else None, FLOOR * self.std)

    def forget_anchor(self) -> None:
        """Mark the density as not normalised."""
        self.constant.zero_()
        self.constant_error.fill_(math.inf)
        self.label_shares.fill_(1 / max(1, self.num_classes))

    @torch.no_grad()
    def anchor(
        self,
        images: Tensor,
        sigma: float,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Fix the constant by training images, so that log-densities are normalised.

        Args:
            images: at least 2 training images (N, C, H, W) in [0, 1]; about 1000 are enough.
            sigma: highest noise level of the training, image units.
            labels: labels (N,) of training images, for p(c); None: each label is equally likely.
            generator: source of the noise, on the device of the images.

        Raises:
            UserError: if sigma is not far above the standard deviation of the data, or there is
                only one image.
        """
        if len(images) < 2:
            raise UserError(f"{len(images)} image(s) cannot normalise the density: give 2 or more")
        if sigma < FAR * self.std:
            raise UserError(
                f"noise level {sigma:g} is too low to normalise the density: train up to "
                f"{FAR * self.std:.3g} or more, {FAR:g} standard deviations of the data"
            )
        x, variance = images.double().flatten(1), sigma**2 + self.std**2
        if self.reference is None:
            center = self.mean.double().expand(images.shape[1:]).flatten()
            rows, share = x.new_zeros(0, x.shape[1]), self.std**2
        else:
            center, rows, share = self.reference.moments()
        x, count, entries = x - center, *x.shape
        mean = x.mean(0)
        products = (x - mean) @ (x - mean).T
        others = ~torch.eye(count, dtype=torch.bool, device=x.device)
        trace = float(products.diagonal().sum()) / (count - 1)
        offset = max(0.0, float(mean.square().sum()) - trace / count)
        # || S - A^T A - r I ||^2 for the covariances S of the data, A^T A + r I of the Gaussians
        total, gram = float(rows.square().sum()), rows @ rows.T
        common = float(((x - mean) @ rows.T).square().sum()) / (count - 1) + share * trace
        own = float(gram.square().sum()) + 2 * share * total + entries * share**2
        spread = max(0.0, float(products[others].square().mean()) - 2 * common + own)
        skewness = max(0.0, float(products[others].pow(3).mean()))
        divergence = offset / (2 * variance) + spread / (4 * variance**2)
        residuals = []
        for part in torch.split(images, ANCHOR_BATCH):
            for _ in range(max(1, ANCHOR_DRAWS // count)):
                eps = torch.randn(part.shape, generator=generator, device=part.device)
                residuals.append(self._parts(part + sigma * eps.to(part), sigma)[2].double())
        residual = torch.cat(residuals)
        error = float(residual.std()) / len(residual) ** 0.5
        self.constant.fill_(divergence - float(residual.mean()))
        self.constant_error.fill_(error + (skewness / 12 + spread**1.5 / 6) / variance**3)
        if labels is not None:
            counts = torch.bincount(labels, minlength=self.num_classes).double() + 1e-9
            self.label_shares.copy_(counts / counts.sum())

    @property
    def log_prior(self) -> Tensor:
        """log p(c), (C,): shares of the labels in training."""
        return self.label_shares.log()

    def scale(self, sigma: Tensor) -> Tensor:
        """P a(sigma), the factor of n, for noise levels (B,), image units."""
        tau = (sigma.square() + self.std**2).sqrt()
        power = 1 if self.reference is None else 3
        return self.positions * (self.std / tau) ** power * (tau / sigma) ** self.gamma

    @property
    def normalized(self) -> bool:
        """Whether the constant was fixed, so that log-densities are normalised."""
        return math.isfinite(float(self.constant_error))

    def set_recompute(self, on: bool) -> None:
        """Switch activation checkpointing of the network on or off (`JointModel.set_recompute`)."""
        self.network.set_recompute(on)  # type: ignore[operator]
