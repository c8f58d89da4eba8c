"""The exact network of a preconditioned model, for tests."""

from __future__ import annotations

from ebmkit.analytic import Gaussian
from ebmkit.energy import Energies, EnergyModel


class Exact(EnergyModel):
    """The network with which a preconditioned model is ``truth``, up to a factor."""

    noise_conditional, in_channels = True, 3

    def __init__(self, truth, mean, std, log_factor=0.0):
        super().__init__()
        self.truth, self.log_factor, self.num_classes = truth, log_factor, truth.num_classes
        self.gaussian, self.mean, self.std = Gaussian(mean, std**2), mean, std

    def forward(self, u, sigma=None):
        variance = sigma**2 + self.std**2
        y = self.mean + variance.sqrt()[:, None, None, None] * u
        own, reference = self.truth(y, sigma), self.gaussian(y, sigma).log_density
        n = (own.log_density - reference + self.log_factor) * sigma / self.std
        return Energies(own.logits, n)
