"""Image folders and torchvision data sets into one HDF5 file (laid out as `ebmkit.data.hdf5` says).

Images are stored in small compressed chunks, so that they can be read one by one in any order. They
go through memory in blocks, and the file appears under its name only once it is whole.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from ebmkit.data.folders import has_parts, list_folder, readable_images, to_pixels
from ebmkit.data.imagesets import DatasetRequest, Faults, ImageSet, StreamedSet, shuffled
from ebmkit.data.sets import CIFAR, torchvision_cifar
from ebmkit.errors import UserError, first_line, unknown_name
from ebmkit.terminal import progress_bar

_BLOCK = 256
_CHUNK_BYTES = 65536

_BROKEN = (OSError, RuntimeError, ValueError, TypeError, LookupError, EOFError, SyntaxError)
"""What torchvision raises on files that are missing, damaged or something else."""


class _Items:
    """A data set of torchvision, read item by item at the size and colour of the first.

    Raises:
        UserError: if it does not give images, or not of one size without an ``image_size``, or its
            labels are no numbers; naming what cannot be read.
    """

    def __init__(self, source: Any, name: str, image_size: int | None) -> None:
        self.source, self.name, self.resized = source, name, image_size is not None
        first = self._item(0)
        if not (isinstance(first, tuple) and isinstance(first[0], Image.Image)):
            raise UserError(f"{name!r} does not give images with labels: pack a folder of images")
        self.channels = 1 if first[0].mode in ("1", "L") else 3
        self.size = (image_size, image_size) if image_size else first[0].size[::-1]
        self.class_names = tuple(str(c) for c in getattr(source, "classes", ()))

    def __len__(self) -> int:
        return len(self.source)

    def read(self, rows: range) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) uint8 and labels (B,)."""
        images, labels = [], []
        for row in rows:
            image, label = self._item(row)
            if not self.resized and image.size[::-1] != self.size:
                raise UserError(
                    f"images of {self.name!r} differ in size: choose one by --image-size"
                )
            if not isinstance(label, int):
                raise UserError(
                    f"{self.name!r} has labels that are not whole numbers, as {label!r}"
                )
            images.append(to_pixels(image, self.channels, self.size))
            labels.append(label)
        return torch.stack(images), torch.tensor(labels)

    def _item(self, row: int) -> Any:
        try:
            return self.source[row]
        except _BROKEN as error:
            raise UserError(f"image {row} of {self.name!r} cannot be read: {error}") from None


Parts = Mapping[str, ImageSet | StreamedSet | _Items]
"""Group of the file -> the images that it gets."""


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
    parts = _parts(str(src), image_size, progress, faults or Faults())
    class_names = next(iter(parts.values())).class_names
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
            for group, source in parts.items():
                _write(file.require_group(group or "/"), source, progress)
        os.chmod(temporary, 0o644)
        os.replace(temporary, out)
    except OSError as error:
        raise UserError(f"cannot write {str(out)!r}: {error}; nothing was left behind") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _write(group: h5py.Group, source: ImageSet | StreamedSet | _Items, progress: bool) -> None:
    count, labels = len(source), []
    what = group.name.strip("/") or "images"
    for start in progress_bar(range(0, count, _BLOCK), f"packing {what}", progress):
        images, tags = source.read(range(start, min(start + _BLOCK, count)))
        pixels = rearrange(images, "n c h w -> n h w c").numpy()
        if start == 0:
            shape = pixels.shape[1:]
            rows = max(1, min(count, _CHUNK_BYTES // pixels[0].size))
            written = group.create_dataset(
                "images",
                shape=(count, *shape),
                dtype=np.uint8,
                chunks=(rows, *shape),
                compression="gzip",
                compression_opts=1,
            )
        written[start : start + len(pixels)] = pixels
        if tags is not None:
            labels.append(tags)
    if labels:
        group.create_dataset("labels", data=torch.cat(labels).numpy())


def _parts(src: str, image_size: int | None, progress: bool, faults: Faults) -> Parts:
    if src.startswith("torchvision:"):
        return _torchvision_parts(src, image_size)
    folder = Path(src)
    for name, facts in CIFAR.items():
        if folder.name != facts.folder and not (folder / facts.folder).is_dir():
            continue
        if image_size not in (None, 32):
            raise UserError(f"{name} has images of 32x32: leave the image size out")
        return {
            part: torchvision_cifar(name, folder, part == "train", download=False)
            for part in ("train", "test")
        }
    return _folder_parts(folder, image_size, progress, faults)


def _folder_parts(root: Path, image_size: int | None, progress: bool, faults: Faults) -> Parts:
    groups = [""]
    if has_parts(root):
        there = {name for name in ("train", "test", "val") if (root / name).is_dir()}
        groups = ["train"] * ("train" in there) + ["test"] * bool(there - {"train"})
    request = DatasetRequest("folder", "train", root, image_size, False, progress, faults)
    parts: dict[str, StreamedSet] = {}
    for group in groups:
        images = list_folder(request, group or "all")
        images = images.select(shuffled(len(images)))
        parts[group] = readable_images(images, f"{root.name}/{group}", request)
    if len({(part.channels, part.image_size) for part in parts.values()}) > 1:
        raise UserError(
            f"training and test images in {str(root)!r} differ in size or colour: give an image "
            "size and convert all to one colour"
        )
    return parts


def _torchvision_parts(src: str, image_size: int | None) -> Parts:
    """The parts of ``torchvision:NAME[:FOLDER]``."""
    import torchvision

    name, _, folder = src.removeprefix("torchvision:").partition(":")
    if name not in torchvision.datasets.__all__:
        raise unknown_name("torchvision data set", name, torchvision.datasets.__all__)
    make = getattr(torchvision.datasets, name)
    options = inspect.signature(make).parameters
    if not {"train", "split"} & set(options):
        raise UserError(f"{src!r} does not come in a training and a test part: pack a folder of it")
    download = {"download": True} if "download" in options else {}
    parts: dict[str, _Items] = {}
    for part in ("train", "test"):
        choice = {"train": part == "train"} if "train" in options else {"split": part}
        try:
            source = make(folder or "data", **choice, **download)
        except _BROKEN as error:
            reason = first_line(error)
            raise UserError(f"cannot get {src!r} into {folder or 'data'!r}: {reason}") from None
        parts[part] = _Items(source, src, image_size)
    return parts
