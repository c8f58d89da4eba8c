r"""Denoise images of any size in bounded memory.

The score of a large image is a weighted mean of the scores of overlapping crops,

.. math:: s(y) = \frac{\sum_t w_t\, s(y_t)}{\sum_t w_t}

with weights :math:`w_t` that fall linearly to 0 over the overlap. Crops have twice the training
size and overlap by half, as in the model's log-density of large images (`ebmkit.models.joint`,
"tiles"). The result is nearly the gradient of that log-density, but smoother, and only a few crops
are in memory at a time. The noise level :math:`\hat\sigma = \sqrt d/\|s\|`, calibrated
(`ebmkit.blind`), if none is given, and :math:`D(y) = y + \sigma^2 s(y)` are computed from this
score. For plain denoisers and gradient-step denoisers, :math:`D(y) - y` is averaged instead.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ebmkit.blind import calibrated, reliability_warnings
from ebmkit.energy import ScoreModel, sigma_of_score, tweedie
from ebmkit.errors import UserError
from ebmkit.noise import require_sigma

TILE = 256
"""Crop size, in pixels, if the training size is unknown."""

BATCH_PIXELS = 128 * 128
"""Number of pixels in a batch of crops."""

Progress = Callable[[int, int], None]


class Denoised(NamedTuple):
    """A denoised image (C, H, W), not clipped, and the noise level, given or estimated.

    ``warnings`` say why the result is unreliable, if sigma was estimated (`ebmkit.blind`).
    """

    image: Tensor
    sigma: float
    warnings: tuple[str, ...] = ()


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
        y: the noisy image (C, H, W), image units; or an 8-bit tensor, NumPy array (also (H, W, C))
            or PIL image (`ebmkit.inputs.image_batch`).
        sigma: noise level of ``y``, image units; None: estimated from the score of the whole image.
        c: label, for the class-conditional denoiser.
        tile: crop size, pixels; None: twice the training size, or `TILE` for plain denoisers and
            gradient-step denoisers. Smaller images are processed as one crop.
        overlap: overlap of crops, pixels; None: half a crop.
        progress: called with (crops done, number of crops).

    Raises:
        UserError: if channels or label do not fit the model, or it needs sigma and none is given.
    """
    if model.noise_conditional:
        require_sigma(sigma)
    batch, sigma, _ = model.inputs(y[None] if isinstance(y, Tensor) else y, sigma, c)
    y = batch[0]
    if model.ignores_sigma or not model.is_energy_based:

        def change(crops: Tensor) -> Tensor:
            if sigma is None:
                return model.denoise_blind(crops, c)[0] - crops
            return model.denoise(crops, sigma, c) - crops

        moved = _assemble(change, y, tile or TILE, overlap, progress)
        if sigma is None:
            raw = moved.square().mean().sqrt()
            return _checked(
                model,
                y,
                y + moved,
                float(calibrated(raw[None], y[None], model.card, by_score=False)),
            )
        return Denoised(y + moved, sigma)
    score = image_score(model, y, sigma, c, tile, overlap, progress)
    if sigma is None:
        # the noise level is estimated from the unconditional score
        plain = score if c is None else image_score(model, y, None, None, tile, overlap)
        level = float(calibrated(sigma_of_score(plain[None]), y[None], model.card))
        return _checked(model, y, tweedie(y, score, level), level)
    return Denoised(tweedie(y, score, sigma), sigma)


def _checked(model: ScoreModel, y: Tensor, clean: Tensor, sigma: float) -> Denoised:
    """Result of blind denoising, with its warnings."""
    level = torch.full((1,), sigma, device=y.device)
    found = reliability_warnings(model.card, y[None], clean[None], level, model.denoises_by_score)
    return Denoised(clean, sigma, tuple(found))


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

    For the arguments see `denoise_image`.
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
    """Apply ``function`` to crops (B, C, h, w) of an image (C, H, W), and blend the results."""
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
    """Start positions of evenly spaced tiles that cover ``length``, at most ``stride`` apart.

    >>> spread(80, 32, 16)
    [0, 16, 32, 48]
    """
    count = math.ceil(max(0, length - tile) / stride) + 1
    return [round(i * (length - tile) / max(1, count - 1)) for i in range(count)]


def _fade(length: int, overlap: int, like: Tensor) -> Tensor:
    """Blending weights: 1 in the middle, falling linearly over ``overlap`` at the ends, above 0."""
    distance = torch.arange(length, dtype=like.dtype, device=like.device) + 1
    nearest = torch.minimum(distance, distance.flip(0))
    return (nearest / (overlap + 1)).clamp(max=1.0)
