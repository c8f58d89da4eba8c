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

Nothing is imported, no object's method is looked up by a name from the file, and attributes are
never set. Inert are the libraries whose objects training codes leave beside the weights (dill,
robustness, cox, optimisers, numpy), without the names in ``SUSPECT``, which also reach code through
such libraries. The extension registry and out-of-band buffers are refused.

`ebmkit.models.torchfile` reads the files of `torch.save` with it.
"""

from __future__ import annotations

import pickle
import pickletools
from typing import IO, Any

from ebmkit.models.pickled import (
    Damaged,
    Refusal,
    StorageRecord,
    called,
    find,
    safe_key,
    storage_of,
)

__all__ = ["unpickle"]

MARK = object()


def unpickle(file: IO[bytes], storages: dict[str, StorageRecord] | None = None) -> Any:
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
    ) as error:
        raise Damaged(str(error)) from None


class _Machine:
    def __init__(self, storages: dict[str, StorageRecord]) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages = storages

    def run(self, file: IO[bytes]) -> Any:
        for opcode, argument, _position in pickletools.genops(file):
            if opcode.name == "STOP":
                return self.stack.pop()
            self.step(opcode.name, argument)
        raise Damaged

    def marked(self) -> list[Any]:
        """What lies above the topmost mark, taken off with it."""
        at = max(i for i, value in enumerate(self.stack) if value is MARK)
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
                stack.append(called(found, tuple(self.marked())) if name == "INST" else found)
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(self.named(module, attribute))
            case "REDUCE" | "NEWOBJ":
                args, function = stack.pop(), stack.pop()
                stack.append(called(function, args))
            case "NEWOBJ_EX":
                _keywords, args, function = stack.pop(), stack.pop(), stack.pop()
                stack.append(called(function, args))
            case "OBJ":
                function, *parts = self.marked()
                stack.append(called(function, tuple(parts)))
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


PLAIN = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BYTEARRAY8"),
    }
)
"""Instructions that put their own argument on the stack."""
