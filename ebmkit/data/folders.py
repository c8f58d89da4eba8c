"""Data sets that are folders of image files.

``train/CLASS/*.png`` and ``test/CLASS/*.png``; or ``CLASS/*.png`` alone, of which a fixed tenth,
chosen by a hash of each file's path, is the test set. Files that lie loose, without class folders,
make a set without labels. Class folders sorted by name give the labels; folders inside them count
as part of them. Images are brought to one size by resizing the shorter side and cutting the middle.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ebmkit.data import imagesets
from ebmkit.data.images import open_picture, picture_header
from ebmkit.data.imagesets import ImageSet, Split, StreamedSet, held_out, shuffled
from ebmkit.errors import UserError

__all__ = [
    "SUFFIXES",
    "FolderReader",
    "Listing",
    "list_folder",
    "load_folder",
    "progress_bar",
    "to_pixels",
]

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".ppm", ".pgm")

T = TypeVar("T")


class FolderReader:
    """Reads image files by number, at one size and number of channels.

    Args:
        root: what the names are relative to.
        names: of the files.
        channels: 1 or 3; gray files are repeated to 3.
        size: height and width to bring images to.
    """

    def __init__(
        self, root: Path, names: Sequence[str], channels: int, size: tuple[int, int]
    ) -> None:
        self.root, self.channels, self.size = root, channels, size
        # One buffer instead of many objects, whose reference counts would make workers copy them.
        self._names = np.array([os.fsencode(name) for name in names])

    def __len__(self) -> int:
        return len(self._names)

    def read(self, rows: Sequence[int]) -> Tensor:
        """Images (B, C, H, W) uint8.

        Raises:
            UserError: naming the file that cannot be read.
        """
        return torch.stack([self._one(os.fsdecode(self._names[row])) for row in rows])

    def _one(self, name: str) -> Tensor:
        path = self.root / name
        opened = open_picture(path)
        if opened.is_16_bit:
            raise UserError(f"{str(path)!r} has 16 bits: convert the images of a data set to 8")
        image = opened.image
        if self.channels == 1 and image.mode == "RGB":
            raise UserError(f"{str(path)!r} is in colour among gray images: convert it to gray")
        return to_pixels(image, self.channels, self.size)


def to_pixels(image: Image.Image, channels: int, size: tuple[int, int]) -> Tensor:
    """A Pillow image as uint8 (channels, *size): shorter side resized (bicubic), middle cut out."""
    image = image.convert("L" if channels == 1 else "RGB")
    height, width = size
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1).contiguous()


class Listing(NamedTuple):
    """The image files of one split of a folder.

    Attributes:
        reader: reads them.
        labels: (N,) int64, or None without class folders.
        class_names: names of the class folders, sorted.
    """

    reader: FolderReader
    labels: Tensor | None
    class_names: tuple[str, ...]


def load_folder(
    root: Path, split: Split, image_size: int | None = None, progress: bool = False
) -> ImageSet | StreamedSet:
    """One split of a folder; streamed if decoded it takes more than `imagesets.MEMORY_LIMIT` bytes.

    Args:
        root: the folder.
        split: which part.
        image_size: side to bring images to; by default the files' own size, if they agree.
        progress: show a bar while files are read.

    Raises:
        UserError: if the folder is missing or empty, the split is missing, sizes differ without an
            ``image_size``, or a file cannot be read.
    """
    part = "test" if split == "test" else "train"
    listing = list_folder(root, part, image_size, progress)
    rows = shuffled(len(listing.reader))
    if split != "test":
        train, held = held_out(len(rows), repr(str(root)))
        rows = train if split == "train" else held
    reader, labels = listing.reader, listing.labels
    labels = None if labels is None else labels[rows]
    height, width = reader.size
    if len(reader) * reader.channels * height * width > imagesets.MEMORY_LIMIT:
        return StreamedSet(
            "folder",
            split,
            reader,
            rows,
            reader.channels,
            reader.size,
            labels,
            listing.class_names,
        )
    images = torch.empty((len(rows), reader.channels, height, width), dtype=torch.uint8)
    for i, row in enumerate(progress_bar(rows.tolist(), f"reading {root.name}/{split}", progress)):
        images[i] = reader.read([row])[0]
    return ImageSet("folder", split, images, labels, listing.class_names)


def list_folder(
    root: Path, part: str, image_size: int | None = None, progress: bool = False
) -> Listing:
    """All files of ``part`` of a folder, and their common shape.

    Args:
        root: the folder.
        part: "train", "test", or "all" for a folder that is one set.
        image_size: as `load_folder`.
        progress: as `load_folder`.

    Raises:
        UserError: as `load_folder`, short of reading the images.
    """
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise UserError(
            f"{str(root)!r} {what}: name a folder of images, as in DIR/train/CLASS/*.png"
        )
    if not has_parts(root):
        names, classes = _files(root)
        if part != "all":
            names = [name for name in names if _is_test(name) == (part == "test")]
        base = root
    else:
        base = root / part
        if not base.is_dir():
            raise UserError(f"{str(root)!r} has no folder {part!r}: put {part}/CLASS/*.png there")
        names, classes = _files(base)
        classes = _training_classes(root, part, classes)
    if not names:
        raise UserError(
            f"{str(base)!r} holds no {part} images: put files ending in {', '.join(SUFFIXES)} there"
        )
    numbers = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([numbers[Path(n).parts[0]] for n in names]) if classes else None
    channels, size = _shape(base, names, image_size, progress)
    return Listing(FolderReader(base, names, channels, size), labels, classes)


def has_parts(root: Path) -> bool:
    """Whether a folder has its training and test images in folders of their own."""
    return (root / "train").is_dir() or (root / "test").is_dir()


def progress_bar(items: Iterable[T], text: str, show: bool) -> Iterable[T]:
    """``items``, with a bar on a terminal's standard error if ``show``."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    hidden = not (show and console.is_terminal)
    return track(items, text, console=console, transient=True, disable=hidden)


def _files(base: Path) -> tuple[list[str], tuple[str, ...]]:
    """Image files under ``base``, relative and sorted, and the class folders they are in."""
    names: list[str] = []
    ignored: list[str] = []
    for folder, subfolders, files in os.walk(base):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for file in sorted(files):
            kept = names if Path(file).suffix.lower() in SUFFIXES else ignored
            if not file.startswith("."):
                kept.append(str(Path(folder, file).relative_to(base)))
    if ignored:
        warnings.warn(
            f"{len(ignored)} files in {str(base)!r} are not images and are left out, as "
            f"{ignored[0]!r}",
            stacklevel=4,
        )
    loose = [name for name in names if len(Path(name).parts) == 1]
    if loose and len(loose) < len(names):
        raise UserError(
            f"{str(base)!r} has class folders and loose images, as {loose[0]!r}: move every image "
            "into a class folder"
        )
    classes = () if loose else tuple(sorted({Path(name).parts[0] for name in names}))
    return names, classes


def _training_classes(root: Path, part: str, classes: tuple[str, ...]) -> tuple[str, ...]:
    """The classes of the training images, which number those of the test images too."""
    if part == "train" or not classes or not (root / "train").is_dir():
        return classes
    known = {entry.name for entry in os.scandir(root / "train") if entry.is_dir()}
    unknown = sorted(set(classes) - known)
    if unknown:
        raise UserError(
            f"{str(root)!r} has a class {unknown[0]!r} in test/ that is not in train/: add "
            "training images of it, or take it out"
        )
    return tuple(sorted(name for name in known if not name.startswith(".")))


def _is_test(name: str) -> bool:
    """Whether a file is of the test tenth: decided by its path alone, so that adding files moves
    none."""
    digest = hashlib.blake2b(Path(name).as_posix().encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 10 == 0


def _shape(
    base: Path, names: list[str], image_size: int | None, progress: bool
) -> tuple[int, tuple[int, int]]:
    """Channels and size of a set: of all headers, or of a hundred where the size is given."""
    step = 1 if image_size is None else max(1, len(names) // 100)
    channels = 1
    sizes: dict[tuple[int, int], str] = {}
    for name in progress_bar(names[::step], f"looking into {base.name}", progress):
        found, size = picture_header(base / name)
        channels = max(channels, found)
        sizes.setdefault(size, name)
    if image_size is not None:
        return channels, (image_size, image_size)
    if len(sizes) > 1:
        (first, a), (second, b) = list(sizes.items())[:2]
        raise UserError(
            f"images in {str(base)!r} differ in size ({a} is {first[0]}x{first[1]}, {b} "
            f"{second[0]}x{second[1]}): choose one by --image-size"
        )
    return channels, next(iter(sizes))
