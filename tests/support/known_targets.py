"""Target distributions with known moments, and errors of samples in standard errors."""

from __future__ import annotations

import torch

from ebmkit import GaussianMixture
from ebmkit.sampling import Chains


def overlapping():
    """A labelled mixture in the plane whose components overlap, so that chains mix."""
    return GaussianMixture(
        torch.tensor([[-0.7, 0.0], [0.7, 0.4], [0.2, -0.8]], dtype=torch.float64),
        torch.tensor([0.25, 0.2, 0.3], dtype=torch.float64),
        weights=[0.5, 0.3, 0.2],
        labels=[0, 1, 1],
    )


def density(model):
    """log p and score of an isotropic mixture on vectors in closed form, without autograd."""
    means, variances = model.means, model._variances[:, 0]

    def function(x, sigma=None):
        v = variances + (sigma or 0.0) ** 2
        offsets = means - x[:, None]
        squares = offsets.square().sum(2)
        logs = model.log_weights - 0.5 * (squares / v + means.shape[1] * (2 * torch.pi * v).log())
        log_density = logs.logsumexp(1)
        factors = (logs - log_density[:, None]).exp() / v
        return log_density, (factors[:, :, None] * offsets).sum(1)

    return function


def score(model):
    """Score function of `density`."""
    both = density(model)
    return lambda x, sigma=None: both(x, sigma)[1]


def denoiser(model):
    """Denoiser y + sigma^2 score(y, sigma) of the mixture."""
    field = score(model)
    return lambda y, sigma: y + sigma**2 * field(y, sigma)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gray_start(sampler, shape, generator):
    """Gray images (0.5) with noise of the sampler's first level, float64."""
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return 0.5 + sampler.sigmas[0] * noise


def run(sampler, x, steps, seed=0):
    """Final states of chains that start at ``x``."""
    return Chains(sampler, sampler.init(x)).run(steps, generator(seed)).x


def exact_moments(model, sigma=0.0):
    """Mean (d,) and second moment (d, d) of a mixture with noise of level ``sigma``."""
    weights, means = model.log_weights.exp(), model.means.flatten(1)
    covariances = torch.einsum("kde,ke,kfe->kdf", model._axes, model._variances, model._axes)
    covariances = covariances + sigma**2 * torch.eye(means.shape[1], dtype=means.dtype)
    second = covariances + means[:, :, None] * means[:, None]
    return weights @ means, torch.einsum("k,kdf->df", weights, second)


def worst_error(x, model, sigma=0.0):
    """The largest error of means, second moments and class proportions, in standard errors.

    The proportion of a class is the mean of its posterior, whose expectation is its weight.
    """
    flat = x.double().flatten(1)
    mean, second = exact_moments(model, sigma)
    upper = torch.triu_indices(len(mean), len(mean))
    posterior = model.logits(x.to(model.means), sigma or None).softmax(1).double()
    found = torch.cat([flat, flat[:, upper[0]] * flat[:, upper[1]], posterior], dim=1)
    shares = torch.zeros(model.num_classes, dtype=torch.float64)
    shares.index_add_(0, model.labels, model.log_weights.exp().double())
    exact = torch.cat([mean, second[upper[0], upper[1]], shares]).double()
    error = (found.mean(0) - exact) / (found.std(0) / len(x) ** 0.5 + 1e-12)
    return float(error.abs().max())
