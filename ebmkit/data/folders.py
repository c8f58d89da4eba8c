"""Data sets that are folders of image files.

``train/CLASS/*.png`` and ``test/CLASS/*.png`` (or ``val/``, as ImageNet calls it); or
``CLASS/*.png`` alone, of which a fixed tenth, chosen by a hash of each file's path, is the test
set. Files that lie loose, without class folders, make a set without labels. Class folders sorted by
name give the labels; folders inside them count as part of them.

Images are brought to one size by resizing the shorter side to it and cutting the middle. For a set
of *whole pictures* the shorter side is brought to another length, as 256 for images of 224 pixels:
the middle is what is evaluated on, training crops are cut from all of the picture.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ebmkit.data import imagesets
from ebmkit.data.finding import SUFFIXES, check_inside, find_images
from ebmkit.data.images import picture_header
from ebmkit.data.imagesets import HINT, Faults, ImageSet, Split, held_out, shuffled, some_of
from ebmkit.data.reading import FolderReader
from ebmkit.data.streamed import AnyImages, StreamedSet
from ebmkit.errors import UserError

__all__ = [
    "SUFFIXES",
    "Listing",
    "list_folder",
    "load_folder",
    "part_folder",
    "progress_bar",
    "readable",
    "readable_rows",
    "tell_skipped",
]

T = TypeVar("T")


class Listing(NamedTuple):
    """The image files of one split of a folder.

    Attributes:
        reader: reads them.
        labels: (N,) int64, or None without class folders.
        class_names: names of the class folders, sorted.
        lost: why files were left out.
    """

    reader: FolderReader
    labels: Tensor | None
    class_names: tuple[str, ...]
    lost: list[str]


def load_folder(
    root: Path,
    split: Split,
    image_size: int | None = None,
    progress: bool = False,
    *,
    side: int | None = None,
    name: str = "folder",
    faults: Faults | None = None,
) -> AnyImages:
    """One split of a folder; streamed if decoded it takes more than `imagesets.MEMORY_LIMIT` bytes.

    Args:
        root: the folder.
        split: which part.
        image_size: side to bring images to; by default the files' own size, if they agree.
        progress: show a bar while files are read.
        side: make it a set of whole pictures, whose shorter side is brought to this, at least
            ``image_size``; its training images are always streamed.
        name: of the set.
        faults: what is done about images that cannot be read, and about links.

    Raises:
        UserError: if the folder is missing or empty, the split is missing, sizes differ without an
            ``image_size``, or a file cannot be read.
    """
    part = "test" if split == "test" else "train"
    faults = faults or Faults()
    listing = list_folder(root, part, image_size, progress, side, faults)
    rows = shuffled(len(listing.reader))
    if split != "test":
        train, held = held_out(len(rows), repr(str(root)))
        rows = train if split == "train" else held
    reader, labels = listing.reader, listing.labels
    labels = None if labels is None else labels[rows]
    height, width = reader.size
    pictures = reader if side is not None and split == "train" else None
    lost = listing.lost
    if faults.skip and pictures is None:
        rows, more = readable_rows(listing, rows, f"{root.name}/{split}", progress)
        lost = [*lost, *more]
        labels = None if listing.labels is None else listing.labels[rows]
    too_many = len(rows) * reader.channels * height * width > imagesets.MEMORY_LIMIT
    if pictures is not None or too_many:
        return StreamedSet(
            name,
            split,
            reader,
            rows,
            reader.channels,
            reader.size,
            labels,
            listing.class_names,
            pictures,
            faults.skip,
            left_out=tuple(lost),
        )
    images = torch.empty((len(rows), reader.channels, height, width), dtype=torch.uint8)
    for i, row in enumerate(progress_bar(rows.tolist(), f"reading {root.name}/{split}", progress)):
        images[i] = reader.read([row])[0]
    return ImageSet(name, split, images, labels, listing.class_names, reader, rows, tuple(lost))


def list_folder(
    root: Path,
    part: str,
    image_size: int | None = None,
    progress: bool = False,
    side: int | None = None,
    faults: Faults | None = None,
) -> Listing:
    """All files of ``part`` of a folder, and their common shape.

    Args:
        root: the folder.
        part: "train", "test", or "all" for a folder that is one set.
        image_size, progress, side, faults: as `load_folder`.

    Raises:
        UserError: as `load_folder`, short of reading the images.
    """
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise UserError(
            f"{str(root)!r} {what}: name a folder of images, as in DIR/train/CLASS/*.png"
        )
    faults = faults or Faults()
    for own in () if faults.follow else ("train", "test", "val"):
        check_inside(root, root / own)
    base = part_folder(root, part) if has_parts(root) else root
    names, classes = _sorted_by_class(base, find_images(root, base, faults.follow))
    if base == root and part != "all":
        names = [name for name in names if _is_test(name) == (part == "test")]
    elif base != root:
        classes = _training_classes(root, base, classes)
    if not names:
        raise UserError(
            f"{str(base)!r} holds no {part} images: put files ending in {', '.join(SUFFIXES)} there"
        )
    lost: list[str] = []
    if faults.skip and image_size is None:
        names, lost = readable(base, names)
    numbers = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([numbers[_class_of(name)] for name in names]) if classes else None
    channels, size = _shape(base, names, image_size, progress, faults.skip)
    reader = FolderReader(base, names, channels, size, side)
    return Listing(reader, labels, tuple(_as_text(name) for name in classes), lost)


def readable(base: Path, names: list[str]) -> tuple[list[str], list[str]]:
    """Those of ``names`` whose headers can be read, and why the others' cannot.

    Raises:
        UserError: if none can.
    """
    kept, lost = [], []
    for name in names:
        try:
            picture_header(base / name)
        except UserError as error:
            lost.append(str(error))
        else:
            kept.append(name)
    tell_skipped(base.name, lost, len(names))
    if not kept:
        raise UserError(f"none of {len(names)} images in {str(base)!r} can be read: {lost[0]}")
    return kept, lost


def tell_skipped(what: str, lost: Sequence[str], count: int) -> None:
    """Warn of images that are left out."""
    if lost:
        warnings.warn(
            f"{len(lost)} of {count} images of {what} cannot be read and are left out: "
            f"{some_of(lost)}",
            stacklevel=4,
        )


def readable_rows(
    listing: Listing, rows: Tensor, what: str, progress: bool
) -> tuple[Tensor, list[str]]:
    """The rows whose images can be read, after reading each, and why the others cannot.

    Raises:
        UserError: if none can.
    """
    kept, lost = [], []
    for row in progress_bar(rows.tolist(), f"looking through {what}", progress):
        try:
            listing.reader.read([row])
        except UserError as error:
            lost.append(str(error).removesuffix(HINT))
        else:
            kept.append(row)
    tell_skipped(what, lost, len(rows))
    if not kept:
        raise UserError(f"none of {len(rows)} images of {what} can be read: {lost[0]}")
    return torch.tensor(kept), lost


def has_parts(root: Path) -> bool:
    """Whether a folder has its training and test images in folders of their own."""
    return (root / "train").is_dir() or (root / "test").is_dir()


def part_folder(root: Path, part: str) -> Path:
    """The folder of ``part``, "train" or "test".

    The test images are those of val/ where test/ is missing, or has no class folders and val/ does,
    as in ImageNet.

    Raises:
        UserError: if there is none.
    """
    base, val = root / part, root / "val"
    if part == "test" and val.is_dir():
        labelled = _has_folders(val) and not _has_folders(base)
        base = val if labelled or not base.is_dir() else base
    if not base.is_dir():
        raise UserError(f"{str(root)!r} has no folder {part!r}: put {part}/CLASS/*.png there")
    return base


def _has_folders(base: Path) -> bool:
    return base.is_dir() and any(entry.is_dir() for entry in base.iterdir())


def _class_of(name: str) -> str:
    """The class folder that the relative path ``name`` begins with."""
    return name.partition(os.sep)[0]


def progress_bar(items: Iterable[T], text: str, show: bool) -> Iterable[T]:
    """``items``, with a bar on a terminal's standard error if ``show``."""
    from rich.progress import track

    from ebmkit.terminal import CleanConsole, for_bar

    console = CleanConsole(stderr=True)
    hidden = not (show and console.is_terminal)
    return track(items, for_bar(text), console=console, transient=True, disable=hidden)


def _sorted_by_class(base: Path, names: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """``names``, and the class folders that they are in.

    Raises:
        UserError: if some are in class folders and some are not.
    """
    loose = [name for name in names if os.sep not in name]
    if loose and len(loose) < len(names):
        raise UserError(
            f"{str(base)!r} has class folders and loose images, as {loose[0]!r}: move every image "
            "into a class folder"
        )
    classes = () if loose else tuple(sorted({_class_of(name) for name in names}))
    return names, classes


def _as_text(name: str) -> str:
    r"""A folder's name as text that any file can hold: bytes that are no UTF-8 as ``\xff``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _training_classes(root: Path, base: Path, classes: tuple[str, ...]) -> tuple[str, ...]:
    """The classes of the training images, which number those of the test images too."""
    train = root / "train"
    if base == train or not train.is_dir():
        return classes
    known = {entry.name for entry in os.scandir(train) if entry.is_dir()}
    known = {name for name in known if not name.startswith(".")}
    if known and not classes:
        raise UserError(
            f"{str(base)!r} has loose images and train/ has class folders: sort them into folders "
            "of the same names"
        )
    if not classes:
        return classes
    unknown = sorted(set(classes) - known)
    if unknown:
        raise UserError(
            f"{str(root)!r} has a class {unknown[0]!r} in {base.name}/ that is not in train/: add "
            "training images of it, or take it out"
        )
    return tuple(sorted(known))


def _is_test(name: str) -> bool:
    """Whether a file is of the test tenth: decided by its path alone, so that adding files moves
    none."""
    digest = hashlib.blake2b(os.fsencode(Path(name).as_posix()), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 10 == 0


def _shape(
    base: Path, names: list[str], image_size: int | None, progress: bool, skip: bool
) -> tuple[int, tuple[int, int]]:
    """Channels and size of a set: of all headers, or of a hundred where the size is given."""
    step = 1 if image_size is None else max(1, len(names) // 100)
    channels, last = 1, None
    sizes: dict[tuple[int, int], str] = {}
    for name in progress_bar(names[::step], f"looking into {base.name}", progress):
        try:
            found, size = picture_header(base / name)
        except UserError as error:
            if not skip:
                raise UserError(f"{error}{HINT}") from None
            last = error
            continue
        channels = max(channels, found)
        sizes.setdefault(size, name)
    if not sizes:
        raise UserError(f"none of {len(names[::step])} images in {str(base)!r} can be read: {last}")
    if image_size is not None:
        return channels, (image_size, image_size)
    if len(sizes) > 1:
        (first, a), (second, b) = list(sizes.items())[:2]
        raise UserError(
            f"images in {str(base)!r} differ in size ({a} is {first[0]}x{first[1]}, {b} "
            f"{second[0]}x{second[1]}): choose one by --image-size"
        )
    return channels, next(iter(sizes))
