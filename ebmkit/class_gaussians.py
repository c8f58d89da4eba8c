r"""Class Gaussians: the mean and covariance of the images of each class, to start chains from.

Starting points (Santurkar et al., arXiv 1906.09453; JEM++, arXiv 2109.09032) are
:math:`x_0 \sim \mathcal N(\mu_c, \Sigma_c)` with the mean and covariance of the images of class c.
The covariance of n images in d dimensions is never formed: with the centred images
:math:`X \in \mathbb R^{n \times d}`,

.. math:: x_0 = \mu_c + X^\top z / \sqrt{n - 1}, \qquad z \sim \mathcal N(0, I_n)

has this covariance, whatever its rank. Noise of level :math:`\sigma` turns it into
:math:`\mathcal N(\mu_c, \Sigma_c + \sigma^2 I)`, which has the mean and covariance of the noisy
images, and approaches their distribution as sigma increases.

A trained model stores its Gaussians in bounded size: of :math:`X / \sqrt{n - 1} = U S V^\top` the
first r rows of :math:`S V^\top`, and the remaining variance, equal in all directions (probabilistic
PCA, Tipping & Bishop 1999):

.. math:: x_0 = \mu_c + V_r S_r z + \rho\, \xi, \qquad \rho^2 = \sum_{k > r} S_k^2 / d, \qquad
    \xi \sim \mathcal N(0, I_d).

The total variance is exact, and with r equal to the rank, as of small images, so is the covariance.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
from torch import Tensor

from ebmkit.errors import UserError
from ebmkit.storage.reading import DamagedFile
from ebmkit.storage.tensors import parse_tensors

MAX_FIT_IMAGES = 1000
"""Maximum number of images per Gaussian, evenly spaced in the set."""

MAX_RANK, MIN_RANK, MAX_STORED = 64, 8, 2**22
"""Maximum rank of a stored Gaussian; a lower maximum for which none are stored; maximum of all
stored numbers, which limits the rank (16 MiB in float32)."""


def storable_rank(classes: int, entries: int) -> int:
    """Maximum rank of ``classes`` stored Gaussians of images of ``entries`` pixels and channels; 0
    if they are too large to be stored."""
    rank = min(MAX_RANK, MAX_STORED // (max(classes, 1) * entries) - 1)
    return rank if rank >= MIN_RANK else 0


class ClassGaussians:
    """Gaussians fitted to images (N, C, H, W): one per class of ``labels`` (N,), or one for all.

    Raises:
        UserError: if a class has fewer than two images.
    """

    def __init__(self, images: Tensor, labels: Tensor | None = None) -> None:
        count = int(labels.max()) + 1 if labels is not None else 1
        self.means, self.spreads, shares = list[Tensor](), list[Tensor](), list[int]()
        self.residuals: list[float] | None = None
        for c in range(count):
            own = images if labels is None else images[labels == c]
            if len(own) < 2:
                raise UserError(
                    f"class {c} has {len(own)} image(s), too few to fit a Gaussian to: start "
                    "chains from uniform noise"
                )
            shares.append(len(own))
            rows = torch.arange(min(len(own), MAX_FIT_IMAGES), device=own.device)
            fitted = own[rows * len(own) // len(rows)]
            self.means.append(fitted.mean(0))
            self.spreads.append((fitted - fitted.mean(0)).flatten(1) / (len(fitted) - 1) ** 0.5)
        self.shares = torch.tensor(shares, dtype=images.dtype, device=images.device)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of an image, (C, H, W)."""
        return tuple(self.means[0].shape)

    def compressed(self, rank: int) -> Self:
        """These Gaussians at a rank of at most ``rank``, float32, on the CPU."""
        found = type(self).__new__(type(self))
        found.shares = self.shares.float().cpu()
        found.means = [mean.float().cpu() for mean in self.means]
        found.spreads, found.residuals = [], []
        for spread in self.spreads:
            x = spread.double().cpu()
            r = min(rank, *x.shape)
            vectors = torch.linalg.eigh(x @ x.T).eigenvectors[:, -r:]  # of U, by increasing S
            found.spreads.append((vectors.T @ x).float())
            rest = float(x.square().sum() - found.spreads[-1].double().square().sum())
            found.residuals.append(math.sqrt(max(rest, 0.0) / x.shape[1]))
        return found

    def to_bytes(self) -> bytes:
        """The Gaussians as a safetensors file."""
        state = {"shares": self.shares, "means": torch.stack(self.means)}
        state["residuals"] = torch.tensor(self.residuals or [0.0] * len(self.means))
        state |= {f"spreads.{c}": spread.contiguous() for c, spread in enumerate(self.spreads)}
        return safetensors.torch.save(state)

    @classmethod
    def from_bytes(cls, content: bytes, path: Path) -> Self:
        """Read a file of `to_bytes`; ``path`` is its name in messages.

        Raises:
            DamagedFile: if it is none.
        """
        state, _ = parse_tensors(content, path)
        found = cls.__new__(cls)
        try:
            found.shares, means = state.pop("shares"), state.pop("means")
            residuals = state.pop("residuals")
            count, entries = len(means), means[0].numel()
            found.spreads = [state.pop(f"spreads.{c}") for c in range(count)]
            sizes = [found.shares.shape == residuals.shape == (count,), means.ndim == 4, not state]
            sizes += [spread.ndim == 2 and spread.shape[1] == entries for spread in found.spreads]
            tensors = [found.shares, means, residuals, *found.spreads]
            sizes += [t.dtype == torch.float32 and bool(t.isfinite().all()) for t in tensors]
            whole = all(sizes) and bool((found.shares > 0).all())
        except (KeyError, IndexError):
            whole = False
        if not whole:
            raise DamagedFile(f"{str(path)!r} is damaged: it holds no Gaussians of classes")
        found.means, found.residuals = list(means), residuals.tolist()
        return found

    def sample(
        self, count: int, generator: torch.Generator, labels: Tensor | None = None
    ) -> Tensor:
        """Draw starting points (count, C, H, W), not clipped.

        ``generator`` is on the device of the images. ``labels`` (count,) select the Gaussians;
        None: classes are drawn with their frequencies in the set.

        Raises:
            UserError: if a label has no images.
        """
        if labels is None:
            labels = torch.multinomial(self.shares, count, replacement=True, generator=generator)
        elif len(labels) and (largest := int(labels.max())) >= len(self.means):
            raise UserError(
                f"label {largest} has 0 images to fit a Gaussian to, the largest label with images "
                f"is {len(self.means) - 1}: start chains from uniform noise"
            )
        kind: dict[str, Any] = {"dtype": self.shares.dtype, "device": self.shares.device}
        most = max(map(len, self.spreads))
        z = torch.randn(count, most, generator=generator, **kind)
        out = torch.empty((count, *self.shape), **kind)
        for c, (mean, spread) in enumerate(zip(self.means, self.spreads, strict=True)):
            rows = torch.nonzero(labels == c).flatten()
            if len(rows):
                drawn = z[rows, : len(spread)] @ spread
                out[rows] = mean + drawn.reshape(-1, *mean.shape)
        if self.residuals is not None:
            scale = torch.tensor(self.residuals, **kind)[labels]
            out += scale[:, None, None, None] * torch.randn(out.shape, generator=generator, **kind)
        return out

    def to(self, device: torch.device) -> Self:
        """These Gaussians on ``device``."""
        found = type(self).__new__(type(self))
        found.shares, found.residuals = self.shares.to(device), self.residuals
        found.means = [mean.to(device) for mean in self.means]
        found.spreads = [spread.to(device) for spread in self.spreads]
        return found
