"""The image files in a folder that somebody else may have packed.

An archive of images can hold links: to files that the one who unpacks it would not show to others
(a model trained on them, or a picture of the results, may), and to folders in a circle. So links
are followed inside the folder alone, unless the user says otherwise; the folder itself may be one.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from ebmkit.errors import UserError

__all__ = ["SUFFIXES", "check_inside", "find_images"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".ppm", ".pgm")

DEEPEST = 64
"""Folders in folders that are looked into."""

ASK = "copy it into the folder, or set dataset.links=follow"


def find_images(
    root: Path, base: Path, follow: bool = False, deep: bool = True, ask: str = ASK
) -> list[str]:
    """Names of the image files under ``base``, relative to it: those of a folder before those of
    the folders in it, each sorted. Hidden ones are left out.

    Args:
        root: what links may not lead out of.
        base: a folder in it.
        follow: links may lead anywhere.
        deep: look into folders in it.
        ask: what to do about a link that leads out.

    Raises:
        UserError: naming a link that leads out or in a circle, or a folder that cannot be read or
            lies too deep.
    """
    home = None if follow else os.path.realpath(root)
    if home is not None:
        _check(str(base), home, ask)
    names: list[str] = []
    ignored: list[str] = []
    for name in _walk(str(base), "", home, ask, deep, (os.path.realpath(base),)):
        kept = names if os.path.splitext(name)[1].lower() in SUFFIXES else ignored
        kept.append(name)
    if ignored and deep:
        warnings.warn(
            f"{len(ignored)} files in {str(base)!r} are not images and are left out, as "
            f"{ignored[0]!r}",
            stacklevel=4,
        )
    return names


def check_inside(root: Path, path: Path, ask: str = ASK) -> None:
    """Check that ``path`` does not lead out of the folder ``root`` by links.

    Raises:
        UserError: if it does.
    """
    _check(str(path), os.path.realpath(root), ask)


def _walk(
    base: str, inside: str, home: str | None, ask: str, deep: bool, above: tuple[str, ...]
) -> Iterator[str]:
    folder = os.path.join(base, inside) if inside else base
    if len(above) > DEEPEST:
        raise UserError(
            f"{base!r} has folders in folders more than {DEEPEST} deep: sort the images into fewer"
        )
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot look into {folder!r}: {error.strerror}") from None
    folders = []
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if _is_folder(entry):
            folders.append(entry)
            continue
        if entry.is_symlink() and home is not None and _is_image(entry.name):
            _check(entry.path, home, ask)
        yield os.path.join(inside, entry.name)
    for entry in folders if deep else ():
        place = above
        if entry.is_symlink():
            if home is not None:
                _check(entry.path, home, ask)
            if any(os.path.samefile(entry.path, other) for other in above):
                raise UserError(f"{entry.path!r} is a link to a folder that it lies in: remove it")
        place = (*above, entry.path)
        yield from _walk(base, os.path.join(inside, entry.name), home, ask, deep, place)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle: whoever opens it says so
        return False


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _check(path: str, home: str, ask: str) -> None:
    target = os.path.realpath(path)
    if target != home and not target.startswith(home.rstrip(os.sep) + os.sep):
        raise UserError(f"{path!r} is a link out of the folder, to {target!r}: {ask}")
