"""Data sets in one HDF5 file.

The file holds one set, of which a fixed random tenth is the test set::

    images       (N, H, W, C) uint8, C = 1 or 3
    labels       (N,) integers from 0 (optional)
    class_names  (K,) text (optional; default: the label numbers)

or a training and a test set: images and labels in the groups ``train`` and ``test``, and
``class_names`` in the root. `ebmkit.data.sets.pack` writes such files. With a group ``validation``
too, no training images are held out, and all keep their order.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ebmkit.data import imagesets
from ebmkit.data.images import MAX_PIXELS_IN_SET
from ebmkit.data.imagesets import (
    SPLITS,
    AnyImages,
    DatasetRequest,
    Split,
    StreamedSet,
    check_range,
    shuffled,
    split_rows,
)
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


@dataclass
class Hdf5Reader:
    """Reads the images of one set of a file by row; created by `read_contents`.

    Each process opens the file at its first read. The file must not change while it is in use:
    otherwise the run would not match its configuration.

    Attributes:
        path: HDF5 file.
        group: "" for the root of the file, "train" or "test".
        shape: (N, H, W, C).
        labels: (N,) int64, or None.
        class_names: one name per label; the label numbers if the file has no names.
        stamp: size in bytes and modification time of the file, to detect changes.
    """

    path: Path
    group: str
    shape: tuple[int, int, int, int]
    labels: Tensor | None
    class_names: tuple[str, ...]
    stamp: tuple[int, int]
    _images: Any = None
    _owner: int = -1

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_images": None, "_owner": -1}

    def read(self, rows: Sequence[int]) -> Tensor:
        """Images (B, C, H, W) uint8.

        Raises:
            UserError: if the file is missing, damaged, or was changed.
        """
        import h5py

        what = repr(str(self.path))
        self._check_unchanged(what)
        with translate_hdf5_errors(what):
            if self._owner != os.getpid():
                self._images = find_array(h5py.File(self.path, "r"), f"{self.group}/images", what)
                self._owner = os.getpid()
            images = np.stack([self._images[row] for row in rows])
        return rearrange(torch.from_numpy(images), "n h w c -> n c h w").contiguous()

    def read_all(self) -> Tensor:
        """All images (N, H, W, C) uint8; raises the errors of `read`."""
        what = repr(str(self.path))
        with open_hdf5(self.path) as file:
            self._check_unchanged(what)
            found = find_array(file, f"{self.group}/images", what)
            assert found is not None  # its shape was read
            return torch.from_numpy(read_array(found, what))

    def _check_unchanged(self, what: str) -> None:
        """Check that the file exists and its stamp is unchanged."""
        if not self.path.is_file():
            raise UserError(f"{what} was removed while it was in use: restore it and resume")
        if _stamp(self.path) != self.stamp:
            raise UserError(f"{what} was changed while it was in use: start a new run with it")


def load_hdf5(request: DatasetRequest) -> AnyImages:
    """Load one split of a file; above `imagesets.MEMORY_LIMIT` bytes it is streamed.

    Raises:
        UserError: if the file is missing, not HDF5, lacks the split, or holds invalid data.
    """
    path, split, side = request.path("an HDF5 file"), request.split, request.image_size
    _check_path(path)
    with open_hdf5(path) as file:
        one_set = not holds(file, "train") and not holds(file, "test")
        ordered = holds(file, "validation") and not one_set
        group = "" if one_set else split if ordered or split == "test" else "train"
        if group and not holds(file, group):
            raise UserError(
                f"{str(path)!r} has no group {group!r}, so no {split} images: pack a folder with "
                "train/ and test/ in it, or choose another split (--split validation)"
            )
    reader = read_contents(path, group)
    count, height, width, _ = reader.shape
    if side is not None and (height, width) != (side, side):
        raise UserError(
            f"{str(path)!r} holds images of {height}x{width}, not {side}: pack them again "
            f"with --image-size {side}"
        )
    rows = torch.arange(count)
    if not group:
        rows, tenth = shuffled(count), max(1, count // 10)
        rows = rows[:tenth] if split == "test" else rows[tenth:]
    if not ordered:
        rows = rows[split_rows(request, len(rows), repr(str(path)))]
    return load_rows(request.name, split, reader, rows)


def load_rows(name: str, split: Split, reader: Hdf5Reader, rows: Tensor) -> AnyImages:
    """Make a set of the images at ``rows`` (N,), in that order; in memory up to the limit."""
    count, height, width, channels = reader.shape
    labels = None if reader.labels is None else reader.labels[rows]
    facts = (labels, reader.class_names, name, split)
    found = StreamedSet(reader, rows, channels, (height, width), *facts)
    if count * height * width * channels > imagesets.MEMORY_LIMIT:
        return found
    return found.loaded(rearrange(reader.read_all()[rows], "n h w c -> n c h w").contiguous())


def read_contents(path: Path, group: str = "", class_names: tuple[str, ...] = ()) -> Hdf5Reader:
    """Read and check a set, except its pixels.

    Args:
        path: HDF5 file.
        group: "" for its root, "train" or "test".
        class_names: class names, which those in the file must equal; default: those in the file.

    Raises:
        UserError: if the file is missing or damaged, or its arrays are invalid.
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
        names = class_names
        if (found := find_array(file, "class_names", what)) is not None:
            names = read_names(found, what)
            if class_names and names != class_names:
                own, expected = next(p for p in zip_longest(names, class_names) if p[0] != p[1])
                raise UserError(
                    f"{what} has class {own!r} where the published data set has {expected!r}: "
                    "number its labels as published, or load it as data set 'hdf5'"
                )
        labels = _labels(file, group, what, len(images), names)
        if labels is not None and not names:
            # over all groups, so that training and test set have the same classes
            every = [_labels(file, own, what) for own in ("", *SPLITS)]
            top = max(int(own.max()) for own in every if own is not None and len(own))
            names = tuple(str(label) for label in range(1 + top))
        return Hdf5Reader(path, group, tuple(images.shape), labels, names, stamp)


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


def _labels(
    file: h5py.File, group: str, what: str, count: int | None = None, names: Sequence[str] = ()
) -> Tensor | None:
    """Read and check the labels of ``count`` images; None if there are none."""
    labels = find_array(file, f"{group}/labels", what)
    if labels is None:
        return None
    where, count = f"{what}, array {labels.name!r}", len(labels) if count is None else count
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise UserError(
            f"{where}: {count} images need {count} whole-numbered labels, not "
            f"{labels.shape} {labels.dtype}"
        )
    numbers = torch.from_numpy(read_array(labels, what).astype(np.int64))
    check_range(numbers, len(names) or MOST_NAMES, where)
    return numbers
