"""CIFAR-10 and CIFAR-100: 32x32 colour photographs.

In ``data_dir``, either torchvision's folder (``cifar-10-batches-py``, ``cifar-100-python``; fetched
if it is missing and that is allowed) or the files ``cifar10-train.h5`` and ``cifar10-test.h5`` with
images (N, 32, 32, 3) uint8 and labels (N,).
"""

from __future__ import annotations

import contextlib
import pickle
import socket
from pathlib import Path
from typing import NamedTuple

import torch

from ebmkit.data.hdf5 import load_rows, read_contents
from ebmkit.data.imagesets import ImageSet, Split, held_out
from ebmkit.data.streamed import AnyImages
from ebmkit.errors import UserError

__all__ = ["CIFAR", "cifar", "torchvision_cifar"]


LARGEST_FILE = 200 * 2**20
"""Bytes; the largest that is published has 155 MB."""


class _Facts(NamedTuple):
    torchvision_name: str
    folder: str
    class_names: tuple[str, ...]


_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100 = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
    butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach
    couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster
    house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
    motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
    pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road
    rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel
    streetcar sunflower sweet_pepper table tank telephone television tiger tractor train
    trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""

CIFAR = {
    "cifar10": _Facts("CIFAR10", "cifar-10-batches-py", tuple(_CIFAR10.split())),
    "cifar100": _Facts("CIFAR100", "cifar-100-python", tuple(_CIFAR100.split())),
}
"""Both sets: torchvision's name and folder, and the published names of the classes."""


def cifar(name: str, data_dir: Path, split: Split, download: bool) -> AnyImages:
    """One split of ``name`` ("cifar10" or "cifar100") as found in ``data_dir``.

    Raises:
        UserError: if it is not there (and cannot be fetched), incomplete, or illegal.
    """
    facts = CIFAR[name]
    part = "test" if split == "test" else "train"
    file = data_dir / f"{name}-{part}.h5"
    other = data_dir / f"{name}-{'train' if part == 'test' else 'test'}.h5"
    if (data_dir / facts.folder).is_dir() or data_dir.name == facts.folder:
        whole = torchvision_cifar(name, data_dir, part == "train", download=False)
        rows = _rows(split, len(whole), name)
        assert whole.labels is not None
        return ImageSet(name, split, whole.images[rows], whole.labels[rows], facts.class_names)
    if file.exists():
        contents = read_contents(file, class_names=facts.class_names)
        if contents.labels is None or contents.shape[1:] != (32, 32, 3):
            raise UserError(
                f"{str(file)!r} is not {name}: it must hold images (N, 32, 32, 3) and labels (N,)"
            )
        return load_rows(name, split, contents, _rows(split, contents.shape[0], name))
    if other.exists():
        raise UserError(
            f"{str(data_dir)!r} has {other.name} but not {file.name}, so no {split} images: put "
            f"{file.name} there too"
        )
    if not download:
        raise UserError(_where(name, data_dir))
    torchvision_cifar(name, data_dir, part == "train", download=True)
    return cifar(name, data_dir, split, download=False)


def torchvision_cifar(name: str, data_dir: Path, train: bool, download: bool) -> ImageSet:
    """All official training or test images, through `torchvision.datasets`.

    The files are pickles, which can run any code when they are opened: torchvision compares the
    digest of each with that of the published one before it does. No other file is opened.

    Raises:
        UserError: if the folder is incomplete, or cannot be fetched.
    """
    import torchvision

    facts = CIFAR[name]
    root = data_dir.parent if data_dir.name == facts.folder else data_dir
    _check_files(root / facts.folder)
    timeout, existed = socket.getdefaulttimeout(), root.exists()
    try:
        socket.setdefaulttimeout(30)
        source = getattr(torchvision.datasets, facts.torchvision_name)(
            root, train=train, download=download
        )
    except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        if download:
            if not existed:
                with contextlib.suppress(OSError):  # not empty: keep what was fetched
                    root.rmdir()
            cause = getattr(error, "reason", error)  # of a URLError: what the network said
            reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
            raise UserError(f"{_where(name, data_dir)} (fetching it failed: {reason})") from None
        raise UserError(
            f"{str(root / facts.folder)!r} is incomplete or damaged: delete it and unpack "
            f"{source_archive(name)} in {str(root)!r} anew"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)
    return ImageSet(
        name=name,
        split="train" if train else "test",
        images=torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous(),
        labels=torch.tensor(source.targets, dtype=torch.int64),
        class_names=facts.class_names,
    )


def _check_files(folder: Path) -> None:
    """Check that what is in ``folder``, if it is there, can be looked at to its end.

    Raises:
        UserError: if not.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if not path.is_file() or path.stat().st_size > LARGEST_FILE:
            raise UserError(
                f"{str(path)!r} is no file of the published data set: delete {str(folder)!r} and "
                "unpack it anew"
            )


def source_archive(name: str) -> str:
    """The file that the data set is published as."""
    return "cifar-10-python.tar.gz" if name == "cifar10" else "cifar-100-python.tar.gz"


def _where(name: str, data_dir: Path) -> str:
    return (
        f"data set {name!r} is not in {str(data_dir)!r}: put the folder {CIFAR[name].folder} "
        f"(from {source_archive(name)}), or {name}-train.h5 and {name}-test.h5, there, or name "
        "another folder by --data-dir"
    )


def _rows(split: Split, count: int, name: str) -> torch.Tensor:
    if split == "test":
        return torch.arange(count)
    train, validation = held_out(count, f"data set {name!r}")
    return train if split == "train" else validation
