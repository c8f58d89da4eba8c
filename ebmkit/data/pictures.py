"""Pictures of any size, each as it is: the sets that denoisers are compared on.

Set12 and BSD68 hold pictures of several sizes, which no batch can. A `PictureSet` gives them one at
a time, and is for evaluation alone; train on a ``folder``, which cuts crops of one size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ebmkit.data.finding import SUFFIXES, find_images
from ebmkit.data.folders import readable
from ebmkit.data.images import picture_header
from ebmkit.data.imagesets import Faults, Split, to_floats
from ebmkit.data.reading import FolderReader, as_tensor
from ebmkit.data.streamed import StreamedSet
from ebmkit.errors import UserError

__all__ = ["PictureSet", "load_pictures"]


class _WholeReader(FolderReader):
    """Reads each picture at its own size; several at a time only where these agree."""

    def _one(self, row: int) -> Tensor:
        image: Image.Image = self._open(row)
        return as_tensor(image, self.channels)


class PictureSet(StreamedSet):
    """Pictures without labels, one to a batch; ``image_size`` is the largest height and width."""

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """In order, one at a time whatever ``size``: (1, C, H, W) in [0, 1], and None.

        Raises:
            UserError: if a picture cannot be read.
        """
        for index in range(len(self)):
            images, _ = self.read([index])
            yield to_floats(images), None


def load_pictures(root: Path, split: Split, faults: Faults | None = None) -> PictureSet:
    """The pictures in the folder ``root``, sorted by name.

    Raises:
        UserError: if it is no folder or holds no pictures, gray and colour ones are mixed, one
            cannot be read, or they are asked for to train on.
    """
    if split != "test":
        raise UserError(
            "data set 'pictures' is to evaluate on: train on data set 'folder', with --image-size "
            "or streams.denoise.augmentation.crop_size"
        )
    if not root.is_dir():
        raise UserError(f"{str(root)!r} is not a folder: name a folder of pictures by --data-dir")
    faults = faults or Faults()
    names = find_images(root, root, faults.follow, deep=False)
    if not names:
        raise UserError(f"{str(root)!r} holds no pictures: put files ending in {SUFFIXES} there")
    lost: list[str] = []
    if faults.skip:
        names, lost = readable(root, names)
    headers = [picture_header(root / name) for name in names]
    channels = {count for count, _ in headers}
    if len(channels) > 1:
        odd = next(n for n, (count, _) in zip(names, headers, strict=True) if count == 1)
        raise UserError(f"{str(root / odd)!r} is gray among pictures in colour: keep them apart")
    size = max(h for _, (h, _) in headers), max(w for _, (_, w) in headers)
    reader = _WholeReader(root, names, channels.pop(), size)
    rows: Sequence[int] = range(len(names))
    images = PictureSet(
        "pictures",
        split,
        reader,
        torch.as_tensor(rows),
        reader.channels,
        size,
        skip=faults.skip,
        left_out=tuple(lost),
    )
    return images.readable() if faults.skip else images
