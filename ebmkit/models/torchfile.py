"""Files of `torch.save`, read without executing anything in them.

`torch.load` with ``weights_only`` comes first. It refuses files in which other objects lie beside
the weights, as in those of the ``robustness`` package, written by ``dill``. Such files are then
read by `ebmkit.models.unpickle`, from both containers:

=======  ==========================================================================================
zip      ``NAME/data.pkl``, ``NAME/data/KEY`` for each storage, ``NAME/byteorder`` (PyTorch 1.6 on)
legacy   pickles in turn (a magic number, the version, facts of the machine, the content, the keys
         of the storages), then each storage: its number of elements (int64) and their bytes
=======  ==========================================================================================
"""

from __future__ import annotations

import contextlib
import pickle
import struct
import sys
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from ebmkit.errors import UserError
from ebmkit.models.pickled import Damaged, Refusal, StorageRecord, TensorRecord
from ebmkit.models.unpickle import unpickle

__all__ = ["read_torch_file"]

NOT_PLAIN = (
    *(RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, OSError, IndexError),
    *(AttributeError, AssertionError, TypeError, struct.error),
)
"""What `torch.load` raises of files with other objects, and of those that are none of its own."""

MAGIC = 0x1950A86A20F9469CFC6C
VERSION = 1001


def read_torch_file(path: Path) -> Any:
    """The content of ``path``, tensors on the CPU; other objects are placeholders.

    Raises:
        UserError: if it cannot be read, is no such file, or asks for what could run code.
    """
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}") from None
    with warnings.catch_warnings(), contextlib.suppress(*NOT_PLAIN):
        warnings.simplefilter("ignore")  # of pickles that only the second reader takes
        return torch.load(path, map_location="cpu", weights_only=True)
    try:
        with path.open("rb") as file:
            return _read_zip(path) if zipfile.is_zipfile(path) else _read_legacy(file)
    except Refusal as refusal:
        raise UserError(
            f"{str(path)!r} cannot be read safely: it asks for {refusal}, which no weights need "
            "and which may run code. Nothing was executed. If you trust the file, save its state "
            "dict alone with the program that wrote it"
        ) from None
    except (Damaged, zipfile.BadZipFile, struct.error, RecursionError, NotImplementedError):
        raise UserError(
            f"{str(path)!r} holds no weights that can be read safely: it must be a state dict "
            "saved by torch.save, or safetensors"
        ) from None


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        names = {info.filename: info.file_size for info in archive.infolist()}
        root = next((n.removesuffix("data.pkl") for n in names if n.endswith("/data.pkl")), None)
        if root is None:
            raise Damaged
        storages: dict[str, StorageRecord] = {}
        with archive.open(f"{root}data.pkl") as file:
            content = unpickle(file, storages)
        order = "little"
        if f"{root}byteorder" in names:
            order = archive.read(f"{root}byteorder").decode("latin-1")
        if order != sys.byteorder:
            raise Damaged
        for storage in storages.values():
            name = f"{root}data/{storage.key}"
            if names.get(name) != storage.numel * storage.dtype.itemsize:
                raise Damaged
            storage.data = archive.read(name)
    return _with_tensors(content, {})


def _read_legacy(file: IO[bytes]) -> Any:
    if unpickle(file) != MAGIC or unpickle(file) != VERSION:
        raise Damaged
    unpickle(file)  # facts of the machine that wrote it
    storages: dict[str, StorageRecord] = {}
    content = unpickle(file, storages)
    keys = unpickle(file)
    if not isinstance(keys, list) or sys.byteorder != "little":
        raise Damaged
    for key in keys:
        storage = storages.get(key.decode("latin-1") if isinstance(key, bytes) else str(key))
        (count,) = struct.unpack("<q", file.read(8))
        if storage is None or count != storage.numel:
            raise Damaged
        storage.data = file.read(count * storage.dtype.itemsize)
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
    if data is None or len(data) != record.storage.numel * record.storage.dtype.itemsize:
        raise Damaged
    if 0 in record.size:
        return torch.empty(record.size, dtype=dtype)
    last = record.offset + sum((n - 1) * s for n, s in zip(record.size, record.stride, strict=True))
    if last >= len(data) // dtype.itemsize:
        raise Damaged
    flat = torch.frombuffer(bytearray(data), dtype=dtype)
    return flat.as_strided(record.size, record.stride, record.offset)
