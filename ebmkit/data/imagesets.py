"""Data sets of images in memory; `ebmkit.data.streamed` has those that are read on demand.

Images are uint8 (N, C, H, W), labels int64 (N,). What leaves a data set for a model is float32 in
[0, 1]; normalising further belongs to the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from ebmkit.errors import UserError

if TYPE_CHECKING:
    from ebmkit.data.streamed import RowReader

__all__ = [
    "MEMORY_LIMIT",
    "SPLITS",
    "Faults",
    "ImageSet",
    "Split",
    "check_labels",
    "held_out",
    "shuffled",
    "to_floats",
]

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

MEMORY_LIMIT = 2**30
"""Bytes of decoded images above which a set on disk is streamed instead of held in memory."""


class Faults(NamedTuple):
    """What is done about faults of a folder of images.

    Attributes:
        skip: leave out images that cannot be read, and say which, instead of ending.
        follow: read through links that lead out of the folder.
    """

    skip: bool = False
    follow: bool = False


HINT = " (dataset.unreadable=skip leaves such out)"
"""What is said of an image that cannot be read, where it is an error."""

SHOWN = 3
"""Images left out that a sentence names."""


def some_of(reasons: Sequence[str]) -> str:
    """The first of the ``reasons`` why images were left out, and how many there are more."""
    more = f"; and {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else ""
    return f"{'; '.join(reasons[:SHOWN])}{more}"


def to_floats(images: Tensor) -> Tensor:
    """uint8 images as float32 in [0, 1]."""
    return images.to(torch.float32) / 255


def evenly(count: int, n: int) -> Tensor:
    """``n`` of the numbers 0 .. count - 1, in order and evenly spaced, int64."""
    return torch.arange(n) * count // n


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images in memory, on one device.

    Attributes:
        name: the data set's.
        split: "train", "validation" or "test".
        images: (N, C, H, W) uint8, C = 1 or 3.
        labels: (N,) int64, or None for a set without labels.
        class_names: one per label; empty without labels.
        reader: what they were read by, where it was a file or folder of the user's.
        rows: (N,) int64, the reader's row of each image.
        left_out: why images were left out when the set was loaded.

    Raises:
        UserError: if the images are not uint8 (N, C, H, W), or a label is out of range.
    """

    name: str
    split: Split
    images: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    reader: RowReader | None = field(default=None, repr=False)
    rows: Tensor | None = field(default=None, repr=False)
    left_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        what = f"data set {self.name!r}"
        if self.images.ndim != 4 or self.images.shape[1] not in (1, 3):
            raise UserError(
                f"{what}: images must be (N, C, H, W) with 1 or 3 channels, not "
                f"{tuple(self.images.shape)}"
            )
        if self.images.dtype != torch.uint8:
            raise UserError(f"{what}: images must be uint8 (0..255), not {self.images.dtype}")
        check_labels(what, self.labels, len(self.images), len(self.class_names))

    def __len__(self) -> int:
        return len(self.images)

    @property
    def channels(self) -> int:
        """1 gray, 3 colour."""
        return self.images.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width, pixels."""
        return self.images.shape[2], self.images.shape[3]

    @property
    def num_classes(self) -> int:
        """Number of labels; 0 for a set without them."""
        return len(self.class_names) if self.labels is not None else 0

    def spread(self, n: int) -> ImageSet:
        """At most ``n`` images, evenly through the set, which may be sorted by class."""
        if len(self) <= n:
            return self
        chosen = evenly(len(self), n)
        rows = None if self.rows is None else self.rows[chosen]
        chosen = chosen.to(self.images.device)
        labels = None if self.labels is None else self.labels[chosen]
        return replace(self, images=self.images[chosen], labels=labels, rows=rows)

    def first(self, n: int) -> ImageSet:
        """The first ``n`` images, or all if there are fewer."""
        labels = None if self.labels is None else self.labels[:n]
        rows = None if self.rows is None else self.rows[:n]
        return replace(self, images=self.images[:n], labels=labels, rows=rows)

    def to(self, device: torch.device | str) -> ImageSet:
        """The same set on ``device``; itself if it is there already."""
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, images=self.images.to(device), labels=labels)

    def floats(self, rows: Tensor | Sequence[int] | slice = slice(None)) -> Tensor:
        """Images at ``rows`` as float32 (B, C, H, W) in [0, 1]."""
        return to_floats(self.images[rows])

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """In order, ``size`` at a time: images (B, C, H, W) in [0, 1], labels (B,) or None."""
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            yield self.floats(rows), None if self.labels is None else self.labels[rows]


def check_labels(what: str, labels: Tensor | None, count: int, num_classes: int) -> None:
    """Check that ``labels`` are (count,) int64 within 0 .. num_classes - 1, if there are any.

    Raises:
        UserError: naming ``what`` and the first that is not.
    """
    if labels is None:
        return
    if labels.shape != (count,) or labels.dtype != torch.int64:
        raise UserError(
            f"{what}: {count} images need labels of shape ({count},) and type int64, not "
            f"{tuple(labels.shape)} {labels.dtype}"
        )
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if len(outside):
        raise UserError(
            f"{what}: label {int(outside[0])} is out of range: its {num_classes} classes have "
            f"labels 0 to {num_classes - 1}"
        )


def held_out(count: int, what: str) -> tuple[Tensor, Tensor]:
    """Rows of ``count`` training images to train on, and rows to validate on, in a fixed order.

    2 % are held out, at least 1 and at most 1000. Both come shuffled, so that the first few are a
    fair sample of a set that is sorted by class.

    Raises:
        UserError: if ``what`` has fewer than 2 training images.
    """
    if count < 2:
        raise UserError(
            f"{what} has {count} training images: at least 2 are needed, one of them to validate on"
        )
    order = shuffled(count)
    held = min(1000, max(1, round(0.02 * count)))
    return order[held:], order[:held]


def shuffled(count: int) -> Tensor:
    """0 .. count - 1 in an order that is always the same, (count,) int64."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(20410))
