r"""Augmentation of a batch, on its own device.

Each operation draws what torchvision would draw for every image alone, for the whole batch at once.
Flips and crops take images of any dtype (uint8 before conversion is cheapest).

MixUp and CutMix are torchvision's (``transforms.v2``, alpha = 1): one :math:`\lambda \sim U[0, 1]`
per batch, each image mixed with the one before it (the batch rolled by one),

.. math:: x'_i = w \odot x_i + (1 - w) \odot x_{i-1},

where the weight w is :math:`\lambda` everywhere for MixUp, and for CutMix 0 inside a box of area
:math:`(1 - \lambda) H W` around a uniform pixel, clipped to the image, and 1 outside. Soft labels
are mixed with the mean of w, which corrects :math:`\lambda` for the clipping.

Cutout (DeVries & Taylor 2017) paints a square over each image; its centre is uniform, so that the
square may be clipped. *Alternating* flips (Jordan 2024, arXiv 2404.00498) mirror a random half of
the images in the first epoch, the other half in the second, and so on: two epochs show each image
both ways, where independent flips show a quarter of them one way twice.

A process that holds only some images of a global batch says so by `Rows`: the draw is always that
of the global batch, so that the number of processes does not change it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torch.nn.functional import pad

from ebmkit.errors import UserError

__all__ = [
    "Augmentation",
    "Mix",
    "Rows",
    "cutmix",
    "cutout",
    "flip",
    "mixup",
    "mixup_or_cutmix",
    "padded",
    "padded_crop",
    "random_crop",
]

Mix = Literal["none", "mixup", "cutmix", "both"]
Flip = bool | Literal["alternating"]
Interval = tuple[float, float]


class Augmentation(BaseModel):
    """What is done to a batch, in this order: flip, crop, cutout, mix.

    Raises:
        UserError: if a resized crop is padded, its ranges are no ranges, or an option says how to
            do what is not done.
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
            raise UserError("crop_scale resizes and crop_padding pads: take one of them")
        if scale is not None and not 0 < scale[0] <= scale[1] <= 1:
            raise UserError(f"crop_scale {list(scale)} must rise within 0 to 1, as [0.08, 1]")
        if not 0 < ratio[0] <= ratio[1]:
            raise UserError(f"crop_ratio {list(ratio)} must rise from above 0, as [0.75, 1.333]")
        if self.crop_fill == "reflect" and not self.crop_padding:
            raise UserError("crop_fill=reflect fills a padding: set crop_padding, as 4")
        if self.mix_probability < 1 and self.mix == "none":
            raise UserError(
                f"mix_probability {self.mix_probability:g} is of mixed batches: set mix to mixup, "
                "cutmix or both"
            )
        return self


class Rows(NamedTuple):
    """Which images of a global batch a tensor holds.

    Attributes:
        total: size of the global batch.
        positions: (B,) int64, the position of each image in it, on the images' device.
    """

    total: int
    positions: Tensor


def flip(x: Tensor, generator: torch.Generator, rows: Rows | None = None) -> Tensor:
    """Mirror each image (B, C, H, W) left-right with probability 1/2."""
    return mirror(x, _draw(x, 2, generator, rows).bool())


def mirror(x: Tensor, which: Tensor) -> Tensor:
    """Mirror the images (B, C, H, W) left-right that ``which`` (B,) bool says."""
    return torch.where(which[:, None, None, None], x.flip(-1), x)


def padded(x: Tensor, padding: int, fill: str = "black") -> Tensor:
    """Add ``padding`` pixels on each side of ``x`` (B, C, H, W): black, or the image reflected."""
    if fill == "black":
        return pad(x, (padding,) * 4)
    height, width = x.shape[-2:]
    down, across = (_reflected(n, padding, x.device) for n in (height, width))
    return x[:, :, down][:, :, :, across]


def padded_crop(
    x: Tensor,
    padding: int,
    generator: torch.Generator,
    rows: Rows | None = None,
    fill: str = "black",
) -> Tensor:
    """Shift each image (B, C, H, W) by up to ``padding`` pixels each way; ``fill`` comes in."""
    return random_crop(padded(x, padding, fill), tuple(x.shape[-2:]), generator, rows)


def cutout(x: Tensor, side: int, generator: torch.Generator, rows: Rows | None = None) -> Tensor:
    """Paint a square of ``side`` pixels over each image (B, C, H, W) in its mean colour."""
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
    """Cut a uniformly placed window of ``size`` (side, or height and width) from each image."""
    height, width = (size, size) if isinstance(size, int) else size
    top = _draw(x, x.shape[2] - height + 1, generator, rows)
    left = _draw(x, x.shape[3] - width + 1, generator, rows)
    b, c = x.shape[:2]
    down = top[:, None] + torch.arange(height, device=x.device)
    across = left[:, None] + torch.arange(width, device=x.device)
    x = x.gather(2, down[:, None, :, None].expand(b, c, height, x.shape[3]))
    return x.gather(3, across[:, None, None, :].expand(b, c, height, width))


def mixup(x: Tensor, soft: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """MixUp of images (B, C, H, W) and soft labels (B, K), as torchvision's with alpha 1."""
    return _mix(x, soft, _mixup_weight(x, generator))


def cutmix(x: Tensor, soft: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """CutMix of images (B, C, H, W) and soft labels (B, K), as torchvision's with alpha 1."""
    return _mix(x, soft, _cutmix_weight(x, generator))


def mixup_or_cutmix(x: Tensor, soft: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One of the two for the whole batch, each with probability 1/2."""
    cut = torch.rand((), generator=generator, device=x.device) < 0.5
    weight_cut, weight_up = _cutmix_weight(x, generator), _mixup_weight(x, generator)
    return _mix(x, soft, torch.where(cut, weight_cut, weight_up))


def _reflected(size: int, padding: int, device: torch.device) -> Tensor:
    """Numbers of the pixels that a side of ``size``, reflected at its ends, shows."""
    numbers = torch.arange(-padding, size + padding, device=device).abs()
    return (size - 1) - ((size - 1) - numbers).abs()


def _draw(x: Tensor, below: int, generator: torch.Generator, rows: Rows | None) -> Tensor:
    """Uniform whole numbers 0 .. below - 1, one per image, (B,)."""
    total = len(x) if rows is None else rows.total
    drawn = torch.randint(below, (total,), generator=generator, device=x.device)
    return drawn if rows is None else drawn[rows.positions]


def _mixup_weight(x: Tensor, generator: torch.Generator) -> Tensor:
    lam = torch.rand((), generator=generator, device=x.device)
    return lam.expand(x.shape[-2:])


def _cutmix_weight(x: Tensor, generator: torch.Generator) -> Tensor:
    height, width = x.shape[-2:]
    lam = torch.rand((), generator=generator, device=x.device)
    centre_x = torch.randint(width, (), generator=generator, device=x.device)
    centre_y = torch.randint(height, (), generator=generator, device=x.device)
    return _outside_box(height, width, lam, centre_x, centre_y)


def _outside_box(
    height: int, width: int, lam: Tensor, centre_x: Tensor, centre_y: Tensor
) -> Tensor:
    """1 outside the box that CutMix pastes, 0 inside, (H, W); no device synchronisation."""
    half = 0.5 * (1.0 - lam.double()).sqrt()
    half_w, half_h = (half * width).floor(), (half * height).floor()
    columns = torch.arange(width, device=lam.device)
    rows = torch.arange(height, device=lam.device)
    across = (columns >= centre_x - half_w) & (columns < centre_x + half_w)
    down = (rows >= centre_y - half_h) & (rows < centre_y + half_h)
    return 1.0 - (down[:, None] & across).float()


def _mix(x: Tensor, soft: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mix with the batch rolled by one: images by ``weight`` (H, W), labels by its mean."""
    lam = weight.double().mean().to(soft.dtype)
    mixed = x.roll(1, 0) * (1.0 - weight) + x * weight
    return mixed, soft.roll(1, 0) * (1.0 - lam) + soft * lam
