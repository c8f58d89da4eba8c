"""Tensors in safetensors files that somebody else may have written.

A safetensors file is the length of a header, the header in JSON, and bytes::

    8 bytes  n, little-endian
    n bytes  {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...,
              "__metadata__": {"text": "text"}}
    rest     the tensors' bytes, without holes

The library that reads them checks most of that. Here the header is read first, bounded, and checked
against the file: so a header that lies costs no memory, says what is wrong, and no name stands in
it twice.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
from torch import Tensor

from ebmkit.errors import shown
from ebmkit.storage.reading import MIB, DamagedFile, parse_json, read_bytes

__all__ = ["Header", "parse_header", "parse_tensors", "read_tensors"]

HEADER_BYTES = 8 * MIB
"""Of a header: 80,000 tensors or so."""

ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}

LARGEST_FILE = 2**36

LARGEST = 2**40
"""Elements of a tensor, where one of its dimensions is 0 and the others say nothing of its size."""


class Header(NamedTuple):
    """What a file says of itself: the shapes by name, and texts by name."""

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]


def parse_header(content: bytes | memoryview, path: Path) -> Header:
    """The header of a safetensors file that holds ``content``.

    Args:
        content: all of it.
        path: names it in messages.

    Raises:
        DamagedFile: if the file is not such as its header says.
    """
    size = len(content)
    length = struct.unpack_from("<Q", content)[0] if size >= 8 else size
    if length > size - 8:
        raise _damaged(path, "it does not parse")
    if length > HEADER_BYTES:
        raise _damaged(path, f"its header has {length} bytes, more than {HEADER_BYTES}")
    text = bytes(content[8 : 8 + length])
    found = parse_json(text, f"the header of {str(path)!r}", finite=True)
    if not isinstance(found, dict):
        raise _damaged(path, "it does not parse")
    metadata = found.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(path, "its metadata are not names with texts")
    end = 0
    for first, last, name in sorted(_span(name, entry, path) for name, entry in found.items()):
        if first != end:
            raise _damaged(path, f"the bytes of {shown(name)} overlap others or leave a hole")
        end = last
    if end != size - 8 - length:
        raise _damaged(path, f"it has {size - 8 - length} bytes of tensors and claims {end}")
    return Header({name: tuple(entry["shape"]) for name, entry in found.items()}, metadata)


def parse_tensors(content: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file on the CPU, by name, and its metadata.

    Raises:
        DamagedFile: as `parse_header`.
    """
    header = parse_header(content, path)
    try:
        return safetensors.torch.load(content), header.metadata
    except (safetensors.SafetensorError, RuntimeError, ValueError, TypeError, KeyError):
        raise _damaged(path, "it does not parse") from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """`parse_tensors` of the file ``path``.

    Raises:
        UserError: if it cannot be read.
        DamagedFile: as `parse_header`.
    """
    return parse_tensors(read_bytes(path, LARGEST_FILE), path)


def _span(name: str, entry: Any, path: Path) -> tuple[int, int, str]:
    """Where the bytes of a tensor begin and end.

    Raises:
        UserError: if its entry in the header makes no sense.
    """
    fields = ("dtype", "shape", "data_offsets")
    if not isinstance(entry, dict) or sorted(entry) != sorted(fields):
        raise _damaged(path, f"its header says no type, shape and place of {shown(name)}")
    dtype, shape, place = (entry[field] for field in fields)
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _damaged(path, f"{shown(name)} is of the type {shown(dtype)}, which no weights need")
    if not _whole(shape) or len(shape) > 64 or math.prod(max(1, n) for n in shape) > LARGEST:
        raise _damaged(path, f"{shown(name)} has the shape {shown(shape)}")
    if not _whole(place) or len(place) != 2 or place[1] - place[0] < 0:
        raise _damaged(path, f"{shown(name)} lies at {shown(place)}")
    if place[1] - place[0] != math.prod(shape) * ITEM_BYTES[dtype]:
        raise _damaged(path, f"{shown(name)} has not as many bytes as its shape says")
    return place[0], place[1], name


def _whole(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)


def _damaged(path: Path, why: str) -> DamagedFile:
    return DamagedFile(f"{str(path)!r} is damaged: {why}")
