"""Data sets from folders of image files, which may be untrusted.

Layouts: ``train/CLASS/*.png`` and ``test/CLASS/*.png`` (or ``val/``, as in ImageNet); or
``CLASS/*.png`` alone, where a fixed tenth, chosen by a hash of each file's path, is the test set.
Without class folders the set has no labels. Labels number the class folders of the training images,
sorted by name, in every split; a class folder without images is no class. Subfolders of a class
folder belong to its class. A folder is gray if some file in it is stored as gray and no file has a
pixel in colour, in any split.

========  ==================================================================================
folder    one size: the shorter side is resized to it (bicubic), then the centre is cropped
imagenet  torchvision's protocol for ImageNet, antialiased bilinear resizing: for evaluation
          the shorter side is resized to 256 and the central 224 pixels are cropped; for
          training `RandomResizedCrop` of the original pixels
pictures  each image at its own size in a batch of one, as in Set12 and BSD68; only for
          evaluation
========  ==================================================================================

An archive can contain symbolic links to private files of the user who unpacks it (a model trained
on them, or a plot, may expose them), and cyclic links to folders. So links are followed only inside
the folder, unless the user allows all; the folder itself may be a link.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from ebmkit.data import imagesets
from ebmkit.data.augment import Cut, crop_boxes
from ebmkit.data.images import MAX_PIXELS_IN_SET, image_header, is_coloured, open_image
from ebmkit.data.imagesets import (
    HINT,
    AnyImages,
    DatasetRequest,
    StreamedSet,
    readable,
    shuffled,
    split_rows,
)
from ebmkit.errors import UserError
from ebmkit.terminal import progress_bar

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".ppm", ".pgm")

MAX_DEPTH = 64
"""Maximum depth of nested folders."""

REMEDY = "copy it into the folder, or set dataset.links=follow"


class FolderReader:
    """Reads image files by index and converts them to one number of channels.

    Args:
        root: folder that the names are relative to.
        names: file names.
        channels: 1 or 3; gray files are repeated to 3.
        size: height and width to resize to; None: each image at its own size.
        side: length that the shorter side is resized to before cropping (antialiased bilinear, as
            in torchvision); None: resize only to fit ``size`` (bicubic).
    """

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        channels: int,
        size: tuple[int, int] | None,
        side: int | None = None,
    ) -> None:
        self.root, self.channels, self.size = root, channels, size
        self.whole, self.side = side is not None, side or 0
        # One buffer: reference counts of many objects would make worker processes copy them.
        self._names = np.array([os.fsencode(name) for name in names])

    def __len__(self) -> int:
        return len(self._names)

    def name(self, row: int) -> str:
        """File name of ``row``, relative to the root."""
        return os.fsdecode(self._names[row])

    def read(self, rows: Sequence[int], cut: Cut | None = None) -> Tensor:
        """Images (B, C, H, W) uint8, or crops (B, C, *cut.size) of the whole images.

        A crop without resizing comes from the image with its shorter side resized to ``side``, a
        resized crop from the original pixels.

        Raises:
            UserError: if a file cannot be read; the message names it.
        """
        cuts = [None if cut is None else cut.of(i) for i in range(len(rows))]
        return torch.stack([self._one(row, own) for row, own in zip(rows, cuts, strict=True)])

    def _one(self, row: int, cut: Cut | None) -> Tensor:
        from torchvision.transforms.v2 import functional

        image = self._open(row)
        if not self.whole:
            return to_pixels(image, self.channels, self.size)
        pixels = to_pixels(image, self.channels)
        if cut is None or cut.scale is None:
            pixels = functional.resize(pixels, [self.side], antialias=True)
        if cut is None:
            assert self.size is not None
            middle: Tensor = functional.center_crop(pixels, list(self.size))
            return middle
        top, left, height, width = crop_boxes(pixels.shape[1], pixels.shape[2], cut)[0].tolist()
        crop = pixels[:, top : top + height, left : left + width]
        if cut.scale is not None:
            crop = functional.resize(crop, list(cut.size), antialias=True)
        return crop

    def _open(self, row: int) -> Image.Image:
        path = self.root / self.name(row)
        try:
            opened = open_image(path, MAX_PIXELS_IN_SET)
        except UserError as error:
            raise UserError(f"{error}{HINT}") from None
        if opened.is_16_bit:
            raise UserError(f"{str(path)!r} has 16 bits: convert the images of a data set to 8")
        if self.channels == 1 and is_coloured(opened.image):
            raise UserError(f"{str(path)!r} is in colour among gray images: convert it to gray")
        return opened.image


def to_pixels(image: Image.Image, channels: int, size: tuple[int, int] | None = None) -> Tensor:
    """Convert a Pillow image to uint8 (channels, H, W).

    Args:
        image: image of any mode and size.
        channels: 1 or 3.
        size: height and width; the shorter side is resized (bicubic), then the centre is cropped.
    """
    image = image.convert("L" if channels == 1 else "RGB")
    if size is not None and image.size != size[::-1]:
        image = ImageOps.fit(image, size[::-1], Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.atleast_3d(np.array(image)))
    return rearrange(pixels, "h w c -> c h w").contiguous()


def to_image(pixels: Tensor) -> Image.Image:
    """Convert uint8 pixels (1 or 3, H, W) to a Pillow image, gray or RGB."""
    levels = rearrange(pixels, "c h w -> h w c").numpy()
    return Image.fromarray(levels.squeeze(-1) if len(pixels) == 1 else levels)


def load_folder(request: DatasetRequest, side: int | None = None) -> AnyImages:
    """Load one split of a folder; above `imagesets.MEMORY_LIMIT` decoded bytes it is streamed.

    Args:
        request: folder, split and image size; by default the common size of the files.
        side: keep whole images and resize their shorter side to this; training images are then
            always streamed.

    Raises:
        UserError: if the folder is missing or empty, the split is missing, sizes differ and no
            image size is given, or a file cannot be read.
    """
    root, split, skip = request.path("a folder of images"), request.split, request.faults.skip
    images = list_folder(request, "test" if split == "test" else "train", side)
    count, what = len(images), f"{root.name}/{split}"
    rows = shuffled(count) if split == "test" else split_rows(request, count, repr(str(root)))
    images = images.select(rows)
    if images.crops is not None:
        return replace(images, skip=skip)
    if skip:
        images = images.readable(what, request.progress, warn=True)
    shape = (len(images), images.channels, *images.image_size)
    if math.prod(shape) > imagesets.MEMORY_LIMIT:
        return replace(images, skip=skip)
    pixels = torch.empty(shape, dtype=torch.uint8)
    bar = progress_bar(images.rows.tolist(), f"reading {what}", request.progress)
    for i, row in enumerate(bar):
        pixels[i] = images.reader.read([row])[0]
    return images.loaded(pixels)


def load_imagenet(request: DatasetRequest) -> AnyImages:
    """`load_folder` with whole images; evaluation uses the central 7/8 of the shorter side."""
    request.path("the folder with train/ and val/")
    size = request.image_size or 224
    return load_folder(request._replace(image_size=size), side=round(size * 256 / 224))


def load_pictures(request: DatasetRequest) -> StreamedSet:
    """Load the images of a folder, sorted by name, each at its own size, without labels.

    Raises:
        UserError: if the path is not a folder or has no images, gray and colour images are mixed,
            an image cannot be read, or the split is not "test".
    """
    root, faults = request.path("a folder of images"), request.faults
    if request.image_size is not None:
        raise UserError("data set 'pictures' keeps each image's size: remove the image size")
    if request.split != "test":
        raise UserError(
            "data set 'pictures' is only for evaluation: train on data set 'folder', with "
            "--image-size or streams.denoise.augmentation.crop_size"
        )
    if not root.is_dir():
        raise UserError(f"{str(root)!r} is not a folder: name a folder of images by --data-dir")
    names = find_images(root, root, faults.follow, deep=False)
    if not names:
        raise UserError(f"{str(root)!r} holds no images: put files ending in {SUFFIXES} there")
    lost: list[str] = []
    if faults.skip:
        names, lost = readable(names, lambda name: image_header(root / name), repr(str(root)))
    headers = [image_header(root / name) for name in names]
    channels = _channels([root / name for name in names])
    odd = [name for name, (count, _) in zip(names, headers, strict=True) if count == 1]
    if odd and channels == 3:
        raise UserError(f"{str(root / odd[0])!r} is gray among images in colour: keep them apart")
    images = StreamedSet(
        FolderReader(root, names, channels, None),
        torch.arange(len(names)),
        channels,
        (max(height for _, (height, _) in headers), max(width for _, (_, width) in headers)),
        name="pictures",
        split="test",
        one_size=False,
        excluded=tuple(lost),
    )
    return images.readable() if faults.skip else images


def list_folder(request: DatasetRequest, part: str, side: int | None = None) -> StreamedSet:
    """All files of ``part`` of a folder, in the order of `find_images`.

    Args:
        request, side: as in `load_folder`.
        part: "train", "test", or "all" for a folder that is one set.

    Raises:
        UserError: as in `load_folder`; pixels are not decoded.
    """
    root, faults = request.path("a folder of images"), request.faults
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise UserError(
            f"{str(root)!r} {what}: name a folder of images, as in DIR/train/CLASS/*.png"
        )
    for own in () if faults.follow else ("train", "test", "val"):
        _check_inside(str(root / own), os.path.realpath(root), REMEDY)
    base = _part_folder(root, part) if has_parts(root) else root
    names = find_images(root, base, faults.follow)
    classes, everything = _classes(base, names), [base / name for name in names]
    empty = sorted(_folders(base) - {_class_of(name) for name in names} if classes else ())
    if empty:
        warnings.warn(
            f"{len(empty)} class folders in {str(base)!r} hold no images and are no classes, such "
            f"as {empty[0]!r}",
            stacklevel=4,
        )
    if base == root and part != "all":
        names = [name for name in names if _is_test(name) == (part == "test")]
    elif base != root:
        classes = _training_classes(root, base, classes)
    if not names:
        raise UserError(
            f"{str(base)!r} holds no {part} images: put files ending in {', '.join(SUFFIXES)} there"
        )

    def others() -> list[Path]:  # the other split, which has the same channels
        with contextlib.suppress(UserError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those about its files come when it is loaded
            other = _part_folder(root, "test" if base.name == "train" else "train")
            return [other / name for name in find_images(root, other, faults.follow)]
        return []

    size, names, lost = _look(base, names, request)
    channels = _channels(everything, others if base != root else list, request.progress)
    numbers = {name: i for i, name in enumerate(classes)}
    # bytes of a folder name that are not UTF-8 are written as \xff, so any file can store it
    texts = (os.fsencode(name).decode("utf-8", "backslashreplace") for name in classes)
    reader = FolderReader(base, names, channels, size, side)
    return StreamedSet(
        reader,
        torch.arange(len(names)),
        channels,
        size,
        torch.tensor([numbers[_class_of(name)] for name in names]) if classes else None,
        tuple(texts),
        request.name,
        request.split,
        crops=reader if side is not None and request.split == "train" else None,
        excluded=tuple(lost),
    )


def has_parts(root: Path) -> bool:
    """Whether a folder has a subfolder train/ or test/."""
    return (root / "train").is_dir() or (root / "test").is_dir()


def _part_folder(root: Path, part: str) -> Path:
    """Folder of ``part``; for "test", val/ if test/ is missing or only val/ has class folders."""
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
    """Class folder of the relative path ``name``: its first component."""
    return name.partition(os.sep)[0]


def _classes(base: Path, names: list[str]) -> tuple[str, ...]:
    """Class folders of ``names``, sorted; empty if no file is in one."""
    loose = [name for name in names if os.sep not in name]
    if loose and len(loose) < len(names):
        raise UserError(
            f"{str(base)!r} has class folders and loose images, as {loose[0]!r}: move every image "
            "into a class folder"
        )
    return () if loose else tuple(sorted({_class_of(name) for name in names}))


def _training_classes(root: Path, base: Path, classes: tuple[str, ...]) -> tuple[str, ...]:
    """Classes of the training images, which also define the labels of the test images."""
    train = root / "train"
    if base == train or not train.is_dir():
        return classes
    known = {
        name
        for name in _folders(train)
        if any(map(_is_image, _walk(str(train / name), None, REMEDY, deep=True)))
    }
    if known and not classes:
        raise UserError(
            f"{str(base)!r} has loose images and train/ has class folders: sort them into folders "
            "of the same names"
        )
    unknown = sorted(set(classes) - known)
    if unknown:
        raise UserError(
            f"{str(root)!r} has a class {unknown[0]!r} in {base.name}/ of which train/ has no "
            "images: add training images of it, or take it out"
        )
    return tuple(sorted(known))


def _folders(base: Path) -> set[str]:
    """Names of the folders in ``base`` that are not hidden."""
    return {e.name for e in os.scandir(base) if e.is_dir() and not e.name.startswith(".")}


def _is_test(name: str) -> bool:
    """Whether a file belongs to the test tenth; depends only on its path, so that new files do not
    move others."""
    digest = hashlib.blake2b(os.fsencode(Path(name).as_posix()), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 10 == 0


def _channels(
    paths: Sequence[Path], others: Callable[[], list[Path]] = list, progress: bool = False
) -> int:
    """1 if a file is stored as gray and none has a pixel in colour, else 3.

    ``others`` lists further files, which are looked at only if none of a sample of ``paths`` has
    colour. Unreadable files are ignored here; an error names them when they are read.
    """

    def coloured(path: Path) -> bool:
        with contextlib.suppress(UserError):
            return is_coloured(open_image(path, MAX_PIXELS_IN_SET).image)
        return False

    if any(map(coloured, paths[:: max(1, len(paths) // 100)])):
        return 3
    stored: dict[int, list[Path]] = {1: [], 3: []}
    for path in progress_bar([*paths, *others()], "looking for colour", progress):
        with contextlib.suppress(UserError):
            stored[image_header(path)[0]].append(path)
    return 3 if not stored[1] or any(map(coloured, stored[3])) else 1


def _look(
    base: Path, names: list[str], request: DatasetRequest
) -> tuple[tuple[int, int], list[str], list[str]]:
    """Size, readable names and error messages of the others.

    With an image size only about 100 headers are read, and all names are returned.
    """
    side, headers = request.image_size, dict[str, tuple[int, int]]()
    step = 1 if side is None else max(1, len(names) // 100)

    def look(name: str) -> None:
        headers[name] = image_header(base / name)[1]

    lost: list[str] = []
    shown = progress_bar(names[::step], f"looking into {base.name}", request.progress)
    if request.faults.skip:
        lost = readable(shown, look, repr(str(base)), warn=side is None)[1]
    else:
        for name in shown:
            try:
                look(name)
            except UserError as error:
                raise UserError(f"{error}{HINT}") from None
    if side is not None:
        return (side, side), names, []
    first, *others = headers
    size = headers[first]
    if odd := next((name for name in others if headers[name] != size), None):
        height, width = headers[odd]
        raise UserError(
            f"images in {str(base)!r} differ in size ({first} is {size[0]}x{size[1]}, {odd} "
            f"{height}x{width}): choose one by --image-size"
        )
    return size, list(headers), lost


def find_images(
    root: Path, base: Path, follow: bool = False, deep: bool = True, ask: str = REMEDY
) -> list[str]:
    """Names of the image files under ``base``, relative to it, without hidden files.

    The files of a folder come before those of its subfolders, each sorted.

    Args:
        root: folder that links may not lead out of, unless ``follow`` is set.
        base: ``root`` or a folder in it.
        follow: allow links to any place.
        deep: search subfolders.
        ask: advice of the error message for a link that leads out.

    Raises:
        UserError: if a link leads out or is cyclic, or a folder is unreadable or nested too deep.
    """
    home = None if follow else os.path.realpath(root)
    if home is not None:
        _check_inside(str(base), home, ask)
    names: list[str] = []
    ignored: list[str] = []
    for name in _walk(str(base), home, ask, deep):
        (names if _is_image(name) else ignored).append(name)
    if ignored and deep:
        warnings.warn(
            f"{len(ignored)} files in {str(base)!r} are not images and are skipped, such as "
            f"{ignored[0]!r}",
            stacklevel=4,
        )
    return names


def _walk(base: str, home: str | None, ask: str, deep: bool) -> Iterator[str]:
    """Yield the files under ``base``, relative to it; check links before following them."""

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot look into {error.filename!r}: {error.strerror}") from None

    for folder, folders, files in os.walk(base, onerror=refuse, followlinks=True):
        inside = Path(folder).relative_to(base).parts
        above = [os.path.join(base, *inside[:depth]) for depth in range(len(inside) + 1)]
        if len(above) > MAX_DEPTH:
            raise UserError(
                f"{base!r} has folders nested more than {MAX_DEPTH} deep: move the images into "
                "fewer"
            )
        folders[:] = sorted(name for name in folders if deep and not name.startswith("."))
        shown = sorted(name for name in files if not name.startswith("."))
        with os.scandir(folder) as found:  # finds links without a system call for each
            links = {entry.name for entry in found if entry.is_symlink()}
        for name in (*filter(_is_image, shown), *folders):
            path = os.path.join(folder, name)
            if name not in links:
                continue
            if home is not None:
                _check_inside(path, home, ask)
            if name in folders and any(os.path.samefile(path, other) for other in above):
                raise UserError(f"{path!r} is a link to a folder that contains it: remove it")
        yield from (os.path.join(*inside, name) for name in shown)


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _check_inside(path: str, home: str, ask: str) -> None:
    """Check that ``path``, with links resolved, is inside the folder ``home``."""
    target = os.path.realpath(path)
    if target != home and not target.startswith(home.rstrip(os.sep) + os.sep):
        raise UserError(f"{path!r} is a link out of the folder, to {target!r}: {ask}")
