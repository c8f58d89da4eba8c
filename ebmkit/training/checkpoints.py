"""Checkpoints: everything needed to go on exactly, the newest few of them.

``checkpoints/step-00000500.pt`` holds the state after so many steps, as `torch.save` writes
tensors and plain values; a replay buffer that belongs to it has a file of its own, HDF5, which the
checkpoint names with its digest. Runs of format 1 kept one checkpoint, ``last.pt``.

A checkpoint is whole if its bytes are those that the manifest vouches for, its archive passes its
own checksums (all there is to go by where the manifest is lost), and it holds the step that its
name says. Of those that are whole the newest counts.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ebmkit.errors import UserError
from ebmkit.storage import DamagedFile, read_together
from ebmkit.storage.manifest import Manifest
from ebmkit.storage.torchfile import read_torch_content

__all__ = [
    "BEST",
    "buffer_name",
    "candidates",
    "checkpoint_name",
    "is_checkpoint",
    "pack_state",
    "read_checkpoint",
    "superseded",
]

BEST = "checkpoints/best.safetensors"
"""The best weights by validation."""

OLD = "checkpoints/last.pt"

_NAME = re.compile(r"checkpoints/step-(\d{8,18})\.pt")
_BUFFER = re.compile(r"checkpoints/buffer-(\d{1,18})-[0-9a-f]{8}\.h5")


def checkpoint_name(step: int) -> str:
    """Name of the checkpoint after ``step``, in the run folder."""
    return f"checkpoints/step-{step:08}.pt"


def buffer_name(step: int, digest: str) -> str:
    """Name of the replay buffer that belongs to it, by the SHA-256 of its content."""
    return f"checkpoints/buffer-{step}-{digest[:8]}.h5"


def is_checkpoint(name: str) -> bool:
    """Whether a file is one that checkpoints consist of."""
    return name == OLD or bool(_NAME.fullmatch(name) or _BUFFER.fullmatch(name))


def candidates(names: Iterable[str]) -> list[str]:
    """The checkpoints among ``names``, newest first; that of format 1 last."""
    found = {name: _step_of(name) for name in names if name == OLD or _NAME.fullmatch(name)}
    return sorted(found, key=lambda name: -found[name])


def superseded(names: Iterable[str], step: int, keep: int) -> list[str]:
    """What goes when the checkpoint of ``step`` is written and the newest ``keep`` are kept.

    Those of later steps go, for the run went back; buffers go with the checkpoints they belong to.
    """
    held = [name for name in names if is_checkpoint(name)]
    steps = sorted({_step_of(name) for name in candidates(held)} | {step})
    kept = {s for s in steps if 0 <= s <= step}
    kept = set(sorted(kept)[-keep:])
    return [name for name in held if _step_of(name) not in kept]


def pack_state(state: dict[str, Any]) -> bytes:
    """A checkpoint's bytes."""
    content = io.BytesIO()
    torch.save(state, content)
    return content.getvalue()  # shares its memory; a view in a cycle crashes Python 3.12.1


def read_checkpoint(root: Path, name: str) -> dict[str, Any]:
    """The state in ``name``, on the CPU; its entry ``buffer``, if any, the bytes of that file.

    Raises:
        DamagedFile: if it, or its buffer, is missing or damaged, or holds anything but tensors and
            plain values.
    """
    path = root / name
    state = _unpacked(read_together(root, [name])[name], path)
    if name != OLD and state["step"] != _step_of(name):
        raise DamagedFile(f"{str(path)!r} is damaged: it holds step {state['step']}")
    if state.get("buffer") is not None:
        state["buffer"] = _read_buffer(root, state["buffer"])
    return state


def all_names(root: Path, manifest: Manifest | None) -> list[str]:
    """Files of checkpoints: those in the manifest, or else those that lie there."""
    if manifest is not None:
        return list(manifest.files)
    return [f"checkpoints/{path.name}" for path in _files(root / "checkpoints")]


def _files(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from (path for path in folder.iterdir() if path.is_file() and not path.is_symlink())


def _step_of(name: str) -> int:
    match = _NAME.fullmatch(name) or _BUFFER.fullmatch(name)
    return int(match[1]) if match else -1


def _unpacked(content: bytes, path: Path) -> dict[str, Any]:
    damaged = DamagedFile(f"{str(path)!r} is damaged: it cannot be read as a checkpoint")
    try:
        state = read_torch_content(content, path)
    except UserError:
        raise damaged from None
    if not isinstance(state, dict) or type(state.get("step")) is not int or state["step"] < 0:
        raise damaged
    numbers = [state.get("best", math.inf), state.get("seconds", 0.0)]
    if any(type(number) not in (int, float) for number in numbers):
        raise damaged
    if not isinstance(state.get("watch"), dict | None) or not isinstance(
        state.get("buffer"), dict | None
    ):
        raise damaged
    return state


def _read_buffer(root: Path, saved: Any) -> bytes:
    facts = saved if isinstance(saved, dict) else {}
    named = facts.get("file")
    name = f"checkpoints/{Path(named).name}" if isinstance(named, str) else ""
    content = read_together(root, [name])[name] if _BUFFER.fullmatch(name) else b""
    if hashlib.sha256(content).hexdigest() != facts.get("sha256"):
        raise DamagedFile(
            f"{str(root / name)!r} is missing or damaged: it is not the replay buffer that the "
            "checkpoint was saved with"
        )
    return content
