"""HDF5 files that somebody else may have made.

HDF5 is more than arrays: a file can refer to others (external links and storage, virtual data
sets), name filters for which the library loads code, and claim sizes that no disk holds. Read here
are plain arrays that lie in the file itself, by hard links, compressed by the filters that come
with HDF5 and h5py, of numbers or text, and of a size that is looked at before a byte is read.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ebmkit.errors import UserError

if TYPE_CHECKING:
    import h5py

__all__ = ["LARGEST", "check_dataset", "find_array", "open_hdf5", "read_array", "read_names"]

LARGEST = 4 * 2**30
"""Bytes that an array may have that is read as a whole."""

LARGEST_CHUNK = 256 * 2**20
"""Bytes of a chunk, which is unpacked as a whole."""

MOST_ROWS = 10**8

MOST_NAMES, LONGEST_NAME = 100_000, 1000

_FILTERS = {
    1: "gzip",
    2: "shuffle",
    3: "fletcher32",
    4: "szip",
    5: "nbit",
    6: "scaleoffset",
    32000: "lzf",
}
"""Those that come with HDF5 and h5py; for others the library would load a plugin."""

_RATIO = 1100
"""Deflate packs a byte into no less than 1/1032."""

_BROKEN = (OSError, KeyError, RuntimeError, ValueError, TypeError, OverflowError, MemoryError)
"""What h5py raises on damaged files; `UserError` is a `ValueError` and passes."""


@contextlib.contextmanager
def open_hdf5(source: Path | bytes, what: str = "") -> Iterator[h5py.File]:
    """An HDF5 file, read-only; what goes wrong within is told in one sentence.

    Args:
        source: path, or content.
        what: names a content in messages.

    Raises:
        UserError: if it is no HDF5 file, or damaged.
    """
    import h5py

    what = what or (repr(str(source)) if isinstance(source, Path) else "the content")
    if isinstance(source, Path) and not source.is_file():
        there = source.exists()
        raise UserError(f"{what} is not an ordinary file" if there else f"there is no file {what}")
    try:
        with h5py.File(io.BytesIO(source) if isinstance(source, bytes) else source, "r") as file:
            yield file
    except UserError:
        raise
    except _BROKEN as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"{what} cannot be read as an HDF5 file ({reason}): it is damaged, incomplete, or "
            "something else"
        ) from None


def find_array(file: h5py.File, name: str, what: str) -> h5py.Dataset | None:
    """The array called ``name`` (with slashes), checked by `check_dataset`; None if there is none.

    Raises:
        UserError: if it is not in this file, or not a plain array.
    """
    import h5py

    found: Any = file
    for part in [part for part in name.split("/") if part]:
        if not isinstance(found, h5py.Group):
            return None
        link = found.get(part, getlink=True)
        if link is None:
            return None
        if not isinstance(link, h5py.HardLink):
            kind = "file" if isinstance(link, h5py.ExternalLink) else "place"
            raise UserError(
                f"{what}: {name!r} is a link to another {kind}, which is not followed: write the "
                "array itself into the file"
            )
        found = found[part]
    if not isinstance(found, h5py.Dataset):
        return None
    check_dataset(found, what)
    return found


def check_dataset(dataset: h5py.Dataset, what: str) -> None:
    """Check that an array lies in its file, plainly, and that its chunks can be unpacked.

    Raises:
        UserError: if not.
    """
    import h5py

    where = f"{what}, array {dataset.name!r}"
    plan = dataset.id.get_create_plist()
    if plan.get_external_count() or plan.get_layout() == h5py.h5d.VIRTUAL:
        raise UserError(
            f"{where}: its data lie in other files, which are not read: write them into this one"
        )
    for number in range(plan.get_nfilters()):
        code = plan.get_filter(number)[0]
        if code not in _FILTERS:
            raise UserError(
                f"{where}: it is packed by filter {code}, for which code would be loaded: pack it "
                "by gzip or lzf"
            )
    kind = dataset.dtype
    text = h5py.check_string_dtype(kind) is not None
    if not text and (kind.hasobject or kind.kind not in "iufb"):
        raise UserError(f"{where}: it holds {kind}, not numbers or text")
    if dataset.shape is None:
        raise UserError(f"{where}: it is empty")
    if len(dataset.shape) and dataset.shape[0] > MOST_ROWS:
        raise UserError(f"{where}: it has {dataset.shape[0]:,} rows, more than {MOST_ROWS:,}")
    size, stored = _bytes(dataset.shape, kind.itemsize), dataset.id.get_storage_size()
    if size > _RATIO * stored + 2**20:
        raise UserError(
            f"{where}: it claims {size:,} bytes, and the file holds {stored:,} of it: the file is "
            "incomplete, or made to fill the memory"
        )
    if dataset.chunks and _bytes(dataset.chunks, kind.itemsize) > LARGEST_CHUNK:
        raise UserError(
            f"{where}: its chunks {dataset.chunks} are larger than {LARGEST_CHUNK // 2**20} MiB: "
            "write it in smaller ones"
        )


def read_array(dataset: h5py.Dataset, what: str) -> np.ndarray:
    """All of an array that `find_array` gave.

    Raises:
        UserError: if it has more than `LARGEST` bytes.
    """
    size = _bytes(dataset.shape, dataset.dtype.itemsize)
    if size > LARGEST:
        raise UserError(
            f"{what}, array {dataset.name!r}: it has {size:,} bytes, and at most {LARGEST:,} are "
            "read at once"
        )
    found: np.ndarray = dataset[()]
    return found


def read_names(dataset: h5py.Dataset, what: str) -> tuple[str, ...]:
    """Text (K,) as strings.

    Raises:
        UserError: if it is no text, or there is too much.
    """
    import h5py

    where = f"{what}, array {dataset.name!r}"
    if h5py.check_string_dtype(dataset.dtype) is None or dataset.ndim != 1:
        raise UserError(f"{where}: names must be text (K,), not {dataset.shape} {dataset.dtype}")
    if len(dataset) > MOST_NAMES or dataset.dtype.itemsize > LONGEST_NAME:
        raise UserError(
            f"{where}: {len(dataset):,} names of {dataset.dtype.itemsize:,} bytes are more than "
            f"{MOST_NAMES:,} of {LONGEST_NAME:,}"
        )
    names = tuple(str(name) for name in dataset.asstr(errors="replace")[()].tolist())
    longest = max(map(len, names), default=0)
    if longest > LONGEST_NAME:
        raise UserError(f"{where}: a name of {longest:,} characters: {LONGEST_NAME} at most")
    return names


def _bytes(shape: tuple[int, ...], item: int) -> int:
    total = item
    for n in shape:
        total *= n
    return total
