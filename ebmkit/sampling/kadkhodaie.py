r"""Coarse-to-fine stochastic ascent with a blind denoiser, free or under linear measurements.

Kadkhodaie & Simoncelli ("Stochastic solutions for linear inverse problems using the prior implicit
in a denoiser", NeurIPS 2021, arXiv 2007.13640) climb the density of noisy images while the noise
falls. A blind denoiser's residual :math:`f(y) = D(y) - y` is
:math:`\sigma^2 \nabla\log p_\sigma(y)` at a level that it finds by itself:
:math:`\|f(y)\|^2 / N` of N entries is that level squared. Step t = 1, 2, ... from
:math:`y_0 \sim \mathcal N(0.5, \sigma_0^2 I)` is

.. math::
    h_t &= \frac{h_0 t}{1 + h_0 (t - 1)}, \qquad
    d_t = f(y_{t-1}), \qquad
    \sigma_t^2 = \|d_t\|^2 / N, \\
    \gamma_t^2 &= \bigl((1 - \beta h_t)^2 - (1 - h_t)^2\bigr)\, \sigma_t^2, \\
    y_t &= y_{t-1} + h_t d_t + \gamma_t z_t, \qquad z_t \sim \mathcal N(0, I)

(algorithm 1), until :math:`\sigma_t \le \sigma_L`. With beta = 1 no noise is added; with a small
beta each step lowers the noise by the share :math:`\beta h_t` only. Of measurements
:math:`m = M^\top x` (`ebmkit.sampling.inverse`), algorithm 2 takes

.. math:: d_t = (I - M M^\top) f(y_{t-1}) + M (m - M^\top y_{t-1}), \qquad
    y_0 \sim \mathcal N\bigl(0.5\,(I - M M^\top)\, e + M m,\ \sigma_0^2 I\bigr).

In the paper a chain ends at the level :math:`\sigma_L`, with that noise on it. Here it then takes
one step with h = 1 and no noise, after which the image is the denoised one and its measurements are
the given ones exactly.

**What it samples.** The prior, or the posterior, of images, with a bias. Take a Gaussian of
variance v along r of the N dimensions, and none along the others. At a level :math:`\sigma`, with
:math:`\kappa = \sigma^2 / (v + \sigma^2)`, the variance along the r tends to

.. math:: V = \sigma^2\, \frac{(1 - \beta h)^2 - (1 - h)^2}{1 - (1 - \kappa h)^2}
    \quad\text{of the exact}\quad v + \sigma^2

at a rate of :math:`\kappa h`, while the noise falls at a rate of :math:`\beta h`; so it stops
changing near :math:`\sigma^2 = \beta v`. For small h the ratio is :math:`1 - \beta`; where h has
come to 1 it is a half. As :math:`h_t` does go to 1, this is what the paper's numbers give: a
variance of 0.57 v at :math:`h_0 = \beta = 0.01`, whose chains end nearer to the mode than samples
should. ``largest_step`` keeps h small, for as many more steps. A second part of the bias is that
:math:`\|f\|^2 / N = \sigma^2 (1 - \frac rN \frac{v}{v + \sigma^2})` on average, less than the
level; that part vanishes with r / N, where images are low-dimensional.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ebmkit.errors import UserError
from ebmkit.sampling.base import Chain, Info, check_positive, per_chain
from ebmkit.sampling.inverse import Measurement
from ebmkit.sampling.langevin import normal_like, root_mean_square
from ebmkit.sampling.target import DenoiserFunction

__all__ = ["StochasticAscent"]


class StochasticAscent:
    """The sampler of Kadkhodaie & Simoncelli 2021, algorithms 1 and 2.

    Each chain finds its own level and ends when that is low enough; `Chains` then leaves it there.

    Args:
        denoiser: blind; it is given no sigma.
        first_sigma: sigma_0, noise of the start, image units; inside what the model was trained
            for.
        last_sigma: sigma_L, the level at which a chain ends, image units.
        first_step: h_0, in (0, 1].
        largest_step: bound on h_t, in (0, 1]; 1 is the paper's.
        beta: from 0, which keeps the noise forever, to 1, which adds none; in (0, 1].
        measurement: of which images; None: free.
        measured: (B, n) or (1, n), what was measured.
        most: steps after which every chain ends, whatever its level.

    Raises:
        UserError: if a number is not legal, or of measurement and measured one alone is given.
    """

    def __init__(
        self,
        denoiser: DenoiserFunction,
        first_sigma: float = 1.0,
        last_sigma: float = 0.01,
        first_step: float = 0.01,
        beta: float = 0.01,
        largest_step: float = 1.0,
        measurement: Measurement | None = None,
        measured: Tensor | None = None,
        most: int = 2000,
    ) -> None:
        check_positive("last sigma", last_sigma)
        if not first_sigma > last_sigma:
            raise UserError(
                f"the noise must fall: first sigma {first_sigma:g} is not above last sigma "
                f"{last_sigma:g}"
            )
        for name, share in (
            ("first step", first_step),
            ("beta", beta),
            ("largest step", largest_step),
        ):
            if not 0 < share <= 1:
                raise UserError(f"{name} {share} must be above 0 and at most 1")
        if most < 1:
            raise UserError(f"{most} steps move no chain: take 1 or more")
        if (measurement is None) != (measured is None):
            raise UserError("a measurement and what was measured belong together: give both")
        self.denoiser = denoiser
        self.first_sigma, self.last_sigma = first_sigma, last_sigma
        self.first_step, self.beta, self.largest_step = first_step, beta, largest_step
        self.measurement, self.measured = measurement, measured
        self.steps = most

    def start(
        self, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Where chains of ``shape`` (B, C, H, W) begin: gray, or what was measured, with noise."""
        gray = torch.full(shape, 0.5, dtype=dtype, device=generator.device)
        if self.measurement is not None and self.measured is not None:
            measured = self.measured.to(gray).expand(len(gray), -1)
            gray = self.measurement.impose(gray, measured)
        return gray + self.first_sigma * normal_like(gray, generator)

    def init(self, x: Tensor) -> Chain:
        """Chains that start at ``x`` (B, ...), images with noise of the first level."""
        return Chain(x, 0)

    def step(self, state: Chain, generator: torch.Generator) -> tuple[Chain, Info]:
        """Up the density with noise, or, where the level is low enough, to the clean image."""
        y, t = state.x, state.step + 1
        change = self.denoiser(y) - y
        if self.measurement is not None and self.measured is not None:
            change = self.measurement.impose(change, self.measured - self.measurement.measure(y))
        sigma = root_mean_square(change)
        h = min(self.largest_step, self.first_step * t / (1 + self.first_step * (t - 1)))
        gamma = ((1 - self.beta * h) ** 2 - (1 - h) ** 2) ** 0.5 * sigma
        moved = y + h * change + per_chain(gamma, y) * normal_like(y, generator)
        finished = (sigma <= self.last_sigma) | (t >= self.steps)
        moved = torch.where(per_chain(finished, y), y + change, moved)  # type: ignore[arg-type]
        info = Info(root_mean_square(moved - y), sigma=sigma, finished=finished)
        return Chain(moved, t), info
