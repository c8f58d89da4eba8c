"""Data sets in one HDF5 file.

Either one set, of which a fixed random tenth is the test set::

    images       (N, H, W, C) uint8, C = 1 or 3
    labels       (N,) whole numbers from 0 (optional)
    class_names  (K,) text (optional; by default the numbers)

or a training and a test set, with images and labels in the groups ``train`` and ``test``, and
class_names beside them. `ebmkit.data.pack.pack` writes such files.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ebmkit.data import imagesets
from ebmkit.data.images import MAX_PIXELS_IN_SET
from ebmkit.data.imagesets import ImageSet, Split, held_out, shuffled
from ebmkit.data.streamed import AnyImages, StreamedSet
from ebmkit.errors import UserError
from ebmkit.storage.hdf5 import (
    MOST_NAMES,
    find_array,
    holds,
    open_hdf5,
    read_array,
    read_names,
    translate_hdf5_errors,
)

if TYPE_CHECKING:
    import h5py

__all__ = ["Contents", "Hdf5Reader", "load_hdf5", "load_rows", "read_contents"]


class Contents(NamedTuple):
    """What one set of a file holds, images aside.

    Attributes:
        path: the file.
        group: "" for the file's root, "train" or "test".
        shape: (N, H, W, C).
        labels: (N,) int64, or None.
        class_names: one per label; the numbers where the file has no names.
        stamp: the file's size and time, which tell whether it was changed.
    """

    path: Path
    group: str
    shape: tuple[int, int, int, int]
    labels: Tensor | None
    class_names: tuple[str, ...]
    stamp: tuple[int, int]


class Hdf5Reader:
    """Reads rows of a file's images; each process opens the file for itself, at its first read.

    The file must stay what it was when ``contents`` was read: a run whose images change under it
    is not the run that its configuration names.
    """

    def __init__(self, contents: Contents) -> None:
        self._path, self._group, self._stamp = contents.path, contents.group, contents.stamp
        self._images: Any = None
        self._owner = -1

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_images": None, "_owner": -1}

    def read(self, rows: Sequence[int]) -> Tensor:
        """Images (B, C, H, W) uint8.

        Raises:
            UserError: if the file is gone, damaged, or was changed.
        """
        import h5py

        _check_stamp(self._path, self._stamp)
        with translate_hdf5_errors(repr(str(self._path))):
            if self._owner != os.getpid():
                what = repr(str(self._path))
                self._images = find_array(h5py.File(self._path, "r"), f"{self._group}/images", what)
                self._owner = os.getpid()
            images = np.stack([self._images[row] for row in rows])
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def load_hdf5(path: Path, split: Split, image_size: int | None = None) -> AnyImages:
    """One split of a file; streamed if its images take more than `imagesets.MEMORY_LIMIT` bytes.

    Raises:
        UserError: if the file is missing, is no HDF5 file, lacks the split, or holds illegal data.
    """
    group = _group_of(path, split)
    contents = read_contents(path, group)
    height, width = contents.shape[1:3]
    if image_size is not None and (height, width) != (image_size, image_size):
        raise UserError(
            f"{str(path)!r} holds images of {height}x{width}, not {image_size}: pack them anew "
            f"with --image-size {image_size}"
        )
    rows = torch.arange(contents.shape[0])
    if not group:
        rows = shuffled(len(rows))
        cut = max(1, len(rows) // 10)
        rows = rows[:cut] if split == "test" else rows[cut:]
    if split != "test":
        kept, held = held_out(len(rows), repr(str(path)))
        rows = rows[kept if split == "train" else held]
    return load_rows("hdf5", split, contents, rows)


def load_rows(name: str, split: Split, contents: Contents, rows: Tensor) -> AnyImages:
    """The set of ``rows`` (N,) of a file's images, in that order, in memory if it fits."""
    count, height, width, channels = contents.shape
    labels = None if contents.labels is None else contents.labels[rows]
    reader = Hdf5Reader(contents)
    if count * height * width * channels > imagesets.MEMORY_LIMIT:
        return StreamedSet(
            name, split, reader, rows, channels, (height, width), labels, contents.class_names
        )
    what = repr(str(contents.path))
    with open_hdf5(contents.path) as file:
        _check_stamp(contents.path, contents.stamp)
        found = find_array(file, f"{contents.group}/images", what)
        assert found is not None  # its contents were read
        images = read_array(found, what)
    pixels = torch.from_numpy(images)[rows].permute(0, 3, 1, 2).contiguous()
    return ImageSet(name, split, pixels, labels, contents.class_names, reader, rows)


def read_contents(path: Path, group: str = "", class_names: tuple[str, ...] = ()) -> Contents:
    """Read and check everything of a set but its images.

    Args:
        path: the file.
        group: "" for its root, "train" or "test".
        class_names: of the labels; by default the file's own.

    Raises:
        UserError: if the file is missing or damaged, or its arrays are illegal.
    """
    _check_path(path)
    what, stamp = repr(str(path)), _stamp(path)
    with open_hdf5(path) as file:
        images = find_array(file, f"{group}/images", what)
        if images is None:
            raise UserError(
                f"{what} has no array '{group}/images': it must hold images (N, H, W, C) "
                "uint8, and labels (N,) if there are any; `ebmkit data pack` writes such files"
            )
        where = f"{what}, array {images.name!r}"
        if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
            raise UserError(
                f"{where}: images must be (N, H, W, C) with 1 or 3 channels, not {images.shape}"
            )
        if images.dtype != np.uint8:
            raise UserError(f"{where}: images must be uint8 (0..255), not {images.dtype}")
        if images.shape[1] * images.shape[2] > MAX_PIXELS_IN_SET:
            raise UserError(
                f"{where}: images of {images.shape[1]:,}x{images.shape[2]:,} have more than "
                f"{MAX_PIXELS_IN_SET // 10**6} megapixels: cut them into smaller ones"
            )
        names, labels = class_names or _class_names(file, what), _labels(file, group, what)
        numbers = None if labels is None else _checked_labels(what, labels, len(images), names)
        if numbers is not None and not names:
            names = tuple(str(c) for c in range(1 + _largest_label(file, what)))
        return Contents(path, group, tuple(images.shape), numbers, names, stamp)


def _group_of(path: Path, split: Split) -> str:
    """The group that a split is taken from; "" where the file holds one set."""
    _check_path(path)
    wanted = "test" if split == "test" else "train"
    with open_hdf5(path) as file:
        if not holds(file, "train") and not holds(file, "test"):
            return ""
        if not holds(file, wanted):
            raise UserError(
                f"{str(path)!r} has no group {wanted!r}, so no {split} images: pack a folder with "
                "train/ and test/ in it"
            )
    return wanted


def _check_path(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"{str(path)!r} is a folder: name an HDF5 file, or use data set 'folder'")
    if not path.exists():
        raise UserError(
            f"there is no file {str(path)!r}: make one by `ebmkit data pack SRC {path.name}`"
        )


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    return found.st_size, found.st_mtime_ns


def _check_stamp(path: Path, stamp: tuple[int, int]) -> None:
    if not path.is_file():
        raise UserError(f"{str(path)!r} is gone, while it was in use: put it back and go on")
    if _stamp(path) != stamp:
        raise UserError(f"{str(path)!r} was changed while it was in use: start anew with it")


def _class_names(file: h5py.File, what: str) -> tuple[str, ...]:
    found = find_array(file, "class_names", what)
    return () if found is None else read_names(found, what)


def _labels(file: h5py.File, group: str, what: str) -> h5py.Dataset | None:
    return find_array(file, f"{group}/labels", what)


def _largest_label(file: h5py.File, what: str) -> int:
    """The largest label of all groups, so that a training and a test set agree on the classes."""
    found = [_labels(file, group, what) for group in ("", "train", "test")]
    checked = [_checked_labels(what, own, len(own), ()) for own in found if own is not None]
    return max(int(labels.max()) for labels in checked if len(labels))


def _checked_labels(what: str, labels: h5py.Dataset, count: int, names: tuple[str, ...]) -> Tensor:
    where = f"{what}, array {labels.name!r}"
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise UserError(
            f"{where}: {count} images need {count} whole-numbered labels, not "
            f"{labels.shape} {labels.dtype}"
        )
    numbers = torch.from_numpy(read_array(labels, what).astype(np.int64))
    top = len(names) if names else MOST_NAMES
    outside = numbers[(numbers < 0) | (numbers >= top)]
    if len(outside):
        raise UserError(
            f"{where}: label {int(outside[0])} is out of range: labels are 0 to {top - 1}"
        )
    return numbers
