"""Read untrusted HDF5 files.

An HDF5 file can refer to other files (external links and storage, virtual data sets), name filters
for which the library loads code, claim sizes that no disk holds, and contain chunks that decompress
to a million times their size. This module reads only arrays of numbers or text in the file itself,
reached by hard links, uncompressed or compressed by gzip or lzf. It checks sizes before
decompression:

- an array is not larger than its bytes in the file can decompress to;
- no chunk decompresses to more than `UNPACKED` bytes, whatever its header claims;
- variable-length text, which is in a heap that many entries may share, is read entry by entry.

The HDF5 library itself, which parses damaged file structures, is C code and remains a risk. All
functions raise a `UserError` that names the file and the array for other content.
"""

from __future__ import annotations

import contextlib
import io
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ebmkit.errors import UserError, first_line

if TYPE_CHECKING:
    import h5py

LARGEST = 4 * 2**30
"""Maximum bytes of an array that is read at once."""

LARGEST_CHUNK = 64 * 2**20
"""Maximum bytes of a chunk, which is decompressed at once."""

UNPACKED = 256 * 2**20
"""Maximum bytes that a chunk may decompress to; its header may claim a smaller size."""

MOST_ROWS = 2**25
MOST_NAMES, LONGEST_NAME = 100_000, 1000
LONGEST_TEXT = 2**20

_GZIP, _LZF = 1, 32000
_FILTERS = {_GZIP: "gzip", 2: "shuffle", 3: "fletcher32", _LZF: "lzf"}
"""Accepted filters. For others the library would load a plugin; its built-in szip, nbit and
scaleoffset are rarely used and have a history of bugs."""

_RATIO = {_GZIP: 1032, _LZF: 88}
"""Maximum decompression ratio of a filter: a deflate token of 2 bits yields 258 bytes, an LZF token
of 3 bytes yields 264."""

_BROKEN = (OSError, KeyError, RuntimeError, ValueError, TypeError, OverflowError, MemoryError)
"""Exceptions of h5py on damaged files. `UserError` is a `ValueError` too, but is not translated."""


@contextlib.contextmanager
def open_hdf5(source: Path | bytes, what: str = "") -> Iterator[h5py.File]:
    """Open an HDF5 file read-only; errors of h5py in the context become `UserError`.

    Args:
        source: path, or content.
        what: name of the content in messages.
    """
    import h5py

    what = what or (repr(str(source)) if isinstance(source, Path) else "the content")
    with translate_hdf5_errors(what):
        if isinstance(source, Path) and not source.is_file():
            there = source.exists()
            raise UserError(
                f"{what} is not an ordinary file" if there else f"there is no file {what}"
            )
        with h5py.File(io.BytesIO(source) if isinstance(source, bytes) else source, "r") as file:
            yield file


@contextlib.contextmanager
def translate_hdf5_errors(what: str) -> Iterator[None]:
    """Context that translates errors of h5py on a damaged file to `UserError`."""
    try:
        yield
    except UserError:
        raise
    except _BROKEN as error:
        raise UserError(
            f"{what} cannot be read as an HDF5 file ({first_line(error)}): it is damaged, "
            "incomplete, or something else"
        ) from None


def holds(file: h5py.File, name: str) -> bool:
    """Whether the root of ``file`` has an entry ``name`` of any kind; the entry is not opened."""
    return file.get(name, getlink=True) is not None


def find_array(file: h5py.File, name: str, what: str) -> h5py.Dataset | None:
    """The array at path ``name``, checked by `check_dataset`; None if there is none."""
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
        raise UserError(f"{what}: {name!r} is a group, not an array")
    check_dataset(found, what)
    return found


def check_dataset(dataset: h5py.Dataset, what: str) -> None:
    """Check that an array is in its file, has an accepted type, and can be decompressed safely."""
    import h5py

    where = f"{what}, array {dataset.name!r}"
    plan = dataset.id.get_create_plist()
    if plan.get_external_count() or plan.get_layout() == h5py.h5d.VIRTUAL:
        raise UserError(
            f"{where}: its data lie in other files, which are not read: write them into this one"
        )
    filters = [plan.get_filter(number)[0] for number in range(plan.get_nfilters())]
    _check_filters(filters, where)
    kind = dataset.dtype
    text = h5py.check_string_dtype(kind) is not None
    if not text and (kind.hasobject or kind.kind not in "iufb"):
        raise UserError(f"{where}: it holds {kind}, not numbers or text")
    if dataset.shape is None:
        raise UserError(f"{where}: it is empty")
    if len(dataset.shape) and dataset.shape[0] > MOST_ROWS:
        raise UserError(f"{where}: it has {dataset.shape[0]:,} rows, more than {MOST_ROWS:,}")
    if dataset.chunks and math.prod(dataset.chunks) * kind.itemsize > LARGEST_CHUNK:
        raise UserError(
            f"{where}: its chunks {dataset.chunks} are larger than {LARGEST_CHUNK // 2**20} MiB: "
            "write it in smaller ones"
        )
    _check_size(dataset, filters, where)


def _check_filters(filters: list[int], where: str) -> None:
    for code in filters:
        if code not in _FILTERS:
            raise UserError(
                f"{where}: it has filter {code}, which is not read: compress it with gzip or lzf"
            )
    packers = [i for i, code in enumerate(filters) if code in _RATIO]
    shuffled_late = packers and 2 in filters[packers[0] :]
    if len(packers) > 1 or len(set(filters)) < len(filters) or shuffled_late:
        names = ", ".join(_FILTERS[code] for code in filters)
        raise UserError(
            f"{where}: it has the filters {names} in sequence, which could exhaust the memory: "
            "compress it with one of gzip and lzf"
        )


def _check_size(dataset: h5py.Dataset, filters: list[int], where: str) -> None:
    """Check that the file has enough bytes for the claimed size of an array."""
    item = dataset.dtype.itemsize
    size, room = math.prod(dataset.shape) * item, dataset.file.id.get_filesize()
    packer = next((code for code in filters if code in _RATIO), None)
    ratio = 1 if packer is None else _RATIO[packer]
    stored = dataset.id.get_storage_size()
    if dataset.chunks:
        plain = math.prod(dataset.chunks) * item
        slots = math.prod(-(-n // c) for n, c in zip(dataset.shape, dataset.chunks, strict=True))
        stored, large = _stored_chunks(dataset, slots, UNPACKED // ratio)
        for offset in large:
            _check_chunk(dataset, offset, filters, plain, where)
    if stored > room or size > ratio * stored + 2**20:
        raise UserError(
            f"{where}: it claims {size:,} bytes, and the file holds {min(stored, room):,} of it: "
            "the file is incomplete or malicious"
        )


def _stored_chunks(
    dataset: h5py.Dataset, slots: int, small: int
) -> tuple[int, list[tuple[int, ...]]]:
    """Total stored bytes of all chunks, and offsets of the chunks of more than ``small`` bytes."""
    stored, count, large = 0, 0, list[tuple[int, ...]]()

    def add(chunk: Any) -> bool | None:
        nonlocal stored, count
        stored, count = stored + chunk.size, count + 1
        if chunk.size > small:
            large.append(chunk.chunk_offset)
        return True if count > slots else None  # a cyclic index

    dataset.id.chunk_iter(add)
    return (stored, large) if count <= slots else (2**63, [])


def _check_chunk(
    dataset: h5py.Dataset, offset: tuple[int, ...], filters: list[int], plain: int, where: str
) -> None:
    """Check that a large chunk does not decompress to more than `UNPACKED` bytes."""
    mask, content = dataset.id.read_direct_chunk(offset)
    used = {code for i, code in enumerate(filters) if not mask >> i & 1}
    fits = len(content) <= plain + plain // 100 + 1024
    if fits and _GZIP in used:
        try:
            fits = len(zlib.decompressobj().decompress(content, UNPACKED + 1)) <= UNPACKED
        except zlib.error:
            fits = False
    elif fits and _LZF in used:
        fits = len(content) * _RATIO[_LZF] <= 2 * UNPACKED
    if not fits:
        raise UserError(
            f"{where}: its chunk at {offset} is damaged, or could unpack to more than "
            f"{UNPACKED // 2**20} MiB: write it in smaller chunks"
        )


def read_array(dataset: h5py.Dataset, what: str) -> np.ndarray:
    """Read a whole array, as returned by `find_array`."""
    size = math.prod(dataset.shape) * dataset.dtype.itemsize
    if size > LARGEST:
        raise UserError(
            f"{what}, array {dataset.name!r}: it has {size:,} bytes, and at most {LARGEST:,} are "
            "read at once"
        )
    found: np.ndarray = dataset[()]
    return found


def read_names(dataset: h5py.Dataset, what: str) -> tuple[str, ...]:
    """Read text (K,) as strings."""
    import h5py

    where = f"{what}, array {dataset.name!r}"
    if h5py.check_string_dtype(dataset.dtype) is None or dataset.ndim != 1:
        raise UserError(f"{where}: names must be text (K,), not {dataset.shape} {dataset.dtype}")
    if len(dataset) > MOST_NAMES or dataset.dtype.itemsize > LONGEST_NAME:
        raise UserError(
            f"{where}: {len(dataset):,} names of {dataset.dtype.itemsize:,} bytes are more than "
            f"{MOST_NAMES:,} of {LONGEST_NAME:,}"
        )
    text, names = dataset.asstr(errors="replace"), list[str]()
    for number in range(len(dataset)):  # not at once: all may share one long text in the heap
        names.append(str(text[number]))
        if len(names[-1]) > LONGEST_NAME:
            raise UserError(
                f"{where}: name {number} has {len(names[-1]):,} characters, more than "
                f"{LONGEST_NAME}"
            )
    return tuple(names)


def read_attribute(file: h5py.File, name: str, what: str) -> Any:
    """Read an attribute of the file, one number or text; None if it does not exist."""
    import h5py

    if name not in file.attrs:
        return None
    held = file.attrs.get_id(name)
    text = h5py.check_string_dtype(held.dtype) is not None
    if (
        held.shape != ()
        or held.dtype.itemsize > LONGEST_TEXT
        or not (text or held.dtype.kind in "iufb")
    ):
        raise UserError(f"{what}: its attribute {name!r} must be one number or text")
    value = file.attrs[name]
    value = value.decode(errors="replace") if isinstance(value, bytes) else value
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, str) and len(value) > LONGEST_TEXT:
        raise UserError(f"{what}: its attribute {name!r} has {len(value):,} characters")
    return value
