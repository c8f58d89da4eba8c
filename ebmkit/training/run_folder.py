"""The run folder, whose files docs/guide/train.md lists ("Files of a run").

``checkpoints/step-00000500.pt`` holds the state after so many steps, as `torch.save` writes
tensors and plain values; a replay buffer that belongs to it has a file of its own, HDF5, which the
checkpoint names with its digest. A checkpoint is whole if its bytes are those that the manifest
vouches for, its archive passes its own checksums (all there is to go by where the manifest is
lost), and it holds the step that its name says. Of the few that are kept, the newest whole one
counts.

This is format 2; format 1 had no manifest, and one checkpoint, ``last.pt``; it is read, and becomes
format 2 when the run is resumed. A new run never writes into a folder that holds anything; a
resumed one must have the same configuration. One process at a time writes.
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
from ebmkit.storage.verify import put_in_order
from ebmkit.training.config import difference
from ebmkit.training.metrics import MetricsLog, as_lines

METRICS = "metrics.jsonl"
BEST = "checkpoints/best.safetensors"  # the best weights by validation
OLD = "checkpoints/last.pt"  # the checkpoint of format 1
_CHECKPOINT = re.compile(r"checkpoints/step-(\d{8,18})\.pt")
_BUFFER = re.compile(r"checkpoints/buffer-(\d{1,18})-[0-9a-f]{8}\.h5")


class RunFolder:
    """Reads and writes the files of one run: made by `create` or `open`, written within `held`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log_file = MetricsLog(path / METRICS)
        self._holds = False

    @classmethod
    def create(cls, path: Path, config: BaseModel) -> RunFolder:
        """A new folder at ``path``, with ``config.yaml`` and ``environment.json``.

        Raises:
            UserError: if something is there already, or it cannot be written.
        """
        if path.exists() and not cls.is_unborn(path):
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
        """The run at ``path``.

        Raises:
            UserError: if there is none, or a link in it leads out of it.
        """
        config = path / "config.yaml"
        if not config.is_file() and not _awaits_config(path):
            if (path / MANIFEST).is_file():
                raise DamagedFile(f"{str(config)!r} is missing: this was a run folder")
            raise UserError(f"{str(path)!r} is no run folder: it holds no config.yaml")
        check_links(path)
        return cls(path)

    @staticmethod
    def is_unborn(path: Path) -> bool:
        """Whether ``path`` is an empty folder, as one whose maker was killed very soon is."""
        if not path.is_dir():
            return False
        own = ("checkpoints", MANIFEST, ".lock", ".holder.json", f".{MANIFEST}.lock")
        known = all(p.name in own or p.name.endswith(PARTIAL) for p in path.iterdir())
        return known and not any(path.glob("checkpoints/*")) and not _awaits_config(path)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within, this process alone writes; what a killed one left behind is put in order.

        Raises:
            Busy: if another process does.
            UserError: if the folder cannot be written into.
        """
        if self._holds:
            yield
            return
        with held(self.path, "training", "take another run folder"):
            self._holds = True
            try:
                put_in_order(self.path, [METRICS])
                yield
            finally:
                self._holds = False

    def config(self) -> dict[str, Any]:
        """The resolved configuration, as a mapping.

        Raises:
            DamagedFile: if it is not what was written.
        """
        path = self.path / "config.yaml"
        try:
            content = _read(self.path, "config.yaml")
        except DamagedManifest:  # told, and made anew, by who writes
            content = read_bytes(path, YAML_BYTES)
        try:
            values = parse_yaml(content, repr(str(path)))
        except UserError as error:
            raise DamagedFile(f"{str(path)!r} is damaged: {error}") from None
        if not isinstance(values, dict):
            raise DamagedFile(f"{str(path)!r} is damaged: it does not parse")
        return values

    def check_same(self, config: BaseModel) -> None:
        """Whether resuming with ``config`` would be the same run.

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
                f"cannot resume {str(self.path)!r} with another configuration: {key} was "
                f"{old!r} and is now {new!r}; leave it out or start a new run"
            )

    def log(self, row: dict[str, Any]) -> None:
        """Append ``row`` to ``metrics.jsonl``, or raise a `UserError`."""
        self.log_file.append(row)

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.jsonl``; a last line cut short by a crash is left out."""
        return self.log_file.rows()

    def forget_after(self, step: int) -> None:
        """Cut ``metrics.jsonl`` after ``step``, whose later rows a resumed run writes again."""
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
        """Write the checkpoint of ``state`` and what belongs to it, all or nothing.

        Args:
            state: tensors, numbers, strings; ``step`` among them.
            buffer: a replay buffer that belongs to it, as HDF5; it gets a file of its own.
            files: other files to write with it.
            keep: number of checkpoints that are kept, this one included.
            rolled_back: the run went back to this checkpoint: the number of the rollback, from 1,
                and the row about it. The rows after the checkpoint go to ``breaches/``.

        Raises:
            UserError: if the disk is full, say; all files are as they were.
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
            written[f"breaches/{number:02}.jsonl"] = as_lines(
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
        """Which checkpoint is the newest, to end a sentence."""
        manifest = read_manifest(self.path)
        saved = _newest_first(manifest.files) if manifest else []
        return f"; the last checkpoint is {saved[0]}" if saved else "; there is no checkpoint yet"

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The state of the newest whole checkpoint, on the CPU; None if there is none yet.

        A replay buffer that belongs to it is its entry ``buffer``, the bytes of the file. Damaged
        checkpoints are passed over, with a warning.

        Raises:
            DamagedFile: if there are checkpoints and none of them is whole.
        """
        manifest, errors = read_manifest(self.path), list[DamagedFile]()
        names: Iterable[str] = manifest.files if manifest else ()
        if manifest is None:  # those that lie there
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
            raise DamagedFile(f"{errors[0]}; no whole checkpoint is left: start the run anew")
        return None

    def read_best(self) -> bytes | None:
        """The file of the best weights; None if there is none, or it is damaged."""
        try:
            return _read(self.path, BEST)
        except DamagedFile as error:
            manifest = manifest_or_none(self.path)
            if (self.path / BEST).exists() or (manifest and BEST in manifest.files):
                warnings.warn(f"{error}; the best weights are looked for anew", stacklevel=2)
            return None

    def _write(self, files: Mapping[str, Content], drop: Sequence[str] = ()) -> None:
        """Write files together, and vouch for the metrics so far."""
        new = files.get(METRICS)
        grown = self.log_file.entry() if new is None else entry_of(new, grows=True)
        known = grown.size or new is not None
        commit_files(self.path, files, drop, {METRICS: grown} if known else {})
        if new is not None:
            self.log_file = MetricsLog(self.path / METRICS)  # it looks at the file again


def _read(root: Path, name: str) -> bytes:
    return read_together(root, [name])[name]


def _awaits_config(path: Path) -> bool:
    """Whether the configuration is written, and only to be moved into place."""
    manifest = manifest_or_none(path)
    return manifest is not None and "config.yaml" in manifest.pending


def _newest_first(names: Iterable[str]) -> list[str]:
    """The checkpoints among ``names``, newest first; that of format 1 last."""
    found = {name: _step_of(name) for name in names if name == OLD or _CHECKPOINT.fullmatch(name)}
    return sorted(found, key=lambda name: -found[name])


def _superseded(names: Iterable[str], step: int, keep: int) -> list[str]:
    """What goes when the checkpoint of ``step`` is written and the newest ``keep`` are kept: older
    ones, those of later steps, for the run went back, and their buffers."""
    held = [n for n in names if n == OLD or _CHECKPOINT.fullmatch(n) or _BUFFER.fullmatch(n)]
    steps = sorted({_step_of(name) for name in _newest_first(held)} | {step})
    kept = [s for s in steps if 0 <= s <= step][-keep:]
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
    """What every checkpoint holds, of these types; `ebmkit.training.state` checks the rest."""

    model_config = ConfigDict(strict=True)

    step: NonNegativeInt
    best: float = math.inf
    seconds: float = 0.0
    watch: dict[Any, Any] | None = None
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
    return state
