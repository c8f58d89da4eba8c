"""Read untrusted files of tensors, and limit the size of the networks that load them.

Three formats are read without executing code:

===========  ======================================================================================
safetensors  the length n of the header (8 bytes, little-endian), the header in JSON (n bytes), e.g.
             ``{"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}``, and the
             bytes of the tensors, without gaps
zip          ``NAME/data.pkl``, ``NAME/data/KEY`` for each storage, ``NAME/byteorder``; written by
             `torch.save` since PyTorch 1.6
legacy       consecutive pickles (magic number, version, system information, content, keys of the
             storages), then each storage: its number of elements (int64) and its bytes
===========  ======================================================================================

The safetensors library checks types, shapes and offsets against the bytes. It accepts duplicate
names (the last entry counts), headers of 100 MB, and any number of dimensions; this module refuses
these with `DamagedFile`.

`torch.load` with ``weights_only`` executes no code either, but in PyTorch 2.15 a file of 300 bytes
can make it allocate 1 GiB, or a view of 2^50 elements; it decompresses zip entries and accepts
duplicate names. It also refuses files with other objects besides the weights, such as those of the
``robustness`` package, written by ``dill``. So `ebmkit.storage.pickles` reads all pickles. It
allocates no more memory than the file size: zip entries must be uncompressed and not exceed the
file in total, a tensor has no more elements than its storage, and checksums are compared while
reading.

A small configuration can describe a network with any number of parameters. `LimitedSize` counts the
elements of torch functions that create tensors before they allocate memory.

>>> with LimitedSize(1000, 2):
...     torch.nn.Linear(10**6, 10**6)
Traceback (most recent call last):
ebmkit.errors.UserError: the network would have more parameters than its weights are
"""

from __future__ import annotations

import io
import math
import stat
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ebmkit.errors import UserError, plain, shown
from ebmkit.storage.pickles import DIMENSIONS, Damaged, Refusal, as_text, unpickle
from ebmkit.storage.reading import MIB, DamagedFile, opened, parse_json, read_bytes

HEADER_BYTES = 8 * MIB
"""Maximum bytes of a safetensors header; about 80,000 tensors."""

LARGEST_FILE = 2**36


def parse_tensors(content: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (on the CPU) by name, and metadata of a safetensors file.

    Args:
        content: bytes of the whole file.
        path: name of the file in messages.
    """
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > len(content) - 8:
        raise _damaged(path, "it does not parse")
    if length > HEADER_BYTES:
        raise _damaged(path, f"its header has {length} bytes, more than {HEADER_BYTES}")
    header = parse_json(content[8 : 8 + length], f"the header of {str(path)!r}", finite=True)
    if not isinstance(header, dict):
        raise _damaged(path, "it does not parse")
    for name, entry in header.items():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if isinstance(shape, list) and len(shape) > DIMENSIONS:
            raise _damaged(path, f"{shown(name)} has more than {DIMENSIONS} dimensions")
    try:
        return safetensors.torch.load(content), header.get("__metadata__", {})
    except safetensors.SafetensorError as error:
        raise _damaged(path, str(error).removeprefix("Error while deserializing: ")) from None
    except (RuntimeError, ValueError, TypeError, KeyError):
        raise _damaged(path, "it does not parse") from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """`parse_tensors` of the file ``path``."""
    return parse_tensors(read_bytes(path, LARGEST_FILE), path)


def _damaged(path: Path, why: str) -> DamagedFile:
    return DamagedFile(f"{str(path)!r} is damaged: {why}")


NOT_PLAIN = (
    *(zipfile.BadZipFile, struct.error, RecursionError, NotImplementedError, RuntimeError),
    *(KeyError, ValueError, EOFError, OverflowError, MemoryError, AttributeError, TypeError),
)
"""Exceptions of zipfile and torch on damaged or malicious files."""

MAGIC = 0x1950A86A20F9469CFC6C
VERSION = 1001

PICKLE_BYTES = 64 * MIB
"""Maximum bytes of the pickle in a zip: all content except the tensors."""

INDEX_BYTES = 8 * MIB
"""Maximum bytes of the central directory of a zip; about 80,000 entries."""

DEPTH = 400
"""Maximum nesting depth of containers."""


def read_torch_file(path: Path) -> Any:
    """Read a file of `torch.save`: tensors on the CPU, placeholders for other objects."""
    with opened(path) as (file, size):
        return _read(_Bounded(file, size), path)


def read_torch_content(content: bytes, path: Path) -> Any:
    """`read_torch_file` for bytes; ``path`` is the name in messages."""
    return _read(_Bounded(io.BytesIO(content), len(content)), path)


def _read(whole: _Bounded, path: Path) -> Any:
    zipped = whole.read(4) == b"PK\x03\x04"
    whole.seek(0)
    try:
        content = _read_zip(whole) if zipped else _read_legacy(whole)
        _check_depth(content)
        return content
    except Refusal as refusal:
        raise UserError(
            f"{str(path)!r} cannot be read safely: it asks for {refusal}, which no weights need "
            "and which may run code. Nothing was executed. If you trust the file, save its state "
            "dict alone with the program that wrote it"
        ) from None
    except (Damaged, *NOT_PLAIN) as why:
        reason = f": {why}" if isinstance(why, Damaged) and str(why) else ""
        raise UserError(
            f"{str(path)!r} holds no weights that can be read safely{reason}; it must be a state "
            "dict saved by torch.save, or safetensors"
        ) from None


def _check_depth(content: Any) -> None:
    """Check the nesting depth of ``content``, whose parts may be shared."""
    level, seen = [content], set[int]()
    for _ in range(DEPTH):
        new = {id(v): v for v in level if isinstance(v, (dict, list, tuple)) and id(v) not in seen}
        seen |= new.keys()
        level = [p for v in new.values() for p in (v.values() if isinstance(v, dict) else v)]
    if level:
        raise Damaged("it is nested too deep")


class _Bounded(io.RawIOBase):
    """A file whose reads allocate at most its remaining bytes."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self.size = file, size
        self.most = size
        """Maximum bytes of a single read."""

    def read(self, count: int | None = -1) -> bytes:
        left = max(0, self.size - self._file.tell())
        count = left if count is None or count < 0 else min(count, left)
        if count > self.most:
            raise Damaged(f"{count} bytes in a part that should be small")
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
        if f"{root}byteorder" in sizes:
            if _entry(archive, f"{root}byteorder", 100).decode("latin-1") != sys.byteorder:
                raise Damaged("it was written by a machine of another byte order")
        elif sys.byteorder != "little":
            raise Damaged

        def load_storage(key: str, dtype: torch.dtype, numel: int) -> Tensor:
            name = f"{root}data/{key}"
            if sizes.get(name) != numel * dtype.itemsize:
                raise Damaged
            data = torch.empty(sizes[name], dtype=torch.uint8)
            with archive.open(name) as file:
                _fill(data, file)
            return data

        return unpickle(io.BytesIO(_entry(archive, f"{root}data.pkl", PICKLE_BYTES)), load_storage)


def _check_entries(entries: list[zipfile.ZipInfo], size: int) -> None:
    """Check that the entries of a zip of ``size`` bytes match the format of `torch.save`."""
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


def _fill(data: Tensor, file: Any) -> None:
    """Fill ``data`` (n,) uint8 from ``file``."""
    into = data.numpy().data
    while len(into):
        part = file.read(min(MIB, len(into)))
        if not part:
            raise Damaged("it ends early")
        into[: len(part)] = part
        into = into[len(part) :]


def _read_legacy(whole: _Bounded) -> Any:
    if unpickle(whole) != MAGIC or unpickle(whole) != VERSION:
        raise Damaged
    unpickle(whole)  # system information
    storages: dict[str, tuple[int, Tensor]] = {}  # their bytes follow the content
    left = whole.size

    def load_storage(key: str, dtype: torch.dtype, numel: int) -> Tensor:
        nonlocal left
        left -= numel * dtype.itemsize
        if left < 0:
            raise Damaged("it ends early")
        storages[key] = numel, torch.empty(numel * dtype.itemsize, dtype=torch.uint8)
        return storages[key][1]

    content = unpickle(whole, load_storage)
    keys = unpickle(whole)
    if not isinstance(keys, list) or sys.byteorder != "little":
        raise Damaged
    for key in keys:
        (count,) = struct.unpack("<q", whole.read(8))
        numel, data = storages.pop(as_text(key))
        if count != numel:
            raise Damaged
        _fill(data, whole)
    if storages:
        raise Damaged("it ends early")
    return content


NESTED = ("model_state_dict", "state_dict", "params", "model", "net")
"""Common keys of the weights in checkpoints of other projects."""

AVERAGED = ("state_dict_ema", "params_ema", "model_ema", "ema_state_dict", "ema")
"""Common keys of weights that were averaged during the training (timm, BasicSR and others)."""


def read_state(path: Path, averaged: bool = True) -> dict[str, Tensor]:
    """Read the tensors of a ``.pth`` or ``.safetensors`` file, by name.

    A file with raw and averaged weights gives the averaged ones and a warning, or the raw ones if
    ``averaged`` is False.
    """
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    content = read_torch_file(path)
    if isinstance(content, Mapping):
        raw, mean = (
            next((n for n in names if isinstance(content.get(n), Mapping)), None)
            for names in (NESTED, AVERAGED)
        )
        if raw and mean and averaged:
            warnings.warn(
                f"{str(path)!r} holds raw ({raw}) and averaged weights ({mean}): the averaged ones "
                "are read; for the others use --no-averaged (averaged=False)",
                stacklevel=2,
            )
        if mean and (averaged or not raw):
            content = content[mean]
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


SLACK = 1_000_000
"""Allowed elements besides the parameters: tables, and buffers that are not saved."""

_SIZED = frozenset(
    (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.eye)
)
_COUNTED = frozenset((torch.arange, torch.linspace))


class LimitedSize(TorchFunctionMode):
    """Context that limits the tensors that torch functions create.

    Args:
        elements: number of elements of all weights; `SLACK` more are allowed.
        tensors: number of weights; ``4 * tensors + 1000`` calls are allowed.
    """

    def __init__(self, elements: int, tensors: int) -> None:
        super().__init__()
        self.left, self.calls = elements + SLACK, 4 * tensors + 1000

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> Self:
        """Limits for a network with the weights ``state``."""
        return cls(sum(value.numel() for value in state.values()), len(state))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SIZED:
            size = kwargs.get("size", args)
            first = size[0] if len(size) and isinstance(size[0], (tuple, list)) else size
            self.left -= math.prod(max(1, n) for n in first if isinstance(n, int))
            self.calls -= 1
        elif func in _COUNTED:
            steps = [n for n in (*args, *kwargs.values()) if type(n) is int]
            self.left -= max(steps, default=0)
        if self.left < 0 or self.calls < 0:
            raise UserError("the network would have more parameters than its weights are")
        return func(*args, **kwargs)
