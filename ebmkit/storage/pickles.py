"""Pickles read as data: the stack machine of `pickle`, with nothing in it that can run code.

A pickle is a program for a small stack machine. Three of its instructions name functions and
classes (GLOBAL, STACK_GLOBAL, INST), five call them (REDUCE, INST, OBJ, NEWOBJ, NEWOBJ_EX), and
BUILD sets attributes; that is how a checkpoint runs code when `pickle` or `dill` reads it. Here a
name is looked up in two tables, and never in a module:

============  ==================================================================================
name          becomes
============  ==================================================================================
known         a function of this module: containers, storages and tensors as records
inert         an `Inert`, which remembers its name; calling it gives another, BUILD changes nothing
all others    a `Refusal` that says the name
============  ==================================================================================

A pickle may be small and stand for much: what lies on its stack can be copied again and again by
calling ``list`` on it. So copies are counted, and are bounded by the bytes that were read.

Nothing is imported, no object's method is looked up by a name from the file, and attributes are
never set. Inert are the libraries whose objects training codes leave beside the weights (dill,
robustness, cox, optimisers, numpy), without the names in ``SUSPECT``, which also reach code through
such libraries. The extension registry and out-of-band buffers are refused.

`pickle.Unpickler` with a ``find_class`` of its own does not do: it sets attributes of whatever
`find_class` gives, hashes what the file makes (a tuple of tuples, for ever) and fills the memory
for an index in the memo.
"""

from __future__ import annotations

import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


class Damaged(Exception):
    """The bytes are no pickle, or none of tensors in containers."""


class Refusal(Exception):
    """The pickle asks for something that could run code; ``str`` is its name."""


@dataclass(frozen=True, eq=False)
class Inert:
    """What stands for an object that is not made."""

    name: str

    def __repr__(self) -> str:
        return f"<{self.name}, not made>"


@dataclass(eq=False)
class StorageRecord:
    """One storage of the file: ``numel`` elements of ``dtype``, at ``key``; bytes (n,) follow."""

    key: str
    dtype: torch.dtype
    numel: int
    data: torch.Tensor | None = field(default=None, repr=False)


@dataclass(frozen=True, eq=False)
class TensorRecord:
    """A view of a storage; offset and strides in elements of ``dtype``."""

    storage: StorageRecord
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Known:
    """A name of the file that stands for ``make``, a function of this module."""

    name: str
    make: Callable[..., Any]


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
"""Whose objects are found beside weights. None of them is ever imported."""

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
"""Names that are refused wherever they stand: what they reach elsewhere runs code."""


def _pairs(*content: Any) -> dict[Any, Any]:
    """A dictionary, ordered, counting or with a default; ``content`` may be pairs or another."""
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
    if not isinstance(numbers, (list, tuple)) or any(type(n) is not int or n < 0 for n in numbers):
        raise Damaged
    return tuple(numbers)


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, *rest: Any, dtype: Any = None
) -> TensorRecord:
    """``torch._utils._rebuild_tensor`` and its second form; hooks in ``rest`` are left out."""
    (start,), sizes, strides = _whole([offset]), _whole(size), _whole(stride)
    if not isinstance(storage, StorageRecord) or len(sizes) != len(strides):
        raise Damaged
    return TensorRecord(storage, dtype or storage.dtype, start, sizes, strides)


def _tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> TensorRecord:
    if not isinstance(dtype, torch.dtype):
        raise Damaged
    return _tensor(storage, offset, size, stride, dtype=dtype)


def _from_type(make: Any, kind: Any, args: Any, state: Any) -> Any:
    """A tensor with attributes, without them."""
    if not isinstance(make, (_Known, Inert)) or not isinstance(args, tuple):
        raise Damaged
    return called(make, args)


def _encoded(text: Any, encoding: Any = "latin-1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8", "utf8", "ascii"):
        raise Damaged
    return text.encode(encoding)


def _imported(name: Any, *_: Any) -> Inert:
    """dill's import of a module or of a name in it, which is not done."""
    if not isinstance(name, str):
        raise Damaged
    module, _dot, last = name.rpartition(".")
    if module and last in SUSPECT:
        raise Refusal(name)
    return Inert(name)


def _attribute(owner: Any, name: Any, *_: Any) -> Any:
    """An attribute of what is not made; that of a module is one more name to look up."""
    if not isinstance(name, str):
        raise Damaged
    if isinstance(owner, Inert) and _plain(owner.name):
        return find(owner.name, name)
    if name in SUSPECT:
        raise Refusal(name)
    return Inert(name)


def _plain(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))


def _dill_type(name: Any) -> Any:
    """What dill calls the types of containers: ``DictType``, ``OrderedDict``."""
    kinds = {"dict": _pairs, "ordereddict": _pairs, **SEQUENCES}
    make = kinds.get(name.removesuffix("Type").lower()) if isinstance(name, str) else None
    return Inert(f"type {name}") if make is None else _Known(name, make)


SEQUENCES = {kind.__name__: _sequence(kind) for kind in (list, tuple, set, frozenset)}

DILL = ("dill._dill", "dill.dill")

KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _pairs,
    ("collections", "defaultdict"): _pairs,
    ("collections", "Counter"): _pairs,
    ("builtins", "dict"): _pairs,
    ("builtins", "getattr"): _attribute,
    ("builtins", "setattr"): lambda *_: Inert("nothing"),
    **{("builtins", name): make for name, make in SEQUENCES.items()},
    ("_codecs", "encode"): _encoded,
    ("torch", "Size"): lambda content=(), *_: _whole(content),
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    **{(module, "_load_type"): _dill_type for module in DILL},
    **{(module, "_import_module"): _imported for module in DILL},
    **{(module, "_get_attr"): _attribute for module in DILL},
}
"""What is made, by module and name. Functions get what the file gives them, so they check it."""


def find(module: str, name: str) -> Any:
    """What stands for ``name`` of ``module``; no module is looked into.

    Raises:
        Refusal: if it is neither known nor inert.
    """
    module = "builtins" if module == "__builtin__" else module
    if module == "torch" and name in DTYPES:
        return DTYPES[name]
    if module in ("torch", "torch.storage", "torch.cuda") and name in STORAGES:
        return _Known(name, _storage_class)
    if (module, name) in KNOWN:
        return _Known(name, KNOWN[module, name])
    full = f"{module}.{name}"
    inert = any(module == p or module.startswith(p + ".") for p in INERT_PACKAGES)
    plain = name.isidentifier() and _plain(module)
    if name in SUSPECT or not plain or not (inert or name in INERT_NAMES.get(module, ())):
        raise Refusal(full)
    return Inert(full)


def _storage_class(*_: Any) -> Any:
    raise Damaged  # storages are made by persistent ids alone


def called(function: Any, args: Any) -> Any:
    if not isinstance(args, tuple):
        raise Damaged
    if isinstance(function, _Known):
        return function.make(*args)
    if isinstance(function, Inert):
        return Inert(f"{function.name}()")
    raise Damaged


def safe_key(value: Any) -> Any:
    """A key that hashes without calling into what the file made."""
    return value if isinstance(value, (str, int, float, bytes, type(None), Inert)) else Inert("key")


def storage_of(saved: Any, storages: dict[str, StorageRecord]) -> Any:
    """What `torch.save` writes as a persistent id: a storage; of a module, its object."""
    if not isinstance(saved, tuple) or not saved:
        raise Damaged
    what = saved[0].decode("latin-1") if isinstance(saved[0], bytes) else saved[0]
    if what == "module" and len(saved) > 1:
        return saved[1]
    if what != "storage" or len(saved) not in (5, 6) or not isinstance(saved[1], _Known):
        raise Damaged
    if len(saved) == 6 and saved[5] is not None:  # views of storages, before PyTorch 0.4
        raise Damaged
    dtype, (numel,) = STORAGES.get(saved[1].name), _whole([saved[4]])
    key = saved[2].decode("latin-1") if isinstance(saved[2], bytes) else str(saved[2])
    if dtype is None:
        raise Damaged
    return storages.setdefault(key, StorageRecord(key, dtype, numel))


# --- the machine ---------------------------------------------------------------------------------

MARK = object()

STEPS = 5_000_000
"""Instructions of a pickle, at the most: 100,000 tensors or so, 10 s."""

COPIES = 16
"""Elements that calls may copy for each byte of the pickle, beside a million."""


def unpickle(file: Any, storages: dict[str, StorageRecord] | None = None) -> Any:
    """The next object in ``file``, with records in place of tensors and `Inert` of all else.

    Args:
        file: of bytes (``read``, ``readline``, ``tell``), left behind the pickle's end.
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

    def run(self, file: Any) -> Any:
        start = file.tell()
        for steps, (opcode, argument, position) in enumerate(pickletools.genops(file)):
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
            case "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET" | "EMPTY_TUPLE":
                stack.append({"L": list, "D": dict, "S": set, "T": tuple}[name[6]]())
            case "LIST" | "TUPLE":
                stack.append({"LIST": list, "TUPLE": tuple}[name](self.marked()))
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
            case "REDUCE" | "NEWOBJ" | "NEWOBJ_EX":
                if name == "NEWOBJ_EX":
                    stack.pop()  # keywords
                args, function = stack.pop(), stack.pop()
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
