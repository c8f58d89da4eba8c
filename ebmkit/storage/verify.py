"""Looking over all files of a run folder: which are what was written, and which are not."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ebmkit.errors import UserError
from ebmkit.storage.atomic import PARTIAL, free_name
from ebmkit.storage.manifest import (
    FOLDERS,
    MANIFEST,
    DamagedManifest,
    Entry,
    Manifest,
    begin_manifest,
    commit_files,
    entry_of,
    read_entered,
    read_manifest,
    recover,
)
from ebmkit.storage.reading import DamagedFile

WRITTEN_ALONE = ("config.yaml", "environment.json", "metrics.jsonl", "model.", "cost.json")
"""Beginnings of the names of files in the run folder itself that only its holder writes."""

ATTEMPTS = 20
"""To see a file at rest that is being written."""

OLD = 3600.0
"""Seconds after which a temporary file of any process is left over."""


class Finding(NamedTuple):
    """What was found of a file.

    Attributes:
        name: relative to the run folder.
        state: ``whole``, ``changed`` (cut short, exchanged, or with bits that differ), ``missing``,
            or ``unknown`` to the manifest.
        size: bytes; 0 where there is no file.
        reason: why it is not whole, in words; empty where it is.
    """

    name: str
    state: str
    size: int
    reason: str = ""


def verify_run(root: Path) -> list[Finding]:
    """Compare every file of the run folder ``root`` with its manifest; sorted by name.

    No lock is taken, so another process may change files meanwhile. What looks wrong is looked at
    again, by itself, until the manifest said the same of it before and after.

    Raises:
        UserError: if it has no manifest, or that is damaged.
    """
    manifest = _manifest(root)
    found = []
    for name in sorted(manifest.files.keys() | set(_names(root))):
        finding = _look(root, name, manifest)
        for _ in range(ATTEMPTS):
            if finding is None or finding.state == "whole":
                break
            before = _manifest(root)
            finding = _look(root, name, before)
            if _said(before, name) == _said(_manifest(root), name):
                break
            time.sleep(0.05)
        if finding is not None:
            found.append(finding)
    return found


def accept_files(root: Path, names: Iterable[str]) -> None:
    """Enter files into the manifest as they are now, where their change was meant.

    Raises:
        UserError: if one is not there.
    """
    contents = {}
    for name in names:
        path = root / name
        if name not in set(_names(root)):
            raise UserError(f"there is no file {name!r} in {str(root)!r} that could be of the run")
        contents[name] = path.read_bytes()
    commit_files(root, contents)


def put_in_order(root: Path, growing: Iterable[str] = ()) -> None:
    """Settle what was being written in ``root``, and remove what killed processes left.

    To be called by the process that holds the folder. A manifest that is damaged, or missing beside
    checkpoints, is made anew of the files as they are, with a warning; those in ``growing`` grow.

    Raises:
        UserError: if one of the run's own folders is a link out of it.
    """
    for path in (root / name for name in FOLDERS):
        if path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
            raise UserError(
                f"{str(path)!r} is a link out of the run, which is not followed to write: link the "
                "whole run folder instead"
            )
    manifest, damage = None, f"{str(root / MANIFEST)!r} is missing"
    try:
        manifest = read_manifest(root)
        damaged = manifest is None and any((root / "checkpoints").glob("step-*.pt"))
    except DamagedManifest as error:
        damage, damaged = str(error), True
        (root / MANIFEST).rename(free_name(root / f"{MANIFEST}.damaged"))
    if damaged:
        warnings.warn(f"{damage}; it is made anew of the files as they are", stacklevel=3)
    if manifest is None:
        grow = set(growing)
        files = {n: entry_of((root / n).read_bytes(), n in grow) for n in _names(root)}
        begin_manifest(root, files)
    recover(root)
    for path in stale_temporary_files(root):
        path.unlink(missing_ok=True)


def stale_temporary_files(root: Path) -> Iterator[Path]:
    """Temporary files of killed processes, seen from the one that holds the folder."""
    now = time.time()
    for folder in (root, root / "checkpoints", root / "breaches"):
        for path in folder.glob(f".*{PARTIAL}"):
            ours = folder != root or path.name[1:].startswith(WRITTEN_ALONE)
            if ours or now - path.stat().st_mtime > OLD:
                yield path
    for path in (root / "evaluation").rglob(f".*{PARTIAL}"):
        if now - path.stat().st_mtime > OLD:
            yield path


def _look(root: Path, name: str, manifest: Manifest) -> Finding | None:
    """What is found of a file beside ``manifest``; None if it is not there and need not be."""
    path, size = root / name, 0
    there = path.is_file()
    with contextlib.suppress(FileNotFoundError):  # it was on its way out
        size = path.stat().st_size if there else 0
    if name not in manifest.files:
        gone = not there or name in manifest.removed
        return None if gone else Finding(name, "unknown", size, "not of the run")
    try:
        content = read_entered(root, name, manifest)
    except DamagedFile as error:
        reason = str(error).partition(" is damaged: ")[2]
        return Finding(name, "changed" if there else "missing", size, reason)
    return Finding(name, "whole", len(content))


def _manifest(root: Path) -> Manifest:
    manifest = read_manifest(root)
    if manifest is None:
        raise UserError(
            f"{str(root)!r} has no {MANIFEST}: it is no run folder, or one of an earlier version, "
            "which gets one when the run is resumed"
        )
    return manifest


def _said(manifest: Manifest, name: str) -> tuple[Entry | None, str | None, bool]:
    """All that the manifest has of a file."""
    return manifest.files.get(name), manifest.pending.get(name), name in manifest.removed


def _names(root: Path) -> list[str]:
    """Files that belong to a run by where they lie; hidden ones and links do not."""
    found = [path for path in root.iterdir() if path.name != MANIFEST]
    for folder in FOLDERS:
        found += (root / folder).rglob("*")
    names = []
    for path in found:
        name = path.relative_to(root)
        hidden = any(part.startswith(".") for part in name.parts)
        odd = "\\" in str(name) or not str(name).isprintable()  # no manifest may name it
        if path.is_file() and not path.is_symlink() and not hidden and not odd:
            names.append(name.as_posix())
    return sorted(names)
