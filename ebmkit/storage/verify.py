"""Verify all files of a run folder against its manifest, and repair the manifest."""

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
"""Name prefixes of files in the run folder itself that only the holder of its lock writes."""

ATTEMPTS = 20
"""Maximum number of checks of a file that another process is writing."""

OLD = 3600.0
"""Age in seconds from which a temporary file of any process is stale."""


class Finding(NamedTuple):
    """Result of the check of a file.

    Attributes:
        name: file name relative to the run folder.
        state: ``whole``, ``changed`` (truncated, replaced, or different bits), ``missing``, or
            ``unknown`` (not listed in the manifest).
        size: bytes; 0 if the file is missing.
        reason: description of the fault; empty for a whole file.
    """

    name: str
    state: str
    size: int
    reason: str = ""


def verify_run(root: Path) -> list[Finding]:
    """Compare every file of the run folder ``root`` with its manifest; sorted by name.

    The function takes no lock, so another process may change files at the same time. A file with a
    fault is checked again until its entry in the manifest is the same before and after the check.

    Raises:
        UserError: if the manifest is missing or damaged.
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
    """Update the manifest with the current content of files that were changed on purpose.

    Raises:
        UserError: if a file does not exist.
    """
    contents = {}
    for name in names:
        path = root / name
        if name not in set(_names(root)):
            raise UserError(f"there is no file {name!r} in {str(root)!r} that belongs to the run")
        contents[name] = path.read_bytes()
    commit_files(root, contents)


def repair_run(root: Path, growing: Iterable[str] = ()) -> None:
    """Complete an interrupted change in ``root`` and remove stale temporary files.

    The caller must hold the lock of the folder. If the manifest is damaged, or missing although
    there are checkpoints, it is rebuilt from the current files, with a warning.

    Args:
        root: run folder.
        growing: names of files that grow.

    Raises:
        UserError: if one of the run's subfolders is a link out of the run.
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
        warnings.warn(f"{damage}; it is rebuilt from the current files", stacklevel=3)
    if manifest is None:
        grow = set(growing)
        files = {n: entry_of((root / n).read_bytes(), n in grow) for n in _names(root)}
        begin_manifest(root, files)
    recover(root)
    for path in stale_temporary_files(root):
        path.unlink(missing_ok=True)


def stale_temporary_files(root: Path) -> Iterator[Path]:
    """Yield temporary files of killed processes; the caller must hold the lock of the folder."""
    now = time.time()
    for folder in (root, *(root / name for name in ("checkpoints", "rollbacks", "breaches"))):
        for path in folder.glob(f".*{PARTIAL}"):
            ours = folder != root or path.name[1:].startswith(WRITTEN_ALONE)
            if ours or now - path.stat().st_mtime > OLD:
                yield path
    for path in (root / "evaluation").rglob(f".*{PARTIAL}"):
        if now - path.stat().st_mtime > OLD:
            yield path


def _look(root: Path, name: str, manifest: Manifest) -> Finding | None:
    """Check a file against ``manifest``; None if it neither exists nor is listed."""
    path, size = root / name, 0
    there = path.is_file()
    with contextlib.suppress(FileNotFoundError):  # removed meanwhile
        size = path.stat().st_size if there else 0
    if name not in manifest.files:
        gone = not there or name in manifest.removed
        return None if gone else Finding(name, "unknown", size, "not listed in the manifest")
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
    """All information of the manifest about a file."""
    return manifest.files.get(name), manifest.pending.get(name), name in manifest.removed


def _names(root: Path) -> list[str]:
    """Names of the files that belong to a run by their location, except hidden files and links."""
    found = [path for path in root.iterdir() if path.name != MANIFEST]
    for folder in FOLDERS:
        found += (root / folder).rglob("*")
    names = []
    for path in found:
        name = path.relative_to(root)
        hidden = any(part.startswith(".") for part in name.parts)
        odd = "\\" in str(name) or not str(name).isprintable()  # not allowed in a manifest
        if path.is_file() and not path.is_symlink() and not hidden and not odd:
            names.append(name.as_posix())
    return sorted(names)
