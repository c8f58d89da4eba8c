"""A labelled Gaussian mixture on 4x4 images with known density, and samples of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ebmkit import GaussianMixture


@dataclass(frozen=True)
class Drawn:
    """An image set of float images, without rounding to 8 bits."""

    images: torch.Tensor
    labels: torch.Tensor | None
    name: str = "mixture"
    split: str = "test"
    class_names: tuple[str, ...] = ("left", "right", "both")

    def __len__(self):
        return len(self.images)

    @property
    def channels(self):
        return self.images.shape[1]

    @property
    def image_size(self):
        return tuple(self.images.shape[2:])

    @property
    def num_classes(self):
        return len(self.class_names) if self.labels is not None else 0

    def first(self, n):
        labels = None if self.labels is None else self.labels[:n]
        return replace(self, images=self.images[:n], labels=labels)

    def select(self, chosen):
        labels = None if self.labels is None else self.labels[chosen]
        return replace(self, images=self.images[chosen], labels=labels)

    def batches(self, size):
        for at in range(0, len(self), size):
            rows = slice(at, at + size)
            yield self.images[rows], None if self.labels is None else self.labels[rows]


def make_mixture(cls=GaussianMixture):
    means = torch.full((3, 1, 4, 4), 0.4)
    means[0, ..., :2] += 0.04
    means[1, ..., 2:] += 0.04
    means[2] += 0.04
    axes = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))[0]
    covariance = axes @ torch.diag(torch.logspace(-3.2, -2.2, 16)) @ axes.T
    return cls(means, covariance.expand(3, -1, -1), weights=[0.5, 0.3, 0.2]).eval()


SIDE = 4


def two_gaussians(variance=0.02):
    """Two labels with equal covariance: the decision boundary is the plane between the means.

    Noise, the denoiser and Langevin steps keep the symmetry about this plane, and so the boundary.
    """
    direction = torch.linspace(-1, 1.5, SIDE**2).reshape(1, SIDE, SIDE)
    middle = torch.full((1, SIDE, SIDE), 0.5)
    means = torch.stack([middle - 0.06 * direction, middle + 0.06 * direction])
    return GaussianMixture(means, variance, labels=[0, 1]).eval()


def near_the_plane(model, count=60):
    """Images, labels by their side of the plane, and l_inf and l2 distances to the plane."""
    normal = (model.means[1] - model.means[0]).flatten()
    offset = model.means.flatten(1).mean(0)
    generator = torch.Generator().manual_seed(4)
    x = offset + 0.08 * torch.randn(count, SIDE**2, generator=generator).clamp(-2, 2)
    height = (x - offset) @ normal
    distance = {"linf": height.abs() / normal.abs().sum(), "l2": height.abs() / normal.norm()}
    return x.reshape(-1, 1, SIDE, SIDE), (height > 0).long(), distance
