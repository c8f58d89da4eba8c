"""Data sets of images on disk, read when they are asked for; the surface of `ImageSet`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from ebmkit.data.crops import Cut
from ebmkit.data.imagesets import HINT, ImageSet, Split, check_labels, evenly, to_floats
from ebmkit.errors import UserError

__all__ = ["AnyImages", "PictureReader", "RowReader", "StreamedSet", "origin"]

MOST_IN_A_ROW = 100
"""Images that may be skipped one after the other."""


class RowReader(Protocol):
    """Reads images of a data set on disk by their row. Picklable; opens files in the process that
    reads."""

    def read(self, rows: Sequence[int]) -> Tensor:
        """Images (B, C, H, W) uint8.

        Raises:
            UserError: if one cannot be read.
        """
        ...


class PictureReader(RowReader, Protocol):
    """Reads crops of whole pictures, which may differ in size.

    Attributes:
        side: shorter side that pictures are brought to before a window is cut from them.
    """

    side: int

    def read_cut(self, rows: Sequence[int], cut: Cut) -> Tensor:
        """Crops (B, C, *cut.crop.size) uint8 of as many pictures.

        Raises:
            UserError: if one cannot be read.
        """
        ...


@dataclass(frozen=True, eq=False)
class StreamedSet:
    """Images on disk, read when asked for; the surface of `ImageSet` with other insides.

    Attributes:
        name: the data set's.
        split: "train", "validation" or "test".
        reader: reads rows of the files.
        rows: (N,) int64, the reader's row of each image.
        channels: 1 gray, 3 colour.
        image_size: height and width, pixels.
        labels: (N,) int64, or None for a set without labels.
        class_names: one per label; empty without labels.
        pictures: reads crops of the whole pictures, of which the images are the middle; None: crops
            are cut from the images.
        skip: an image that cannot be read is left out: the next one takes its place.
        skipped: what was left out so far, in this process: number -> reason.
        left_out: why images were left out when the set was loaded.

    Raises:
        UserError: if a label is out of range.
    """

    name: str
    split: Split
    reader: RowReader
    rows: Tensor
    channels: int
    image_size: tuple[int, int]
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    pictures: PictureReader | None = None
    skip: bool = False
    skipped: dict[int, str] = field(default_factory=dict, repr=False)
    left_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_labels(f"data set {self.name!r}", self.labels, len(self.rows), len(self.class_names))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_classes(self) -> int:
        """Number of labels; 0 for a set without them."""
        return len(self.class_names) if self.labels is not None else 0

    def spread(self, n: int) -> StreamedSet:
        """At most ``n`` images, evenly through the set, which may be sorted by class."""
        if len(self) <= n:
            return self
        chosen = evenly(len(self), n)
        labels = None if self.labels is None else self.labels[chosen]
        return replace(self, rows=self.rows[chosen], labels=labels)

    def first(self, n: int) -> StreamedSet:
        """The first ``n`` images, or all if there are fewer."""
        labels = None if self.labels is None else self.labels[:n]
        return replace(self, rows=self.rows[:n], labels=labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int | None]:
        """One image (C, H, W) uint8 and its label, or None.

        Raises:
            UserError: if it cannot be read.
        """
        images, labels = self.read([index])
        return images[0], None if labels is None else int(labels[0])

    def read(self, indices: Sequence[int], cut: Cut | None = None) -> tuple[Tensor, Tensor | None]:
        """Several images (B, C, H, W) uint8 and their labels (B,), or None.

        Args:
            indices: which.
            cut: crops to take of ``pictures`` instead.

        Raises:
            UserError: if one cannot be read.
        """
        if not self.skip:
            return self._read(indices, cut)
        with contextlib.suppress(UserError):
            return self._read(indices, cut)
        single = [None if cut is None else cut.of(i) for i in range(len(indices))]
        read = [self._readable(n, own) for n, own in zip(indices, single, strict=True)]
        images = torch.cat([image for image, _ in read])
        return images, None if self.labels is None else torch.cat([label for _, label in read])

    def _readable(self, number: int, cut: Cut | None) -> tuple[Tensor, Tensor]:
        """Image ``number`` (1, C, H, W) and its label, or the next that can be read."""
        for ahead in range(MOST_IN_A_ROW):
            chosen = (int(number) + ahead) % len(self)
            try:
                image, label = self._read([chosen], cut)
            except UserError as error:
                self.skipped[chosen] = last = str(error).removesuffix(HINT)
            else:
                return image, torch.zeros(0) if label is None else label
        raise UserError(f"{MOST_IN_A_ROW} images in a row cannot be read: {last}")

    def _read(self, indices: Sequence[int], cut: Cut | None = None) -> tuple[Tensor, Tensor | None]:
        chosen = torch.as_tensor(indices)
        labels = None if self.labels is None else self.labels[chosen]
        rows = self.rows[chosen].tolist()
        if cut is None:
            return self.reader.read(rows), labels
        assert self.pictures is not None
        return self.pictures.read_cut(rows, cut), labels

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """In order, ``size`` at a time: images (B, C, H, W) in [0, 1], labels (B,) or None.

        With ``skip``, images that cannot be read are missing: their batch is smaller.

        Raises:
            UserError: if an image cannot be read.
        """
        for start in range(0, len(self), size):
            numbers = range(start, min(start + size, len(self)))
            try:
                images, labels = self._read(numbers)
            except UserError:
                kept, _ = self._readable_of(numbers)
                if not kept:
                    continue
                images, labels = self._read(kept)
            yield to_floats(images), labels

    def readable(self) -> Self:
        """Those that can be read, after reading each; from then on none may be missing.

        Raises:
            UserError: if none can.
        """
        kept, lost = self._readable_of(range(len(self)))
        if not kept:
            raise UserError(f"none of {len(self)} images of {self.name!r} can be read: {lost[0]}")
        chosen = torch.as_tensor(kept)
        return replace(
            self,
            rows=self.rows[chosen],
            labels=None if self.labels is None else self.labels[chosen],
            skip=False,
            left_out=(*self.left_out, *lost),
        )

    def _readable_of(self, numbers: Sequence[int]) -> tuple[list[int], list[str]]:
        """Those of ``numbers`` that can be read, and why the others cannot."""
        kept, lost = [], []
        for number in numbers:
            try:
                self._read([number])
            except UserError as error:
                if not self.skip:
                    raise
                lost.append(str(error).removesuffix(HINT))
            else:
                kept.append(number)
        return kept, lost


AnyImages = ImageSet | StreamedSet
"""Images of one split, in memory or on disk."""


def origin(images: AnyImages, number: int) -> dict[str, Any]:
    """Where image ``number`` came from: ``image``, the number; ``row`` of its reader, and ``file``
    relative to the folder, where there are any."""
    found: dict[str, Any] = {"image": number}
    if images.rows is not None:
        found["row"] = row = int(images.rows[number])
        name = getattr(images.reader, "name", None)  # a folder's
        if name is not None:
            found["file"] = name(row)
    return found
