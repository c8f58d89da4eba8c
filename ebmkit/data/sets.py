"""The table of data sets, their loaders, and packing to HDF5.

Every set has three splits. "test" is the official test set (or a fixed part if there is none);
"validation" is held out of the training images by a fixed seed, and "train" is the rest, or all of
them if nothing is held out (``hold_out=False``). So test images do not influence training.

digits: 1,797 scans of handwritten digits, 8x8 gray, values 0..16 scaled to 0..255 (scikit-learn).
A fixed fifth, stratified by class, is the test set; a tenth of the rest is held out for validation.

patches: two photographs of 427x640 pixels (scikit-learn). Training patches come from columns 0..447
and overlap by three quarters; validation patches come from columns 448..511 and test patches from
512..639, the right-hand fifth, without overlap. So no pixel is in two splits.

CIFAR-10 and CIFAR-100: 32x32 colour photographs. The folder holds torchvision's folder
(``cifar-10-batches-py``, ``cifar-100-python``; downloaded if it is missing and ``download`` is set)
or the files ``cifar10-train.h5`` and ``cifar10-test.h5`` with images (N, 32, 32, 3) uint8 and
labels (N,).

`ebmkit.data.folders` and `ebmkit.data.hdf5` load your own images. `pack` writes a folder, or a
data set of torchvision, to one HDF5 file. It processes blocks of images and writes small compressed
chunks, so that single images can be read in any order.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import inspect
import os
import pickle
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import yaml
from einops import rearrange

from ebmkit.data.convert import convert
from ebmkit.data.folders import (
    has_parts,
    list_folder,
    load_folder,
    load_imagenet,
    load_pictures,
)
from ebmkit.data.hdf5 import load_hdf5, load_rows, read_contents
from ebmkit.data.imagesets import (
    SPLITS,
    AnyImages,
    DatasetRequest,
    FaultPolicy,
    ImageSet,
    Split,
    StreamedSet,
    shuffled,
    split_rows,
    warn_of_empty_classes,
)
from ebmkit.errors import UserError, first_line, unknown_name
from ebmkit.registry import Table, find
from ebmkit.storage.atomic import replacing
from ebmkit.terminal import progress_bar

if TYPE_CHECKING:
    import h5py

DIGITS = tuple("0123456789")

MAX_FILE_SIZE = 200 * 2**20
"""Maximum bytes of a CIFAR file; the largest published one has 155 MB."""

_COLUMNS: dict[Split, slice] = {
    "train": slice(448),
    "validation": slice(448, 512),
    "test": slice(512, None),
}


class Published(NamedTuple):
    """torchvision's names of a data set, its folder and archive, and the official class names."""

    torchvision_name: str
    folder: str
    archive: str
    class_names: tuple[str, ...]


_DATA = importlib.resources.files(__package__).joinpath("cifar.yaml").read_text(encoding="utf-8")
CIFAR = {
    name: Published(**facts | {"class_names": tuple(facts["class_names"])})
    for name, facts in yaml.safe_load(_DATA).items()
}
"""Published names of CIFAR-10 and CIFAR-100."""


def load_digits(request: DatasetRequest) -> ImageSet:
    """Load one split of scikit-learn's digits: images (N, 1, 8, 8), labels 0..9."""
    request.check_size(8)
    pixels, labels, rows = _digits()
    own = rows[request.split]
    if not request.hold_out and request.split == "train":
        own = np.concatenate([rows["validation"], own])
    images = torch.from_numpy(pixels[own])  # a copy
    return ImageSet(images, torch.from_numpy(labels[own]), DIGITS, request.name, request.split)


@cache
def _digits() -> tuple[np.ndarray, np.ndarray, dict[Split, np.ndarray]]:
    """Pixels (N, 1, 8, 8), labels, and row indices of each split; cached."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    values, labels = load_digits(return_X_y=True)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0
    )
    train, validation = train_test_split(
        train, test_size=0.1, stratify=labels[train], random_state=0
    )
    pixels = np.round(values * 255 / 16).astype(np.uint8).reshape(-1, 1, 8, 8)
    rows: dict[Split, np.ndarray] = {"train": train, "validation": validation, "test": test}
    return pixels, labels.astype(np.int64), rows


def load_patches(request: DatasetRequest) -> ImageSet:
    """Load one split of the patches: images (N, 3, size, size), no labels; default size 32.

    Raises:
        UserError: if the size is below 4 or above 64, the width of the narrowest region.
    """
    from sklearn.datasets import load_sample_images

    size, split = request.image_size or 32, request.split
    if not 4 <= size <= 64:
        raise UserError(f"patches of {size}x{size} cannot be cut: take a size from 4 to 64")
    stride = max(1, size // 4) if split == "train" else size
    photographs = torch.from_numpy(np.stack(load_sample_images().images))  # (2, 427, 640, 3)
    columns = _COLUMNS[split]
    if not request.hold_out and split == "train":
        columns = slice(_COLUMNS["validation"].stop)
    windows = photographs[:, :, columns].unfold(1, size, stride).unfold(2, size, stride)
    images = rearrange(windows, "n rows columns c h w -> (n rows columns) c h w").contiguous()
    return ImageSet(images, name=request.name, split=split)


def load_cifar(request: DatasetRequest) -> AnyImages:
    """Load one split of CIFAR-10 or CIFAR-100 from the given folder, ``./data`` by default.

    Raises:
        UserError: if the data is missing (and cannot be downloaded), incomplete, or invalid.
    """
    request.check_size(32)
    name, split, data_dir = request.name, request.split, request.data_dir or Path("data")
    facts = CIFAR[name]
    part, other_part = ("test", "train") if split == "test" else ("train", "test")
    file, other = data_dir / f"{name}-{part}.h5", data_dir / f"{name}-{other_part}.h5"
    what = f"data set {name!r}"
    there = (data_dir / facts.folder).is_dir() or data_dir.name == facts.folder
    if not there and file.exists():
        reader = read_contents(file, class_names=facts.class_names)
        if reader.labels is None or reader.shape[1:] != (32, 32, 3):
            raise UserError(
                f"{str(file)!r} is not {name}: it must hold images (N, 32, 32, 3) and labels (N,)"
            )
        return load_rows(name, split, reader, split_rows(request, reader.shape[0], what))
    if not there and other.exists():
        raise UserError(
            f"{str(data_dir)!r} has {other.name} but not {file.name}, so no {split} images: put "
            f"{file.name} there too"
        )
    if not there and not request.download:
        raise UserError(_missing(name, data_dir))
    whole = torchvision_cifar(name, data_dir, part == "train", download=not there)
    rows = split_rows(request, len(whole), what)
    assert whole.labels is not None
    return ImageSet(whole.images[rows], whole.labels[rows], facts.class_names, name, split)


def torchvision_cifar(name: str, data_dir: Path, train: bool, download: bool) -> ImageSet:
    """Load all official training or test images with `torchvision.datasets`.

    The files are pickles, which can execute code when they are loaded. torchvision compares the
    digest of each file with the published one before it loads the file. No other file is opened.

    Raises:
        UserError: if the folder is incomplete, or cannot be downloaded.
    """
    import torchvision

    facts = CIFAR[name]
    root = data_dir.parent if data_dir.name == facts.folder else data_dir
    folder = root / facts.folder
    for path in folder.iterdir() if folder.is_dir() else ():
        if not path.is_file() or path.stat().st_size > MAX_FILE_SIZE:
            raise UserError(
                f"{str(path)!r} is no file of the published data set: delete {str(folder)!r} and "
                "unpack it again"
            )
    timeout, existed = socket.getdefaulttimeout(), root.exists()
    try:
        socket.setdefaulttimeout(30)
        source = getattr(torchvision.datasets, facts.torchvision_name)(
            root, train=train, download=download
        )
    except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        if download:
            if not existed:
                with contextlib.suppress(OSError):  # not empty: keep the downloaded files
                    root.rmdir()
            cause = getattr(error, "reason", error)  # of a URLError: the network error
            raise UserError(
                f"{_missing(name, data_dir)} (download failed: {first_line(cause)})"
            ) from None
        raise UserError(
            f"{str(folder)!r} is incomplete or damaged: delete it and unpack {facts.archive} in "
            f"{str(root)!r} again"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)
    images = rearrange(torch.from_numpy(source.data), "n h w c -> n c h w").contiguous()
    labels = torch.tensor(source.targets, dtype=torch.int64)
    return ImageSet(images, labels, facts.class_names, name, "train" if train else "test")


def _missing(name: str, data_dir: Path) -> str:
    facts = CIFAR[name]
    return (
        f"data set {name!r} is not in {str(data_dir)!r}: put the folder {facts.folder} (from "
        f"{facts.archive}), or {name}-train.h5 and {name}-test.h5, there, or name another folder "
        "by --data-dir"
    )


@dataclass(frozen=True)
class DatasetEntry:
    """A named data set.

    Attributes:
        load: loader, from a `DatasetRequest` to one split.
        description: one line of text.
        class_names: class names, if they are fixed.
        resizable: whether ``image_size`` chooses the size of the images.
    """

    load: Callable[[DatasetRequest], AnyImages]
    description: str
    class_names: tuple[str, ...] = ()
    resizable: bool = False


DATASETS: dict[str, DatasetEntry] = Table(
    "dataset",
    {
        "digits": DatasetEntry(
            load_digits,
            "1,797 scanned digits, gray 8x8, 10 classes; included in scikit-learn",
            DIGITS,
        ),
        "patches": DatasetEntry(
            load_patches,
            "patches of two photographs, colour 32x32, no labels; included in scikit-learn",
            resizable=True,
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
            load_folder,
            "--data-dir is a folder: [train|test]/CLASS/*.png, or images without classes",
            resizable=True,
        ),
        "imagenet": DatasetEntry(
            load_imagenet,
            "--data-dir is a folder of whole images, train|val/CLASS/*.JPEG; tested "
            "on the 224 centre crop of 256",
            resizable=True,
        ),
        "pictures": DatasetEntry(
            load_pictures,
            "--data-dir is a folder of images of any size, to evaluate denoisers",
        ),
        "hdf5": DatasetEntry(
            load_hdf5, "--data-dir is an HDF5 file, as `ebmkit data pack` writes it"
        ),
    },
)


def load_dataset(
    name: str,
    data_dir: Path | None = None,
    split: Split = "train",
    *,
    image_size: int | None = None,
    download: bool = True,
    progress: bool = True,
    faults: FaultPolicy | None = None,
    hold_out: bool = True,
) -> AnyImages:
    """Load one split of a data set.

    Args:
        name: a key of `DATASETS`.
        data_dir: folder (or HDF5 file) of the data; default for CIFAR: ``./data``.
        split: "train", "validation" (held out of the training images) or "test".
        image_size: side of the images, pixels, for data sets with variable size.
        download: download CIFAR if it is missing.
        progress: show a progress bar while files are read.
        faults: handling of unreadable images and links in a folder.
        hold_out: hold images out of "train" for "validation"; if not, "train" has all training
            images, and there is no "validation".

    Raises:
        UserError: if there is no such set or split, or files are missing, incomplete or invalid.
    """
    entry = find("dataset", DATASETS, name)
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    if split == "validation" and not hold_out:
        raise UserError(
            f"no images of data set {name!r} are held out for validation (hold_out is false): take "
            "split test or train"
        )
    if image_size is not None and image_size < 1:
        raise UserError(f"image size {image_size} is not a number of pixels: take 1 or more")
    faults = faults or FaultPolicy()
    request = DatasetRequest(
        name, split, data_dir, image_size, download, progress, faults, hold_out
    )
    images = entry.load(request)
    if split == "train" and images.labels is not None and not entry.class_names:
        warn_of_empty_classes(images.labels, images.class_names, f"data set {name!r}")
    return images


def find_source(source: str | os.PathLike[str]) -> tuple[str, Path | None]:
    """Name in `DATASETS` and ``data_dir`` of a data set given by its name, or by a path.

    Raises:
        UserError: if ``source`` is neither a name nor a folder or file.
    """
    path = Path(source)
    if isinstance(source, str) and source in DATASETS:
        return source, None
    if path.exists():
        return "folder" if path.is_dir() else "hdf5", path.absolute()
    raise unknown_name("data set, folder or HDF5 file", str(source), DATASETS)


def as_images(source: Any, split: Split = "train", **options: Any) -> AnyImages:
    """Images of a name, folder or HDF5 file (`load_dataset`), or of an object (`convert`).

    ``options`` are those of `ebmkit.data.convert.convert`.
    """
    if isinstance(source, (str, os.PathLike)):
        size = options.get("image_size")
        return load_dataset(*find_source(source), split, image_size=size, progress=False)
    return convert(source, split=split, **options)


# --- packing -------------------------------------------------------------------------------------

_BLOCK = 256
_CHUNK_BYTES = 65536

_BROKEN = (OSError, RuntimeError, ValueError, TypeError, LookupError, EOFError, SyntaxError)
"""Exceptions of torchvision on missing, damaged or other files."""


def pack(
    src: Path | str,
    out: Path | str,
    *,
    overwrite: bool = False,
    image_size: int | None = None,
    progress: bool = True,
    faults: FaultPolicy | None = None,
) -> None:
    """Write the images and labels of ``src`` to the HDF5 file ``out``.

    Args:
        src: an image folder (see `ebmkit.data.folders` for the layout; a folder without train/ and
            test/ becomes one set); a folder that contains torchvision's cifar-10-batches-py or
            cifar-100-python; or ``torchvision:NAME`` or ``torchvision:NAME:FOLDER``, such as
            ``torchvision:SVHN:data``, for any class of `torchvision.datasets` that returns images
            with labels, downloaded to FOLDER (default ``./data``) if possible.
        out: HDF5 file to write.
        overwrite: replace an existing file.
        image_size: side of the images, pixels; required if they differ in size.
        progress: show a progress bar.
        faults: handling of unreadable images and links in a folder.

    Raises:
        UserError: if ``out`` exists, ``src`` is missing or incomplete, or an image cannot be read;
            no file is written then.
    """
    import h5py

    out = Path(out)
    if out.exists() and not overwrite:
        raise UserError(f"{str(out)!r} exists: move it away, or choose another name")
    if not out.parent.is_dir():
        raise UserError(f"cannot write {str(out)!r}: there is no folder {str(out.parent)!r}")
    parts = _parts(str(src), image_size, progress, faults or FaultPolicy())
    if len({(part.channels, part.image_size, part.class_names) for part in parts.values()}) > 1:
        raise UserError(
            f"training and test images in {str(src)!r} differ in size, colour or classes: give an "
            "image size, convert all to one colour, and have the same classes in both"
        )
    with replacing(out) as temporary, h5py.File(temporary, "w") as file:
        write_parts(file, parts, progress)


def write_parts(file: h5py.File, parts: Mapping[str, AnyImages], progress: bool = False) -> None:
    """Write sets to an open HDF5 file: group ("" for the root) -> images of its classes."""
    import h5py

    if names := next(iter(parts.values())).class_names:
        file.create_dataset("class_names", data=list(names), dtype=h5py.string_dtype())
    for group, source in parts.items():
        _write(file.require_group(group or "/"), source, progress)


def _write(group: h5py.Group, source: AnyImages, progress: bool) -> None:
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


def _parts(
    src: str, image_size: int | None, progress: bool, faults: FaultPolicy
) -> Mapping[str, AnyImages]:
    """Group of the HDF5 file -> source of its images."""
    if src.startswith("torchvision:"):
        return _torchvision_parts(src, image_size)
    folder = Path(src)
    for name, facts in CIFAR.items():
        if folder.name != facts.folder and not (folder / facts.folder).is_dir():
            continue
        if image_size not in (None, 32):
            raise UserError(f"{name} has images of 32x32: remove the image size")
        return {
            part: torchvision_cifar(name, folder, part == "train", download=False)
            for part in ("train", "test")
        }
    return _folder_parts(folder, image_size, progress, faults)


def _folder_parts(
    root: Path, image_size: int | None, progress: bool, faults: FaultPolicy
) -> Mapping[str, AnyImages]:
    groups = [""]
    if has_parts(root):
        there = {name for name in ("train", "test", "val") if (root / name).is_dir()}
        groups = ["train"] * ("train" in there) + ["test"] * bool(there - {"train"})
    request = DatasetRequest("folder", "train", root, image_size, False, progress, faults)
    parts: dict[str, StreamedSet] = {}
    for group in groups:
        images = list_folder(request, group or "all")
        parts[group] = images.select(shuffled(len(images)))
        if faults.skip:
            parts[group] = parts[group].readable(f"{root.name}/{group}", progress, warn=True)
    return parts


def _torchvision_parts(src: str, image_size: int | None) -> Mapping[str, AnyImages]:
    """`_parts` of a ``src`` ``torchvision:NAME[:FOLDER]``."""
    import torchvision

    name, _, folder = src.removeprefix("torchvision:").partition(":")
    if name not in torchvision.datasets.__all__:
        raise unknown_name("torchvision data set", name, torchvision.datasets.__all__)
    make = getattr(torchvision.datasets, name)
    options = inspect.signature(make).parameters
    if not {"train", "split"} & set(options):
        raise UserError(f"{src!r} has no training and test parts: pack a folder of its images")
    download = {"download": True} if "download" in options else {}
    parts: dict[str, AnyImages] = {}
    for part in ("train", "test"):
        choice = {"train": part == "train"} if "train" in options else {"split": part}
        try:
            source = make(folder or "data", **choice, **download)
        except _BROKEN as error:
            reason = first_line(error)
            raise UserError(f"cannot get {src!r} into {folder or 'data'!r}: {reason}") from None
        parts[part] = convert(source, src, image_size=image_size, like=parts.get("train"))
    return parts
