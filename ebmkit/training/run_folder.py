"""The run folder; docs/guide/train.md lists its files ("Files of a run").

``checkpoints/step-00000500.pt`` holds the state after 500 steps, tensors and plain values written
by `torch.save`. A replay buffer is saved in a separate HDF5 file, which the checkpoint names with
its digest. A checkpoint is intact if its bytes match the manifest, its archive passes its own
checksums (the only check if the manifest is lost), and its step is the one in its name. A run
resumes from the newest intact checkpoint.

This is format 2. Format 1 had no manifest and a single checkpoint, ``last.pt``; it is read, and
converted when the run is resumed. A new run never writes into a folder that is not empty; a
resumed run must have the same configuration. Only one process writes at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from ebmkit.compute import environment
from ebmkit.errors import UserError
from ebmkit.storage import (
    DamagedFile,
    commit_files,
    held,
    make_folder,
    read_together,
    write_atomically,
)
from ebmkit.storage.atomic import PARTIAL, Content, free_name
from ebmkit.storage.manifest import (
    MANIFEST,
    DamagedManifest,
    entry_of,
    manifest_or_none,
    matches,
    read_manifest,
)
from ebmkit.storage.reading import YAML_BYTES, check_links, parse_yaml, read_bytes
from ebmkit.storage.tensors import read_torch_content
from ebmkit.storage.verify import repair_run
from ebmkit.training.config import check_same
from ebmkit.training.metrics import MetricsLog, as_lines

METRICS = "metrics.jsonl"
BEST = "checkpoints/best.safetensors"  # the best weights by validation
OLD = "checkpoints/last.pt"  # the checkpoint of format 1
_CHECKPOINT = re.compile(r"checkpoints/step-(\d{8,18})\.pt")
_BUFFER = re.compile(r"checkpoints/buffer-(\d{1,18})-[0-9a-f]{8}\.h5")


class RunFolder:
    """Reads and writes the files of a run. Construct it by `create` or `open`; write in `held`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log_file = MetricsLog(path / METRICS)
        self._holds = False

    @classmethod
    def create(cls, path: Path, config: BaseModel) -> RunFolder:
        """Create the folder ``path``, with ``config.yaml`` and ``environment.json``.

        Raises:
            UserError: if ``path`` exists and is not empty, or it cannot be written.
        """
        if path.exists() and not cls.is_empty_or_aborted(path):
            raise UserError(
                f"run folder {str(path)!r} exists: resume it by --resume {path}, or choose "
                "another --out"
            )
        make_folder(path / "checkpoints")
        run = cls(path)
        with run.held():
            if (path / "config.yaml").exists():
                raise UserError(f"run folder {str(path)!r} was just made by another process")
            documents = {
                "environment.json": json.dumps(environment(), indent=2),
                "config.yaml": yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
            }
            commit_files(path, {name: text.encode() for name, text in documents.items()})
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open the run at ``path``.

        Raises:
            UserError: if there is no run, or a link in the folder leads out of it.
        """
        config = path / "config.yaml"
        if not config.is_file() and not _awaits_config(path):
            if (path / MANIFEST).is_file():
                raise DamagedFile(f"{str(config)!r} is missing: this was a run folder")
            raise UserError(f"{str(path)!r} is no run folder: it holds no config.yaml")
        check_links(path)
        return cls(path)

    @staticmethod
    def is_empty_or_aborted(path: Path) -> bool:
        """Whether ``path`` is an empty folder, or one whose creation was interrupted early."""
        if not path.is_dir():
            return False
        own = ("checkpoints", MANIFEST, ".lock", ".holder.json", f".{MANIFEST}.lock")
        known = all(p.name in own or p.name.endswith(PARTIAL) for p in path.iterdir())
        return known and not any(path.glob("checkpoints/*")) and not _awaits_config(path)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within the context, only this process writes; first recover files of a killed process.

        Raises:
            FolderLocked: if another process writes.
            UserError: if the folder is not writable.
        """
        if self._holds:
            yield
            return
        with held(self.path, "training", "take another run folder"):
            self._holds = True
            try:
                repair_run(self.path, [METRICS])
                yield
            finally:
                self._holds = False

    def config(self) -> dict[str, Any]:
        """The resolved configuration, as a mapping.

        Raises:
            DamagedFile: if the file is damaged.
        """
        path = self.path / "config.yaml"
        try:
            content = _read(self.path, "config.yaml")
        except DamagedManifest:  # a writing process reports and rebuilds the manifest
            content = read_bytes(path, YAML_BYTES)
        try:
            values = parse_yaml(content, repr(str(path)))
        except UserError as error:
            raise DamagedFile(f"{str(path)!r} is damaged: {error}") from None
        if not isinstance(values, dict):
            raise DamagedFile(f"{str(path)!r} is damaged: it does not parse")
        return values

    def check_config(self, config: BaseModel) -> None:
        """Check that resuming with ``config`` continues the same run.

        Raises:
            UserError: naming the first field that differs.
        """
        what = f"cannot resume {str(self.path)!r} with another configuration"
        check_same(self.config(), config, what, "leave it out or start a new run")

    def write_document(self, name: str, document: Mapping[str, Any]) -> None:
        """Write a JSON file beside the configuration, or raise a `UserError`."""
        with self.held():
            self._write({name: json.dumps(document, indent=2).encode()})

    def log(self, row: dict[str, Any]) -> None:
        """Append ``row`` to ``metrics.jsonl``, or raise a `UserError`."""
        self.log_file.append(row)

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.jsonl``, without an incomplete last line."""
        return self.log_file.rows()

    def truncate_metrics(self, step: int) -> None:
        """Truncate ``metrics.jsonl`` after ``step``; a resumed run writes the later rows again."""
        content = self.log_file.content()
        manifest = manifest_or_none(self.path)
        known = manifest.files.get(METRICS) if manifest else None
        if known is not None and not matches(content, known):
            aside = free_name(self.path / f"{METRICS}.damaged")
            warnings.warn(
                f"{str(self.path / METRICS)!r} is damaged: it is kept as {aside.name}, and the run "
                "continues with those of its rows that can be read",
                stacklevel=2,
            )
            write_atomically(aside, content)
        kept = self.log_file.up_to(step)
        if len(kept) != len(content) or (known is not None and known.size > len(kept)):
            with self.held():
                self._write({METRICS: kept})

    def save_checkpoint(
        self,
        state: dict[str, Any],
        buffer: bytes | None = None,
        files: Mapping[str, bytes] | None = None,
        keep: int = 2,
        rolled_back: tuple[int, dict[str, Any]] | None = None,
    ) -> None:
        """Write the checkpoint of ``state`` and related files, all or nothing.

        Args:
            state: tensors, numbers and strings, with an entry ``step``.
            buffer: replay buffer of ``state``, as HDF5; written to a separate file.
            files: other files to write with it.
            keep: number of checkpoints to keep, including this one.
            rolled_back: after a rollback to ``state``: number of the rollback, from 1, and its row
                of metrics. The rows after ``step`` are moved to ``rollbacks/``.

        Raises:
            UserError: if writing fails, for example on a full disk; all files are unchanged.
        """
        step: int = state["step"]
        written: dict[str, Content] = dict(files or {})
        if buffer is not None:
            digest = hashlib.sha256(buffer).hexdigest()
            name = f"checkpoints/buffer-{step}-{digest[:8]}.h5"
            written[name] = buffer
            state = state | {"buffer": {"file": Path(name).name, "sha256": digest}}
        if rolled_back is not None:
            number, row = rolled_back
            written[f"rollbacks/{number:02}.jsonl"] = as_lines(
                [own for own in self.metrics() if own["step"] > step]
            )
            written[METRICS] = self.log_file.up_to(step) + as_lines([row])
        written[f"checkpoints/step-{step:08}.pt"] = pack_state(state)
        manifest = read_manifest(self.path)
        old = _superseded([*manifest.files, *written] if manifest else written, step, keep)
        try:
            with self.held():
                self._write(written, [name for name in old if name not in written])
        except UserError as error:
            raise UserError(f"step {step} is not saved: {error}{self.where_saved()}") from error

    def where_saved(self) -> str:
        """End of a sentence that names the newest checkpoint."""
        manifest = read_manifest(self.path)
        saved = _newest_first(manifest.files) if manifest else []
        return f"; the last checkpoint is {saved[0]}" if saved else "; there is no checkpoint yet"

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The state of the newest intact checkpoint, on the CPU; None if there is none yet.

        Its entry ``buffer`` holds the bytes of the replay buffer's file, if it has one. Damaged
        checkpoints are skipped with a warning.

        Raises:
            DamagedFile: if there are checkpoints and none of them is intact.
        """
        manifest, errors = read_manifest(self.path), list[DamagedFile]()
        names: Iterable[str] = manifest.files if manifest else ()
        if manifest is None:  # use the files in the folder
            found = self.path.glob("checkpoints/*")
            names = [f"checkpoints/{p.name}" for p in found if p.is_file() and not p.is_symlink()]
        for name in _newest_first(names):
            try:
                state = read_checkpoint(self.path, name)
            except DamagedFile as error:
                errors.append(error)
                continue
            for damage in errors:
                warnings.warn(f"{damage}; going back to step {state['step']}", stacklevel=2)
            return state
        if errors:
            raise DamagedFile(f"{errors[0]}; no intact checkpoint is left: start a new run")
        return None

    def read_best(self) -> bytes | None:
        """Bytes of the file of the best weights; None if it is missing or damaged."""
        try:
            return _read(self.path, BEST)
        except DamagedFile as error:
            manifest = manifest_or_none(self.path)
            if (self.path / BEST).exists() or (manifest and BEST in manifest.files):
                warnings.warn(f"{error}; the best weights are tracked from here on", stacklevel=2)
            return None

    def _write(self, files: Mapping[str, Content], drop: Sequence[str] = ()) -> None:
        """Write files together, and update the manifest entry of ``metrics.jsonl``."""
        new = files.get(METRICS)
        grown = self.log_file.entry() if new is None else entry_of(new, grows=True)
        known = grown.size or new is not None
        commit_files(self.path, files, drop, {METRICS: grown} if known else {})
        if new is not None:
            self.log_file = MetricsLog(self.path / METRICS)  # reads the file again


def _read(root: Path, name: str) -> bytes:
    return read_together(root, [name])[name]


def _awaits_config(path: Path) -> bool:
    """Whether the configuration is written but not yet moved into place."""
    manifest = manifest_or_none(path)
    return manifest is not None and "config.yaml" in manifest.pending


def _newest_first(names: Iterable[str]) -> list[str]:
    """The checkpoints among ``names``, newest first; the one of format 1 last."""
    found = {name: _step_of(name) for name in names if name == OLD or _CHECKPOINT.fullmatch(name)}
    return sorted(found, key=lambda name: -found[name])


def _superseded(names: Iterable[str], step: int, keep: int) -> list[str]:
    """Files to delete when the checkpoint of ``step`` is written and the newest ``keep`` are kept:
    older checkpoints, those of later steps (after a rollback), and their buffers."""
    held = [n for n in names if n == OLD or _CHECKPOINT.fullmatch(n) or _BUFFER.fullmatch(n)]
    steps = sorted({_step_of(name) for name in _newest_first(held)} | {step})
    kept = [s for s in steps if 0 <= s <= step][-keep:]
    return [name for name in held if _step_of(name) not in kept]


def pack_state(state: dict[str, Any]) -> bytes:
    """Serialise a checkpoint to bytes."""
    content = io.BytesIO()
    torch.save(state, content)
    return content.getvalue()  # shares its memory; a view in a cycle crashes Python 3.12.1


def read_checkpoint(root: Path, name: str) -> dict[str, Any]:
    """The state in file ``name``, on the CPU; its entry ``buffer``, if any, is that file's bytes.

    Raises:
        DamagedFile: if the checkpoint or its buffer is missing or damaged, or contains anything but
            tensors and plain values.
    """
    path = root / name
    state = _unpacked(_read(root, name), path)
    if name != OLD and state["step"] != _step_of(name):
        raise DamagedFile(f"{str(path)!r} is damaged: it holds step {state['step']}")
    saved = state.get("buffer")
    if saved is not None:
        buffer = f"checkpoints/{Path(str(saved.get('file'))).name}"
        state["buffer"] = _read(root, buffer) if _BUFFER.fullmatch(buffer) else b""
        if hashlib.sha256(state["buffer"]).hexdigest() != saved.get("sha256"):
            raise DamagedFile(
                f"{str(root / buffer)!r} is missing or damaged: it is not the replay buffer that "
                "the checkpoint was saved with"
            )
    return state


class SavedHead(BaseModel):
    """Entries of every checkpoint, with their types; `ebmkit.training.state` checks the rest."""

    model_config = ConfigDict(strict=True)

    step: NonNegativeInt
    best: float = math.inf
    seconds: float = 0.0
    rollback: dict[Any, Any] | None = None
    watch: dict[Any, Any] | None = None  # name of ``rollback`` until December 2026
    buffer: dict[Any, Any] | None = None


def _step_of(name: str) -> int:
    match = _CHECKPOINT.fullmatch(name) or _BUFFER.fullmatch(name)
    return int(match[1]) if match else -1


def _unpacked(content: bytes, path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = read_torch_content(content, path)
        SavedHead.model_validate(state)
    except (UserError, ValidationError):
        raise DamagedFile(f"{str(path)!r} is damaged: it cannot be read as a checkpoint") from None
    if "watch" in state:
        state["rollback"] = state.pop("watch")
    return state
