"""The run folder.

::

    RUN/
      config.yaml            the resolved configuration
      environment.json       versions, device, git commit, command
      metrics.jsonl          one row per log or validation
      model.safetensors      the weights (the averaged ones, where averaging is on)
      model.json             what builds the network, and what it was trained for
      checkpoints/last.pt    everything needed to go on exactly
      checkpoints/best.safetensors   the best weights by validation
      checkpoints/buffer-*.h5        the chains that last.pt goes on with, where there are any
      breaches/              what was logged before the run went back (`ebmkit.training.watch`)
      cost.json              seconds of a step, memory, share of the device's matrix rate
      evaluation/            written by `ebmkit evaluate`

A new run never writes into a folder that holds anything; a continued one must have the same
configuration.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import platform
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel, ValidationError

from ebmkit.errors import UserError
from ebmkit.parallel import launch
from ebmkit.storage import write_atomically

__all__ = ["RunFolder", "difference", "environment"]

_FREE_TO_CHANGE = (
    "device",
    "log_every",
    "validate_every",
    "checkpoint_every",
    "dataset.data_dir",
    "dataset.workers",
    "compute.precision",
    "compute.compile",
    "compute.accumulate",
    "compute.recompute",
)
"""Fields that a continued run may set differently: they change nothing, or rounding alone."""


class RunFolder:
    """Reads and writes the files of one run.

    Make one with `create` or `open`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, config: BaseModel) -> RunFolder:
        """A new folder at ``path``, with ``config.yaml`` and ``environment.json``.

        Raises:
            UserError: if something is there already, or it cannot be written.
        """
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(
                f"run folder {str(path)!r} exists: go on with it by --resume {path}, or choose "
                "another --out"
            )
        try:
            (path / "checkpoints").mkdir(parents=True)
        except OSError as error:
            raise UserError(f"cannot make run folder {str(path)!r}: {error.strerror}") from None
        run = cls(path)
        document = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        write_atomically(path / "config.yaml", document.encode())
        write_atomically(path / "environment.json", json.dumps(environment(), indent=2).encode())
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """The run at ``path``.

        Raises:
            UserError: if there is none.
        """
        if not (path / "config.yaml").is_file():
            raise UserError(f"{str(path)!r} is no run folder: it holds no config.yaml")
        return cls(path)

    def config(self) -> dict[str, Any]:
        """The resolved configuration, as a mapping.

        Raises:
            UserError: if it does not parse.
        """
        try:
            values = yaml.safe_load((self.path / "config.yaml").read_text())
        except (yaml.YAMLError, UnicodeDecodeError):
            values = None
        if not isinstance(values, dict):
            raise UserError(f"{str(self.path / 'config.yaml')!r} is damaged: it does not parse")
        return values

    def check_same(self, config: BaseModel) -> None:
        """Whether going on with ``config`` would be the same run.

        Raises:
            UserError: naming the first field that differs.
        """
        old = self.config()
        with contextlib.suppress(ValidationError):  # fields that came later have their defaults
            old = type(config).model_validate(old).model_dump(mode="json")
        found = difference(old, config.model_dump(mode="json"))
        if found is not None:
            key, old, new = found
            raise UserError(
                f"cannot go on with {str(self.path)!r} in another configuration: {key} was "
                f"{old!r} and is now {new!r}; leave it out or start a new run"
            )

    def log(self, row: dict[str, Any]) -> None:
        """Append ``row`` to ``metrics.jsonl``.

        Raises:
            UserError: if it cannot be written.
        """
        try:
            with (self.path / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(f"cannot write metrics.jsonl: {error.strerror}") from error

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.jsonl``; a last line cut short by a crash is left out."""
        path = self.path / "metrics.jsonl"
        rows = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def forget_after(self, step: int) -> None:
        """Drop the rows after ``step``, which a continued run writes again."""
        rows = self.metrics()
        kept = [row for row in rows if row["step"] <= step]
        if len(kept) == len(rows):
            return
        text = "".join(json.dumps(row) + "\n" for row in kept)
        write_atomically(self.path / "metrics.jsonl", text.encode())

    def set_aside(self, step: int, number: int) -> None:
        """Move the rows after ``step`` into ``breaches/``, for the run goes back to it.

        Args:
            step: the last whose rows are kept.
            number: of the breach, from 1.
        """
        rows = [row for row in self.metrics() if row["step"] > step]
        folder = self.path / "breaches"
        folder.mkdir(exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(folder / f"{number:02}.jsonl", text.encode())
        self.forget_after(step)

    def save_checkpoint(self, state: dict[str, Any], buffer: bytes | None = None) -> None:
        """Replace ``checkpoints/last.pt`` by ``state`` (tensors, numbers, strings) in one move.

        Args:
            state: what to save.
            buffer: a replay buffer that belongs to it, as HDF5; it gets a file of its own, which
                the checkpoint names.

        Raises:
            UserError: if the disk is full; the earlier checkpoint is untouched.
        """
        folder = self.path / "checkpoints"
        name = None
        if buffer is not None:
            digest = hashlib.sha256(buffer).hexdigest()
            name = f"buffer-{state['step']}-{digest[:8]}.h5"
            write_atomically(folder / name, buffer)
            state = state | {"buffer": {"file": name, "sha256": digest}}
        content = io.BytesIO()
        torch.save(state, content)
        write_atomically(folder / "last.pt", content.getvalue())
        for old in folder.glob("buffer-*.h5"):
            if old.name != name:
                old.unlink(missing_ok=True)

    def _read_buffer(self, saved: dict[str, str]) -> bytes:
        path = self.path / "checkpoints" / Path(saved["file"]).name
        content = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(content).hexdigest() != saved["sha256"]:
            raise UserError(
                f"{str(path)!r} is missing or damaged: it is not the replay buffer that the "
                "checkpoint was saved with; start the run anew"
            )
        return content

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The state of ``checkpoints/last.pt``, on the CPU; None if there is none yet.

        A replay buffer that belongs to it is its entry ``buffer``, the bytes of the file.

        Raises:
            UserError: if the file is damaged, or holds anything but tensors and plain values.
        """
        path = self.path / "checkpoints" / "last.pt"
        if not path.is_file():
            return None
        damaged = UserError(f"{str(path)!r} is damaged: it cannot be read; start the run anew")
        try:
            with zipfile.ZipFile(path) as file:
                if file.testzip() is not None:  # torch.load looks at no checksum
                    raise damaged
            state: Any = torch.load(path, map_location="cpu", weights_only=True)
        except (zipfile.BadZipFile, RuntimeError, pickle.UnpicklingError, EOFError, OSError):
            raise damaged from None
        if not isinstance(state, dict) or not isinstance(state.get("step"), int):
            raise damaged
        if state.get("buffer") is not None:
            state["buffer"] = self._read_buffer(state["buffer"])
        return state


def environment() -> dict[str, Any]:
    """Versions, device, git commit and command of this process."""
    from importlib.metadata import version

    import ebmkit

    cuda = torch.cuda.is_available()
    return {
        "ebmkit": ebmkit.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "numpy": version("numpy"),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "git_commit": _git_commit(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "launch": launch(),
        "command": ["ebmkit", *sys.argv[1:]],
    }


def _git_commit() -> str | None:
    """The commit of the code that runs, if it runs from a checkout."""
    source = Path(__file__).resolve().parents[2]
    if not (source / ".git").exists():
        return None
    command = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def difference(old: dict[str, Any], new: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first field in which two configurations make different runs: its name, old and new."""
    before, after = _flat(old), _flat(new)
    for key in sorted(before.keys() | after.keys()):
        if key not in _FREE_TO_CHANGE and before.get(key) != after.get(key):
            return key, before.get(key), after.get(key)
    return None


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return result
