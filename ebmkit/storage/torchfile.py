"""Files of `torch.save`, read without executing anything in them.

`torch.load` with ``weights_only`` runs no code either, but in PyTorch 2.15 a file of 300 bytes has
it make an array of 1 GiB, or a view of 2^50 elements; it unpacks compressed zip entries and takes
one of two entries of one name. It also refuses files in which other objects lie beside the weights,
as in those of the ``robustness`` package, written by ``dill``. So all are read by
`ebmkit.storage.pickles`, from both containers:

=======  ==========================================================================================
zip      ``NAME/data.pkl``, ``NAME/data/KEY`` for each storage, ``NAME/byteorder`` (PyTorch 1.6 on)
legacy   pickles in turn (a magic number, the version, facts of the machine, the content, the keys
         of the storages), then each storage: its number of elements (int64) and their bytes
=======  ==========================================================================================

What is read takes no more memory than the file's size, a few times for a moment: entries of a zip
lie as they are, beside each other, and a tensor has no more elements than its storage. Their
checksums are compared on the way.
"""

from __future__ import annotations

import io
import stat
import struct
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ebmkit.errors import UserError, plain
from ebmkit.storage.pickles import Damaged, Refusal, StorageRecord, TensorRecord, unpickle
from ebmkit.storage.reading import MIB, opened
from ebmkit.storage.tensors import read_tensors

NOT_PLAIN = (
    *(zipfile.BadZipFile, struct.error, RecursionError, NotImplementedError, RuntimeError),
    *(KeyError, ValueError, EOFError, OverflowError, MemoryError, AttributeError, TypeError),
)
"""What zipfile and torch raise of bytes that nothing made as it should be."""

MAGIC = 0x1950A86A20F9469CFC6C
VERSION = 1001

PICKLE_BYTES = 64 * MIB
"""Of the pickle in a zip: what lies beside the tensors."""

INDEX_BYTES = 8 * MIB
"""Of a zip's list of entries: 80,000 of them or so."""

LARGEST = 2**40
"""Elements of a tensor that has none, as its other dimensions count them."""

CHUNK = MIB


NESTED = ("model_state_dict", "state_dict", "params", "model", "net")
"""Under which names training codes keep the weights in a checkpoint."""


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors in a ``.pth`` or ``.safetensors`` file, by name."""
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    content = read_torch_file(path)
    for name in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{str(path)!r} holds no state dict: names of parameters with tensors")
    odd = next(
        (plain(str(name)) for name, value in content.items() if not isinstance(value, Tensor)), None
    )
    if odd is not None:
        raise UserError(f"{odd} in {str(path)!r} is no tensor: give the network's state dict")
    return {str(name): value for name, value in content.items()}


def read_torch_file(path: Path) -> Any:
    """The content of ``path``, tensors on the CPU; other objects are placeholders."""
    with opened(path) as (file, size):
        return _read(_Bounded(file, size), path)


def read_torch_content(content: bytes, path: Path) -> Any:
    """`read_torch_file` of a file that is read already; ``path`` names it in messages."""
    return _read(_Bounded(io.BytesIO(content), len(content)), path)


def _read(whole: _Bounded, path: Path) -> Any:
    zipped = whole.read(4) == b"PK\x03\x04"
    whole.seek(0)
    try:
        return _read_zip(whole) if zipped else _read_legacy(whole)
    except Refusal as refusal:
        raise UserError(
            f"{str(path)!r} cannot be read safely: it asks for {refusal}, which no weights need "
            "and which may run code. Nothing was executed. If you trust the file, save its state "
            "dict alone with the program that wrote it"
        ) from None
    except UserError:
        raise
    except (Damaged, *NOT_PLAIN) as why:
        reason = f": {why}" if isinstance(why, Damaged) and str(why) else ""
        raise UserError(
            f"{str(path)!r} holds no weights that can be read safely{reason}; it must be a state "
            "dict saved by torch.save, or safetensors"
        ) from None


class _Bounded(io.RawIOBase):
    """A file that allocates no more than it holds, whatever number of bytes is asked for."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self.size = file, size
        self.most = size
        """Bytes that can be read at once."""

    def read(self, count: int | None = -1) -> bytes:
        left = max(0, self.size - self._file.tell())
        count = left if count is None or count < 0 else min(count, left)
        if count > self.most:
            raise Damaged(f"{count} bytes lie where there should be few")
        return self._file.read(count)

    def readline(self, size: int | None = -1) -> bytes:
        return self._file.readline(MIB)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True


def _read_zip(whole: _Bounded) -> Any:
    whole.most = INDEX_BYTES
    try:
        archive = zipfile.ZipFile(whole)  # type: ignore[arg-type]
    except (ValueError, EOFError, OSError):
        raise Damaged from None
    whole.most = whole.size
    with archive:
        entries = archive.infolist()
        _check_entries(entries, whole.size)
        sizes = {entry.filename: entry.file_size for entry in entries}
        root = next((n.removesuffix("data.pkl") for n in sizes if n.endswith("/data.pkl")), None)
        if root is None:
            raise Damaged
        storages: dict[str, StorageRecord] = {}
        content = unpickle(io.BytesIO(_entry(archive, f"{root}data.pkl", PICKLE_BYTES)), storages)
        if f"{root}byteorder" in sizes:
            if _entry(archive, f"{root}byteorder", 100).decode("latin-1") != sys.byteorder:
                raise Damaged("it was written by a machine of another byte order")
        elif sys.byteorder != "little":
            raise Damaged
        for storage in storages.values():
            name = f"{root}data/{storage.key}"
            if sizes.get(name) != storage.numel * storage.dtype.itemsize:
                raise Damaged
            storage.data = torch.empty(sizes[name], dtype=torch.uint8)
            with archive.open(name) as file:
                _fill(storage.data, file)
    return _with_tensors(content, {})


def _check_entries(entries: list[zipfile.ZipInfo], size: int) -> None:
    """Whether the entries of a zip of ``size`` bytes are such as `torch.save` writes."""
    if len({entry.filename for entry in entries}) < len(entries):
        raise Damaged("two of its entries have one name")
    if sum(entry.file_size for entry in entries) > size:
        raise Damaged("its entries claim more bytes than the file has")
    for entry in entries:
        if entry.flag_bits & 1 or entry.flag_bits & 64:
            raise Damaged("it is encrypted")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise Damaged("it is compressed, which torch.save never does")
        parts = entry.filename.replace("\\", "/").split("/")
        if ".." in parts or entry.filename.startswith(("/", "\\")) or ":" in parts[0]:
            raise Damaged("an entry's name leads out of it")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise Damaged("an entry is a link")


def _entry(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    if archive.getinfo(name).file_size > most:
        raise Damaged(f"its {name.rpartition('/')[2]} has more than {most} bytes")
    return archive.read(name)


def _fill(data: torch.Tensor, file: Any) -> None:
    """Read as many bytes as ``data`` (n,) uint8 has into it."""
    into = data.numpy().data
    for start in range(0, len(into), CHUNK):
        part = file.read(min(CHUNK, len(into) - start))
        into[start : start + len(part)] = part
        if len(part) < min(CHUNK, len(into) - start):
            raise Damaged("it ends early")


def _read_legacy(whole: _Bounded) -> Any:
    if unpickle(whole) != MAGIC or unpickle(whole) != VERSION:
        raise Damaged
    unpickle(whole)  # facts of the machine that wrote it
    storages: dict[str, StorageRecord] = {}
    content = unpickle(whole, storages)
    keys = unpickle(whole)
    if not isinstance(keys, list) or sys.byteorder != "little":
        raise Damaged
    for key in keys:
        storage = storages.get(key.decode("latin-1") if isinstance(key, bytes) else str(key))
        (count,) = struct.unpack("<q", whole.read(8))
        if storage is None or count != storage.numel or storage.data is not None:
            raise Damaged
        if count * storage.dtype.itemsize > whole.size - whole.tell():
            raise Damaged("it ends early")
        storage.data = torch.empty(count * storage.dtype.itemsize, dtype=torch.uint8)
        _fill(storage.data, whole)
    return _with_tensors(content, {})


def _with_tensors(content: Any, seen: dict[int, tuple[Any, Any]]) -> Any:
    """``content`` with tensors for records, in dictionaries, lists and tuples.

    ``seen`` has those that were visited, by identity, so that each is visited once.
    """
    if isinstance(content, TensorRecord):
        return _tensor(content)
    if not isinstance(content, (dict, list, tuple)):
        return content
    if id(content) in seen:
        return seen[id(content)][1]
    seen[id(content)] = (content, content)
    if isinstance(content, dict):
        for key, value in content.items():
            content[key] = _with_tensors(value, seen)
    elif isinstance(content, list):
        content[:] = [_with_tensors(part, seen) for part in content]
    else:
        made = tuple(_with_tensors(part, seen) for part in content)
        seen[id(content)] = (content, made)
        return made
    return content


def _tensor(record: TensorRecord) -> torch.Tensor:
    data, dtype = record.storage.data, record.dtype
    if data is None:
        raise Damaged
    held, count = len(data) // dtype.itemsize, 1
    for extent in record.size:
        count *= max(1, extent)
    if 0 in record.size:
        if count > LARGEST:
            raise Damaged("a tensor has an absurd shape")
        return torch.empty(record.size, dtype=dtype)
    last = record.offset + sum((n - 1) * s for n, s in zip(record.size, record.stride, strict=True))
    if last >= held or count > held:
        raise Damaged("a tensor reaches beyond its bytes")
    flat = data[: held * dtype.itemsize].view(dtype)
    return flat.as_strided(record.size, record.stride, record.offset)
