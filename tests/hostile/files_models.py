"""Untrusted models, checkpoints and runs: crafted contents, and links out of the run."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import pickle
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import yaml
from diffusers import UNet2DModel  # noqa: F401  (its import opens a socket, which is not part of a case)
from ebmkit_tests.hostile.case import Case, outside
from ebmkit_tests.hostile.making import Make

import ebmkit
import ebmkit.evaluation.runner
from ebmkit.cli.app import app
from ebmkit.errors import UserError
from ebmkit.models import ModelConfig
from ebmkit.models.importing import load_checkpoint
from ebmkit.models.saving import model_files
from ebmkit.sampling.jobs.sources import at_hand, buffer_of
from ebmkit.storage.tensors import read_tensors, read_torch_file
from ebmkit.storage.verify import verify_run
from ebmkit.training import RunFolder, resolve

# ---------------------------------------------------------------- safetensors


def packed(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with ``header`` (JSON or bytes) and any value in its length field."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


FOUR = bytes(16)

SHAPE = "invalid shape, data type, or offset"

SAFETENSORS: dict[str, tuple[bytes, str | None]] = {
    "empty": (b"", "does not parse"),
    "a header of 2^63 bytes": (packed({}, length=2**63), "does not parse"),
    "a header longer than the file": (packed({}, length=100), "does not parse"),
    "a header of 9 MB": (packed(b"{" + b" " * 9 * 2**20 + b"}"), "more than"),
    "a header that is not a mapping": (packed([1]), "does not parse"),
    "a deeply nested header": (packed(b"[" * 10**5 + b"]" * 10**5), "not JSON|nested"),
    "data beyond the file": (packed({"a": entry([4], 0, 16)}, bytes(8)), "not fully covered"),
    "bytes without a tensor": (packed({"a": entry([4], 0, 16)}, bytes(99)), "not fully covered"),
    "overlapping tensors": (
        packed({"a": entry([4], 0, 16), "b": entry([4], 0, 16)}, FOUR),
        "invalid offset for tensor `a`|`b`",
    ),
    "a gap between tensors": (
        packed({"a": entry([2], 0, 8), "b": entry([1], 12, 16)}, FOUR),
        "offset for tensor `b`",
    ),
    "end before start": (packed({"a": entry([4], 16, 0)}, FOUR), "offset for tensor `a`"),
    "more elements than bytes": (
        packed({"a": entry([2**40], 0, 16)}, FOUR),
        SHAPE,
    ),
    "a product that overflows": (
        packed({"a": entry([2**33, 2**33], 0, 16)}, FOUR),
        "overflow computing",
    ),
    "a huge shape of size 0": (packed({"a": entry([0, 2**62, 2**62], 0, 0)}), "does not parse"),
    "many dimensions": (
        packed({"a": entry([1] * 10**5, 0, 4)}, bytes(4)),
        "64 dimensions",
    ),
    "a negative size": (packed({"a": entry([-4], 0, 16)}, FOUR), "integer `-4`"),
    "a size that is a string": (
        packed({"a": entry(["4"], 0, 16)}, FOUR),
        'string "4"',
    ),
    "an unknown type": (packed({"a": entry([4], 0, 16, "X32")}, FOUR), "unknown variant `X32`"),
    "a type of another width": (
        packed({"a": entry([4], 0, 16, "F64")}, FOUR),
        SHAPE,
    ),
    "an entry that is not a mapping": (packed({"a": 1}, FOUR), "invalid type: integer `1`"),
    "a duplicate name": (
        packed(
            b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},'
            b'"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}',
            FOUR,
        ),
        "'a' twice",
    ),
    "metadata that are not strings": (
        packed({"__metadata__": {"a": 1}, "x": entry([4], 0, 16)}, FOUR),
        "expected a string",
    ),
    "control characters in a name": (packed({"\x1b[2J": entry([4], 4, 20)}, bytes(20)), "x1b"),
}

# ---------------------------------------------------------------- pickles and their zips


def number(n: int) -> bytes:
    return b"J" + struct.pack("<i", n)


def zipped(pickled: bytes, **entries: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, content in entries.items():
            archive.writestr(name.replace("__", "/"), content)
    return buffer.getvalue()


def bomb() -> bytes:
    """256 MiB of zeros in 256 KiB."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/data.pkl", tensor_of(2**26))
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", bytes(2**28))
    return buffer.getvalue()


def tensor_of(numel: int, offset: int = 0, size: int | None = None, stride: int = 1) -> bytes:
    """The pickle of a state dict with one tensor of a storage of ``numel``."""
    size = numel if size is None else size

    def integer(n: int) -> bytes:
        return b"\x8a\x09" + n.to_bytes(9, "little", signed=True)

    return (
        b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n(("
        + b"X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
        + integer(numel) + b"tQ" + integer(offset) + integer(size) + b"\x85" + integer(stride)
        + b"\x85\x89ccollections\nOrderedDict\n)RtRs."
    )  # fmt: skip


def stored(pickled: bytes, data: bytes = FOUR) -> bytes:
    return zipped(pickled, archive__byteorder=b"little", archive__data__0=data)


def renamed(old: bytes, new: bytes, content: bytes) -> bytes:
    """``content`` with a name of a zip entry replaced by one of the same length."""
    assert len(old) == len(new)
    return content.replace(old, new)


def encrypted() -> bytes:
    content = bytearray(stored(tensor_of(4)))
    at = content.index(b"PK\x01\x02")
    content[at + 8] |= 1  # the flag in the list of entries
    return bytes(content)


def linked() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        info = zipfile.ZipInfo("archive/data.pkl")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    return buffer.getvalue()


def overlapping() -> bytes:
    """Eight entries that share one megabyte."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", tensor_of(4))
        archive.writestr("archive/data/0", bytes(2**20))
        for i in range(1, 8):
            twin = copy.copy(archive.getinfo("archive/data/0"))
            twin.filename = f"archive/data/{i}"
            archive.filelist.append(twin)
            archive.NameToInfo[twin.filename] = twin
    return buffer.getvalue()


def crowded() -> bytes:
    """200,000 empty entries."""
    name = b"archive/aaaaaaaaaaaaaaaa"
    row = struct.pack("<4s4B4HL2L5H2L", b"PK\x01\x02", 20, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0,
                      len(name), 0, 0, 0, 0, 0, 0)  # fmt: skip
    rows = (row + name) * 200_000
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, len(rows), 4, 0)
    return b"PK\x03\x04" + rows + end


def flipped() -> bytes:
    content = bytearray(stored(tensor_of(4), b"\x01" * 16))
    content[content.index(b"\x01" * 16) + 5] ^= 1
    return bytes(content)


ARRAY = b"\x80\x02c__builtin__\nbytearray\n" + number(2**30) + b"\x85R."
TENSOR = b"\x80\x02ctorch\nTensor\n" + number(2**28) + b"\x85R."
COPIES = (
    b"\x80\x02]q\x00(" + b"K\x01" * 50_000 + b"e0]"
    + b"c__builtin__\nlist\nh\x00\x85Ra" * 20_000 + b"."
)  # fmt: skip
DEEP = b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."
MARKS = b"\x80\x02" + b"K\x01" * 200_000 + b"(t" * 200_000 + b"."
LEGACY = b"".join(pickle.dumps(p, 2) for p in (0x1950A86A20F9469CFC6C, 1001, {}))

PICKLES: dict[str, tuple[Callable[[], bytes] | bytes, str | None]] = {
    "a bomb of zeros": (bomb, "claim more bytes"),
    "a bytearray of 2^30": (zipped(ARRAY), "safely|no state dict"),
    "a tensor of 2^28": (zipped(TENSOR), "asks for torch.Tensor"),
    "20,000 copies of a list": (zipped(COPIES), "over and over"),
    "deeply nested": (zipped(DEEP), "no weights that can be read safely"),
    "nested marks": (zipped(MARKS), "no state dict"),
    "a storage longer than its bytes": (stored(tensor_of(5)), "no weights that can be read"),
    "a storage of 2^60": (stored(tensor_of(2**60)), "no weights that can be read"),
    "an offset beyond the storage": (stored(tensor_of(4, 3, 2)), "beyond its bytes"),
    "strides beyond the storage": (stored(tensor_of(4, 0, 2, 2**40)), "beyond its bytes"),
    "one element viewed as 2^50": (stored(tensor_of(4, 0, 2**50, 0)), "beyond its bytes"),
    "a negative offset": (stored(tensor_of(4, -1)), "no weights that can be read"),
    "a wrong checksum": (flipped, "no weights that can be read"),
    "encrypted": (encrypted, "encrypted"),
    "a link": (linked, "is a link"),
    "overlapping entries": (overlapping, "claim more bytes"),
    "200,000 entries": (crowded, "a part that should be small"),
    "names with parent folders": (
        renamed(b"archive/extra", b"../../../evil", zipped(tensor_of(4), archive__extra=b"")),
        "leads out",
    ),
    "absolute names": (
        renamed(b"archive/extra", b"/tmp/evil.txt", zipped(tensor_of(4), archive__extra=b"")),
        "leads out",
    ),
    "duplicate names": (
        renamed(b"archive/twin.pkl", b"archive/data.pkl",
                zipped(tensor_of(4), **{"archive__twin.pkl": b"N."})),
        "one name",
    ),
    "truncated": (stored(tensor_of(4))[:-30], "no weights that can be read"),
    "empty": (b"", "no weights that can be read"),
    "an empty zip": (b"PK\x05\x06" + bytes(18), "no weights that can be read"),
    "legacy, a storage of 2^60": (
        LEGACY + tensor_of(2**60) + pickle.dumps(["0"], 2) + struct.pack("<q", 2**60),
        "ends early",
    ),
    "legacy, bytes of 2^40": (
        LEGACY + b"\x80\x04\x8e" + struct.pack("<Q", 2**40),
        "no weights that can be read",
    ),
    "control characters in a name": (zipped(b"\x80\x02}X\x04\x00\x00\x00\x1b[2JK\x01s."), "x1b"),
}  # fmt: skip

# ---------------------------------------------------------------- folders


@cache
def small_run() -> Path:
    """A run with all files of a trained one, made without training."""
    root = Path(tempfile.mkdtemp()) / "run"
    config = resolve({"model": {"backbone": {"width": 8}}, "steps": 2, "device": "cpu"})
    run = RunFolder.create(root, config)
    built = ModelConfig.model_validate(
        config.model.model_dump() | {"in_channels": 1, "num_classes": 10, "reference_size": (8, 8)}
    )
    card = ebmkit.ModelCard(dataset="digits", objective="ce+dsm", image_size=(8, 8), channels=1,
                            class_names=list("0123456789"), classifies=True)  # fmt: skip
    run.log({"step": 1, "ce": 2.0})
    run.save_checkpoint(
        {"step": 2, "w": torch.zeros(3)}, b"buffer", model_files(built.build(), built, card)
    )
    shutil.rmtree(root / ".locks", ignore_errors=True)
    return root


def run_with(change: Callable[[Path, Path], object], manifest: bool = False) -> Make:
    """A run changed by ``change(root, outside)``; its manifest is removed or left as it is."""

    def make(folder: Path) -> Path:
        root = shutil.copytree(small_run(), folder / "run")
        change(root, outside(folder))
        if not manifest:
            (root / "manifest.json").unlink(missing_ok=True)
        return root

    return make


def replaced(name: str, content: bytes | str) -> Make:
    def change(root: Path, where: Path) -> None:
        text = content.encode() if isinstance(content, str) else content
        (root / name).write_bytes(text)

    return run_with(change)


def edited(name: str, **fields: object) -> Make:
    """A run with other values in the document ``name``; ``__`` in a key separates levels."""

    def change(root: Path, where: Path) -> None:
        path = root / name
        values = yaml.safe_load(path.read_text())
        for key, value in fields.items():
            *parts, last = key.split("__")
            inner = values
            for part in parts:
                inner = inner[part]
            inner[last] = value
        path.write_text(json.dumps(values))

    return run_with(change)


def link_out(name: str) -> Make:
    def change(root: Path, where: Path) -> None:
        (where / "there").write_bytes((root / name).read_bytes())
        (root / name).unlink()
        (root / name).symlink_to(where / "there")

    return run_with(change)


def folder_out(root: Path, where: Path) -> None:
    (root / "evaluation").symlink_to(where)


def pipe_at(name: str) -> Make:
    def change(root: Path, where: Path) -> None:
        (root / name).unlink()
        os.mkfifo(root / name)

    return run_with(change)


def state(**fields: object) -> bytes:
    buffer = io.BytesIO()
    torch.save({"step": 2, **fields}, buffer)
    return buffer.getvalue()


def manifest_naming(name: str) -> Make:
    """A run whose manifest, with a valid digest, has an entry for a file outside the run."""

    def change(root: Path, where: Path) -> None:
        import hashlib

        path = root / "manifest.json"
        values = json.loads(path.read_text())
        values.pop("sha256")
        values["files"][name.replace("OUTSIDE", str(where))] = {"bytes": 1, "sha256": "0"}
        body = json.dumps(values, sort_keys=True).encode()
        path.write_text(json.dumps(values | {"sha256": hashlib.sha256(body).hexdigest()}))

    return run_with(change, manifest=True)


def use_model(root: Path) -> object:
    return ebmkit.load(root)


def use_run(root: Path) -> None:
    """Read everything in a run, then raise the first `UserError`."""
    first: UserError | None = None
    for read in (
        lambda: ebmkit.load(root),
        lambda: resolve(RunFolder.open(root).config()),
        lambda: RunFolder.open(root).metrics(),
        lambda: RunFolder.open(root).load_checkpoint(),
        lambda: buffer_of(root, ebmkit.load(root)),
        lambda: verify_run(root),
    ):
        try:
            read()
        except UserError as error:
            first = first or error
    at_hand(root)
    if first is not None:
        raise first


def warm_up() -> None:
    """Make the imports of the first read of a run, which are not part of a case."""
    with contextlib.suppress(UserError):  # an untrained run has no buffer
        use_run(small_run())


def evaluate(root: Path) -> None:
    app(["evaluate", str(root), "--device", "cpu", "--limit", "10"], standalone_mode=False)


def file_with(content: Callable[[], bytes] | bytes, name: str) -> Make:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content() if callable(content) else content)
        return folder / name

    return make


CASES = [
    *(
        Case(f"safetensors: {name}", "weights", file_with(content, "w.safetensors"), message)
        for name, (content, message) in SAFETENSORS.items()
    ),
    *(
        Case(f"pt: {name}", "weights", file_with(content, "w.pt"), message)
        for name, (content, message) in PICKLES.items()
    ),
    *(
        Case(f"model.json: {name}", "model", edited("model.json", **fields), message)
        for name, fields, message in (
            ("a width of 10^6", {"model__backbone__width": 10**6}, "more parameters"),
            ("a width of 2^62", {"model__backbone__width": 2**62}, "more parameters|fit|no such"),
            ("labels of 10^12", {"model__num_classes": 10**12}, "more parameters"),
            ("layers of 10^9",
             {"model__backbone": {"kind": "wideresnet", "depth": 6 * 10**9 + 4, "width": 16}},
             "more parameters"),
            ("an mlp of 10^12 layers",
             {"model__backbone": {"kind": "mlp", "depth": 10**12, "width": 1}},
             "more parameters"),
            ("a kernel of 10^9", {"model__backbone": {"kind": "mlp", "kernel": 10**9 + 1}},
             "more parameters|not legal"),
            ("frequencies of 10^12",
             {"model__backbone": {"kind": "mlp", "noise_conditional": True,
                                  "frequencies": 10**12}}, "not legal"),
            ("timesteps of 10^12", {"model__backbone": {"kind": "unet", "timesteps": 10**12}},
             "not legal"),
            ("blocks of 10^12 in a unet",
             {"model__backbone": {"kind": "unet", "blocks": 10**12, "width": 8}},
             "more parameters"),
            ("blocks of 10^12 in a drunet",
             {"model__backbone": {"kind": "drunet", "blocks": 10**12, "width": 1}},
             "more parameters"),
            ("images of 10^9 pixels a side", {"card__image_size": [10**9, 10**9]}, "not legal"),
            ("another backbone", {"model__backbone": {"kind": "mlp"}}, "do not fit|more param"),
            ("an unknown backbone", {"model__backbone": {"kind": "evil"}}, "backbone"),
            ("control characters in a class name", {"card__class_names": ["\x1b[2J"] * 10}, None),
            ("a name of 10^6 characters", {"card__dataset": "x" * 10**6}, None),
        )
    ),
    Case("model.json: NaN", "model", replaced("model.json", '{"format": NaN}'), "not JSON"),
    Case("model.json: a pipe", "model", pipe_at("model.json"), "no model.json|ordinary"),
    Case("model: weights are a link outside", "model", link_out("model.safetensors"), "a link to"),
    Case("model: a document is a link outside", "model", link_out("model.json"), "a link to"),
    Case("run: a configuration is a link outside", "run", link_out("config.yaml"), "a link to"),
    Case("run: results are a link outside", "run", run_with(folder_out), "a link to"),
    Case("run: metrics are a pipe", "run", pipe_at("metrics.jsonl"), "no ordinary file"),
    Case("run: a manifest is a pipe", "run",
         run_with(lambda root, _: ((root / "manifest.json").unlink(),
                                   os.mkfifo(root / "manifest.json")), manifest=True), "damaged"),
    Case("run: a tag in the configuration", "run",
         replaced("config.yaml", "seed: !!python/object/apply:os.system ['id']"), "not YAML"),
    Case("run: a checkpoint with code", "run",
         replaced("checkpoints/step-00000002.pt", zipped(b"cposix\nsystem\n(Vid\ntR.")), "damaged"),
    Case("run: a checkpoint is a bomb", "run",
         run_with(lambda root, _: (root / "checkpoints/step-00000002.pt").write_bytes(bomb())),
         "damaged"),
    Case("run: a checkpoint with a bytearray of 2^30", "run",
         replaced("checkpoints/step-00000002.pt", zipped(ARRAY)), "damaged"),
    *(
        Case(f"run: a buffer at {name!r}", "run",
             replaced("checkpoints/step-00000002.pt",
                      state(buffer={"file": name, "sha256": "0" * 64})), "damaged")
        for name in ("../../../outside/secret.txt", "/etc/passwd", "buffer-2-aaaaaaaa.h5", "", "\0")
    ),
    Case("run: a buffer that is not a mapping", "run",
         replaced("checkpoints/step-00000002.pt", state(buffer=[1])), "damaged"),
    *(
        Case(f"run: a manifest names {name!r}", "run", manifest_naming(name), "damaged")
        for name in ("../../../outside/secret.txt", "OUTSIDE/absolute", "a\\b", "\0", "")
    ),
    Case("run: invalid rows of metrics", "run",
         replaced("metrics.jsonl", '[1]\n{"step": "x"}\n' + "[" * 10**5), "."),
    Case("run: evaluated with data at another path", "evaluate",
         edited("config.yaml", dataset__name="cifar10", dataset__data_dir="/nowhere/else"),
         "is not in '/nowhere/else'"),
    Case("run: evaluated with a device as data", "evaluate",
         edited("config.yaml", dataset__name="hdf5", dataset__data_dir="/dev/zero"), "/dev/zero"),
    Case("run: evaluated with NUL in its data", "evaluate",
         replaced("config.yaml", 'dataset: {name: hdf5, data_dir: "\\0"}'), "cannot be written"),
]  # fmt: skip


def use_weights(path: Path) -> object:
    """Read the tensors alone, and as an imported checkpoint."""
    if path.suffix == ".safetensors":
        read_tensors(path)
    else:
        read_torch_file(path)
    return load_checkpoint(path)


OPENERS = {
    "weights": use_weights,
    "model": use_model,
    "run": use_run,
    "evaluate": evaluate,
}
