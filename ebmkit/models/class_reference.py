r"""Gaussians of the classes as a reference density at every noise level.

With the mean :math:`\mu_c`, the covariance :math:`\Sigma_c` and the share :math:`\pi_c` of each
class of the training images, and a floor f,

.. math::
    q_\sigma(y, c) = \pi_c\, \mathcal N(y;\, \mu_c,\, \Sigma_c + (f^2 + \sigma^2) I) .

Where noise hides everything but the first two moments of each class, this is nearly the density of
the data and their labels: 8x8 digits it classifies as well as the images allow from sigma 0.3 on.
It is what a `ebmkit.models.PreconditionedModel` adds its network to. The covariances are those of
`ebmkit.class_gaussians`: orthogonal rows :math:`w_k`, and :math:`\rho^2` in all directions,

.. math::
    \Sigma_c + (f^2 + \sigma^2) I = \sum_k w_k w_k^\top + t I, \qquad t = \rho^2 + f^2 + \sigma^2,

    x^\top (\dots)^{-1} x = \frac{\|x\|^2}{t}
        - \sum_k \frac{\langle w_k, x\rangle^2}{t\, (\|w_k\|^2 + t)}, \qquad
    \log\det = d \log t + \sum_k \log\Bigl(1 + \frac{\|w_k\|^2}{t}\Bigr) .

The floor keeps the density of pixels that are constant in a class finite at low noise, where the
network has to correct it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ebmkit.class_gaussians import ClassGaussians
from ebmkit.errors import UserError, shown

FLOOR = 0.25
"""Floor f, in standard deviations of the data."""


class ClassReference(nn.Module):
    """q_sigma(y, c), with one Gaussian per class; not fitted until `fit`.

    Args:
        classes: number of Gaussians, 1 for images without labels.
        shape: shape (C, H, W) of the images.
        rank: number of rows of a covariance.
    """

    means: Tensor
    rows: Tensor
    variances: Tensor
    shares: Tensor

    def __init__(self, classes: int, shape: tuple[int, int, int], rank: int) -> None:
        super().__init__()
        self.shape, entries = shape, math.prod(shape)
        self.register_buffer("means", torch.zeros(classes, entries))
        self.register_buffer("rows", torch.zeros(classes, min(rank, entries), entries))
        self.register_buffer("variances", torch.zeros(classes))
        self.register_buffer("shares", torch.full((classes,), 1 / classes))

    @property
    def fitted(self) -> bool:
        """Whether `fit` was called, or a fitted reference was loaded."""
        return bool((self.variances > 0).all())

    def fit(self, images: Tensor, labels: Tensor | None, floor: float) -> None:
        """Fit to training images (N, C, H, W); ``floor``: f, image units.

        Raises:
            UserError: if a class has fewer than two images.
        """
        classes, rank, _ = self.rows.shape
        found = ClassGaussians(images, labels).compressed(rank)
        if len(found.means) != classes:
            raise UserError(
                f"{len(found.means)} of {classes} classes have images, and each needs 2 or more: "
                "set model.reference_rank=0"
            )
        assert found.residuals is not None
        for c, (mean, rows) in enumerate(zip(found.means, found.spreads, strict=True)):
            self.means[c] = mean.flatten()
            self.rows[c] = 0.0  # of few images there are fewer rows
            self.rows[c, : len(rows)] = rows
            self.variances[c] = found.residuals[c] ** 2 + floor**2
        self.shares.copy_(found.shares / found.shares.sum())

    def log_joint(self, y: Tensor, sigma: Tensor) -> Tensor:
        """log q_sigma(y, c), (B, K), of images (B, C, H, W) at noise levels (B,).

        Raises:
            UserError: if the images have another size.
        """
        if y.shape[1:] != self.shape:
            raise UserError(
                f"images of {shown(tuple(y.shape[1:]))} do not fit the Gaussians of the classes, "
                f"which are of {shown(self.shape)}: resize them, or train with "
                "model.reference_rank=0"
            )
        means, rows = self.means.to(y), self.rows.to(y)
        x = y.flatten(1)[:, None] - means
        t = self.variances.to(y) + sigma[:, None].square()
        along = torch.einsum("bcd,crd->bcr", x, rows).square()
        eigenvalues = rows.square().sum(2)
        quadratic = x.square().sum(2) - (along / (eigenvalues + t[..., None])).sum(2)
        log_det = (eigenvalues / t[..., None]).log1p().sum(2) + x.shape[2] * (2 * math.pi * t).log()
        return self.shares.to(y).log() - 0.5 * (quadratic / t + log_det)

    def moments(self) -> tuple[Tensor, Tensor, float]:
        """Mean (d,) of q_0, and rows A (M, d) and r of its covariance A^T A + r I; float64."""
        shares, means = self.shares.double(), self.means.double()
        mean = shares @ means
        between = shares.sqrt()[:, None] * (means - mean)
        within = (shares.sqrt()[:, None, None] * self.rows.double()).flatten(0, 1)
        return mean, torch.cat([between, within]), float(shares @ self.variances.double())
