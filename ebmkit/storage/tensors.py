"""Tensors in safetensors files that somebody else may have written, and networks to load them into.

A safetensors file is the length of a header, the header in JSON, and bytes::

    8 bytes  n, little-endian
    n bytes  {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...,
              "__metadata__": {"text": "text"}}
    rest     the tensors' bytes, without holes

The library checks types, shapes and places against the bytes. It takes the last of two entries of
one name, headers of 100 MB, and shapes of any number of dimensions: these are refused here, as a
`DamagedFile`.

A configuration of a few bytes may ask for a network of any number of parameters. Within
`LimitedSize` the functions of torch that make tensors are counted before they take any memory.

>>> with LimitedSize(1000, 2):
...     torch.nn.Linear(10**6, 10**6)
Traceback (most recent call last):
ebmkit.errors.UserError: the network would have more parameters than its weights are
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ebmkit.errors import UserError, shown
from ebmkit.storage.reading import MIB, DamagedFile, parse_json, read_bytes

HEADER_BYTES = 8 * MIB
"""Of a header: 80,000 tensors or so."""

LARGEST_FILE = 2**36
DIMENSIONS = 64


def parse_tensors(content: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file on the CPU, by name, and its metadata.

    Args:
        content: all of it.
        path: names it in messages.
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


SLACK = 1_000_000
"""Elements beside the parameters: tables, and buffers that are not saved."""

_SIZED = frozenset(
    (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.eye)
)
_COUNTED = frozenset((torch.arange, torch.linspace))


class LimitedSize(TorchFunctionMode):
    """Within, ``tensors`` of ``elements`` in all can be made by their sizes, and some more."""

    def __init__(self, elements: int, tensors: int) -> None:
        super().__init__()
        self.left, self.calls = elements + SLACK, 4 * tensors + 1000

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> Self:
        """The size of a network whose weights are ``state``."""
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
