"""Fuzz targets: each parser of the package as a function of bytes.

For any input a target returns or raises `UserError`, within `SECONDS` and the memory limit of the
process.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ebmkit.errors import UserError

SECONDS = 10
"""Time limit for one input."""


class Target(NamedTuple):
    """A parser.

    Attributes:
        run: parses bytes.
        seeds: makes the initial inputs.
        share: fraction of the requested number of inputs; below 1 for slow targets.
        text: whether inputs are text.
    """

    run: Callable[[bytes], object]
    seeds: Callable[[], list[bytes]]
    share: float = 1.0
    text: bool = False


@cache
def place() -> Path:
    """A temporary folder, in memory if possible."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory if memory.is_dir() else None))


def written(content: bytes, name: str) -> Path:
    """A file that holds ``content``."""
    path = place() / name
    path.write_bytes(content)
    return path


def string(parse: Callable[[str], object], *seeds: str) -> Target:
    """Target for a parser of option values."""
    return Target(
        lambda content: parse(content.decode("utf-8", "surrogateescape")),
        lambda: [seed.encode() for seed in seeds],
        text=True,
    )


@cache
def run_folder() -> Path:
    """A small finished run."""
    from ebmkit.training import RunFolder, resolve
    from ebmkit.training.loop import assemble

    config = resolve(
        {
            "model": {"backbone": {"width": 4, "channels_per_group": 4}},
            "steps": 2,
            "validation_images": 0,
            "device": "cpu",
            "objective": "jem",
            "backbone": "gradresnet18",
            "negatives": {"buffer_size": 20, "steps": 1},
            "streams": {
                "classify": {"batch_size": 2},
                "denoise": {"batch_size": 2},
                "generate": {"batch_size": 2},
            },
        }
    )
    root = place() / "run"
    assemble(config, RunFolder.create(root, config)).fit()
    return root


def of_run(pattern: str) -> Callable[[], list[bytes]]:
    return lambda: [path.read_bytes() for path in run_folder().glob(pattern)]


def _objective(text: str) -> object:
    from ebmkit.objectives import parse_objective

    return parse_objective(text)


def _sigma(text: str) -> object:
    from ebmkit.noise import parse_radius, parse_sigma

    for parse in (parse_sigma, parse_radius):
        try:
            parse(text)
        except UserError:
            continue
    return None


def _share(text: str) -> object:
    from ebmkit.data.schedule import parse_share

    return parse_share(text)


def _schedule(text: str) -> object:
    from ebmkit.guidance.guides import parse_schedule

    return parse_schedule(text)


@cache
def _classifier() -> Any:
    import ebmkit
    from ebmkit.card import ModelCard

    names = ["cat", "dog", "0", "a b", "Ä"]
    model = ebmkit.create_model("mlp", len(names), 1)
    model.card = ModelCard(
        dataset="digits", objective="ce", image_size=(8, 8), channels=1, class_names=names,
        sigma_range=None, classifies=True,
    )  # fmt: skip
    return model


def _labels(text: str) -> object:
    from ebmkit.sampling.jobs.settings import parse_labels

    return parse_labels(_classifier(), text, 7)


def _assignments(text: str) -> object:
    from ebmkit.training import parse_assignments, resolve

    return resolve(parse_assignments(text.split("\n")))


def _suite_options(text: str) -> object:
    from ebmkit.evaluation.runner import SUITES, parse_options
    from ebmkit.training import parse_assignments

    return parse_options(parse_assignments([text]), list(SUITES))


def _guidance(text: str) -> object:
    from ebmkit.guidance import make_guidance
    from ebmkit.training import parse_assignments

    return make_guidance(**{str(k): v for k, v in parse_assignments(text.split("\n")).items()})


def _config(content: bytes) -> object:
    from ebmkit.training import read_config, resolve

    return resolve(read_config(written(content, "config.yaml")))


def _card(content: bytes) -> object:
    from ebmkit.models.saving import _read_document

    return _read_document(content, Path("model.json"))


def _weights(content: bytes) -> object:
    from ebmkit.storage.tensors import parse_tensors

    return parse_tensors(content, Path("model.safetensors"))


def _checkpoint(content: bytes) -> object:
    from ebmkit.training.run_folder import _unpacked

    return _unpacked(content, Path("step-00000002.pt"))


def _torch_file(content: bytes) -> object:
    from ebmkit.models.importing import load_checkpoint

    return load_checkpoint(str(written(content, "untrusted.pt")))


def _manifest(content: bytes) -> object:
    from ebmkit.storage.manifest import read_manifest, recover

    root = place() / "manifested"
    root.mkdir(exist_ok=True)
    (root / "manifest.json").write_bytes(content)
    read_manifest(root)
    return recover(root)


def _valid_manifest(content: bytes) -> object:
    """Read a manifest with any content and a valid digest."""
    from ebmkit.storage.manifest import _digest

    try:
        values = json.loads(content)
        values.pop("sha256", None)
        signed = json.dumps(values | {"sha256": _digest(values)}).encode()
    except (ValueError, AttributeError, TypeError, RecursionError):
        signed = content
    return _manifest(signed)


def _journal(content: bytes) -> object:

    from ebmkit.training.metrics import MetricsLog

    journal = MetricsLog(written(content, "metrics.jsonl"))
    rows = journal.rows()
    assert len(journal.up_to(10)) <= len(content)
    return rows


def _holder(content: bytes) -> object:
    from ebmkit.storage import atomic

    found = atomic._read(written(content, "holder.json"))
    return found and (atomic._is_dead(found), atomic._sentence(Path("run"), found))


def _used_run(content: bytes) -> object:
    """Change a file of a run, selected by the first byte, and use the run."""
    import ebmkit
    from ebmkit.storage.verify import verify_run
    from ebmkit.training import RunFolder, resolve

    root = place() / "used"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(run_folder(), root)
    files = sorted(path for path in root.rglob("*") if path.is_file())
    chosen = files[content[0] % len(files)] if content else files[0]
    original = chosen.read_bytes()
    edit = content[1:]
    at = int.from_bytes(edit[:3], "big") % (len(original) + 1)
    chosen.write_bytes(original[:at] + edit[3:] + original[at + len(edit[3:]) :])
    if content[:1] > b"\x7f":  # the files have no checksums
        (root / "manifest.json").unlink(missing_ok=True)
    for use in (
        lambda: ebmkit.load(root),
        lambda: resolve(RunFolder.open(root).config()),
        lambda: RunFolder.open(root).load_checkpoint(),
        lambda: RunFolder.open(root).metrics(),
        lambda: verify_run(root),
    ):
        try:
            use()
        except UserError:
            continue
    return None


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all entries of a checkpoint, containers included."""
    found = [path] if path else []
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        found += [leaf for key, own in items for leaf in _leaves(own, (*path, key))]
    return found


def _edited(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy of ``value`` with ``new`` at ``path``; `REMOVED` deletes the entry."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    changed = _edited(value[path[0]], path[1:], new)
    if changed is REMOVED:
        del copy[path[0]]
    else:
        copy[path[0]] = changed
    return copy


REMOVED = object()

REPLACEMENTS: list[Callable[[Any], Any]] = [
    lambda old: REMOVED,
    *(
        lambda old, new=new: new
        for new in (None, True, -1, 0, 2**62, 1.5, float("nan"), float("inf"), "", "x", [], {}, [1])
    ),
    lambda old: [old],
    lambda old: {"x": old},
    lambda old: {0: old},
    *(
        lambda old, change=change: change(old) if isinstance(old, torch.Tensor) else change(ONE)
        for change in (
            lambda t: t[None],
            lambda t: t.flatten()[:0],
            lambda t: t.double(),
            lambda t: t.long(),
            lambda t: t.bool(),
            lambda t: t.to(torch.complex64),
            lambda t: t * float("nan"),
            lambda t: t * 1e30,
            lambda t: torch.full_like(t, -1),
            lambda t: t.half(),
            lambda t: torch.zeros(()).expand(3, 10**9),
        )
    ),
]
"""Functions from an entry of a checkpoint to its replacement."""

ONE = torch.ones(1)


@cache
def _checkpoint_state() -> tuple[dict[str, Any], bytes]:
    """The state of a run's checkpoint, and its replay buffer."""
    from ebmkit.training import RunFolder

    state = RunFolder.open(run_folder()).load_checkpoint()
    assert state is not None
    return state, state.pop("buffer")


@cache
def _trainer() -> Any:
    """A trainer that resumes checkpoints for one step; it is slow to make, so it is made once."""
    from ebmkit.training import RunFolder, resolve
    from ebmkit.training.loop import assemble

    return assemble(resolve(RunFolder.open(run_folder()).config() | {"steps": 3}), None)


def _resumed(content: bytes) -> object:
    """Replace entries of a checkpoint as the bytes select, resume training, and roll back to a
    snapshot of the checkpoint."""
    from ebmkit.training.run_folder import _unpacked, pack_state

    state, buffer = _checkpoint_state()
    for number in range(0, min(len(content) - 2, 9), 3):
        where, what = int.from_bytes(content[number : number + 2], "big"), content[number + 2]
        places = _leaves(state)
        path = places[where % len(places)]
        old: Any = state
        for key in path:
            old = old[key]
        state = _edited(state, path, REPLACEMENTS[what % len(REPLACEMENTS)](old))
    state = _unpacked(pack_state(state), Path("step-00000002.pt"))
    trainer = _trainer()
    trainer.load_state_dict(state | {"buffer": buffer})
    trainer.fit()
    trainer.rollback.restore_snapshot("made up")
    return trainer.step


def _hdf5(content: bytes) -> object:
    from ebmkit.data import load_dataset
    from ebmkit.sampling.entry import ReplayBuffer

    path = written(content, "set.h5")
    with contextlib.suppress(UserError):
        ReplayBuffer.read_images(content, "the buffer")
    return load_dataset("hdf5", path, "train", progress=False)


def _image(content: bytes) -> object:
    from ebmkit.data.images import image_header, read_image

    path = written(content, "picture.png")
    image_header(path)
    return read_image(path, 1)


def _hdf5_seeds() -> list[bytes]:
    import h5py
    import numpy as np

    found = []
    for options in ({}, {"compression": "gzip"}, {"chunks": (1, 4, 4, 1)}):
        buffer = io.BytesIO()
        with h5py.File(buffer, "w") as file:
            data = np.arange(64, dtype=np.uint8).reshape(4, 4, 4, 1)
            file.create_dataset("images", data=data, **options)
            file["labels"] = np.array([0, 1, 0, 1])
            file["class_names"] = ["cat", "dog"]
        found.append(buffer.getvalue())
    return found


def _image_seeds() -> list[bytes]:
    import numpy as np
    from PIL import Image

    found = []
    for mode in ("L", "RGB", "P", "RGBA", "1", "LA"):
        picture = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).convert(mode)
        kinds = ("PNG", "TIFF", "GIF", "WEBP", "BMP") if mode != "LA" else ("PNG",)
        for kind in (*kinds, *(("JPEG", "PPM") if mode in ("L", "RGB") else ())):
            buffer = io.BytesIO()
            picture.save(buffer, kind)
            found.append(buffer.getvalue())
    return found


def _torch_seeds() -> list[bytes]:
    found = []
    for content in ({"step": 2, "w": torch.zeros(2, 3)}, {"state_dict": {"a.b": torch.ones(3)}}):
        for zipped in (True, False):
            buffer = io.BytesIO()
            torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
            found.append(buffer.getvalue())
    return found


def _config_seeds() -> list[bytes]:
    short = [b"steps: 3\nobjective: ce+dsm\n", b"streams: {denoise: {noise: {max: 25/255}}}\n"]
    return [*short, *of_run("config.yaml")()]


TARGETS = {
    "objective": string(_objective, "ce+dsm", "ce + 0.5*dsm", "jem", "1e-3*ce+adv", "2*cdsm"),
    "sigma": string(_sigma, "25/255", "0.1", "1e-3", "25", "0/1", " 8/255 "),
    "share": string(_share, "160/200", "0.5", "1"),
    "schedule": string(_schedule, "sigmoid:t0=500,y0=0.05,k=0.02", "constant", "linear:a=1"),
    "labels": string(_labels, "3", "9" * 20, "cat", "all", "dog", "0,1", "cat,dog"),
    "assignments": string(
        _assignments, "steps=3", "objective.adv.eps=0.5\nobjective=adv", "dataset={name: digits}"
    ),
    "suite options": string(_suite_options, "robustness.steps=3", "classify={a: b}"),
    "guidance": string(_guidance, "kind=energy\nscale=4", "schedule=sigmoid:t0=500", "view=x0_hat"),
    "config": Target(_config, _config_seeds, 0.5, text=True),
    "model.json": Target(_card, of_run("model.json")),
    "safetensors": Target(_weights, of_run("*.safetensors")),
    "checkpoint": Target(_checkpoint, lambda: _torch_seeds() + of_run("checkpoints/*.pt")(), 0.3),
    "checkpoint, resumed": Target(
        _resumed, lambda: [b"", *(bytes([k % 2, 37 * k, 7 * k]) for k in range(6))], 0.1
    ),
    "untrusted .pt": Target(_torch_file, _torch_seeds, 0.5),
    "manifest": Target(_manifest, of_run("manifest.json"), 0.5),
    "manifest, valid digest": Target(_valid_manifest, of_run("manifest.json"), 0.5),
    "metrics.jsonl": Target(_journal, lambda: [b'{"step": 1, "ce": 2.0}\n{"step": 2}\n']),
    "holder": Target(_holder, lambda: [json.dumps({"process": 1, "host": "a"}).encode()]),
    "run folder": Target(_used_run, lambda: [bytes([k, 0, 9, 9, 65]) for k in range(12)], 0.05),
    "hdf5": Target(_hdf5, _hdf5_seeds, 0.3),
    "image": Target(_image, _image_seeds),
}


def check(target: Target, content: bytes) -> str:
    """Run a target on an input; return ``read``, or ``refused`` for a `UserError`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            target.run(content)
        except UserError:
            return "refused"
    return "read"
