"""The manifest of a run folder: what each file holds, by its SHA-256.

``manifest.json`` names every file of the run with its length and its digest, so that one that was
cut short, emptied, exchanged, lost, or in which a single bit has changed is noticed before it is
used. A log that only grows is entered with the length and digest of its first bytes. The manifest
carries a digest of itself. For how files and manifest change together see
`ebmkit.storage.commit`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from ebmkit.errors import UserError
from ebmkit.storage.atomic import PARTIAL, Content, replace_file, writing
from ebmkit.storage.reading import MIB, DamagedFile, read_json

MANIFEST = "manifest.json"
FORMAT = 2
"""Of run folders: 1 had no manifest."""

FOLDERS = ("checkpoints", "breaches", "evaluation", "energies")
"""Folders whose files are entered, beside those in the run folder itself."""

LARGEST = 16 * MIB
"""Bytes of a manifest, at the most."""

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
        values = read_json(path, LARGEST)
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
