"""Where a model of somebody else lies: a local path, or a name on the Hugging Face hub.

A file on the hub is ``owner/name:file``, a repository ``owner/name``. What is fetched is taken from
the hub's cache the next time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ebmkit.errors import UserError, first_line

SUFFIXES = (".pt", ".pth", ".ckpt", ".tar", ".bin", ".safetensors", ".zip")
NAME = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(?::(?P<file>[^:]+))?")


def is_hub_name(source: str) -> bool:
    """Whether ``source``, which is no local path, reads ``owner/name`` or ``owner/name:file``."""
    match = NAME.fullmatch(source)
    return match is not None and (bool(match["file"]) or not source.endswith(SUFFIXES))


def locate_file(source: str) -> Path:
    """The local path of ``source``, a path or ``owner/name:file``.

    Raises:
        UserError: if it is neither, huggingface_hub is not installed, or it cannot be fetched.
    """
    if Path(source).exists():
        return Path(source)
    match = NAME.fullmatch(source)
    if not is_hub_name(source) or match is None:
        raise UserError(f"cannot read {source!r}: no such file or folder")
    if not match["file"]:
        raise UserError(
            f"{source!r} is no local path; of a repository on the hub say the file too, as in "
            f"{source}:model.pt"
        )
    return _fetch(source, "hf_hub_download", match["repository"], match["file"])


def locate_folder(
    source: str | Path, patterns: Sequence[str], choices: Sequence[Sequence[str]]
) -> Path:
    """The local folder of ``source``, a path or ``owner/name``.

    Args:
        source: of the folder.
        patterns: of the files to fetch from a repository.
        choices: paths of files to fetch, too: the second ones only if none of the first is there.

    Raises:
        UserError: as `locate_file`.
    """
    folder, name = Path(source), str(source)
    if folder.is_dir():
        return folder
    if (match := NAME.fullmatch(name)) is None or match["file"]:
        raise UserError(f"there is no folder {name!r}, and a name on the hub is like owner/name")
    for paths in choices:
        folder = _fetch(name, "snapshot_download", name, allow_patterns=[*patterns, *paths])
        if any((folder / path).is_file() for path in paths):
            break
    return folder


def _fetch(source: str, function: str, *arguments: str, **options: Any) -> Path:
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            "fetching from the hub needs huggingface_hub: pip install 'ebmkit-vision[hub]'"
        ) from None
    try:
        return Path(getattr(huggingface_hub, function)(*arguments, **options))
    except Exception as error:  # of the network, the hub and its cache: it has no common class
        raise UserError(
            f"cannot fetch {source!r} (no local path): the hub does not give it: "
            f"{first_line(error)}"
        ) from None
