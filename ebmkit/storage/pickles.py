"""Safe unpickler: the stack machine of `pickle` without instructions that can execute code.

A pickle is a program for a small stack machine. Three of its instructions name functions and
classes (GLOBAL, STACK_GLOBAL, INST), five call them (REDUCE, INST, OBJ, NEWOBJ, NEWOBJ_EX), and
BUILD sets attributes. So a checkpoint can execute code when `pickle` or `dill` loads it. Here names
are looked up in two tables instead of in imported modules:

============  ==================================================================================
name          result
============  ==================================================================================
known         a function of this module that makes a container or a tensor, or a type
inert         an `Inert` placeholder with this name; a call returns another, BUILD has no effect
all others    a `Refusal` that contains the name
============  ==================================================================================

A small pickle can describe a large object: calls of ``list`` can copy an element of the stack again
and again. So the number of copied elements is limited by the number of bytes read.

The module imports nothing, calls no method by a name from the file, and never sets attributes.
Inert names belong to libraries whose objects training scripts save with the weights (dill,
robustness, cox, optimisers, numpy), except the names in ``SUSPECT``, which can reach code through
these libraries. The extension registry and out-of-band buffers are refused.

`pickle.Unpickler` with its own ``find_class`` is not sufficient: it sets attributes of objects
returned by ``find_class``, hashes objects from the file (nested tuples take forever), and
allocates memory for any memo index.
"""

from __future__ import annotations

import math
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor


class Damaged(Exception):
    """The bytes are not a pickle of tensors in containers."""


class Refusal(Exception):
    """The pickle requests an object that could execute code; ``str`` returns its name."""


@dataclass(frozen=True, eq=False)
class Inert:
    """Placeholder for an object that is not created.

    A call makes a new placeholder with the same name, so the length of the name is limited.
    """

    name: str

    def __post_init__(self) -> None:
        if len(self.name) > LONGEST_NAME:
            raise Damaged("a name has more than 1,000 characters")

    def __repr__(self) -> str:
        return f"<{self.name}, not made>"


@dataclass(frozen=True)
class _StorageType:
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class _Storage:
    """A storage of the file: bytes (n,) uint8 of elements of ``dtype``."""

    data: Tensor
    dtype: torch.dtype


LoadStorage = Callable[[str, torch.dtype, int], Tensor]
"""Function from key, dtype and number of elements of a storage to its bytes (n,) uint8."""

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}

DTYPES = {str(d).removeprefix("torch."): d for d in (*STORAGES.values(), torch.uint8)}
DTYPES |= {"float": torch.float32, "double": torch.float64, "half": torch.float16}
DTYPES |= {"long": torch.int64, "int": torch.int32, "short": torch.int16}

INERT_PACKAGES = (
    *("dill", "robustness", "cox", "numpy", "omegaconf", "pytorch_lightning", "lightning"),
    *("torch.optim", "torch.nn", "torch.amp", "torch.cuda.amp", "__main__"),
)
"""Packages whose objects checkpoints contain besides the weights; they are never imported."""

LONGEST_NAME = 1000

INERT_NAMES = {
    "argparse": {"Namespace"},
    "types": {"SimpleNamespace"},
    "pathlib": {"Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "datetime": {"datetime", "date", "time", "timedelta", "timezone"},
    "copyreg": {"_reconstructor", "__newobj__"},
    "copy_reg": {"_reconstructor", "__newobj__"},
    "uuid": {"UUID"},
    "decimal": {"Decimal"},
    "builtins": {"object", "slice", "range", "complex", "bytearray", "__main__"},
    "torch": {"device", "Generator"},
    "torch.serialization": {"_get_layout"},
}

SUSPECT = frozenset(
    {
        *("eval", "exec", "execfile", "compile", "runstring", "__import__", "import_module"),
        *("getattr", "setattr", "delattr", "attrgetter", "methodcaller", "itemgetter", "partial"),
        *("system", "popen", "Popen", "call", "check_call", "check_output", "run", "spawn"),
        *("spawnl", "spawnv", "execv", "execve", "execvp", "fork", "breakpoint", "exit", "input"),
        *("load", "loads", "load_module", "load_source", "dump", "open", "_eval_repr"),
        *("os", "sys", "posix", "nt", "subprocess", "builtins", "importlib", "shutil", "socket"),
        *("runpy", "pty", "__builtins__", "__globals__", "__code__", "__reduce__", "__class__"),
        "__subclasses__",
    }
)
"""Names that are refused in every module, because they can execute code."""


def _pairs(*content: Any) -> dict[Any, Any]:
    """Make a dictionary (also for Counter and defaultdict) from pairs or from dictionaries."""
    made: OrderedDict[Any, Any] = OrderedDict()
    for part in content:
        if isinstance(part, dict):
            items = list(part.items())
        elif isinstance(part, (list, tuple)) and all(
            isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in part
        ):
            items = [(pair[0], pair[1]) for pair in part]
        else:
            continue  # the default of a defaultdict
        made.update((safe_key(key), value) for key, value in items)
    return made


def _sequence(kind: Callable[[Any], Any]) -> Callable[..., Any]:
    def make(content: Any = (), *_: Any) -> Any:
        if not isinstance(content, (list, tuple, set, frozenset)):
            raise Damaged
        return kind([safe_key(part) for part in content] if kind in (set, frozenset) else content)

    return make


def _whole(numbers: Any) -> tuple[int, ...]:
    if not isinstance(numbers, (list, tuple)) or len(numbers) > DIMENSIONS:
        raise Damaged("a tensor has more than 64 dimensions")
    if any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
        raise Damaged
    return tuple(numbers)


DIMENSIONS = 64

LARGEST = 2**40
"""Maximum product of the other dimensions of a tensor with a dimension 0."""


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor:
    """``torch._utils._rebuild_tensor`` and its versions 2 and 3; ignores hooks."""
    (start,), sizes, strides = _whole([offset]), _whole(size), _whole(stride)
    if not isinstance(storage, _Storage) or len(sizes) != len(strides):
        raise Damaged
    dtype = next((part for part in rest if isinstance(part, torch.dtype)), storage.dtype)
    held, count = len(storage.data) // dtype.itemsize, math.prod(max(1, n) for n in sizes)
    if 0 in sizes:
        if count > LARGEST:
            raise Damaged("a tensor has an absurd shape")
        return torch.empty(sizes, dtype=dtype)
    last = start + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    if last >= held or count > held:
        raise Damaged("a tensor reaches beyond its bytes")
    flat = storage.data[: held * dtype.itemsize].view(dtype)
    return flat.as_strided(sizes, strides, start)


def _from_type(make: Any, kind: Any, args: Any, state: Any) -> Any:
    """Make a tensor that was saved with attributes; ignores the attributes."""
    if make is not _tensor and not isinstance(make, Inert):
        raise Damaged
    return called(make, args)


ENCODINGS = ("latin1", "latin-1", "utf-8", "utf8", "ascii")


def _encoded(text: Any, encoding: Any = "latin-1") -> bytes:
    if not isinstance(text, str) or not isinstance(encoding, str) or encoding not in ENCODINGS:
        raise Damaged
    return text.encode(encoding)


def _imported(name: Any, *_: Any) -> Inert:
    """Placeholder for dill's import of a module or of a name in it."""
    text = as_text(name)
    module, _dot, last = text.rpartition(".")
    if module and last in SUSPECT:
        raise Refusal(text)
    return Inert(text)


def _attribute(owner: Any, name: Any, *_: Any) -> Any:
    """Attribute of a placeholder; an attribute of a module is looked up with `find`."""
    if isinstance(owner, Inert) and _plain(owner.name):
        return find(owner.name, name)
    text = as_text(name)
    if text in SUSPECT:
        raise Refusal(text)
    return Inert(text)


def _plain(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))


def _dill_type(name: Any) -> Any:
    """Container types by dill's names, such as ``DictType`` and ``OrderedDict``."""
    kinds = {"dict": _pairs, "ordereddict": _pairs, **SEQUENCES}
    make = kinds.get(name.removesuffix("Type").lower()) if isinstance(name, str) else None
    return make or Inert(f"type {as_text(name)}")


SEQUENCES = {kind.__name__: _sequence(kind) for kind in (list, tuple, set, frozenset)}

DILL = ("dill._dill", "dill.dill")

KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    **{("collections", name): _pairs for name in ("OrderedDict", "defaultdict", "Counter")},
    ("builtins", "dict"): _pairs,
    ("builtins", "getattr"): _attribute,
    ("builtins", "setattr"): lambda *_: Inert("nothing"),
    **{("builtins", name): make for name, make in SEQUENCES.items()},
    ("_codecs", "encode"): _encoded,
    ("torch", "Size"): lambda content=(), *_: _whole(content),
    **{("torch._utils", f"_rebuild_tensor{version}"): _tensor for version in ("", "_v2", "_v3")},
    **{
        ("torch._utils", f"_rebuild_parameter{kind}"): lambda data, *_: data
        for kind in ("", "_with_state")
    },
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    **{(module, "_load_type"): _dill_type for module in DILL},
    **{(module, "_import_module"): _imported for module in DILL},
    **{(module, "_get_attr"): _attribute for module in DILL},
}
"""(module, name) -> replacement. The arguments come from the file, so the functions check them."""


def find(module: Any, name: Any) -> Any:
    """Look up the replacement for ``name`` of ``module`` in the tables.

    Raises:
        Refusal: if the name is neither known nor inert.
    """
    if not isinstance(module, str) or not isinstance(name, str):
        raise Damaged
    module = "builtins" if module == "__builtin__" else module
    if module == "torch" and name in DTYPES:
        return DTYPES[name]
    if module in ("torch", "torch.storage", "torch.cuda") and name in STORAGES:
        return _StorageType(STORAGES[name])
    if (module, name) in KNOWN:
        return KNOWN[module, name]
    full = f"{module}.{name}"
    inert = any(module == p or module.startswith(p + ".") for p in INERT_PACKAGES)
    plain = name.isidentifier() and _plain(module) and len(full) <= LONGEST_NAME
    if name in SUSPECT or not plain or not (inert or name in INERT_NAMES.get(module, ())):
        raise Refusal(full)
    return Inert(full)


def called(function: Any, args: Any) -> Any:
    if not isinstance(args, tuple) or not isinstance(function, (FunctionType, Inert)):
        raise Damaged
    if isinstance(function, Inert):
        return Inert(f"{function.name.removesuffix('()')}()")
    return function(*args)


def as_text(value: Any) -> str:
    """Text as str; Python 2 wrote it as bytes."""
    if not isinstance(value, (str, bytes)):
        raise Damaged
    return value.decode("latin-1") if isinstance(value, bytes) else value


def safe_key(value: Any) -> Any:
    """The key itself if it has a built-in scalar type, else a placeholder; hashing it is safe."""
    return value if isinstance(value, (str, int, float, bytes, type(None), Inert)) else Inert("key")


# --- the machine ---------------------------------------------------------------------------------

MARK = object()

STEPS = 5_000_000
"""Maximum number of instructions of a pickle: about 100,000 tensors, 10 s."""

COPIES = 16
"""Elements that calls may copy per byte of the pickle, in addition to a million."""


def unpickle(file: Any, load_storage: LoadStorage | None = None) -> Any:
    """Read the next object of ``file``: containers, tensors and `Inert` placeholders.

    Args:
        file: binary file (``read``, ``readline``, ``tell``); its position is the end of the pickle
            afterwards.
        load_storage: called once for each storage, at its first use; None: no storages.

    Raises:
        Refusal: if a name is neither known nor inert.
        Damaged: if the content is not a valid pickle.
    """
    try:
        return _Machine(load_storage).run(file)
    except (
        *(ValueError, TypeError, KeyError, IndexError, EOFError, AttributeError, OverflowError),
        *(RecursionError, MemoryError, pickle.UnpicklingError),
    ):
        raise Damaged from None


class _Machine:
    def __init__(self, load_storage: LoadStorage | None) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.load_storage = load_storage
        self.storages: dict[str, _Storage] = {}
        self.copied = 0
        self.bytes = 0

    def run(self, file: Any) -> Any:
        start = file.tell()
        for steps, (opcode, argument, position) in enumerate(pickletools.genops(file)):
            if opcode.name == "STOP":
                return self.stack.pop()
            if steps > STEPS:
                raise Damaged(f"its pickle has more than {STEPS} instructions")
            self.bytes = (position or 0) - start
            self.step(opcode, argument)
        raise Damaged

    def storage(self, saved: Any) -> Any:
        """Resolve a persistent id of `torch.save`: a storage, or the object of a module."""
        if not isinstance(saved, tuple) or not saved:
            raise Damaged
        what = as_text(saved[0])
        if what == "module" and len(saved) > 1:
            return saved[1]
        views = saved[5:]  # views of storages, before PyTorch 0.4
        if what != "storage" or len(saved) not in (5, 6) or any(v is not None for v in views):
            raise Damaged
        kind, key, (numel,) = saved[1], as_text(saved[2]), _whole([saved[4]])
        if not isinstance(kind, _StorageType) or self.load_storage is None:
            raise Damaged
        if key not in self.storages:
            data = self.load_storage(key, kind.dtype, numel)
            self.storages[key] = _Storage(data, kind.dtype)
        return self.storages[key]

    def call(self, function: Any, args: Any) -> Any:
        """`called`, with a limit on the copied elements."""
        parts = args if isinstance(args, tuple) else ()
        self.copied += len(parts) + sum(len(p) for p in parts if isinstance(p, COPIED))
        if self.copied > 1_000_000 + COPIES * self.bytes:
            raise Damaged("its pickle copies the same content over and over")
        return called(function, args)

    def step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        """Execute ``opcode``: pop its operands from the stack and push its result."""
        below, marked = TAKES[opcode.name]
        above = [self.above_mark()] if marked else []
        at = len(self.stack) - below
        if at < 0:
            raise Damaged
        operands = self.stack[at:] + above
        del self.stack[at:]
        if opcode.arg is not None:
            operands.append(argument)
        given = OPERATIONS[opcode.name](self, *operands)
        self.stack += [given] * len(opcode.stack_after)

    def above_mark(self) -> list[Any]:
        """Pop the elements above the topmost mark, and the mark; return the elements."""
        at = len(self.stack) - 1
        while self.stack[at] is not MARK:  # IndexError without a mark
            at -= 1
        above = self.stack[at + 1 :]
        del self.stack[at:]
        return above

    def memoize(self, index: int, value: Any) -> Any:
        self.memo[index] = value
        return value


def _put(top: Any, items: Sequence[Any]) -> Any:
    """Add alternating keys and values to ``top`` if it is a dictionary; return ``top``."""
    if isinstance(top, dict):
        for key, value in zip(items[::2], items[1::2], strict=True):
            top[safe_key(key)] = value
    return top


def _add(top: Any, items: Sequence[Any]) -> Any:
    if isinstance(top, list):
        top.extend(items)
    elif isinstance(top, set):
        top.update(map(safe_key, items))
    return top


def _refused(*_: Any) -> None:
    raise Refusal("the extension registry")


COPIED = (str, bytes, list, tuple, dict, set, frozenset)

PLAIN = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BYTEARRAY8"),
)
"""Instructions that push their argument."""


def _takes(opcode: pickletools.OpcodeInfo) -> tuple[int, bool]:
    names = [kind.name for kind in opcode.stack_before]
    marked = "mark" in names
    return names.index("mark") if marked else len(names), marked


TAKES = {opcode.name: _takes(opcode) for opcode in pickletools.opcodes}
"""Number of operands of an instruction, and whether it also pops all above the topmost mark."""

OPERATIONS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys((*PLAIN, "DUP"), lambda _, value: value),
    **dict.fromkeys(("PROTO", "FRAME", "POP", "POP_MARK", "NONE"), lambda *_: None),
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_LIST": lambda _: [],
    "EMPTY_DICT": lambda _: {},
    "EMPTY_SET": lambda _: set(),
    "LIST": lambda _, above: above,
    "TUPLE": lambda _, above: tuple(above),
    **dict.fromkeys(("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"), lambda _, *parts: parts),
    "DICT": lambda _, above: _put({}, above),
    "FROZENSET": lambda _, above: frozenset(map(safe_key, above)),
    "SETITEM": lambda _, top, *item: _put(top, item),
    "SETITEMS": lambda _, top, above: _put(top, above),
    "APPEND": lambda _, top, item: _add(top, [item]),
    **dict.fromkeys(("APPENDS", "ADDITEMS"), lambda _, top, above: _add(top, above)),
    "MARK": lambda _: MARK,
    "MEMOIZE": lambda machine, value: machine.memoize(len(machine.memo), value),
    **dict.fromkeys(
        ("PUT", "BINPUT", "LONG_BINPUT"), lambda machine, at: machine.memoize(at, machine.stack[-1])
    ),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda machine, at: machine.memo[at]),
    "GLOBAL": lambda _, name: find(*name.split(" ", 1)),
    "STACK_GLOBAL": lambda _, module, name: find(module, name),
    "INST": lambda machine, above, name: machine.call(find(*name.split(" ", 1)), tuple(above)),
    "OBJ": lambda machine, above: machine.call(above[0], tuple(above[1:])),
    **dict.fromkeys(
        ("REDUCE", "NEWOBJ", "NEWOBJ_EX"),
        lambda machine, function, args, *keywords: machine.call(function, args),
    ),
    "BUILD": lambda _, made, attributes: made,  # ignores them
    "BINPERSID": _Machine.storage,
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), _refused),
}
"""Result of each instruction as a function of the machine, its operands and its argument."""
