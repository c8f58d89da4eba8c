r"""Where chains start: a Gaussian fitted to the images of each class.

.. math:: x_0 \sim \mathcal N(\mu_c, \Sigma_c), \qquad c \sim p(c)

with the mean and covariance of the images of class c (Santurkar et al., arXiv 1906.09453; JEM++,
arXiv 2109.09032). Of n images in d dimensions the covariance is never formed: with the centred
images :math:`X \in \mathbb R^{n \times d}`,

.. math:: x_0 = \mu_c + X^\top z / \sqrt{n - 1}, \qquad z \sim \mathcal N(0, I_n)

has just that covariance, of whatever rank. Up to `KEPT` images of a class are kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ebmkit.errors import UserError

__all__ = ["ClassGaussians"]

KEPT = 1000
"""Images of a class that its Gaussian is fitted to, at the most, evenly through the set."""


class ClassGaussians:
    """The Gaussians of each class of ``images``, or of all together.

    Args:
        images: (N, C, H, W) in [0, 1].
        labels: (N,) int64; None: one Gaussian.

    Raises:
        UserError: if a class has fewer than two images.
    """

    def __init__(self, images: Tensor, labels: Tensor | None = None) -> None:
        count = int(labels.max()) + 1 if labels is not None else 1
        self.means, self.spreads, shares = [], [], []
        for c in range(count):
            own = images if labels is None else images[labels == c]
            if len(own) < 2:
                raise UserError(
                    f"class {c} has {len(own)} image(s), too few to fit a Gaussian to: start "
                    "chains from uniform noise"
                )
            shares.append(len(own))
            rows = torch.arange(min(len(own), KEPT), device=own.device)
            kept = own[rows * len(own) // len(rows)]
            self.means.append(kept.mean(0))
            self.spreads.append((kept - kept.mean(0)).flatten(1) / (len(kept) - 1) ** 0.5)
        self.shares = torch.tensor(shares, dtype=images.dtype, device=images.device)

    def sample(
        self, count: int, generator: torch.Generator, labels: Tensor | None = None
    ) -> Tensor:
        """Starting points (count, C, H, W), not clipped.

        Args:
            count: how many.
            generator: on the device of the images.
            labels: (count,), which Gaussians; None: classes as often as they are in the set.

        Raises:
            UserError: if there were no images of a label.
        """
        if labels is not None and len(labels) and int(labels.max()) >= len(self.means):
            raise UserError(
                f"label {int(labels.max())} has 0 images to fit a Gaussian to, the largest label "
                f"among them is {len(self.means) - 1}: start chains from uniform noise"
            )
        if labels is None:
            labels = torch.multinomial(self.shares, count, replacement=True, generator=generator)
        kind: dict[str, Any] = {"dtype": self.shares.dtype, "device": self.shares.device}
        largest = max(len(spread) for spread in self.spreads)
        z = torch.randn(count, largest, generator=generator, **kind)
        out = torch.empty((count, *self.means[0].shape), **kind)
        for c, (mean, spread) in enumerate(zip(self.means, self.spreads, strict=True)):
            rows = torch.nonzero(labels == c).flatten()
            if len(rows):
                drawn = z[rows, : len(spread)] @ spread
                out[rows] = mean + drawn.reshape(-1, *mean.shape)
        return out
