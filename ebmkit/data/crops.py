r"""Random crops whose boxes are drawn on the host: torchvision's random resized crop, and windows.

A box is resolved from numbers :math:`u_0, \dots, u_{21} \sim U[0, 1)` and the size of the picture,
which only the process that reads it may know. The law is that of
`torchvision.transforms.v2.RandomResizedCrop`: ten attempts at a share of the area, uniform in
``scale``, and an aspect ratio, log-uniform in ``ratio``; the first that fits is placed uniformly;
if none does, the largest box in the middle whose ratio is allowed is taken. Attempt k uses
:math:`u_{2k}, u_{2k+1}`, the place :math:`u_{20}, u_{21}`.

Images of one size are cut and resized all at once: the antialiased bilinear filter is separable, so
each image is multiplied by one matrix from the left and one from the right.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["DRAWS", "Crop", "Cut", "crop_boxes", "resize_boxes"]

_ATTEMPTS = 10

DRAWS = 2 * _ATTEMPTS + 2
"""Numbers that a box is resolved from."""


class Crop(NamedTuple):
    """A law of crops.

    Attributes:
        size: height and width of what comes out, pixels.
        scale: smallest and largest share of the picture's area; None: a window of ``size``.
        ratio: smallest and largest width by height.
    """

    size: tuple[int, int]
    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] = (3 / 4, 4 / 3)


class Cut(NamedTuple):
    """The crops of a batch: their law, and the numbers (B, DRAWS) float64 that were drawn."""

    crop: Crop
    draws: Tensor

    def of(self, number: int) -> Cut:
        """That of one picture of the batch."""
        return Cut(self.crop, self.draws[number : number + 1])


def crop_boxes(height: int, width: int, cut: Cut) -> Tensor:
    """Boxes (top, left, height, width) in pictures of one size, (B, 4) int64.

    Args:
        height, width: of the pictures, pixels; at least the crop's for a window.
        cut: law and numbers drawn.
    """
    crop, u = cut
    if crop.scale is None:
        h = torch.full(u.shape[:1], crop.size[0])
        w = torch.full(u.shape[:1], crop.size[1])
    else:
        h, w = _shapes(height, width, u, crop.scale, crop.ratio)
    place = u[:, -2:] * torch.stack([height - h + 1, width - w + 1], 1)
    top, left = place.long().unbind(1)
    if crop.scale is not None:
        none = (h == 0).nonzero()[:, 0]  # no attempt fitted
        h[none], w[none] = _largest(height, width, crop.ratio)
        top[none], left[none] = (height - h[none]) // 2, (width - w[none]) // 2
    return torch.stack([top, left, h, w], 1)


def resize_boxes(images: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut ``boxes`` (B, 4) out of uint8 images (B, C, H, W) and bring them to ``size``.

    As `torchvision.transforms.v2.functional.resized_crop` with antialiasing does one by one, up to
    one grey level of rounding. On the images' device.
    """
    top, left, h, w = boxes.to(images.device).unbind(1)
    down = _filter(top, h, images.shape[2], size[0])
    across = _filter(left, w, images.shape[3], size[1])
    resized = down[:, None] @ images.float() @ across[:, None].mT
    return resized.round().clamp(0, 255).to(torch.uint8)


def _shapes(
    height: int, width: int, u: Tensor, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Height and width of the first attempt that fits, (B,) each; 0 where none does."""
    shares, ratios = u[:, :-2:2], u[:, 1:-2:2]
    area = height * width * (scale[0] + (scale[1] - scale[0]) * shares)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = (low + (high - low) * ratios).exp()
    w, h = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)  # 0 where none fits
    any_fits = fits.any(1)
    return h.gather(1, first)[:, 0] * any_fits, w.gather(1, first)[:, 0] * any_fits


def _largest(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int]:
    """Height and width of the largest box whose ratio is allowed."""
    if width / height < ratio[0]:
        return round(width / ratio[0]), width
    if width / height > ratio[1]:
        return height, round(height * ratio[1])
    return height, width


def _filter(start: Tensor, length: Tensor, side: int, out: int) -> Tensor:
    """Matrices (B, out, side) that resize intervals of a line of ``side`` pixels to ``out``."""
    scale = (length / out)[:, None, None]
    centre = (torch.arange(out, device=start.device)[:, None] + 0.5) * scale
    pixel = torch.arange(side, device=start.device) - start[:, None, None]
    weight = (1 - (pixel + 0.5 - centre).abs() / scale.clamp(min=1)).clamp(min=0)
    weight = weight * ((pixel >= 0) & (pixel < length[:, None, None]))
    return weight / weight.sum(2, keepdim=True)
