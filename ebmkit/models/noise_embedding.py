r"""Embedding of the noise level, for networks with sigma as an input.

With :math:`t = \log\sigma` and F frequencies :math:`\omega_k`, geometric from 1/4 to 4,

.. math::
    e(\sigma) = \operatorname{gelu}\bigl(W\,[\cos\omega_1 t, \sin\omega_1 t, \dots,
    \cos\omega_F t, \sin\omega_F t] + b\bigr), \qquad
    (a_l, b_l) = A_l\,e(\sigma), \qquad
    h_l \leftarrow (1 + a_l)\,\operatorname{norm}(h_l) + b_l .

The last is the scale-shift (adaptive group norm, Dhariwal & Nichol, arXiv 2105.05233) after norm l.
Periods are 1.6 to 25 in natural logarithms of sigma: the lowest tells all levels from 0.001 to 40
apart, the highest a change by a factor of about 1.2, and the derivative by :math:`\log\sigma`,
which the time score needs, stays of order one. All :math:`A_l` are 0 at the start, so a
noise-conditional network begins as the blind network of the same weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ebmkit.compute import to_weights, upcast, without_autocast
from ebmkit.models.layers import GELU

FREQUENCIES = 16
LOWEST = 1e-4
"""Noise level, image units, used in place of lower ones, clean images included."""


class NoiseEmbedding(nn.Module):
    """Embedding of noise levels: (B,) image units to (B, width).

    Args:
        width: number of entries of the embedding.
    """

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        frequencies = torch.logspace(-2, 2, FREQUENCIES, base=2.0)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.layer = nn.Linear(2 * FREQUENCIES, width)
        self.activation = GELU()

    def forward(self, sigma: Tensor) -> Tensor:
        """Embed ``sigma`` (B,); differentiable by it."""
        with without_autocast(sigma):
            phase = upcast(sigma).clamp_min(LOWEST).log()[:, None] * self.frequencies.to(sigma)
            features = torch.cat([phase.cos(), phase.sin()], dim=1)
        embedding: Tensor = self.activation(self.layer(to_weights(features, self)))
        return embedding


def scale_shift(width: int, channels: int) -> nn.Linear:
    """A layer from an embedding (B, width) to scales and shifts (B, 2 * channels), 0 at first."""
    layer = nn.Linear(width, 2 * channels, bias=False)
    nn.init.zeros_(layer.weight)
    return layer
