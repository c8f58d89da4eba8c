"""Images that are not of the distribution: other data sets, and what is made of the images or of
nothing.

A made set has as many images as it is made of, each a function of the seed and of its number alone,
so that neither batches nor processes change it. Of files, all images are taken up to that number,
in the order of their names, and brought to the model's size and channels by one rule: the shorter
side resized (bicubic), the middle cut out; gray repeated to colour, colour weighted to gray.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ebmkit.data import StreamedSet, load_dataset
from ebmkit.data.folders import SUFFIXES, find_images, to_pixels
from ebmkit.data.hdf5 import load_rows, read_contents
from ebmkit.data.images import MAX_PIXELS_IN_SET, open_image
from ebmkit.errors import UserError, unknown_name
from ebmkit.evaluation.suite import Images
from ebmkit.randomness import keyed_generator
from ebmkit.storage.hdf5 import holds, open_hdf5


@dataclass(frozen=True)
class OutSet:
    """A set of images out of distribution.

    Attributes:
        name: of the set.
        description: one line.
        images: of the model's size and channels.
    """

    name: str
    description: str
    images: Images


def _gaussian(x: Tensor, generator: torch.Generator) -> Tensor:
    std, mean = torch.std_mean(x, dim=(1, 2), keepdim=True)
    return (mean + std * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def _shuffled(x: Tensor, generator: torch.Generator) -> Tensor:
    order = torch.randperm(x[0].numel(), generator=generator)
    return x.flatten(1)[:, order].reshape(x.shape)


GENERATORS: dict[str, tuple[Callable[[Tensor, torch.Generator], Tensor], str]] = {
    "constant": (
        lambda x, generator: torch.rand(len(x), 1, 1, generator=generator).expand(x.shape),
        "one gray or colour all over",
    ),
    "uniform": (
        lambda x, generator: torch.rand(x.shape, generator=generator),
        "each value uniform in [0, 1]",
    ),
    "gaussian": (_gaussian, "normal noise of each image's mean and deviation, clipped"),
    "inverted": (lambda x, generator: 1 - x, "1 - x"),
    "shuffled": (_shuffled, "the pixels of each image in random order"),
}
"""Made sets: an image (C, H, W) from one of the distribution and random numbers."""

MADE = ("interpolations", *GENERATORS)
"""Sets that are made here."""

NAMED = ("cifar10", "cifar100", "digits", "patches")
"""Data sets that are found by their name: their test images."""


@dataclass(frozen=True)
class Made:
    """Images made one by one of those of a set; the side of it that an evaluation needs."""

    source: Images
    name: str
    seed: int
    split: str = "made"
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    num_classes: int = 0

    @property
    def channels(self) -> int:
        """Those of the source."""
        return self.source.channels

    @property
    def image_size(self) -> tuple[int, int]:
        """That of the source."""
        return self.source.image_size

    def __len__(self) -> int:
        return len(self.source)

    def first(self, n: int) -> Self:
        """Made of the first ``n`` images of the source."""
        return replace(self, source=self.source.first(n))

    def select(self, chosen: Tensor) -> Self:
        """Made of the images of the source with the numbers ``chosen``."""
        return replace(self, source=self.source.select(chosen))

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """In order, ``size`` at a time: images (B, C, H, W) in [0, 1], and None."""
        mixed = self.name == "interpolations"
        other = torch.tensor(partners(self.source.labels, len(self)) if mixed else [])
        first = 0
        for x, _ in self.source.batches(size):
            keys = range(first, first + len(x))
            if mixed:
                ((y, _),) = self.source.select(other[first : first + len(x)]).batches(len(x))
                yield (x + y) / 2, None
            else:
                generators = [keyed_generator("cpu", "ood", self.name, self.seed, k) for k in keys]
                make = GENERATORS[self.name][0]
                pairs = zip(x.cpu(), generators, strict=True)
                yield torch.stack([make(image, generator) for image, generator in pairs]), None
            first += len(x)


def partners(labels: Tensor | None, count: int) -> list[int]:
    """For each of ``count`` images the next one, cyclic, with another label (if there are labels).

    Raises:
        UserError: if there is none.
    """
    own = list(range(count)) if labels is None else labels.tolist()
    if len(set(own)) < 2:
        raise UserError(
            f"interpolations are means of two images of different classes, and all {count} are of "
            "one: leave interpolations out of ood.sets, or take more images"
        )
    after: list[int] = [0] * (2 * count)
    for i in reversed(range(2 * count - 1)):
        same = own[(i + 1) % count] == own[i % count]
        after[i] = after[i + 1] if same and after[i + 1] else i + 1
    return [after[i] % count for i in range(count)]


def standard_sets(images: Images, data_dir: Path | None) -> list[str]:
    """What ``auto`` stands for: CIFAR-100 beside CIFAR-10 where it is found, and made sets."""
    found = list(MADE[:4])
    if images.name == "cifar10" and _has_cifar100(data_dir):
        return ["cifar100", *found]
    return found if images.name == "cifar10" else list(MADE)


def find_set(name: str, images: Images, data_dir: Path | None, seed: int) -> OutSet:
    """The set ``name`` out of the distribution of ``images``.

    Args:
        name: one of `MADE` or `NAMED`, an image folder, or an HDF5 file with images (N, H, W, C)
            uint8 at its root or in the group ``test``.
        images: what the model is at home with; the set has no more, of the same shape.
        data_dir: where data sets are looked for.
        seed: of made sets.

    Raises:
        UserError: if there is no such set, or its files cannot be read.
    """
    if name == "interpolations":
        partners(images.labels, len(images))  # or says why not
        classes = "" if images.labels is None else " of different classes"
        return OutSet(name, f"means of two images{classes}", Made(images, name, seed))
    if name in GENERATORS:
        return OutSet(name, GENERATORS[name][1], Made(images, name, seed))
    if name in NAMED:
        if name == images.name:
            raise UserError(f"ood.sets: {name!r} is the data set that is evaluated: name another")
        own = load_dataset(name, data_dir, "test", download=False, progress=False)
        return OutSet(name, f"{name} test images", _reshaped(own, images))
    path = Path(name).expanduser()
    if path.is_dir():
        return OutSet(path.name, f"images in the folder {path.name}", _folder(path, images))
    if path.is_file():
        return OutSet(path.name, f"images in the file {path.name}", _file(path, images))
    if os.sep in name or path.suffix:
        raise UserError(f"ood.sets: there is no folder or HDF5 file {name!r}")
    raise unknown_name("set out of distribution", name, ["auto", *MADE, *NAMED])


def _has_cifar100(data_dir: Path | None) -> bool:
    where = data_dir or Path("data")
    return (where / "cifar-100-python").is_dir() or (where / "cifar100-test.h5").is_file()


def _reshaped(other: Any, like: Images) -> Images:
    """The first images of an `ImageSet` or `StreamedSet`, of the shape of ``like``."""
    other = other.first(len(like))
    if (other.channels, other.image_size) == (like.channels, like.image_size):
        found: Images = replace(other, labels=None, class_names=())
        return found
    from PIL import Image

    def read(row: int) -> Any:
        (pixels,), _ = other.read([row])
        array = pixels.movedim(0, -1).numpy()
        return Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array)

    return _streamed(other.name, read, len(other), like)


def _folder(root: Path, like: Images) -> Images:

    names = find_images(root, root, ask="copy it into the folder, or make a folder without links")
    files = sorted(root / name for name in names)
    if not files:
        raise UserError(f"{str(root)!r} holds no images: put files ending in {SUFFIXES} there")

    def read(row: int) -> Any:
        opened = open_image(files[row], MAX_PIXELS_IN_SET)
        if opened.is_16_bit:
            raise UserError(f"{str(files[row])!r} has 16 bits: convert it to 8")
        return opened.image

    return _streamed(root.name, read, min(len(files), len(like)), like)


def _file(path: Path, like: Images) -> Images:

    with open_hdf5(path) as file:
        groups = [] if holds(file, "images") else ["test", "train"]
        group = next((g for g in groups if holds(file, g)), "")
    contents = read_contents(path, group)
    rows = torch.arange(min(contents.shape[0], len(like)))
    return _reshaped(load_rows(path.name, "test", contents, rows), like)


@dataclass(frozen=True)
class _Reader:
    """Reads rows of images at one size and number of channels, as the module's text says."""

    open: Callable[[int], Any]
    channels: int
    size: tuple[int, int]

    def read(self, rows: Sequence[int]) -> Tensor:
        """Images (B, C, H, W) uint8."""
        return torch.stack([to_pixels(self.open(r), self.channels, self.size) for r in rows])


def _streamed(name: str, read: Callable[[int], Any], count: int, like: Images) -> Images:

    reader = _Reader(read, like.channels, like.image_size)
    return StreamedSet(
        reader, torch.arange(count), like.channels, like.image_size, name=name, split="test"
    )
