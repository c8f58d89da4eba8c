"""Image files as uint8 tensors: at one size, or as crops of the whole picture.

Sets of one size resize the shorter side (bicubic) and cut the middle. Whole pictures follow
torchvision's protocol for ImageNet: antialiased bilinear resizing, the shorter side to 256 and the
middle 224 for evaluation, `RandomResizedCrop` of the file's own pixels for training.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ebmkit.data.crops import Cut, crop_boxes
from ebmkit.data.images import MAX_PIXELS_IN_SET, open_picture
from ebmkit.data.imagesets import HINT
from ebmkit.errors import UserError

__all__ = ["FolderReader", "as_tensor", "to_pixels"]


class FolderReader:
    """Reads image files by number, at one size and number of channels.

    Args:
        root: what the names are relative to.
        names: of the files.
        channels: 1 or 3; gray files are repeated to 3.
        size: height and width to bring images to.
        side: what to bring the shorter side of pictures to before anything is cut out (antialiased
            bilinear, as torchvision); None: just what ``size`` needs (bicubic).
    """

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        channels: int,
        size: tuple[int, int],
        side: int | None = None,
    ) -> None:
        self.root, self.channels, self.size = root, channels, size
        self.whole = side is not None
        self.side = side or min(size)
        # One buffer instead of many objects, whose reference counts would make workers copy them.
        self._names = np.array([os.fsencode(name) for name in names])

    def __len__(self) -> int:
        return len(self._names)

    def name(self, row: int) -> str:
        """The file of ``row``, relative to the root."""
        return os.fsdecode(self._names[row])

    def read(self, rows: Sequence[int]) -> Tensor:
        """Images (B, C, H, W) uint8.

        Raises:
            UserError: naming the file that cannot be read.
        """
        return torch.stack([self._one(row) for row in rows])

    def read_cut(self, rows: Sequence[int], cut: Cut) -> Tensor:
        """Crops (B, C, *cut.crop.size) uint8 of the whole pictures.

        A window is cut from the picture with its shorter side brought to ``side``, a resized crop
        from the picture as it is in the file.

        Raises:
            UserError: naming the file that cannot be read.
        """
        return torch.stack([self._crop(row, cut, i) for i, row in enumerate(rows)])

    def _one(self, row: int) -> Tensor:
        from torchvision.transforms.v2 import functional

        image = self._open(row)
        if not self.whole:
            return to_pixels(image, self.channels, self.size)
        middle: Tensor = functional.center_crop(self._brought_to_side(image), list(self.size))
        return middle

    def _crop(self, row: int, cut: Cut, number: int) -> Tensor:
        from torchvision.transforms.v2 import functional

        image, size = self._open(row), cut.crop.size
        own = cut.of(number)
        if cut.crop.scale is None:
            pixels = self._brought_to_side(image)
            top, left, height, width = crop_boxes(pixels.shape[1], pixels.shape[2], own)[0].tolist()
            return pixels[:, top : top + height, left : left + width]
        pixels = as_tensor(image, self.channels)
        box = crop_boxes(pixels.shape[1], pixels.shape[2], own)[0].tolist()
        resized: Tensor = functional.resized_crop(pixels, *box, list(size), antialias=True)
        return resized

    def _brought_to_side(self, image: Image.Image) -> Tensor:
        from torchvision.transforms.v2 import functional

        pixels = as_tensor(image, self.channels)
        resized: Tensor = functional.resize(pixels, [self.side], antialias=True)
        return resized

    def _open(self, row: int) -> Image.Image:
        path = self.root / self.name(row)
        try:
            opened = open_picture(path, MAX_PIXELS_IN_SET)
        except UserError as error:
            raise UserError(f"{error}{HINT}") from None
        if opened.is_16_bit:
            raise UserError(f"{str(path)!r} has 16 bits: convert the images of a data set to 8")
        if self.channels == 1 and opened.image.mode == "RGB":
            raise UserError(f"{str(path)!r} is in colour among gray images: convert it to gray")
        return opened.image


def to_pixels(image: Image.Image, channels: int, size: tuple[int, int]) -> Tensor:
    """A Pillow image as uint8 (channels, *size): shorter side resized (bicubic), middle cut out."""
    image = image.convert("L" if channels == 1 else "RGB")
    height, width = size
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    return as_tensor(image, channels)


def as_tensor(image: Image.Image, channels: int) -> Tensor:
    """A Pillow image as uint8 (channels, H, W)."""
    pixels = torch.from_numpy(np.array(image.convert("L" if channels == 1 else "RGB")))
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1).contiguous()
