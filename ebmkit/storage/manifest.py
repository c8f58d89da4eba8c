"""The manifest of a run folder: checksums of its files, and atomic changes of several files.

``manifest.json`` lists every file of the run with its length and SHA-256, so that a truncated,
replaced, lost or changed file (down to one bit) is detected before it is used. A file that only
grows, such as a log, is listed with the length and digest of its first bytes. The manifest contains
a digest of itself.

A redo log makes a change of several files atomic. The new contents are written to temporary files.
Then the manifest is replaced by one with their digests and temporary names (``pending``): this
commits the change. Afterwards the temporary files are renamed. If the process is killed before the
commit, nothing has changed; if it is killed later, the next writer completes the change
(`recover`). Until then readers follow ``pending``. So a reader sees all of the old files or all of
the new ones, without a lock.
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
"""Format version of run folders; version 1 had no manifest."""

FOLDERS = ("checkpoints", "rollbacks", "breaches", "evaluation", "energies")
"""Subfolders whose files the manifest lists, besides those in the run folder itself.
``breaches`` is the name of ``rollbacks`` in runs from before December 2026."""

LARGEST_MANIFEST, LARGEST_FILE = 16 * MIB, 2**34
"""Maximum bytes of a manifest and of another file."""

PATIENCE = 60.0
"""Maximum seconds to wait for another process that changes the manifest."""

KIND = "ebmkit run"


class DamagedManifest(DamagedFile):
    """The manifest itself is damaged."""


@dataclass(frozen=True)
class Entry:
    """Size and checksum of a file.

    Attributes:
        size: number of bytes; for a file that grows, of the part that is checked.
        sha256: digest of these bytes.
        grows: whether more bytes may follow.
    """

    size: Annotated[int, Field(ge=0, strict=True, validation_alias="bytes")]
    sha256: str
    grows: bool = False


def entry_of(content: Content, grows: bool = False) -> Entry:
    """Make the entry of a file with ``content``."""
    return Entry(len(content), hashlib.sha256(content).hexdigest(), grows)


def _check_name(name: str) -> str:
    """Check that a name in a manifest does not lead out of the run folder."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name or "\\" in name:
        raise ValueError(name)
    return name


Name = Annotated[str, AfterValidator(_check_name)]


class Manifest(BaseModel):
    """Files of a run.

    Attributes:
        files: name, relative to the run folder, with slashes -> entry.
        pending: name of a changed file -> temporary file in the same folder with its new content.
        removed: names of files that are still to be removed.
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
        """Serialise to JSON that contains a digest of itself."""
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
    """Read the manifest of the run folder ``root``; None if there is none.

    Raises:
        DamagedManifest: if it is damaged.
        UserError: if its format is of a later version.
    """
    path = root / MANIFEST
    damaged = DamagedManifest(
        f"{str(path)!r} is damaged: move it away, or let `ebmkit train --resume` rebuild it"
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
            f"{str(root)!r} is a run of format {values['format']}, and this version supports at "
            f"most {FORMAT}: use a newer ebmkit"
        )
    if values.pop("sha256", None) != _digest(values) or values.get("format") != FORMAT:
        raise damaged
    try:
        return Manifest.model_validate(values)
    except ValidationError:
        raise damaged from None


def manifest_or_none(root: Path) -> Manifest | None:
    """As `read_manifest`, but None also if it is damaged."""
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
    """Whether ``content`` has the size and digest of ``entry``."""
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
    """Replace several files of the run folder ``root`` atomically.

    Args:
        root: a folder with a manifest.
        files: name, relative to ``root`` -> content.
        drop: names of files to remove in the same change.
        grown: new entries of files that have grown, which are not written.

    Raises:
        UserError: if writing fails; the old files are unchanged, or, if only a rename failed, the
            next writer completes the change.
        DamagedFile: if the manifest is damaged.
    """
    staged: dict[str, Path] = {}
    committed = False
    current = root / next(iter(files), MANIFEST)
    try:
        with ThreadPoolExecutor(1) as aside:  # compute digests while the disk writes
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
                committed = True  # after an error from here on, the next writer completes it
                sync_folder(root)
            with writing(current):
                _finish(root, manifest)
    finally:
        if not committed:
            for path in staged.values():
                with contextlib.suppress(OSError):
                    path.unlink()


def write_atomically(path: Path, content: Content) -> None:
    """Write ``content`` to ``path`` atomically: readers see the old file or the new one.

    A file of a run (in its folder, or in one of its `FOLDERS`) is listed in the run's manifest.

    Raises:
        UserError: if it cannot be written; the old file, if any, is unchanged.
    """
    found = _home(path)
    if found is not None:
        with contextlib.suppress(DamagedFile):  # the file itself can be written nevertheless
            commit_files(found[0], {found[1]: content})
            return
    with writing(path):
        replace_file(path, content)


def remove_file(path: Path) -> None:
    """Remove the file ``path`` if it exists, also from the manifest if it is a file of a run.

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
    """Read a consistent snapshot of files of a run folder and verify them.

    Args:
        root: run folder; without a manifest, files are not verified.
        names: names relative to it; a file that grows is read whole, and its listed bytes verified.

    Raises:
        DamagedFile: if a file is missing or damaged; the message names the first one.
    """
    requested = list(names)
    for attempt in range(20):
        manifest = read_manifest(root)
        try:
            return {name: read_entered(root, name, manifest) for name in requested}
        except DamagedFile:  # may also be a change by another process
            if attempt == 19 or read_manifest(root) == manifest:
                raise
            time.sleep(0.05)
    raise AssertionError


def recover(root: Path) -> None:
    """Complete the committed change of a killed process, and remove stale temporary manifests.

    Raises:
        UserError: if it cannot be written.
        DamagedFile: if the manifest is damaged.
    """
    with _changing(root):
        for path in root.glob(f".{MANIFEST}.*{PARTIAL}"):  # only the holder of the lock writes them
            path.unlink(missing_ok=True)


def read_entered(root: Path, name: str, manifest: Manifest | None) -> bytes:
    """Read a file and verify it against ``manifest``; an unlisted file is not verified.

    Raises:
        DamagedFile: if the file is missing or differs.
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
            else "its content differs from what was written"
        )
    meant = name in ("config.yaml", "environment.json") and path.is_file()
    advice = f" (if this is intended: ebmkit verify {root} --accept {name})" if meant else ""
    raise DamagedFile(f"{str(path)!r} is damaged: {reason}{advice}")


@contextlib.contextmanager
def _changing(root: Path) -> Iterator[Manifest]:
    """Context that holds the lock of the manifest, with any committed change completed."""
    lock = FileLock(root / f".{MANIFEST}.lock")
    with writing(root / MANIFEST):
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout:
            raise UserError(
                f"cannot write into {str(root)!r}: another process has held its manifest for "
                f"{PATIENCE:.0f} s; check whether a process hangs"
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
    """Rename the pending files, remove the removed ones, and update the manifest."""
    if not (manifest.pending or manifest.removed):
        return
    for name, partial in manifest.pending.items():
        with contextlib.suppress(FileNotFoundError):  # already renamed
            os.replace((root / name).with_name(partial), root / name)
    for folder in {(root / name).parent for name in manifest.pending}:
        sync_folder(folder)
    for name in manifest.removed:
        (root / name).unlink(missing_ok=True)
    manifest.pending, manifest.removed = {}, ()
    replace_file(root / MANIFEST, manifest.to_bytes())


def _home(path: Path) -> tuple[Path, str] | None:
    """Run folder whose manifest lists ``path``, and its name there; None for other files."""
    path = Path(os.path.abspath(path))
    for root in list(path.parents)[:4]:
        if (root / MANIFEST).is_file() and (root / "checkpoints").is_dir():
            name = path.relative_to(root)
            own = len(name.parts) == 1 or name.parts[0] in FOLDERS
            hidden = any(part.startswith(".") for part in name.parts)
            return (root, name.as_posix()) if own and not hidden else None
    return None
