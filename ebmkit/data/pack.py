"""Image folders and torchvision data sets into one HDF5 file (laid out as `ebmkit.data.hdf5` says).

Images are stored in small compressed chunks, so that they can be read one by one in any order. They
go through memory in blocks, and the file appears under its name only once it is whole.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ebmkit.data.cifar import CIFAR, torchvision_cifar
from ebmkit.data.folders import has_parts, list_folder, progress_bar, readable_rows
from ebmkit.data.imagesets import Faults, shuffled
from ebmkit.data.reading import to_pixels
from ebmkit.errors import UserError, unknown_name

__all__ = ["pack"]

_BLOCK = 256
_CHUNK_BYTES = 65536

_BROKEN = (OSError, RuntimeError, ValueError, TypeError, LookupError, EOFError, SyntaxError)
"""What torchvision raises on files that are missing, damaged or something else."""


class _Part(NamedTuple):
    """One set to be written: ``read(rows)`` gives images (B, C, H, W) uint8 and labels."""

    group: str
    length: int
    read: Callable[[list[int]], tuple[Tensor, Tensor | None]]


def pack(
    src: Path | str,
    out: Path | str,
    *,
    overwrite: bool = False,
    image_size: int | None = None,
    progress: bool = True,
    faults: Faults | None = None,
) -> None:
    """Write the images and labels of ``src`` to the HDF5 file ``out``.

    Args:
        src: an image folder (`ebmkit.data.folders` says how it is laid out; a folder without train/
            and test/ becomes one set); a folder with torchvision's cifar-10-batches-py or
            cifar-100-python in it; or ``torchvision:NAME`` or ``torchvision:NAME:FOLDER``, as in
            ``torchvision:SVHN:data``, any class of `torchvision.datasets` that gives images with
            labels, fetched into FOLDER (``./data`` by default) if need be.
        out: the file.
        overwrite: replace a file that exists.
        image_size: side to bring images to; needed where they differ in size.
        progress: show a bar.
        faults: what is done about images of a folder that cannot be read, and about links.

    Raises:
        UserError: if ``out`` exists, ``src`` is missing or incomplete, or an image cannot be read;
            nothing is left behind then.
    """
    out = Path(out)
    if out.exists() and not overwrite:
        raise UserError(f"{str(out)!r} exists: move it away, or choose another name")
    if not out.parent.is_dir():
        raise UserError(f"cannot write {str(out)!r}: there is no folder {str(out.parent)!r}")
    parts, class_names = _parts(str(src), image_size, progress, faults or Faults())
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{out.name}.", dir=out.parent)
    except OSError as error:
        raise UserError(f"cannot write {str(out)!r}: {error.strerror}") from None
    os.close(handle)
    try:
        with h5py.File(temporary, "w") as file:
            if class_names:
                file.create_dataset(
                    "class_names", data=list(class_names), dtype=h5py.string_dtype()
                )
            for part in parts:
                _write(file.require_group(part.group or "/"), part, progress)
        os.chmod(temporary, 0o644)
        os.replace(temporary, out)
    except OSError as error:
        raise UserError(f"cannot write {str(out)!r}: {error}; nothing was left behind") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _write(group: h5py.Group, part: _Part, progress: bool) -> None:
    images: h5py.Dataset | None = None
    labels: list[Tensor] = []
    starts = range(0, part.length, _BLOCK)
    for start in progress_bar(starts, f"packing {part.group or 'images'}", progress):
        block, tags = part.read(list(range(start, min(start + _BLOCK, part.length))))
        pixels = block.permute(0, 2, 3, 1).numpy()
        if images is None:
            images = group.create_dataset(
                "images",
                shape=(part.length, *pixels.shape[1:]),
                dtype=np.uint8,
                chunks=(
                    max(1, min(part.length, _CHUNK_BYTES // pixels[0].size)),
                    *pixels.shape[1:],
                ),
                compression="gzip",
                compression_opts=1,
            )
        images[start : start + len(pixels)] = pixels
        if tags is not None:
            labels.append(tags)
    if labels:
        group.create_dataset("labels", data=torch.cat(labels).numpy())


def _parts(
    src: str, image_size: int | None, progress: bool, faults: Faults
) -> tuple[list[_Part], tuple[str, ...]]:
    if src.startswith("torchvision:"):
        return _torchvision_parts(src, image_size)
    folder = Path(src)
    for name, facts in CIFAR.items():
        if folder.name == facts.folder or (folder / facts.folder).is_dir():
            return _cifar_parts(name, folder, image_size)
    return _folder_parts(folder, image_size, progress, faults)


def _folder_parts(
    root: Path, image_size: int | None, progress: bool, faults: Faults
) -> tuple[list[_Part], tuple[str, ...]]:
    if has_parts(root):
        names = {"train": ("train",), "test": ("test", "val")}
        groups = [p for p in names if any((root / name).is_dir() for name in names[p])]
    else:
        groups = [""]
    listings = {
        part: list_folder(root, part or "all", image_size, progress, faults=faults)
        for part in groups
    }
    shapes = {(listing.reader.channels, listing.reader.size) for listing in listings.values()}
    if len(shapes) > 1:
        raise UserError(
            f"training and test images in {str(root)!r} differ in size or colour: give an image "
            "size and convert all to one colour"
        )
    parts = []
    for group, listing in listings.items():
        order = shuffled(len(listing.reader))
        if faults.skip:
            order, _ = readable_rows(listing, order, f"{root.name}/{group}", progress)

        def read(
            rows: list[int], listing: Any = listing, order: Tensor = order
        ) -> tuple[Tensor, Tensor | None]:
            own = order[rows]
            labels = None if listing.labels is None else listing.labels[own]
            return listing.reader.read(own.tolist()), labels

        parts.append(_Part(group, len(order), read))
    return parts, next(iter(listings.values())).class_names


def _cifar_parts(
    name: str, folder: Path, image_size: int | None
) -> tuple[list[_Part], tuple[str, ...]]:
    if image_size not in (None, 32):
        raise UserError(f"{name} has images of 32x32: leave the image size out")
    parts = []
    for group in ("train", "test"):
        whole = torchvision_cifar(name, folder, group == "train", download=False)

        def read(rows: list[int], whole: Any = whole) -> tuple[Tensor, Tensor | None]:
            return whole.images[rows], whole.labels[rows]

        parts.append(_Part(group, len(whole), read))
    return parts, CIFAR[name].class_names


def _torchvision_parts(src: str, image_size: int | None) -> tuple[list[_Part], tuple[str, ...]]:
    """The parts of ``torchvision:NAME[:FOLDER]``."""
    import torchvision

    name, _, folder = src.removeprefix("torchvision:").partition(":")
    if name not in torchvision.datasets.__all__:
        raise unknown_name("torchvision data set", name, torchvision.datasets.__all__)
    make = getattr(torchvision.datasets, name)
    options = inspect.signature(make).parameters
    if "train" in options:
        choices: dict[str, dict[str, object]] = {"train": {"train": True}, "test": {"train": False}}
    elif "split" in options:
        choices = {"train": {"split": "train"}, "test": {"split": "test"}}
    else:
        raise UserError(f"{src!r} does not come in a training and a test part: pack a folder of it")
    download = {"download": True} if "download" in options else {}
    parts: list[_Part] = []
    class_names: tuple[str, ...] = ()
    for group, choice in choices.items():
        try:
            source = make(folder or "data", **choice, **download)
        except _BROKEN as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"cannot get {src!r} into {folder or 'data'!r}: {reason}") from None
        parts.append(_Part(group, len(source), _item_reader(source, src, image_size)))
        class_names = tuple(str(c) for c in getattr(source, "classes", ()))
    return parts, class_names


def _item_reader(
    source: Any, src: str, image_size: int | None
) -> Callable[[list[int]], tuple[Tensor, Tensor | None]]:
    """Reads (Pillow image, label) items at the size and colour of the first."""
    try:
        first = source[0]
    except _BROKEN as error:
        raise UserError(f"the first image of {src!r} cannot be read: {error}") from None
    if not (isinstance(first, tuple) and isinstance(first[0], Image.Image)):
        raise UserError(f"{src!r} does not give images with labels: pack a folder of images")
    channels = 1 if first[0].mode in ("1", "L") else 3
    size = (image_size, image_size) if image_size else first[0].size[::-1]

    def read(rows: list[int]) -> tuple[Tensor, Tensor | None]:
        images, labels = [], []
        for row in rows:
            try:
                image, label = source[row]
            except _BROKEN as error:
                raise UserError(f"image {row} of {src!r} cannot be read: {error}") from None
            if image_size is None and image.size[::-1] != size:
                raise UserError(f"images of {src!r} differ in size: choose one by --image-size")
            if not isinstance(label, int):
                raise UserError(f"{src!r} has labels that are not whole numbers, as {label!r}")
            images.append(to_pixels(image, channels, size))
            labels.append(label)
        return torch.stack(images), torch.tensor(labels)

    return read
