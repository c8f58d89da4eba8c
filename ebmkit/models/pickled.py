"""What a name in a pickle stands for: tables, and functions that check what they are given.

See `ebmkit.models.unpickle`, which reads pickles by them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = [
    "Damaged",
    "Inert",
    "Refusal",
    "StorageRecord",
    "TensorRecord",
    "called",
    "find",
    "safe_key",
    "storage_of",
]


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

TYPES = {
    "DictType": dict,
    "ListType": list,
    "TupleType": tuple,
    "SetType": set,
    "FrozenSetType": frozenset,
    "OrderedDict": OrderedDict,
}
"""What dill calls the types of containers."""


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


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> TensorRecord:
    """``torch._utils._rebuild_tensor`` and its second form; hooks in ``rest`` are left out."""
    if not isinstance(storage, StorageRecord):
        raise Damaged
    return _view(storage, storage.dtype, offset, size, stride)


def _tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> TensorRecord:
    if not isinstance(storage, StorageRecord) or not isinstance(dtype, torch.dtype):
        raise Damaged
    return _view(storage, dtype, offset, size, stride)


def _view(
    storage: StorageRecord, dtype: torch.dtype, offset: Any, size: Any, stride: Any
) -> TensorRecord:
    (start,), sizes, strides = _whole([offset]), _whole(size), _whole(stride)
    if len(sizes) != len(strides):
        raise Damaged
    return TensorRecord(storage, dtype, start, sizes, strides)


def _from_type(make: Any, kind: Any, args: Any, state: Any) -> Any:
    """A tensor with attributes, without them."""
    if not isinstance(make, (_Known, Inert)) or not isinstance(args, tuple):
        raise Damaged
    return called(make, args)


def _encoded(text: Any, encoding: Any = "latin-1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8", "utf8", "ascii"):
        raise Damaged
    return text.encode(encoding)


def _size(content: Any = (), *_: Any) -> tuple[int, ...]:
    return _whole(content)


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
    kind = TYPES.get(name) if isinstance(name, str) else None
    if kind is None:
        return Inert(f"type {name}")
    return _Known(str(name), _pairs if issubclass(kind, dict) else _sequence(kind))


def _nothing(*_: Any) -> Inert:
    return Inert("nothing")


def _parameter(data: Any, *_: Any) -> Any:
    return data


KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _pairs,
    ("collections", "defaultdict"): _pairs,
    ("collections", "Counter"): _pairs,
    ("builtins", "dict"): _pairs,
    ("builtins", "getattr"): _attribute,
    ("builtins", "setattr"): _nothing,
    **{("builtins", kind.__name__): _sequence(kind) for kind in (list, tuple, set, frozenset)},
    ("_codecs", "encode"): _encoded,
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("dill._dill", "_load_type"): _dill_type,
    ("dill._dill", "_import_module"): _imported,
    ("dill._dill", "_get_attr"): _attribute,
    ("dill.dill", "_load_type"): _dill_type,
    ("dill.dill", "_import_module"): _imported,
    ("dill.dill", "_get_attr"): _attribute,
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
