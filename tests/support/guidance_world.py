"""Labelled mixtures with known guided distributions, float64."""

import torch

from ebmkit import GaussianMixture
from ebmkit.sampling import Chains


def plane():
    """Three overlapping components in the plane, labels 0, 1, 1."""
    return GaussianMixture(
        torch.tensor([[0.2, 0.5], [0.8, 0.7], [0.55, 0.1]], dtype=torch.float64),
        torch.tensor([0.02, 0.015, 0.03], dtype=torch.float64),
        weights=[0.5, 0.3, 0.2],
        labels=[0, 1, 1],
    )


SHAPE = (1, 4, 4)


def pictures(kind=GaussianMixture, dtype=torch.float32):
    """Dark, bright and split images; labels 0, 1, 1."""
    means = torch.stack([torch.full(SHAPE, 0.3), torch.full(SHAPE, 0.7), torch.full(SHAPE, 0.3)])
    means[2, :, :2] = 0.7
    return kind(means.to(dtype), 0.01, weights=[0.5, 0.3, 0.2], labels=[0, 1, 1])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def run(sampler, x, seed=0, steps=10_000):
    return Chains(sampler, sampler.init(x)).run(steps, generator(seed)).x


def slope(function, y, step=1e-6):
    """Gradient, by central differences, of a function (B, ...) -> (B,) that acts per image."""
    flat = y.flatten(1)
    columns = []
    for i in range(flat.shape[1]):
        offset = torch.zeros_like(flat)
        offset[:, i] = step
        high, low = (function((flat + o).reshape(y.shape)) for o in (offset, -offset))
        columns.append((high - low) / (2 * step))
    return torch.stack(columns, 1).reshape(y.shape)
