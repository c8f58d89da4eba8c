"""Data sets by name.

Every set gives three splits. "test" is the publisher's own (or a fixed part, where there is none);
"validation" is held out of the training images by a fixed seed, and "train" is the rest. So the
test images decide nothing during training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ebmkit.data.folders import load_folder, load_imagenet, load_pictures
from ebmkit.data.hdf5 import load_hdf5
from ebmkit.data.imagesets import SPLITS, AnyImages, DatasetRequest, Faults, Split
from ebmkit.data.standard import CIFAR, DIGITS, load_cifar, load_digits, load_patches
from ebmkit.errors import UserError, unknown_name
from ebmkit.registry import find


@dataclass(frozen=True)
class DatasetEntry:
    """A named data set.

    Attributes:
        load: gives the images that a `DatasetRequest` asks for.
        description: one line of text.
        class_names: of its labels, where they are always the same.
    """

    load: Callable[[DatasetRequest], AnyImages]
    description: str
    class_names: tuple[str, ...] = ()


DATASETS: dict[str, DatasetEntry] = {
    "digits": DatasetEntry(
        load_digits, "1,797 scanned digits, gray 8x8, 10 classes; comes along", DIGITS
    ),
    "patches": DatasetEntry(
        load_patches, "patches of two photographs, colour 32x32, no labels; comes along"
    ),
    "cifar10": DatasetEntry(
        load_cifar,
        "60,000 photographs, colour 32x32, 10 classes; torchvision's folder or HDF5",
        CIFAR["cifar10"].class_names,
    ),
    "cifar100": DatasetEntry(
        load_cifar,
        "60,000 photographs, colour 32x32, 100 classes; torchvision's folder or HDF5",
        CIFAR["cifar100"].class_names,
    ),
    "folder": DatasetEntry(
        load_folder, "--data-dir is a folder: [train|test]/CLASS/*.png, or images without classes"
    ),
    "imagenet": DatasetEntry(
        load_imagenet,
        "a folder of whole pictures, train|val/CLASS/*.JPEG: tested on the middle 224 of 256",
    ),
    "pictures": DatasetEntry(
        load_pictures, "--data-dir is a folder of pictures of any size, to evaluate denoisers on"
    ),
    "hdf5": DatasetEntry(load_hdf5, "--data-dir is an HDF5 file, as `ebmkit data pack` writes it"),
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
    return entry.load(DatasetRequest(name, split, data_dir, image_size, download, progress, faults))
