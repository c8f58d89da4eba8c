r"""Denoising images of any size within bounded memory.

The score of a large image is assembled from overlapping crops whose borders fade into each other:

.. math:: s(y) = \frac{\sum_t w_t\, s(y_t)}{\sum_t w_t}

with weights :math:`w_t` that fall linearly to 0 over the overlap. The crops are twice the size that
the model was trained at and overlap by half, as in the model's own log-density of large images
(`ebmkit.models.joint`, "tiles"), of whose gradient this is a smoother copy that never holds more
than a few crops in memory. Everything else follows from the assembled score: the noise level
:math:`\hat\sigma = \sqrt d/\|s\|` where none is given, and :math:`D(y) = y + \sigma^2 s(y)`. Of a
plain denoiser, and of a gradient step, the change :math:`D(y) - y` is assembled instead.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ebmkit.energy import ScoreModel, check_sigma, sigma_of_score, tweedie
from ebmkit.errors import UserError

TILE = 256
"""Side of the crops where the model does not say what it was trained at."""

BATCH_PIXELS = 128 * 128
"""Pixels of crops that go through the network at once."""

Progress = Callable[[int, int], None]


class Denoised(NamedTuple):
    """A denoised image (C, H, W), not clipped, and the noise level that was taken out."""

    image: Tensor
    sigma: float


@torch.no_grad()
def denoise_image(
    model: ScoreModel,
    y: Tensor,
    sigma: float | None = None,
    c: int | None = None,
    tile: int | None = None,
    overlap: int | None = None,
    progress: Progress | None = None,
) -> Denoised:
    """Denoise one image of any size.

    Args:
        model: a blind or noise-conditional model.
        y: the noisy image (C, H, W), image units.
        sigma: its noise level in image units; None: estimated from the score of the whole image.
        c: a label, for the class-conditional denoiser.
        tile: side of the crops; None: twice the trained size, or `TILE` for plain denoisers and
            gradient steps. An image no larger is done at once.
        overlap: by how much crops overlap; None: half a crop.
        progress: called with (crops done, crops in all).

    Raises:
        UserError: if channels or label do not suit the model, or it needs sigma and none is given.
    """
    if sigma is None and model.noise_conditional:
        raise UserError("this model takes the noise level as an input: give sigma")
    check_sigma(sigma)
    if model.ignores_sigma or not model.is_energy_based:

        def change(crops: Tensor) -> Tensor:
            return model.denoise(crops, sigma, c) - crops

        moved = _assemble(change, y, tile or TILE, overlap, progress)
        if sigma is None:
            sigma = float(moved.square().mean().sqrt())
        return Denoised(y + moved, sigma)
    score = image_score(model, y, sigma, c, tile, overlap, progress)
    if sigma is None:
        # the level is that of the unconditional score
        plain = score if c is None else image_score(model, y, None, None, tile, overlap)
        sigma = float(sigma_of_score(plain[None]))
    return Denoised(tweedie(y, score, sigma), sigma)


@torch.no_grad()
def image_score(
    model: ScoreModel,
    y: Tensor,
    sigma: float | None = None,
    c: int | None = None,
    tile: int | None = None,
    overlap: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """grad log p(y) or grad log p(y|c) of an image ``y`` (C, H, W), from crops; same shape.

    The arguments are those of `denoise_image`.
    """
    if tile is None:
        size = model.card.image_size if model.card else None
        tile = 2 * max(size) if size else TILE
    return _assemble(lambda crops: model.score(crops, sigma, c), y, tile, overlap, progress)


def _assemble(
    function: Callable[[Tensor], Tensor],
    y: Tensor,
    tile: int,
    overlap: int | None,
    progress: Progress | None,
) -> Tensor:
    """``function`` of the crops (B, C, h, w) of an image (C, H, W), faded into each other."""
    overlap = tile // 2 if overlap is None else overlap
    if not 0 <= overlap < tile:
        raise UserError(f"overlap {overlap} must be at least 0 and less than the tile's {tile}")
    height, width = min(tile, y.shape[-2]), min(tile, y.shape[-1])
    corners = list(
        itertools.product(
            spread(y.shape[-2], height, tile - overlap), spread(y.shape[-1], width, tile - overlap)
        )
    )
    fade = _fade(height, overlap, y)[:, None] * _fade(width, overlap, y)
    total, weight = torch.zeros_like(y), torch.zeros_like(y[:1])
    batch = max(1, BATCH_PIXELS // (height * width))
    for start in range(0, len(corners), batch):
        some = corners[start : start + batch]
        crops = torch.stack([y[:, t : t + height, l : l + width] for t, l in some])
        for (top, left), part in zip(some, function(crops), strict=True):
            total[:, top : top + height, left : left + width] += fade * part
            weight[:, top : top + height, left : left + width] += fade
        if progress is not None:
            progress(start + len(some), len(corners))
    return total / weight


def spread(length: int, tile: int, stride: int) -> list[int]:
    """Starts of tiles of size ``tile`` at most ``stride`` apart that cover 0 .. length evenly.

    >>> spread(80, 32, 16)
    [0, 16, 32, 48]
    """
    count = math.ceil(max(0, length - tile) / stride) + 1
    return [round(i * (length - tile) / max(1, count - 1)) for i in range(count)]


def _fade(length: int, overlap: int, like: Tensor) -> Tensor:
    """1 in the middle, falling linearly towards both ends over ``overlap``; above 0 everywhere."""
    distance = torch.arange(length, dtype=like.dtype, device=like.device) + 1
    nearest = torch.minimum(distance, distance.flip(0))
    return (nearest / (overlap + 1)).clamp(max=1.0)
