"""Pickled checkpoints: objects beside the weights become placeholders, code is refused."""

import argparse
import io
import pickle
import random
import sys
import types
import zipfile

import numpy as np
import pytest
import torch

from ebmkit import UserError
from ebmkit.storage.pickles import Damaged, Inert, Refusal, unpickle
from ebmkit.storage.tensors import MAGIC, read_torch_file


@pytest.fixture
def extra(monkeypatch):
    """Modules ``dill`` and ``robustness`` that exist until ``drop()`` is called."""

    def create_function(*parts):
        raise AssertionError("called")

    dill, inner = types.ModuleType("dill"), types.ModuleType("dill._dill")
    create_function.__module__, create_function.__qualname__ = "dill._dill", "_create_function"
    inner._create_function, dill._dill = create_function, inner
    tools = types.ModuleType("robustness.tools")
    tools.Parameters = type("Parameters", (), {"__module__": "robustness.tools"})
    modules = {"dill": dill, "dill._dill": inner, "robustness.tools": tools}
    modules["robustness"] = types.ModuleType("robustness")
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)

    class Made:
        def __reduce__(self):
            return create_function, (b"code", {"steps": [1, 2]})

    def drop():
        for name in modules:
            monkeypatch.delitem(sys.modules, name)

    return types.SimpleNamespace(function=Made(), parameters=tools.Parameters(), drop=drop)


@pytest.mark.parametrize("zipped", [True, False])
def test_weights_beside_pickled_objects_are_read(tmp_path, extra, zipped):
    """The weights equal the saved ones although modules are missing; objects are placeholders."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).half()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    shared = torch.arange(12.0)
    extra.parameters.lr = 0.1
    content = {
        "model": net.state_dict(),
        "views": [shared[2:8].view(2, 3).t(), shared[4:], torch.empty(0, 3)],
        "kinds": (torch.tensor([True]), torch.arange(3), torch.ones(2, dtype=torch.bfloat16)),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "optimizer": optimizer.state_dict(),
        "schedule": {"function": extra.function, "array": np.ones(3), "best": np.float64(0.5)},
        "args": argparse.Namespace(lr=0.1),
        "more": extra.parameters,
        "epoch": 153,
        "size": torch.Size([1, 2]),
    }
    path = tmp_path / "checkpoint.pt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    extra.drop()
    read = read_torch_file(path)
    assert list(read) == list(content)
    for name, value in net.state_dict().items():
        assert torch.equal(read["model"][name], value)
        assert read["model"][name].dtype == value.dtype
    for found, expected in zip(read["views"], content["views"], strict=True):
        assert torch.equal(found, expected)
    for found, expected in zip(read["kinds"], content["kinds"], strict=True):
        assert torch.equal(found, expected)
        assert found.dtype == expected.dtype
    assert torch.equal(read["parameter"], torch.ones(2))
    assert read["epoch"] == 153
    assert read["size"] == (1, 2)
    assert read["optimizer"]["param_groups"][0]["lr"] == 0.1
    assert isinstance(read["schedule"]["function"], Inert)
    assert isinstance(read["args"], Inert)
    assert isinstance(read["more"], Inert)
    assert "dill" not in sys.modules
    assert "robustness" not in sys.modules


def text(value: str) -> bytes:
    """A string in protocol 0."""
    return f"V{value}\n".encode()


COMMAND = text("touch MARKER")

CODE = {
    "REDUCE": (b"cposix\nsystem\n(" + COMMAND + b"tR.", "posix.system"),
    "in a dictionary": (b"}" + text("opt") + b"cposix\nsystem\n(" + COMMAND + b"tRs.", "posix.sys"),
    "eval": (b"c__builtin__\neval\n(" + text("open('MARKER', 'w').close()") + b"tR.", "s.eval"),
    "INST": (b"(" + COMMAND + b"iposix\nsystem\n.", "posix.system"),
    "OBJ": (b"(cposix\nsystem\n" + COMMAND + b"o.", "posix.system"),
    "NEWOBJ": (b"\x80\x02csubprocess\nPopen\n(" + COMMAND + b"t\x81.", "subprocess.Popen"),
    "STACK_GLOBAL": (
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93(" + COMMAND + b"tR.",
        "posix.system",
    ),
    "dotted path in dill": (
        b"\x80\x04\x8c\x0adill._dill\x8c\x09os.system\x93(" + COMMAND + b"tR.",
        "dill._dill.os.system",
    ),
    "dill's import": (
        b"cdill._dill\n_import_module\n(" + text("os.system") + b"tR(" + COMMAND + b"tR.",
        "os.system",
    ),
    "dill's attribute": (
        b"cdill._dill\n_get_attr\n(cdill._dill\n_import_module\n(" + text("os") + b"tR"
        + text("system") + b"tR(" + COMMAND + b"tR.",
        "os.system",
    ),
    "dill.loads": (b"cdill\nloads\n(" + text("x") + b"tR.", "dill.loads"),
    "getattr": (
        b"c__builtin__\ngetattr\n(c__builtin__\n__import__\n" + text("system") + b"tR.",
        "builtins.__import__",
    ),
    "name imported by a library": (
        b"crobustness.tools.helpers\nPopen\n(" + COMMAND + b"tR.",
        "robustness.tools.helpers.Popen",
    ),
    "partial": (b"cfunctools\npartial\n(cposix\nsystem\n" + COMMAND + b"tR.", "functools.partial"),
    "attrgetter": (b"coperator\nattrgetter\n(" + text("system") + b"tR.", "operator.attrgetter"),
    "torch.hub": (b"ctorch.hub\nload\n(" + text("x/y") + text("z") + b"tR.", "torch.hub.load"),
    "__setstate__": (
        b"ccollections\nOrderedDict\n)R}" + text("__setstate__") + b"cposix\nsystem\nsb.",
        "posix.system",
    ),
    "instance attribute": (
        b"\x80\x02ccollections\nOrderedDict\n)\x81}" + text("items") + b"cevil\nrun\nsb.",
        "evil.run",
    ),
    "hooks": (
        b"ctorch._utils\n_rebuild_tensor_v2\n(NI0\n)))I00\nccollections\nOrderedDict\n(]("
        + text("h") + b"cposix\nsystem\nltatRtR.",
        "posix.system",
    ),
    "tensor subclass": (
        b"ctorch._tensor\n_rebuild_from_type_v2\n(cposix\nsystem\nN(" + COMMAND + b"tNtR.",
        "posix.system",
    ),
    "persistent id": (b"(" + text("module") + b"cposix\nsystem\nNNtQ.", "posix.system"),
    "pickle": (b"cpickle\nloads\n(" + text("x") + b"tR.", "pickle.loads"),
    "extension": (b"\x80\x02\x82\x01.", "extension registry"),
}  # fmt: skip


def write(path, content: bytes, zipped: bool):
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/version", "3")
    else:
        head = [pickle.dumps(part, 2) for part in (MAGIC, 1001, {"little_endian": True})]
        path.write_bytes(b"".join([*head, content, pickle.dumps([], 2)]))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("how", CODE)
def test_pickled_code_is_refused_by_name(tmp_path, how, zipped):
    content, name = CODE[how]
    marker = tmp_path / "marker"
    write(tmp_path / "evil.pt", content.replace(b"MARKER", str(marker).encode()), zipped)
    with pytest.raises(UserError, match="cannot be read safely: it asks for .*" + name) as caught:
        read_torch_file(tmp_path / "evil.pt")
    assert "\n" not in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize("how", ["REDUCE", "eval", "INST", "OBJ", "STACK_GLOBAL"])
def test_plain_pickle_executes_the_same_bytes(tmp_path, how):
    """The control: the cases above do execute code."""
    marker = tmp_path / "marker"
    pickle.loads(CODE[how][0].replace(b"MARKER", str(marker).encode()))
    assert marker.exists()


def test_changed_bytes_raise_only_damaged_or_refusal(extra):
    """Any bytes give an object, `Damaged` or `Refusal`, never another error."""
    content = {"a": [1.5, "x", (2, None)], "o": extra.function, "s": {1, 2}, "b": b"y" * 300}
    rng, outcomes = random.Random(0), set()
    for protocol in (0, 2, 4):
        pickled = pickle.dumps(content, protocol)
        for _ in range(400):
            changed = bytearray(pickled)
            for _ in range(rng.randint(1, 3)):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            try:
                cut = rng.randint(1, len(changed)) if rng.random() < 0.2 else len(changed)
                unpickle(io.BytesIO(bytes(changed[:cut])))
            except (Damaged, Refusal) as error:
                outcomes.add(type(error))
            else:
                outcomes.add(None)
    assert outcomes == {Damaged, Refusal, None}


@pytest.mark.parametrize(
    "view",
    [
        (8, (3,), (1,)),
        (0, (4, 4), (4, 1)),
        (0, (2, 2), (9, 1)),
        (-1, (2,), (1,)),
        (0, (2,), (1, 1)),
    ],
)
def test_views_beyond_their_storage_are_refused(tmp_path, view):
    class View:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (storage, *view, False, {}, hooks)

    storage, hooks = torch.arange(10.0).untyped_storage(), argparse.Namespace()
    storage = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    torch.save({"a": View()}, tmp_path / "odd.pt")
    with pytest.raises(UserError, match="no weights that can be read safely"):
        read_torch_file(tmp_path / "odd.pt")


def test_nested_tuples_are_visited_once(tmp_path):
    """A pickle of a few hundred bytes can describe 2^200 tuples."""
    content = b"]" + b"0(cargparse\nNamespace\n)Rt" + b"2\x86" * 200 + b"."
    write(tmp_path / "deep.pt", content, True)
    deep = read_torch_file(tmp_path / "deep.pt")
    assert deep[0] is deep[1]


def test_repeated_calls_of_a_placeholder_use_no_memory():
    made = unpickle(io.BytesIO(b"cargparse\nNamespace\n" + b")R" * 1000 + b"."))
    assert repr(made) == "<argparse.Namespace(), not made>"
    copies = b"ctorch._tensor\n_rebuild_from_type_v2\n(c__builtin__\nlist\nN(]tNtR."
    with pytest.raises(Damaged):
        unpickle(io.BytesIO(copies))
