"""Mixtures as blind denoisers, which estimate the noise level from the image."""

from ebmkit import GaussianMixture

VARIANCE = 0.01
"""Variance of each component, image units squared."""


class BlindMixin:
    """Mix-in for a mixture; estimates the level from the rms distance to the nearest mean."""

    noise_conditional = False

    def denoise(self, y, sigma=None, c=None):
        return self.denoise_blind(y, c)[0]

    def denoise_blind(self, y, c=None, sigma_range=None):
        level = self.estimate_sigma(y)
        return GaussianMixture.posterior_mean(self, y, level, c), level

    def estimate_sigma(self, y):
        squares = (y[:, None] - self.means).flatten(2).square().mean(2).amin(1)
        return (squares - VARIANCE).clamp_min(1e-8).sqrt()


class BlindMixture(BlindMixin, GaussianMixture):
    """`GaussianMixture` as a blind denoiser."""
