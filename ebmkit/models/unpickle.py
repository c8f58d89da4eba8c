"""Pickles read as data: the stack machine of `pickle`, with nothing in it that can run code.

A pickle is a program for a small stack machine. Three of its instructions name functions and
classes (GLOBAL, STACK_GLOBAL, INST), five call them (REDUCE, INST, OBJ, NEWOBJ, NEWOBJ_EX), and
BUILD sets attributes; that is how a checkpoint runs code when `pickle` or `dill` reads it. Here a
name is looked up in two tables, and never in a module:

============  ==================================================================================
name          becomes
============  ==================================================================================
known         a function of `ebmkit.models.pickled`: containers, storages and tensors as records
inert         an `Inert`, which remembers its name; calling it gives another, BUILD changes nothing
all others    a `Refusal` that says the name
============  ==================================================================================

A pickle may be small and stand for much: what lies on its stack can be copied again and again by
calling ``list`` on it. So copies are counted, and are bounded by the bytes that were read.

Nothing is imported, no object's method is looked up by a name from the file, and attributes are
never set. Inert are the libraries whose objects training codes leave beside the weights (dill,
robustness, cox, optimisers, numpy), without the names in ``SUSPECT``, which also reach code through
such libraries. The extension registry and out-of-band buffers are refused.

`ebmkit.models.torchfile` reads the files of `torch.save` with it.
"""

from __future__ import annotations

import pickle
import pickletools
from typing import IO, Any, Protocol, cast

from ebmkit.models.pickled import (
    Damaged,
    Refusal,
    StorageRecord,
    called,
    find,
    safe_key,
    storage_of,
)

__all__ = ["Readable", "unpickle"]

MARK = object()

STEPS = 5_000_000
"""Instructions of a pickle, at the most: 100,000 tensors or so, 10 s."""

COPIES = 16
"""Elements that calls may copy for each byte of the pickle, beside a million."""


class Readable(Protocol):
    """What is asked of a file of bytes."""

    def read(self, count: int, /) -> bytes: ...

    def readline(self) -> bytes: ...

    def tell(self) -> int: ...


def unpickle(file: Readable, storages: dict[str, StorageRecord] | None = None) -> Any:
    """The next object in ``file``, with records in place of tensors and `Inert` of all else.

    Args:
        file: left behind the pickle's end.
        storages: those that are mentioned are added.

    Raises:
        Refusal: if it names what is neither known nor inert.
        Damaged: if it is no pickle.
    """
    try:
        return _Machine({} if storages is None else storages).run(file)
    except (Refusal, Damaged):
        raise
    except (
        *(ValueError, TypeError, KeyError, IndexError, EOFError, AttributeError, OverflowError),
        *(RecursionError, MemoryError, pickle.UnpicklingError),
    ):
        raise Damaged from None


class _Machine:
    def __init__(self, storages: dict[str, StorageRecord]) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages = storages
        self.copied = 0
        self.bytes = 0

    def run(self, file: Readable) -> Any:
        start = file.tell()
        for steps, (opcode, argument, position) in enumerate(
            pickletools.genops(cast(IO[bytes], file))
        ):
            if opcode.name == "STOP":
                return self.stack.pop()
            if steps > STEPS:
                raise Damaged(f"its pickle has more than {STEPS} instructions")
            self.bytes = (position or 0) - start
            self.step(opcode.name, argument)
        raise Damaged

    def call(self, function: Any, args: Any) -> Any:
        """`called`, which may copy what it is given."""
        parts = args if isinstance(args, tuple) else ()
        self.copied += len(parts) + sum(len(p) for p in parts if isinstance(p, COPIED))
        if self.copied > 1_000_000 + COPIES * self.bytes:
            raise Damaged("its pickle copies the same content over and over")
        return called(function, args)

    def marked(self) -> list[Any]:
        """What lies above the topmost mark, taken off with it."""
        at = len(self.stack) - 1
        while self.stack[at] is not MARK:  # an IndexError where there is none
            at -= 1
        above = self.stack[at + 1 :]
        del self.stack[at:]
        return above

    def named(self, module: Any, name: Any) -> Any:
        if not isinstance(module, str) or not isinstance(name, str):
            raise Damaged
        return find(module, name)

    def put(self, items: list[Any]) -> None:
        """Keys and values in turn, into the dictionary on top; others take nothing."""
        top = self.stack[-1]
        if isinstance(top, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                top[safe_key(key)] = value

    def add(self, items: list[Any]) -> None:
        top = self.stack[-1]
        if isinstance(top, list):
            top.extend(items)
        elif isinstance(top, set):
            top.update(safe_key(item) for item in items)

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                stack.append(MARK)
            case "POP":
                stack.pop()
            case "POP_MARK":
                self.marked()
            case "DUP":
                stack.append(stack[-1])
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET":
                stack.append({"L": list, "D": dict, "S": set}[name[6]]())
            case "EMPTY_TUPLE":
                stack.append(())
            case "LIST":
                stack.append(self.marked())
            case "TUPLE":
                stack.append(tuple(self.marked()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[5])
                if len(stack) < count:
                    raise Damaged
                stack[-count:] = [tuple(stack[-count:])]
            case "DICT":
                items = self.marked()
                stack.append({})
                self.put(items)
            case "FROZENSET":
                stack.append(frozenset(safe_key(item) for item in self.marked()))
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self.put([key, value])
            case "SETITEMS":
                self.put(self.marked())
            case "APPEND":
                self.add([stack.pop()])
            case "APPENDS" | "ADDITEMS":
                self.add(self.marked())
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GLOBAL" | "INST":
                found = self.named(*argument.split(" ", 1))
                stack.append(self.call(found, tuple(self.marked())) if name == "INST" else found)
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(self.named(module, attribute))
            case "REDUCE" | "NEWOBJ":
                args, function = stack.pop(), stack.pop()
                stack.append(self.call(function, args))
            case "NEWOBJ_EX":
                _keywords, args, function = stack.pop(), stack.pop(), stack.pop()
                stack.append(self.call(function, args))
            case "OBJ":
                function, *parts = self.marked()
                stack.append(self.call(function, tuple(parts)))
            case "BUILD":
                stack.pop()  # attributes of what is not made
            case "BINPERSID":
                stack.append(storage_of(stack.pop(), self.storages))
            case "EXT1" | "EXT2" | "EXT4":
                raise Refusal("the extension registry")
            case _ if name in PLAIN:
                stack.append(argument)
            case _:
                raise Damaged


COPIED = (str, bytes, list, tuple, dict, set, frozenset)

PLAIN = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BYTEARRAY8"),
    }
)
"""Instructions that put their own argument on the stack."""
