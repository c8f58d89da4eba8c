r"""Batched augmentation on the device of the images.

Each operation follows the distribution of its torchvision counterpart, but draws the parameters of
all images of a batch at once. Flips and crops accept any dtype; uint8 images are the cheapest.

**MixUp and CutMix** as in torchvision (``transforms.v2``, alpha = 1): one
:math:`\lambda \sim U[0, 1]` per batch; each image is mixed with the previous one,

.. math:: x'_i = w \odot x_i + (1 - w) \odot x_{i-1},

where w is :math:`\lambda` everywhere for MixUp. For CutMix, w is 0 inside a box of area
:math:`(1 - \lambda) H W` around a uniform pixel, clipped to the image, and 1 outside. Soft labels
are mixed with the mean of w, which corrects :math:`\lambda` for the clipping.

**Cutout** (DeVries & Taylor 2017) fills a square with a uniform centre, so it may be clipped.

**Alternating flips** (Jordan 2024, arXiv 2404.00498) mirror a random half of the images in the
first epoch, the other half in the second, and so on. Two epochs show each image in both
orientations; independent flips show half of the images twice in the same one.

A process that holds a part of a global batch passes `Rows`: random numbers are always drawn for
the whole global batch, so the number of processes does not change them.

**Crops with boxes drawn on the CPU** (`Cut`): a box is computed from numbers
:math:`u_0, \dots, u_{21} \sim U[0, 1)` and the image size, which only the process that reads the
image may know. The distribution is that of `torchvision.transforms.v2.RandomResizedCrop`: ten
attempts draw a share of the area, uniform in ``scale``, and an aspect ratio, log-uniform in
``ratio``. The first box that fits is placed uniformly; if none fits, the largest centred box with
an allowed ratio is used. Attempt k uses :math:`u_{2k}, u_{2k+1}`, the position
:math:`u_{20}, u_{21}`. Images of one size are cropped and resized together: the antialiased
bilinear filter is separable, so one matrix multiplies each image from the left and one from the
right.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torch.nn.functional import pad

from ebmkit.errors import UserError

RANDOM_NUMBERS_PER_CROP = 22
"""Random numbers per box: two for each of ten attempts, and two for the position."""

Mix = Literal["none", "mixup", "cutmix", "both"]
Flip = bool | Literal["alternating"]
Interval = tuple[float, float]


class Augmentation(BaseModel):
    """Settings of the augmentation, applied in this order: flip, crop, cutout, mix.

    Raises:
        UserError: if a resized crop is padded, a range is invalid, or an option applies to an
            operation that is off.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    flip: Flip = Field(
        False,
        description="mirror left-right: true (with probability 1/2) or alternating (every "
        "other epoch)",
    )
    crop_padding: int = Field(0, ge=0, description="pixels added on each side before a random crop")
    crop_fill: Literal["black", "reflect"] = Field(
        "black", description="content of the padding: black or reflect"
    )
    crop_size: int | None = Field(
        None,
        ge=1,
        description="height and width of the random crop, pixels; null: the size of the image",
    )
    crop_scale: Interval | None = Field(
        None,
        description="range of area shares of a random resized crop, for example [0.08, 1]; "
        "null: crop without resizing",
    )
    crop_ratio: Interval = Field(
        (3 / 4, 4 / 3), description="range of width / height of a random resized crop"
    )
    cutout: int = Field(
        0,
        ge=0,
        description="cutout: side in pixels of a square that is filled with the mean colour "
        "of the image",
    )
    mix: Mix = Field(
        "none",
        description="mixup, cutmix, or both (one of the two per batch, with equal probability)",
    )
    mix_probability: float = Field(1.0, gt=0, le=1, description="share of batches that are mixed")

    @model_validator(mode="after")
    def _check(self) -> Augmentation:
        scale, ratio = self.crop_scale, self.crop_ratio
        if scale is not None and self.crop_padding:
            raise UserError("crop_scale and crop_padding exclude each other: set only one of them")
        if scale is not None and not 0 < scale[0] <= scale[1] <= 1:
            raise UserError(f"crop_scale {list(scale)} must rise within 0 to 1, like [0.08, 1]")
        if not 0 < ratio[0] <= ratio[1]:
            raise UserError(f"crop_ratio {list(ratio)} must rise from above 0, like [0.75, 1.333]")
        if self.crop_fill == "reflect" and not self.crop_padding:
            raise UserError("crop_fill=reflect needs a padding: set crop_padding, for example to 4")
        if self.mix_probability < 1 and self.mix == "none":
            raise UserError(
                f"mix_probability {self.mix_probability:g} needs mixed batches: set mix to mixup, "
                "cutmix or both"
            )
        return self


class Rows(NamedTuple):
    """Positions of the images of a tensor in the global batch.

    Attributes:
        total: size of the global batch.
        positions: (B,) int64, position of each image in it, on the device of the images.
    """

    total: int
    positions: Tensor


def flip(x: Tensor, generator: torch.Generator, rows: Rows | None = None) -> Tensor:
    """Mirror each image (B, C, H, W) left-right with probability 1/2."""
    return mirror(x, _draw(x, 2, generator, rows).bool())


def mirror(x: Tensor, which: Tensor) -> Tensor:
    """Mirror left-right the images (B, C, H, W) where ``which`` (B,) bool is true."""
    return torch.where(which[:, None, None, None], x.flip(-1), x)


def pad_images(x: Tensor, padding: int, fill: str = "black") -> Tensor:
    """Pad ``x`` (B, C, H, W) by ``padding`` pixels on each side, with black or by reflection."""
    if fill == "black":
        return pad(x, (padding,) * 4)
    wide = x if x.is_floating_point() else x.float()  # PyTorch does not reflect integers
    return pad(wide, (padding,) * 4, "reflect").to(x.dtype)


def cutout(x: Tensor, side: int, generator: torch.Generator, rows: Rows | None = None) -> Tensor:
    """Fill a square of ``side`` pixels in each image (B, C, H, W) with its mean colour."""
    height, width = x.shape[-2:]
    top = _draw(x, height, generator, rows) - side // 2
    left = _draw(x, width, generator, rows) - side // 2
    down = torch.arange(height, device=x.device) - top[:, None]
    across = torch.arange(width, device=x.device) - left[:, None]
    inside = ((down >= 0) & (down < side))[:, None, :, None]
    inside = inside & ((across >= 0) & (across < side))[:, None, None, :]
    return torch.where(inside, x.mean(dim=(2, 3), keepdim=True), x)


def random_crop(
    x: Tensor, size: int | tuple[int, ...], generator: torch.Generator, rows: Rows | None = None
) -> Tensor:
    """Crop each image at a uniform position to ``size`` (side, or height and width)."""
    height, width = (size, size) if isinstance(size, int) else size
    top = _draw(x, x.shape[2] - height + 1, generator, rows)
    left = _draw(x, x.shape[3] - width + 1, generator, rows)
    b, c = x.shape[:2]
    down = top[:, None] + torch.arange(height, device=x.device)
    across = left[:, None] + torch.arange(width, device=x.device)
    x = x.gather(2, down[:, None, :, None].expand(b, c, height, x.shape[3]))
    return x.gather(3, across[:, None, None, :].expand(b, c, height, width))


def mix(x: Tensor, soft: Tensor, kind: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mix a batch with itself, rolled by one, as torchvision does with alpha 1.

    Args:
        x: images (B, C, H, W).
        soft: label probabilities (B, K).
        kind: mixup, cutmix, or both (one of the two per batch, with equal probability).
        generator: random generator on the device of the images.
    """
    if kind == "both":
        cut = torch.rand((), generator=generator, device=x.device) < 0.5
        weight_cut, weight_up = _cutmix_weight(x, generator), _mixup_weight(x, generator)
        weight = torch.where(cut, weight_cut, weight_up)
    else:
        weight = (_cutmix_weight if kind == "cutmix" else _mixup_weight)(x, generator)
    lam = weight.double().mean().to(soft.dtype)
    mixed = x.roll(1, 0) * (1.0 - weight) + x * weight
    return mixed, soft.roll(1, 0) * (1.0 - lam) + soft * lam


def _draw(x: Tensor, below: int, generator: torch.Generator, rows: Rows | None) -> Tensor:
    """Uniform integers 0 .. below - 1, one per image, (B,)."""
    total = len(x) if rows is None else rows.total
    drawn = torch.randint(below, (total,), generator=generator, device=x.device)
    return drawn if rows is None else drawn[rows.positions]


def _mixup_weight(x: Tensor, generator: torch.Generator) -> Tensor:
    lam = torch.rand((), generator=generator, device=x.device)
    return lam.expand(x.shape[-2:])


def _cutmix_weight(x: Tensor, generator: torch.Generator) -> Tensor:
    """CutMix weights (H, W), 0 inside the pasted box and 1 outside; no device synchronisation."""
    height, width = x.shape[-2:]
    lam = torch.rand((), generator=generator, device=x.device)
    centre_x = torch.randint(width, (), generator=generator, device=x.device)
    centre_y = torch.randint(height, (), generator=generator, device=x.device)
    half = 0.5 * (1.0 - lam.double()).sqrt()
    half_w, half_h = (half * width).floor(), (half * height).floor()
    columns = torch.arange(width, device=lam.device)
    rows = torch.arange(height, device=lam.device)
    across = (columns >= centre_x - half_w) & (columns < centre_x + half_w)
    down = (rows >= centre_y - half_h) & (rows < centre_y + half_h)
    return 1.0 - (down[:, None] & across).float()


class Cut(NamedTuple):
    """The random crops of a batch: drawn numbers and the distribution of the boxes.

    Attributes:
        draws: (B, RANDOM_NUMBERS_PER_CROP) float64, uniform in [0, 1).
        size: height and width of the output, pixels.
        scale: smallest and largest share of the image area; None: crop to ``size`` without
            resizing.
        ratio: smallest and largest width / height.
    """

    draws: Tensor
    size: tuple[int, int]
    scale: Interval | None = None
    ratio: Interval = (3 / 4, 4 / 3)

    def of(self, number: int) -> Cut:
        """The crop of image ``number``, as a batch of one."""
        return self._replace(draws=self.draws[number : number + 1])


def crop_boxes(height: int, width: int, cut: Cut) -> Tensor:
    """Boxes (top, left, height, width) in images of one size, (B, 4) int64.

    Args:
        height, width: size of the images, pixels; at least ``cut.size`` if ``cut.scale`` is None.
        cut: drawn numbers and distribution.
    """
    u, size, scale, ratio = cut
    if scale is None:
        h, w = (torch.full(u.shape[:1], side) for side in size)
    else:
        h, w = _shapes(height, width, u, scale, ratio)
    place = u[:, -2:] * torch.stack([height - h + 1, width - w + 1], 1)
    top, left = place.long().unbind(1)
    if scale is not None:
        none = (h == 0).nonzero()[:, 0]  # no attempt fits
        h[none], w[none] = _largest(height, width, ratio)
        top[none], left[none] = (height - h[none]) // 2, (width - w[none]) // 2
    return torch.stack([top, left, h, w], 1)


def resize_boxes(images: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop uint8 images (B, C, H, W) to ``boxes`` (B, 4) and resize the crops to ``size``.

    Batched `torchvision.transforms.v2.functional.resized_crop` with antialiasing, equal up to one
    grey level of rounding. Runs on the device of the images.
    """
    top, left, h, w = boxes.to(images.device).unbind(1)
    down = _filter(top, h, images.shape[2], size[0])
    across = _filter(left, w, images.shape[3], size[1])
    resized = down[:, None] @ images.float() @ across[:, None].mT
    return resized.round().clamp(0, 255).to(torch.uint8)


def _shapes(
    height: int, width: int, u: Tensor, scale: Interval, ratio: Interval
) -> tuple[Tensor, Tensor]:
    """Height and width of the first attempt that fits, (B,) each; 0 if none fits."""
    shares, ratios = u[:, :-2:2], u[:, 1:-2:2]
    area = height * width * (scale[0] + (scale[1] - scale[0]) * shares)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = (low + (high - low) * ratios).exp()
    w, h = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)  # 0 where none fits
    any_fits = fits.any(1)
    return h.gather(1, first)[:, 0] * any_fits, w.gather(1, first)[:, 0] * any_fits


def _largest(height: int, width: int, ratio: Interval) -> tuple[int, int]:
    """Height and width of the largest box with an allowed ratio."""
    if width / height < ratio[0]:
        return round(width / ratio[0]), width
    if width / height > ratio[1]:
        return height, round(height * ratio[1])
    return height, width


def _filter(start: Tensor, length: Tensor, side: int, out: int) -> Tensor:
    """Matrices (B, out, side) that resize an interval of ``side`` pixels to ``out`` pixels."""
    scale = (length / out)[:, None, None]
    centre = (torch.arange(out, device=start.device)[:, None] + 0.5) * scale
    pixel = torch.arange(side, device=start.device) - start[:, None, None]
    weight = (1 - (pixel + 0.5 - centre).abs() / scale.clamp(min=1)).clamp(min=0)
    weight = weight * ((pixel >= 0) & (pixel < length[:, None, None]))
    return weight / weight.sum(2, keepdim=True)
