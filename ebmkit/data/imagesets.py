"""Image sets with one interface: in memory (`ImageSet`) or read on demand (`StreamedSet`).

Images are uint8 (N, C, H, W), labels int64 (N,). Models get float32 images in [0, 1]; any further
normalisation is part of the model.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, Self, TypeVar, get_args

import torch
from torch import Tensor

from ebmkit.data.augment import Cut
from ebmkit.errors import UserError, shown
from ebmkit.randomness import keyed_generator, seeded_generator
from ebmkit.terminal import progress_bar

T = TypeVar("T")
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

MEMORY_LIMIT = 2**30
"""Bytes of decoded images above which a set is streamed from disk instead of held in memory."""

MAX_CONSECUTIVE_SKIPS = 100
"""Maximum number of consecutive skipped images."""

HINT = " (dataset.unreadable=skip skips such images)"
"""End of the error message for an unreadable image."""

SHOWN = 3
"""Number of reasons for skipped images in one message."""


class FaultPolicy(NamedTuple):
    """Handling of unreadable images and links in a folder.

    Attributes:
        skip: skip unreadable images with a warning instead of raising an error.
        follow: follow links that lead out of the folder.
    """

    skip: bool = False
    follow: bool = False


class DatasetRequest(NamedTuple):
    """Arguments of a data set loader; `ebmkit.data.load_dataset` describes them."""

    name: str
    split: Split = "train"
    data_dir: Path | None = None
    image_size: int | None = None
    download: bool = True
    progress: bool = True
    faults: FaultPolicy = FaultPolicy()
    hold_out: bool = True

    def path(self, content: str) -> Path:
        """The folder or file given by ``--data-dir``.

        Raises:
            UserError: if none is given; ``content`` describes what is needed, for the message.
        """
        if self.data_dir is None:
            raise UserError(f"data set {self.name!r} needs {content}: name it by --data-dir")
        return self.data_dir

    def check_size(self, side: int) -> None:
        """Check that the requested image size, if any, is ``side``.

        Raises:
            UserError: if it differs.
        """
        if self.image_size not in (None, side):
            raise UserError(
                f"data set {self.name!r} has images of {side}x{side}, not {self.image_size}: "
                "remove the image size"
            )


class RowReader(Protocol):
    """Reads images of a data set on disk by row; raises `UserError` for an unreadable image.

    A reader can be pickled; it opens files in the process that reads.
    """

    def read(self, rows: Sequence[int]) -> Tensor:
        """Images (B, C, H, W) uint8."""
        ...


class CropReader(RowReader, Protocol):
    """Reads whole images, which may differ in size, or crops of them."""

    side: int
    """Shorter side, pixels, that images are resized to before a crop without resizing."""

    def read(self, rows: Sequence[int], cut: Cut | None = None) -> Tensor:
        """Images (B, C, H, W) uint8, or one crop of each, (B, C, *cut.size)."""
        ...


class _ImageSetBase(ABC):
    """Base class of `ImageSet` and `StreamedSet`."""

    name: str
    labels: Tensor | None
    class_names: tuple[str, ...]
    rows: Tensor | None

    one_size: bool = True
    skip: bool = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read_exactly(self, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]: ...

    def __repr__(self: Any) -> str:
        height, width = self.image_size
        classes = f", {self.num_classes} classes" if self.num_classes else ", no labels"
        return (
            f"{type(self).__name__}({self.name!r}, {self.split!r}: {len(self):,} images of "
            f"{self.channels}x{height}x{width}{classes})"
        )

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        return len(self.class_names) if self.labels is not None else 0

    def select(self, chosen: Tensor | slice) -> Self:
        """Subset of the images at indices ``chosen``, in that order."""
        columns = {name: getattr(self, name, None) for name in ("images", "rows", "labels")}
        own = {name: column[chosen] for name, column in columns.items() if column is not None}
        return replace(self, **own)  # type: ignore[type-var]

    def first(self, n: int) -> Self:
        """The first ``n`` images, or all if there are fewer."""
        return self.select(slice(n))

    def spread(self, n: int) -> Self:
        """At most ``n`` images, evenly spaced through the set, which may be sorted by class."""
        return self if len(self) <= n else self.select(torch.arange(n) * len(self) // n)

    def sample(self, n: int, seed: int) -> Self:
        """At most ``n`` random images, drawn by ``seed``, with numbers per class that differ by at
        most one while every class has images left. Those of a smaller n are the first of a larger.
        """
        order = torch.randperm(len(self), generator=keyed_generator("cpu", seed, "sample"))
        if self.labels is not None:  # the first of every class, then the second of every class, ...
            labels = self.labels.cpu()[order]
            counts = labels.bincount()
            ranks = torch.cat([torch.arange(int(count)) for count in counts])
            place = torch.empty_like(order)
            place[labels.argsort(stable=True)] = ranks
            order = order[place.argsort(stable=True)]
        return self.select(order[:n])

    def with_classes(self, names: Sequence[str]) -> Self:
        """The same images, with labels numbered as a model does whose classes are ``names``.

        Unchanged if no class of the set is in ``names``, or either has none. If only some of the
        classes are, the set has no labels, with a warning: numbers would compare other classes.
        """
        own = self.class_names
        if self.labels is None or own == tuple(names) or not {*own} & {*names}:
            return self
        unknown = [name for name in own if name not in names]
        if unknown:
            warnings.warn(
                f"the model has no class {unknown[0]!r} of data set {self.name!r}: the images are "
                f"used without labels; its classes are {shown(list(names))}",
                stacklevel=3,
            )
            return replace(self, labels=None, class_names=())  # type: ignore[type-var]
        numbers = torch.tensor([names.index(name) for name in own], device=self.labels.device)
        labels = numbers[self.labels]
        return replace(self, labels=labels, class_names=tuple(names))  # type: ignore[type-var]

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield batches of ``size`` in order: images (B, C, H, W) in [0, 1], labels (B,) or None.

        With ``skip``, unreadable images are missing, so their batch is smaller.

        Raises:
            UserError: if an image cannot be read and ``skip`` is not set.
        """
        size = size if self.one_size else 1
        for start in range(0, len(self), size):
            numbers: Sequence[int] = range(start, min(start + size, len(self)))
            try:
                images, labels = self.read_exactly(numbers)
            except UserError:
                if not self.skip:
                    raise
                numbers, _ = readable(numbers, lambda number: self.read_exactly([number]))
                if not numbers:
                    continue
                images, labels = self.read_exactly(numbers)
            yield to_floats(images), labels

    def _check_labels(self, what: str) -> None:
        """Check that labels are (N,) int64 in 0 .. K - 1; set default class names."""
        labels = self.labels
        if labels is None:
            return
        if labels.shape != (len(self),) or labels.dtype != torch.int64:
            raise UserError(
                f"{what}: {len(self)} images need labels of shape ({len(self)},) and type int64, "
                f"not {tuple(labels.shape)} {labels.dtype}"
            )
        if not self.class_names and len(labels):
            names = tuple(str(label) for label in range(1 + int(labels.max())))
            object.__setattr__(self, "class_names", names)
            warn_of_empty_classes(labels, names, what)
        check_range(labels, self.num_classes, what)


@dataclass(frozen=True, eq=False, repr=False)
class ImageSet(_ImageSetBase):
    """Images in memory on one device: a loaded data set, or your own tensors.

    A set made in Python works wherever a data set is expected (`ebmkit.training.Trainer`,
    `ebmkit.data.Stream`, `ebmkit.evaluation.evaluate`):

    >>> photographs = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8)
    >>> train = ImageSet(photographs, torch.arange(20) % 2, ("cat", "dog"), name="pets")
    >>> len(train), train.channels, train.image_size, train.num_classes
    (20, 3, (32, 32), 2)

    To train on it by name, add a `DatasetEntry` to `ebmkit.data.DATASETS`. For images on disk that
    are read on demand, use `StreamedSet`.

    Attributes:
        images: (N, C, H, W) uint8, C = 1 or 3; convert floats x in [0, 1] by
            ``(255 * x).round().to(torch.uint8)``.
        labels: (N,) int64, 0 .. K - 1, or None for a set without labels.
        class_names: one name per class; default: the label numbers; empty without labels.
        name: name of the data set.
        split: "train", "validation" or "test".
        reader: reader of the images, if they come from a file or folder.
        rows: (N,) int64, row of each image in the reader.
        excluded: error messages of the unreadable images that were excluded on loading.

    Raises:
        UserError: if the images are not uint8 (N, C, H, W), or a label is out of range.
    """

    images: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    name: str = "images"
    split: Split = "train"
    reader: RowReader | None = field(default=None, repr=False)
    rows: Tensor | None = field(default=None, repr=False)
    excluded: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        what = f"data set {self.name!r}"
        if self.images.ndim != 4 or self.images.shape[1] not in (1, 3):
            raise UserError(
                f"{what}: images must be (N, C, H, W) with 1 or 3 channels, not "
                f"{tuple(self.images.shape)}"
            )
        if self.images.dtype != torch.uint8:
            raise UserError(f"{what}: images must be uint8 (0..255), not {self.images.dtype}")
        self._check_labels(what)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def channels(self) -> int:
        """1 gray, 3 colour."""
        return self.images.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width, pixels."""
        return self.images.shape[2], self.images.shape[3]

    def to(self, device: torch.device | str) -> ImageSet:
        """Move images and labels to ``device``; returns a new set."""
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, images=self.images.to(device), labels=labels)

    def read(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (B, C, H, W) uint8 at ``indices``, and their labels (B,) or None."""
        rows = torch.as_tensor(indices)
        return self.images[rows], None if self.labels is None else self.labels[rows]

    read_exactly = read

    def floats(self, rows: Tensor | Sequence[int] | slice = slice(None)) -> Tensor:
        """Images at ``rows`` as float32 (B, C, H, W) in [0, 1]."""
        return to_floats(self.images[rows])


@dataclass(frozen=True, eq=False, repr=False)
class StreamedSet(_ImageSetBase):
    """Images on disk, read on demand, with the interface of `ImageSet`.

    Attributes:
        reader: reads images by row.
        rows: (N,) int64, row of each image in the reader.
        channels: 1 gray, 3 colour.
        image_size: height and width, pixels; the maxima if sizes differ.
        labels, class_names, name, split, excluded: as in `ImageSet`.
        crops: reads crops of the whole images (``reader`` returns their centre); None: crops are
            taken from the images of ``reader``.
        one_size: whether all images have ``image_size``; if not, batches hold one image.
        skip: replace an unreadable image by the next readable one.
        skipped: index -> error message of the images skipped so far in this process.

    Raises:
        UserError: if a label is out of range.
    """

    reader: RowReader
    rows: Tensor
    channels: int
    image_size: tuple[int, int]
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    name: str = "images"
    split: Split = "train"
    crops: CropReader | None = None
    one_size: bool = True
    skip: bool = False
    skipped: dict[int, str] = field(default_factory=dict, repr=False)
    excluded: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_labels(f"data set {self.name!r}")

    def __len__(self) -> int:
        return len(self.rows)

    def loaded(self, images: Tensor) -> ImageSet:
        """Convert to an `ImageSet` with the given ``images`` (N, C, H, W)."""
        shared = ("labels", "class_names", "name", "split", "reader", "rows", "excluded")
        return ImageSet(images, **{name: getattr(self, name) for name in shared})

    def read(self, indices: Sequence[int], cut: Cut | None = None) -> tuple[Tensor, Tensor | None]:
        """Images (B, C, H, W) uint8 and their labels (B,) or None.

        Args:
            indices: indices of the images.
            cut: crops of the whole images to return instead.

        Raises:
            UserError: if an image cannot be read and ``skip`` is not set, or
                `MAX_CONSECUTIVE_SKIPS` images in a row cannot be read.
        """
        if not self.skip:
            return self.read_exactly(indices, cut)
        with contextlib.suppress(UserError):
            return self.read_exactly(indices, cut)
        single = [None if cut is None else cut.of(i) for i in range(len(indices))]
        read = [self._next_readable(n, own) for n, own in zip(indices, single, strict=True)]
        images = torch.cat([image for image, _ in read])
        return images, None if self.labels is None else torch.cat([label for _, label in read])

    def _next_readable(self, number: int, cut: Cut | None) -> tuple[Tensor, Tensor]:
        """Image ``number`` (1, C, H, W) and its label, or those of the next readable image."""
        for ahead in range(MAX_CONSECUTIVE_SKIPS):
            chosen = (int(number) + ahead) % len(self)
            try:
                image, label = self.read_exactly([chosen], cut)
            except UserError as error:
                self.skipped[chosen] = last = str(error).removesuffix(HINT)
            else:
                return image, torch.zeros(0) if label is None else label
        raise UserError(f"{MAX_CONSECUTIVE_SKIPS} images in a row cannot be read: {last}")

    def read_exactly(
        self, indices: Sequence[int], cut: Cut | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """As `read`, but raises an error for an unreadable image even if ``skip`` is set."""
        chosen = torch.as_tensor(indices)
        labels = None if self.labels is None else self.labels[chosen]
        rows = self.rows[chosen].tolist()
        if cut is None:
            return self.reader.read(rows), labels
        assert self.crops is not None
        return self.crops.read(rows, cut), labels

    def readable(self, what: str = "", progress: bool = False, warn: bool = False) -> StreamedSet:
        """Read every image and return the subset of the readable ones, with ``skip`` off.

        Args:
            what: name of the images in the progress bar and in messages; default: the set's name.
            progress: show a progress bar.
            warn: warn about skipped images.

        Raises:
            UserError: if no image can be read.
        """
        what = what or repr(self.name)
        numbers = progress_bar(range(len(self)), f"looking through {what}", progress)
        found, reasons = readable(numbers, lambda number: self.read_exactly([number]), what, warn)
        whole = self.select(torch.as_tensor(found))
        return replace(whole, skip=False, excluded=(*self.excluded, *reasons))


AnyImages = ImageSet | StreamedSet
"""Images of one split, in memory or on disk."""


def check_range(labels: Tensor, classes: int, what: str) -> None:
    """Check that ``labels`` (N,) are in 0 .. ``classes`` - 1.

    Raises:
        UserError: if one is not; the message starts with ``what`` and states the first such label.
    """
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        raise UserError(
            f"{what}: label {int(outside[0])} is out of range: labels are 0 to {classes - 1}"
        )


def warn_of_empty_classes(labels: Tensor, names: Sequence[str], what: str) -> None:
    """Warn about classes without an image, such as class 0 of labels that start at 1."""
    if len(labels) == 0 or labels.min() < 0:  # refused elsewhere
        return
    counts = labels.cpu().bincount(minlength=len(names))
    empty = [name for name, count in zip(names, counts.tolist(), strict=False) if not count]
    if not empty:
        return
    ask = "take out what is no class"
    if not counts[0] and counts[1:].all():
        ask = f"if its labels 1 to {len(names) - 1} are all, subtract 1 from each"
    more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
    warnings.warn(f"{what} has no image of class {empty[0]!r}{more}: {ask}", stacklevel=4)


def to_floats(images: Tensor) -> Tensor:
    """Convert uint8 images to float32 in [0, 1]."""
    return images.to(torch.float32) / 255


def readable(
    items: Iterable[T], read: Callable[[T], object], what: str = "", warn: bool = True
) -> tuple[list[T], list[str]]:
    """Items for which ``read`` raises no `UserError`, and the error messages of the others.

    With ``what``, a name for messages: warns about unreadable items, and raises `UserError` if
    every item is unreadable.
    """
    found, reasons = [], []
    for item in items:
        try:
            read(item)
        except UserError as error:
            reasons.append(str(error).removesuffix(HINT))
        else:
            found.append(item)
    count = len(found) + len(reasons)
    if what and reasons and not found:
        raise UserError(f"none of {count} images of {what} can be read: {reasons[0]}")
    if what and reasons and warn:
        warnings.warn(
            f"{len(reasons)} of {count} images of {what} cannot be read and are skipped: "
            f"{summarize_reasons(reasons)}",
            stacklevel=4,
        )
    return found, reasons


def summarize_reasons(reasons: Sequence[str]) -> str:
    """The first `SHOWN` of the ``reasons``, and the number of the others."""
    more = f"; and {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else ""
    return f"{'; '.join(reasons[:SHOWN])}{more}"


def split_rows(request: DatasetRequest, count: int, what: str) -> Tensor:
    """Row indices of the requested split among ``count`` test images or training images.

    2 % of the training images, at least 1 and at most 1000, are held out for validation, or none if
    the request says so. Both parts are in a fixed shuffled order, so the first images are a random
    sample even if the set is sorted by class. Test images keep their order.

    Raises:
        UserError: if ``what`` has too few training images: fewer than 2, or none.
    """
    if request.split == "test":
        return torch.arange(count)
    if count < 1 + request.hold_out:
        needed = "2 are needed, one of them to validate on" if request.hold_out else "1 is needed"
        raise UserError(f"{what} has {count} training images: at least {needed}")
    held = min(1000, max(1, round(0.02 * count))) if request.hold_out else 0
    order = shuffled(count)
    return order[:held] if request.split == "validation" else order[held:]


def shuffled(count: int) -> Tensor:
    """A fixed random permutation of 0 .. count - 1, (count,) int64."""
    return torch.randperm(count, generator=seeded_generator(20410))


def fingerprint(images: Any) -> str:
    """Eight hexadecimal digits that identify a set: a hash of its size, labels and first 16 images.

    Args:
        images: `ImageSet`, `StreamedSet`, or another object with their interface.
    """
    digest = hashlib.sha256(f"{len(images)} {images.channels} {images.image_size}".encode())
    if images.labels is not None:
        digest.update(images.labels.cpu().numpy().tobytes())
    for x, _ in images.first(16).batches(16):
        digest.update((255 * x).round().byte().cpu().numpy().tobytes())
    return digest.hexdigest()[:8]


def origin(images: AnyImages, number: int) -> dict[str, Any]:
    """Origin of image ``number``: its index ``image`` and, if known, ``row`` of the reader and
    ``file`` relative to the folder."""
    found: dict[str, Any] = {"image": number}
    if images.rows is not None:
        found["row"] = row = int(images.rows[number])
        name = getattr(images.reader, "name", None)  # of a `FolderReader`
        if name is not None:
            found["file"] = name(row)
    return found
