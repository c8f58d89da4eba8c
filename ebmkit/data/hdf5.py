"""Data sets in one HDF5 file.

Either one set, of which a fixed random tenth is the test set::

    images       (N, H, W, C) uint8, C = 1 or 3
    labels       (N,) whole numbers from 0 (optional)
    class_names  (K,) text (optional; by default the numbers)

or a training and a test set, with images and labels in the groups ``train`` and ``test``, and
class_names beside them. `ebmkit.data.sets.pack` writes such files.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ebmkit.data import imagesets
from ebmkit.data.images import MAX_PIXELS_IN_SET
from ebmkit.data.imagesets import (
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
    """One set of a file, whose images are read by row; `read_contents` makes it.

    Each process opens the file for itself, at its first read. The file must stay what it was: a run
    whose images change under it is not the run that its configuration names.

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
    _images: Any = None
    _owner: int = -1

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_images": None, "_owner": -1}

    def read(self, rows: Sequence[int]) -> Tensor:
        """Images (B, C, H, W) uint8.

        Raises:
            UserError: if the file is gone, damaged, or was changed.
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
        """All images (N, H, W, C) uint8, at once; errors as of `read`."""
        what = repr(str(self.path))
        with open_hdf5(self.path) as file:
            self._check_unchanged(what)
            found = find_array(file, f"{self.group}/images", what)
            assert found is not None  # its shape was read
            return torch.from_numpy(read_array(found, what))

    def _check_unchanged(self, what: str) -> None:
        """Check that the file is what it was."""
        if not self.path.is_file():
            raise UserError(f"{what} is gone, while it was in use: put it back and go on")
        if _stamp(self.path) != self.stamp:
            raise UserError(f"{what} was changed while it was in use: start anew with it")


def load_hdf5(request: DatasetRequest) -> AnyImages:
    """One split of a file; streamed if its images take more than `imagesets.MEMORY_LIMIT` bytes.

    Raises:
        UserError: if the file is missing, is no HDF5 file, lacks the split, or holds illegal data.
    """
    path, split, side = request.path("an HDF5 file"), request.split, request.image_size
    _check_path(path)
    with open_hdf5(path) as file:
        one_set = not holds(file, "train") and not holds(file, "test")
        group = "" if one_set else "test" if split == "test" else "train"
        if group and not holds(file, group):
            raise UserError(
                f"{str(path)!r} has no group {group!r}, so no {split} images: pack a folder with "
                "train/ and test/ in it"
            )
    reader = read_contents(path, group)
    count, height, width, _ = reader.shape
    if side is not None and (height, width) != (side, side):
        raise UserError(
            f"{str(path)!r} holds images of {height}x{width}, not {side}: pack them anew "
            f"with --image-size {side}"
        )
    rows = torch.arange(count)
    if not group:
        rows, tenth = shuffled(count), max(1, count // 10)
        rows = rows[:tenth] if split == "test" else rows[tenth:]
    rows = rows[split_rows(split, len(rows), repr(str(path)))]
    return load_rows(request.name, split, reader, rows)


def load_rows(name: str, split: Split, reader: Hdf5Reader, rows: Tensor) -> AnyImages:
    """The set of ``rows`` (N,) of a file's images, in that order, in memory if it fits."""
    count, height, width, channels = reader.shape
    labels = None if reader.labels is None else reader.labels[rows]
    facts = (labels, reader.class_names, name, split)
    found = StreamedSet(reader, rows, channels, (height, width), *facts)
    if count * height * width * channels > imagesets.MEMORY_LIMIT:
        return found
    return found.loaded(rearrange(reader.read_all()[rows], "n h w c -> n c h w").contiguous())


def read_contents(path: Path, group: str = "", class_names: tuple[str, ...] = ()) -> Hdf5Reader:
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
        names = class_names
        if not names and (found := find_array(file, "class_names", what)) is not None:
            names = read_names(found, what)
        labels = _labels(file, group, what, len(images), names)
        if labels is not None and not names:
            # of all groups, so that a training and a test set agree on the classes
            every = [_labels(file, own, what) for own in ("", "train", "test")]
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
    """The labels of ``count`` images, checked; None where there are none."""
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
