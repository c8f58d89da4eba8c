"""Data sets by name.

Every set gives three splits. "test" is the publisher's own (or a fixed part, where there is none);
"validation" is held out of the training images by a fixed seed, and "train" is the rest. So the
test images decide nothing during training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ebmkit.data.imagesets import SPLITS, Faults, ImageSet, Split
from ebmkit.data.streamed import AnyImages, StreamedSet
from ebmkit.errors import UserError, unknown_name
from ebmkit.registry import find

__all__ = ["DATASETS", "DatasetEntry", "ImageSet", "StreamedSet", "load_dataset"]


class Request(NamedTuple):
    """What is asked of a loader: where, which split, side in pixels, and what it may do."""

    data_dir: Path | None
    split: Split
    image_size: int | None
    download: bool
    progress: bool
    faults: Faults = Faults()


@dataclass(frozen=True)
class DatasetEntry:
    """A named data set: its loader and one line of text ``about`` it."""

    load: Callable[[Request], AnyImages]
    description: str


def _digits(request: Request) -> ImageSet:
    from ebmkit.data.embedded import digits

    _own_size("digits", request, 8)
    return digits(request.split)


def _patches(request: Request) -> ImageSet:
    from ebmkit.data.embedded import patches

    return patches(request.split, request.image_size or 32)


def _cifar10(request: Request) -> AnyImages:
    from ebmkit.data.cifar import cifar

    _own_size("cifar10", request, 32)
    return cifar("cifar10", request.data_dir or Path("data"), request.split, request.download)


def _cifar100(request: Request) -> AnyImages:
    from ebmkit.data.cifar import cifar

    _own_size("cifar100", request, 32)
    return cifar("cifar100", request.data_dir or Path("data"), request.split, request.download)


def _folder(request: Request) -> AnyImages:
    from ebmkit.data.folders import load_folder

    if request.data_dir is None:
        raise UserError("data set 'folder' needs a folder of images: name it by --data-dir")
    return load_folder(
        request.data_dir,
        request.split,
        request.image_size,
        request.progress,
        faults=request.faults,
    )


def _imagenet(request: Request) -> AnyImages:
    from ebmkit.data.folders import load_folder

    if request.data_dir is None:
        raise UserError(
            "data set 'imagenet' needs the folder with train/ and val/: name it by --data-dir"
        )
    size = request.image_size or 224
    return load_folder(
        request.data_dir,
        request.split,
        size,
        request.progress,
        side=round(size * 256 / 224),
        name="imagenet",
        faults=request.faults,
    )


def _hdf5(request: Request) -> AnyImages:
    from ebmkit.data.hdf5 import load_hdf5

    if request.data_dir is None:
        raise UserError("data set 'hdf5' needs an HDF5 file: name it by --data-dir")
    return load_hdf5(request.data_dir, request.split, request.image_size)


def _pictures(request: Request) -> StreamedSet:
    from ebmkit.data.pictures import load_pictures

    if request.data_dir is None:
        raise UserError("data set 'pictures' needs a folder of pictures: name it by --data-dir")
    if request.image_size is not None:
        raise UserError("data set 'pictures' keeps each picture's size: leave the image size out")
    return load_pictures(request.data_dir, request.split, request.faults)


DATASETS: dict[str, DatasetEntry] = {
    "digits": DatasetEntry(
        _digits, "1,797 scanned digits, gray 8x8, 10 classes; included in scikit-learn"
    ),
    "patches": DatasetEntry(
        _patches, "patches of two photographs, colour 32x32, no labels; included in scikit-learn"
    ),
    "cifar10": DatasetEntry(
        _cifar10, "60,000 photographs, colour 32x32, 10 classes; torchvision's folder or HDF5"
    ),
    "cifar100": DatasetEntry(
        _cifar100, "60,000 photographs, colour 32x32, 100 classes; torchvision's folder or HDF5"
    ),
    "folder": DatasetEntry(
        _folder, "--data-dir is a folder: [train|test]/CLASS/*.png, or images without classes"
    ),
    "imagenet": DatasetEntry(
        _imagenet,
        "--data-dir is a folder of whole images, train|val/CLASS/*.JPEG; tested "
        "on the 224 centre crop of 256",
    ),
    "pictures": DatasetEntry(
        _pictures, "--data-dir is a folder of images of any size, to evaluate denoisers"
    ),
    "hdf5": DatasetEntry(_hdf5, "--data-dir is an HDF5 file, as `ebmkit data pack` writes it"),
}


def load_dataset(
    name: str,
    data_dir: Path | None = None,
    split: Split = "train",
    *,
    image_size: int | None = None,
    download: bool = True,
    progress: bool = True,
    faults: Faults | None = None,
) -> AnyImages:
    """One split of a data set.

    Args:
        name: one of `DATASETS`.
        data_dir: the folder (or HDF5 file) it is in; ``./data`` by default for CIFAR.
        split: "train", "validation" (held out of the training images) or "test".
        image_size: side of the images, pixels, for sets that can be cut to size.
        download: fetch CIFAR if it is not there.
        progress: show a progress bar while many files are read.
        faults: what is done about images of a folder that cannot be read, and about links.

    Raises:
        UserError: if there is no such set or split, or files are missing, incomplete or illegal.
    """
    entry = find("dataset", DATASETS, name)
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    if image_size is not None and image_size < 1:
        raise UserError(f"image size {image_size} is not a number of pixels: take 1 or more")
    faults = faults or Faults()
    return entry.load(Request(data_dir, split, image_size, download, progress, faults))


def _own_size(name: str, request: Request, side: int) -> None:
    if request.image_size not in (None, side):
        raise UserError(
            f"data set {name!r} has images of {side}x{side}, not {request.image_size}: leave the "
            "image size out"
        )
