r"""Denoising pictures of any size within bounded memory.

The score of a large picture is assembled from overlapping tiles whose borders fade into each other:

.. math:: s(y) = \frac{\sum_t w_t\, s(y_t)}{\sum_t w_t}

with weights :math:`w_t` that fall linearly to 0 over the overlap. Everything else follows from the
assembled score: the noise level :math:`\hat\sigma = \sqrt d/\|s\|` where none is given, and
:math:`D(y) = y + \sigma^2 s(y)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ebmkit.core import EnergyModel
from ebmkit.errors import UserError
from ebmkit.models.joint import spread

__all__ = ["Denoised", "denoise_picture", "picture_score"]

TILE = 256
OVERLAP = 32


class Denoised(NamedTuple):
    """A denoised picture (C, H, W), not clipped, and the noise level that was taken out."""

    image: Tensor
    sigma: float


@torch.no_grad()
def denoise_picture(
    model: EnergyModel,
    y: Tensor,
    sigma: float | None = None,
    c: int | None = None,
    tile: int = TILE,
    overlap: int = OVERLAP,
    progress: Callable[[int, int], None] | None = None,
) -> Denoised:
    """Denoise one picture of any size.

    Args:
        model: a blind or noise-conditional model.
        y: the noisy picture (C, H, W), image units.
        sigma: its noise level in image units; None: estimated from the score of the whole picture.
        c: a label, for the class-conditional denoiser.
        tile: side of the tiles; a picture no larger is done at once.
        overlap: by how much tiles overlap.
        progress: called with (tiles done, tiles in all).

    Raises:
        UserError: if channels or label do not suit the model, or it needs sigma and none is given.
    """
    if sigma is None and model.noise_conditional:
        raise UserError("this model takes the noise level as an input: give sigma")
    score = picture_score(model, y, sigma, c, tile, overlap, progress)
    if sigma is None:
        sigma = float(y.numel() ** 0.5 / score.norm())
        if c is not None:  # the level is that of the unconditional score
            plain = picture_score(model, y, None, None, tile, overlap)
            sigma = float(y.numel() ** 0.5 / plain.norm())
    return Denoised(y + sigma**2 * score, sigma)


@torch.no_grad()
def picture_score(
    model: EnergyModel,
    y: Tensor,
    sigma: float | None = None,
    c: int | None = None,
    tile: int = TILE,
    overlap: int = OVERLAP,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """grad log p(y) or grad log p(y|c) of a picture ``y`` (C, H, W), from tiles; same shape."""
    if not 0 <= overlap < tile:
        raise UserError(f"overlap {overlap} must be at least 0 and less than the tile's {tile}")
    height, width = y.shape[-2:]
    if height <= tile and width <= tile:
        return model.score(y[None], c, sigma)[0]
    tops = spread(height, min(tile, height), tile - overlap)
    lefts = spread(width, min(tile, width), tile - overlap)
    total = torch.zeros_like(y)
    weight = torch.zeros_like(y[:1])
    done = 0
    for top in tops:
        for left in lefts:
            crop = y[:, top : top + tile, left : left + tile]
            fade = _fade(crop.shape[-2], overlap, y)[:, None] * _fade(crop.shape[-1], overlap, y)
            where = (slice(None), slice(top, top + tile), slice(left, left + tile))
            total[where] += fade * model.score(crop[None], c, sigma)[0]
            weight[where] += fade
            done += 1
            if progress is not None:
                progress(done, len(tops) * len(lefts))
    return total / weight


def _fade(length: int, overlap: int, like: Tensor) -> Tensor:
    """1 in the middle, falling linearly towards both ends over ``overlap``; above 0 everywhere."""
    distance = torch.arange(length, dtype=like.dtype, device=like.device) + 1
    nearest = torch.minimum(distance, distance.flip(0))
    return (nearest / (overlap + 1)).clamp(max=1.0)
