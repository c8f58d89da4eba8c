"""The manifest of a run folder: what each file holds, and how its files change together.

``manifest.json`` names every file of the run with its length and its SHA-256, so that one that was
cut short, emptied, exchanged, lost, or in which a single bit has changed is noticed before it is
used. A log that only grows is entered with the length and digest of its first bytes. The manifest
carries a digest of itself.

A redo log makes one change of many. The new contents lie beside their places, on the disk, before
the manifest is replaced by one that has their digests and says where they lie (``pending``): that
is the moment at which the change has happened. Then they are moved into place. Whoever is killed
before that moment has changed nothing; whoever is killed after it has left everything to finish the
change, which the next writer does (`recover`); readers follow ``pending`` meanwhile. So a reader
sees all of the old files or all of the new ones, without a lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from filelock import FileLock, Timeout
from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from ebmkit.errors import UserError
from ebmkit.storage.atomic import PARTIAL, Content, replace_file, stage, sync_folder, writing
from ebmkit.storage.reading import MIB, DamagedFile, read_bytes, read_json

MANIFEST = "manifest.json"
FORMAT = 2
"""Of run folders: 1 had no manifest."""

FOLDERS = ("checkpoints", "breaches", "evaluation", "energies")
"""Folders whose files are entered, beside those in the run folder itself."""

LARGEST_MANIFEST, LARGEST_FILE = 16 * MIB, 2**34
"""Bytes, at the most."""

PATIENCE = 60.0
"""Seconds to wait for another process that changes the manifest."""

KIND = "ebmkit run"


class DamagedManifest(DamagedFile):
    """The manifest itself is not what was written."""


@dataclass(frozen=True)
class Entry:
    """What is known of a file.

    Attributes:
        size: bytes; of a file that grows, those that are vouched for.
        sha256: of these bytes.
        grows: whether bytes may follow.
    """

    size: Annotated[int, Field(ge=0, strict=True, validation_alias="bytes")]
    sha256: str
    grows: bool = False


def entry_of(content: Content, grows: bool = False) -> Entry:
    """The entry of a file that holds ``content``."""
    return Entry(len(content), hashlib.sha256(content).hexdigest(), grows)


def _check_name(name: str) -> str:
    """A name in a manifest, which must lie in its folder."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name or "\\" in name:
        raise ValueError(name)
    return name


Name = Annotated[str, AfterValidator(_check_name)]


class Manifest(BaseModel):
    """The files of a run.

    Attributes:
        files: by name, relative to the run folder, with slashes.
        pending: files on their way -> the temporary file, beside it, that holds its new content.
        removed: files on their way out.
    """

    files: dict[Name, Entry] = {}
    pending: dict[Name, str] = {}
    removed: tuple[Name, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        if self.pending.keys() - self.files.keys() or self.files.keys() & set(self.removed):
            raise ValueError("files that are none")
        for name, partial in self.pending.items():
            whole = partial.startswith(f".{PurePosixPath(name).name}.")
            if not (whole and partial.endswith(PARTIAL)) or "/" in partial or "\0" in partial:
                raise ValueError(partial)
        return self

    def to_bytes(self) -> bytes:
        """As it is written: JSON that carries a digest of itself."""
        files = {
            name: {"bytes": e.size, "sha256": e.sha256} | ({"grows": True} if e.grows else {})
            for name, e in sorted(self.files.items())
        }
        body = {
            "kind": KIND,
            "format": FORMAT,
            "files": files,
            "pending": self.pending,
            "removed": list(self.removed),
        }
        text = json.dumps(body | {"sha256": _digest(body)}, indent=1)
        return text.encode()


def read_manifest(root: Path) -> Manifest | None:
    """The manifest of the run folder ``root``; None if there is none.

    Raises:
        DamagedManifest: if it is damaged.
        UserError: if it is of a later version.
    """
    path = root / MANIFEST
    damaged = DamagedManifest(
        f"{str(path)!r} is damaged: move it away, or let `ebmkit train --resume` make it anew"
    )
    try:
        values = read_json(path, LARGEST_MANIFEST)
    except UserError:
        if not path.exists() and not path.is_symlink():
            return None
        raise damaged from None
    if not isinstance(values, dict) or values.get("kind") != KIND:
        raise damaged
    if isinstance(values.get("format"), int) and values["format"] > FORMAT:
        raise UserError(
            f"{str(root)!r} is a run of format {values['format']}, and this version knows {FORMAT} "
            "and earlier ones: use a newer ebmkit"
        )
    if values.pop("sha256", None) != _digest(values) or values.get("format") != FORMAT:
        raise damaged
    try:
        return Manifest.model_validate(values)
    except ValidationError:
        raise damaged from None


def manifest_or_none(root: Path) -> Manifest | None:
    """As `read_manifest`, but None also where it is damaged."""
    try:
        return read_manifest(root)
    except DamagedManifest:
        return None


def begin_manifest(root: Path, files: Mapping[str, Entry]) -> None:
    """Write the first manifest of the run folder ``root``.

    Raises:
        UserError: if it cannot be written.
    """
    with writing(root / MANIFEST):
        replace_file(root / MANIFEST, Manifest(files=dict(files)).to_bytes())


def matches(content: Content, entry: Entry) -> bool:
    """Whether ``content`` is what the entry says."""
    if len(content) < entry.size or (len(content) > entry.size and not entry.grows):
        return False
    return hashlib.sha256(memoryview(content)[: entry.size]).hexdigest() == entry.sha256


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def commit_files(
    root: Path,
    files: Mapping[str, Content],
    drop: Sequence[str] = (),
    grown: Mapping[str, Entry] | None = None,
) -> None:
    """Replace several files of the run folder ``root``, all or none.

    Args:
        root: a folder with a manifest.
        files: name, relative to ``root`` -> content.
        drop: names of files to remove with it.
        grown: entries of files that grew, which are not written.

    Raises:
        UserError: if they cannot be written; what was there before is untouched, or, where only
            moving into place failed, the next writer does it.
        DamagedFile: if the manifest is damaged.
    """
    staged: dict[str, Path] = {}
    committed = False
    current = root / next(iter(files), MANIFEST)
    try:
        with ThreadPoolExecutor(1) as aside:  # digests are taken while the disk writes
            entries = {name: aside.submit(entry_of, content) for name, content in files.items()}
            for name, content in files.items():
                current = root / name
                with writing(current):
                    if current.parent != root:
                        current.parent.mkdir(exist_ok=True)
                    staged[name] = stage(current, content)
        with _changing(root) as manifest:
            manifest.files |= {name: entry.result() for name, entry in entries.items()}
            manifest.files |= grown or {}
            manifest.removed = tuple(name for name in drop if manifest.files.pop(name, None))
            manifest.pending = {name: path.name for name, path in staged.items()}
            with writing(root / MANIFEST):
                redo = stage(root / MANIFEST, manifest.to_bytes())
                staged[MANIFEST] = redo
                os.replace(redo, root / MANIFEST)
                committed = True  # whatever fails now, the next writer finishes it
                sync_folder(root)
            with writing(current):
                _finish(root, manifest)
    finally:
        if not committed:
            for path in staged.values():
                with contextlib.suppress(OSError):
                    path.unlink()


def write_atomically(path: Path, content: Content) -> None:
    """Write ``content`` to ``path`` in one move: readers see the old file or the new one.

    A file of a run (in it, or in one of its `FOLDERS`) is entered into the run's manifest.

    Raises:
        UserError: if it cannot be written; the old file, if any, is untouched.
    """
    found = _home(path)
    if found is not None:
        with contextlib.suppress(DamagedFile):  # the file is good nevertheless
            commit_files(found[0], {found[1]: content})
            return
    with writing(path):
        replace_file(path, content)


def remove_file(path: Path) -> None:
    """Remove ``path`` if it is there; from the manifest too, if it is a file of a run.

    Raises:
        UserError: if it cannot be removed.
    """
    found = _home(path)
    if found is not None:
        with contextlib.suppress(DamagedFile):
            commit_files(found[0], {}, drop=[found[1]])
    with writing(path):
        path.unlink(missing_ok=True)


def read_together(root: Path, names: Iterable[str]) -> dict[str, bytes]:
    """The contents of files of a run folder, of one moment, each as it was written.

    Args:
        root: the folder; without a manifest, files are read as they are.
        names: relative to it; of a file that grows all is read, and the bytes vouched for checked.

    Raises:
        DamagedFile: naming the first that is missing or is not what was written.
    """
    wanted = list(names)
    for attempt in range(20):
        manifest = read_manifest(root)
        try:
            return {name: read_entered(root, name, manifest) for name in wanted}
        except DamagedFile:  # or else replaced just now by another process
            if attempt == 19 or read_manifest(root) == manifest:
                raise
            time.sleep(0.05)
    raise AssertionError


def recover(root: Path) -> None:
    """Finish what a killed process had begun to write.

    Raises:
        UserError: if it cannot be written.
        DamagedFile: if the manifest is damaged.
    """
    with _changing(root):
        for path in root.glob(f".{MANIFEST}.*{PARTIAL}"):  # only who is in here writes such
            path.unlink(missing_ok=True)


def read_entered(root: Path, name: str, manifest: Manifest | None) -> bytes:
    """The content of a file as ``manifest`` has it; as it is, if it is not in there.

    Raises:
        DamagedFile: if it is missing or another.
    """
    path = root / name
    known = manifest.files.get(name) if manifest else None
    candidates = [path]
    if manifest and name in manifest.pending:
        candidates.insert(0, path.with_name(manifest.pending[name]))
    reason = "it is missing"
    for candidate in candidates:
        try:
            content = read_bytes(candidate, LARGEST_FILE)
        except UserError as error:
            if candidate.exists():
                reason = f"it cannot be read ({error})"
            continue
        if known is None or matches(content, known):
            return content
        short = len(content) < known.size or (not known.grows and len(content) != known.size)
        reason = (
            f"it has {len(content):,} bytes and had {known.size:,}"
            if short
            else "its bytes are not those that were written"
        )
    meant = name in ("config.yaml", "environment.json") and path.is_file()
    advice = f" (if that was meant: ebmkit verify {root} --accept {name})" if meant else ""
    raise DamagedFile(f"{str(path)!r} is damaged: {reason}{advice}")


@contextlib.contextmanager
def _changing(root: Path) -> Iterator[Manifest]:
    """The manifest, settled, while no other process changes it."""
    lock = FileLock(root / f".{MANIFEST}.lock")
    with writing(root / MANIFEST):
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout:
            raise UserError(
                f"cannot write into {str(root)!r}: another process has held its manifest for "
                f"{PATIENCE:.0f} s; see whether one hangs"
            ) from None
    try:
        manifest = read_manifest(root)
        if manifest is None:
            raise DamagedManifest(f"{str(root / MANIFEST)!r} is missing")
        with writing(root / MANIFEST):
            _finish(root, manifest)
        yield manifest
    finally:
        lock.release()


def _finish(root: Path, manifest: Manifest) -> None:
    """Move what is pending into place, remove what is on its way out, and say so."""
    if not (manifest.pending or manifest.removed):
        return
    for name, partial in manifest.pending.items():
        with contextlib.suppress(FileNotFoundError):  # it is there already
            os.replace((root / name).with_name(partial), root / name)
    for folder in {(root / name).parent for name in manifest.pending}:
        sync_folder(folder)
    for name in manifest.removed:
        (root / name).unlink(missing_ok=True)
    manifest.pending, manifest.removed = {}, ()
    replace_file(root / MANIFEST, manifest.to_bytes())


def _home(path: Path) -> tuple[Path, str] | None:
    """The run folder whose manifest ``path`` belongs in, and its name there."""
    path = Path(os.path.abspath(path))
    for root in list(path.parents)[:4]:
        if (root / MANIFEST).is_file() and (root / "checkpoints").is_dir():
            name = path.relative_to(root)
            own = len(name.parts) == 1 or name.parts[0] in FOLDERS
            hidden = any(part.startswith(".") for part in name.parts)
            return (root, name.as_posix()) if own and not hidden else None
    return None
