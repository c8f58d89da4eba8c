"""Building a network that somebody else's file describes, of no more parameters than the file has.

A configuration of a few bytes may ask for any number of parameters. Within `AtMost` the functions
of torch that make tensors are counted before they take any memory.

>>> with AtMost(1000, 2):
...     torch.nn.Linear(10**6, 10**6)
Traceback (most recent call last):
ebmkit.errors.UserError: the network would have more parameters than its weights are
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ebmkit.errors import UserError

__all__ = ["AtMost"]

SLACK = 1_000_000
"""Elements beside the parameters: tables, and buffers that are not saved."""

_SIZED = frozenset(
    (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.eye)
)
_COUNTED = frozenset((torch.arange, torch.linspace))


class AtMost(TorchFunctionMode):
    """Within, ``tensors`` of ``elements`` in all can be made by their sizes, and some more.

    Raises:
        UserError: where more are asked for.
    """

    def __init__(self, elements: int, tensors: int) -> None:
        super().__init__()
        self.left, self.calls = elements + SLACK, 4 * tensors + 1000

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
