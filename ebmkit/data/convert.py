"""Data sets from Python objects: tensors, arrays, and data sets of PyTorch and Hugging Face.

Images become uint8 (N, C, H, W), so floats in [0, 1] are rounded to multiples of 1/255. Every item
is read once: random transforms of the source are not drawn again in each epoch (augmentation is a
setting of the streams). Sources above `imagesets.MEMORY_LIMIT` decoded bytes are read on demand, by
index. Sources without random access, which give their items one after the other, are read into
memory first.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ebmkit.data import imagesets
from ebmkit.data.folders import to_image, to_pixels
from ebmkit.data.imagesets import AnyImages, ImageSet, Split, StreamedSet, warn_of_empty_classes
from ebmkit.errors import UserError, first_line, shown
from ebmkit.inputs import LEVELS, pil_array
from ebmkit.terminal import progress_bar

Column = str | int
"""Key of a column in the items of a data set: a name, or a position in a tuple."""

IMAGE_NAMES = ("image", "img", "images", "pixel_values")
LABEL_NAMES = ("label", "labels", "target", "class")
"""Names of columns with images and labels, if the types of the features do not tell."""

CHECKED = 8
"""Number of items that are read twice, to detect random transforms."""


class Columns(NamedTuple):
    """Columns of an item with image and label; None: the item itself is the image, or no label."""

    image: Column | None
    label: Column | None

    def of(self, item: Any) -> tuple[Any, Any]:
        """Image and label of ``item``."""
        image = item if self.image is None else item[self.image]
        return image, None if self.label is None else item[self.label]


class ItemReader:
    """Reads the images of a map-style data set by index.

    Args:
        source: object with ``len`` and items by index.
        what: name of the data set, for messages.
        columns: columns of the items.
        image_size: height and width that images are resized and cropped to; None: that of item 0.
    """

    def __init__(
        self, source: Any, what: str, columns: Columns, image_size: tuple[int, int] | None
    ) -> None:
        self.source, self.what, self.columns, self.resized = source, what, columns, image_size
        self.channels = 3
        self.size = image_size

    def item(self, row: int) -> tuple[Tensor, Any]:
        """Image (1 or 3, H, W) uint8 and label of one item."""
        what = f"item {row} of {self.what}"
        try:
            image, label = self.columns.of(self.source[row])
        except (OSError, RuntimeError, ValueError, TypeError, LookupError, SyntaxError) as error:
            raise UserError(f"{what} cannot be read: {first_line(error)}") from error
        return self.image(image, what), label

    def image(self, image: Any, what: str) -> Tensor:
        """Pixels (1 or 3, H, W) uint8 of ``image``, of the size of the first one."""
        pixels = image_pixels(image, what)
        if self.resized is not None and tuple(pixels.shape[1:]) != self.resized:
            pixels = to_pixels(to_image(pixels), len(pixels), self.resized)
        self.size = self.size or (pixels.shape[1], pixels.shape[2])
        if tuple(pixels.shape[1:]) != self.size:
            raise UserError(
                f"images of {self.what} differ in size ({what} is {pixels.shape[1]}x"
                f"{pixels.shape[2]}, item 0 {self.size[0]}x{self.size[1]}): choose one by "
                "image_size (--image-size)"
            )
        return pixels

    def read(self, rows: Sequence[int]) -> Tensor:
        """Images (B, C, H, W) uint8.

        Raises:
            UserError: if an item cannot be read, differs in size, or is in colour among gray ones.
        """
        pixels = [self.item(row)[0][None] for row in rows]
        return torch.cat([with_channels(own, self.channels, self.what) for own in pixels])


def convert(
    source: Any,
    name: str = "images",
    split: Split = "train",
    *,
    image: Column | None = None,
    label: Column | None = None,
    class_names: Sequence[str] = (),
    like: AnyImages | None = None,
    image_size: int | None = None,
    limit: int | None = None,
    progress: bool = False,
) -> AnyImages:
    """Convert ``source`` to an `ImageSet`, or above the memory limit to a `StreamedSet`.

    Args:
        source: an `ImageSet` or `StreamedSet`, returned unchanged; a pair (images, labels) of
            tensors or arrays, or images alone; a map-style data set of PyTorch, torchvision or
            Hugging Face, or any sequence of items; or an iterable of items. An item is an image,
            a tuple (image, label) or a mapping; an image is a PIL image, tensor or array, gray
            (H, W) or with 1 or 3 channels, first or last, as uint8, uint16 or floats in [0, 1].
        name, split: those of the result.
        image, label: columns of the items. Default: by the types of the features of Hugging Face
            (`Image`, `ClassLabel`), or by usual names; positions 0 and 1 of a tuple.
        class_names: one name per class, in label order. Default: the names that the source states;
            the sorted names if labels are text; or the label numbers.
        like: training set, for validation or test images: its classes and channels apply.
        image_size: height and width that images are resized and cropped to.
        limit: maximum number of items that are read from an iterable.
        progress: show a progress bar.

    Raises:
        UserError: if there are no images, they differ in size, are not in [0, 1], a label is
            missing or out of range, a column is unknown, or an item cannot be read.
    """
    if isinstance(source, (ImageSet, StreamedSet)):
        return source
    if isinstance(source, DataLoader):
        raise UserError("a DataLoader is no data set: give the data set in it, loader.dataset")
    if isinstance(source, Mapping):
        splits = ", ".join(map(repr, source))
        raise UserError(f"{shown(type(source).__name__)} has several splits: give one of {splits}")
    what = f"data set {name!r}"
    size = None if image_size is None else (image_size, image_size)
    stated = tuple(class_names) or _class_names(source)
    given = stated or ((like.class_names if like.num_classes else ()) if like else ())
    if (arrays := _arrays(source)) is not None:
        levels, labels = _batch_pixels(arrays[0], what), arrays[1]
        if size is not None and tuple(levels.shape[2:]) != size:
            levels = torch.stack([to_pixels(to_image(x), len(x), size) for x in levels])
        numbers, names = number_labels(labels, len(levels), given, what)
        return _checked(ImageSet(levels, numbers, names, name, split), like)
    stream = isinstance(source, IterableDataset) or not hasattr(source, "__getitem__")
    if not hasattr(source, "__iter__" if stream else "__len__"):
        raise UserError(
            f"{shown(source)} is no data set: give a data set of PyTorch, torchvision or Hugging "
            "Face, a pair (images, labels), a folder, or a name from `ebmkit list datasets`"
        )
    items: Iterator[Any] = iter(())
    if stream:
        items = iter(source)
        first = next(items, None)
        items = itertools.chain([] if first is None else [first], items)
    else:
        first = source[0] if len(source) else None
    if first is None:
        raise UserError(f"{what} has no images: give at least 2, one of them to validate on")
    reader = ItemReader(source, what, find_columns(source, first, image, label, what), size)
    found: AnyImages
    if stream:
        found = _in_memory(_streamed_items(reader, items, limit, what), name, split, given, what)
    else:
        count, (pixels, _) = len(source), reader.item(0)
        if count * pixels.numel() > imagesets.MEMORY_LIMIT:
            found = _on_demand(reader, count, name, split, given, progress)
        else:
            _warn_if_random(reader, count)
            rows = progress_bar(range(count), f"reading {what}", progress)
            found = _in_memory(map(reader.item, rows), name, split, given, what)
    return _checked(found, like)


def _arrays(source: Any) -> tuple[Any, Any] | None:
    """Images and labels of a pair of arrays, or of images alone; None for another source."""
    if isinstance(source, (Tensor, np.ndarray)):
        return source, None
    if not isinstance(source, (tuple, list)) or len(source) != 2:
        return None
    images, labels = source
    if not isinstance(images, (Tensor, np.ndarray)) or images.ndim < 3:
        return None
    return None if getattr(labels, "ndim", 1) >= 3 else (images, labels)


def _in_memory(
    items: Iterable[tuple[Tensor, Any]],
    name: str,
    split: Split,
    class_names: tuple[str, ...],
    what: str,
) -> ImageSet:
    pixels, labels = zip(*items, strict=True)
    channels = max(map(len, pixels))  # gray images among colour ones are repeated
    if min(map(len, pixels)) < channels and not any((x != x[:1]).any() for x in pixels):
        channels = 1  # some are stored in colour, and none has any
    images = torch.stack([x[:channels].expand(channels, -1, -1) for x in pixels])
    return ImageSet(images, *number_labels(labels, len(images), class_names, what), name, split)


def _streamed_items(
    reader: ItemReader, items: Iterable[Any], limit: int | None, what: str
) -> Iterator[tuple[Tensor, Any]]:
    """Images and labels of the first ``limit`` ``items``; refuses more than the memory limit."""
    size = 0
    for row, item in enumerate(itertools.islice(items, limit)):
        image, label = reader.columns.of(item)
        pixels = reader.image(image, f"item {row} of {what}")
        size += pixels.numel()
        if size > imagesets.MEMORY_LIMIT:
            raise UserError(
                f"{what} gives its items one after the other, and they are read into memory: more "
                f"than {row:,} do not fit in {imagesets.MEMORY_LIMIT // 2**20} MiB; set limit "
                f"to at most {row:,}, or give a data set with items by index"
            )
        yield pixels, label


def _on_demand(
    reader: ItemReader,
    count: int,
    name: str,
    split: Split,
    class_names: tuple[str, ...],
    progress: bool,
) -> StreamedSet:
    """A set that reads images by index; channels are those of a sample of 100."""
    label, source, what = reader.columns.label, reader.source, reader.what
    reader.channels = max(len(reader.item(r)[0]) for r in range(0, count, max(1, count // 100)))
    labels: Any = None
    if label is not None:
        if hasattr(source, "column_names"):  # Hugging Face: without decoding images
            labels = list(source[label])
        elif hasattr(source, "targets") and getattr(source, "target_transform", 1) is None:
            labels = source.targets  # torchvision
        else:
            rows = progress_bar(range(count), f"reading the labels of {what}", progress)
            labels = [reader.columns.of(source[row])[1] for row in rows]
    assert reader.size is not None
    numbers, names = number_labels(labels, count, class_names, what)
    rows = torch.arange(count)
    return StreamedSet(reader, rows, reader.channels, reader.size, numbers, names, name, split)


def _warn_if_random(reader: ItemReader, count: int) -> None:
    """Warn if an item is not the same when it is read again."""
    for row in range(min(CHECKED, count)):
        if not torch.equal(reader.item(row)[0], reader.item(row)[0]):
            warnings.warn(
                f"item {row} of {reader.what} differs each time it is read (a random transform?): "
                "it is read once, and the same image is used in every epoch; leave augmentation to "
                "streams.classify.augmentation and streams.denoise.augmentation",
                stacklevel=4,
            )
            return


def _checked(images: AnyImages, like: AnyImages | None) -> AnyImages:
    """``images`` with the classes and channels of ``like``; warns of classes without images."""
    if like is None:
        if images.labels is not None and len(images):
            warn_of_empty_classes(images.labels, images.class_names, f"data set {images.name!r}")
        return images
    what = f"the {images.split} images"
    if like.labels is not None and images.labels is None:
        raise UserError(f"{what} have no labels, and the training images have: give labels too")
    if like.labels is None:
        images = replace(images, labels=None, class_names=())
    elif images.class_names != like.class_names:
        images = _numbered_like(images, like.class_names, what)
    if isinstance(images, ImageSet) and images.channels != like.channels:
        images = replace(images, images=with_channels(images.images, like.channels, what))
    return images


def _numbered_like(images: AnyImages, names: tuple[str, ...], what: str) -> AnyImages:
    """``images`` with labels numbered as in ``names``; unchanged numbers without a common name.

    Raises:
        UserError: if only some of the classes that have images are in ``names``.
    """
    own, labels = images.class_names, images.labels
    assert labels is not None
    if not {*own} & {*names}:
        return replace(images, class_names=names)
    unknown = [own[label] for label in sorted(set(labels.tolist())) if own[label] not in names]
    if unknown:
        raise UserError(
            f"{what} have the class {shown(unknown[0], 60)}, and the training images only "
            f"{shown(list(names))}: give both the same classes"
        )
    numbers = torch.tensor([names.index(name) if name in names else 0 for name in own])
    return replace(images, labels=numbers[labels], class_names=names)


def find_columns(
    source: Any, item: Any, image: Column | None, label: Column | None, what: str
) -> Columns:
    """The columns of ``item``, the first of ``source``, with image and label.

    Raises:
        UserError: if a given column does not exist, or no or several columns fit.
    """
    known: list[Column]
    if isinstance(item, Mapping):
        known = list(item)
    elif isinstance(item, (tuple, list)) and not isinstance(item, str):
        known = list(range(len(item)))
    elif image is None and label is None:
        return Columns(None, None)
    else:
        raise UserError(f"items of {what} have no columns: leave out image and label")
    columns = f"the columns are {', '.join(map(str, known))}"
    for given in (image, label):
        if given is not None and given not in known:
            raise UserError(f"{what} has no column {given!r}: {columns}")
    if isinstance(item, (tuple, list)):
        if len(known) > 2 and None in (image, label):
            raise UserError(f"items of {what} are tuples of {len(known)}: set image and label")
        return Columns(image or 0, (1 if len(known) == 2 else None) if label is None else label)
    features = getattr(source, "features", None) or {}
    kinds = {name: getattr(own, "_type", type(own).__name__) for name, own in features.items()}

    def fitting(kind: str, holds: Callable[[Any], bool], names: Sequence[str]) -> list[Column]:
        return (
            [name for name in known if kinds.get(name) == kind]  # type: ignore[call-overload]
            or [name for name in known if holds(item[name])]
            or [name for name in known if name in names]
        )

    images = fitting("Image", lambda own: isinstance(own, Image.Image), IMAGE_NAMES)
    labels = fitting("ClassLabel", lambda own: False, LABEL_NAMES)
    if image is None and len(images) != 1:
        raise UserError(f"{what} has {len(images)} columns of images: set image; {columns}")
    if label is None and len(labels) > 1:
        names = " and ".join(map(str, labels))
        raise UserError(f"{what} has several columns of labels, {names}: set label to one of them")
    return Columns(images[0] if image is None else image, label or next(iter(labels), None))


def _class_names(source: Any) -> tuple[str, ...]:
    """Class names that ``source`` states: of a `ClassLabel`, or torchvision's ``classes``."""
    while hasattr(source, "dataset") and hasattr(source, "indices"):  # torch.utils.data.Subset
        source = source.dataset
    features = (getattr(source, "features", None) or {}).values()
    named = [own.names for own in features if hasattr(own, "names")]
    found = named[0] if len(named) == 1 else getattr(source, "classes", ())
    return tuple(map(str, found or ()))


def number_labels(
    labels: Any, count: int, class_names: Sequence[str], what: str
) -> tuple[Tensor | None, tuple[str, ...]]:
    """Labels as (N,) int64, and the class names; both empty if ``labels`` are None.

    Args:
        labels: N integers, or N class names; None, or N times None, without labels.
        count: N.
        class_names: known names; empty: text labels are numbered in sorted order.
        what: name of the data set, for messages.

    Raises:
        UserError: if there are not N labels, or one is neither a whole number nor a known name.
    """
    if labels is None:
        return None, ()
    if isinstance(labels, (Tensor, np.ndarray)):
        labels = labels.reshape(-1).tolist() if len(labels) == _total(labels) else list(labels)
    values = [x.item() if _total(x) == 1 and hasattr(x, "item") else x for x in labels]
    if len(values) != count:
        raise UserError(f"{what} has {count} images and {len(values)} labels: give one for each")
    if all(value is None for value in values):
        return None, ()
    names = tuple(map(str, class_names))
    if all(isinstance(value, str) for value in values):
        names = names or tuple(sorted(set(values)))
        numbers = {name: number for number, name in enumerate(names)}
        unknown = next((value for value in values if value not in numbers), None)
        if unknown is not None:
            raise UserError(f"{what}: label {unknown!r} is none of the classes {', '.join(names)}")
        return torch.tensor([numbers[value] for value in values]), names
    odd = next((row for row, value in enumerate(values) if not isinstance(value, int)), None)
    if odd is not None:
        raise UserError(
            f"{what}: label {shown(values[odd], 60)} of item {odd} is no whole number: labels are "
            "numbers from 0, or names for all items"
        )
    return torch.tensor(values, dtype=torch.int64), names


def _total(values: Any) -> int:
    """Number of entries of a tensor or array; 1 of another value."""
    found = getattr(values, "shape", ())
    return int(np.prod(found))


# --- pixels --------------------------------------------------------------------------------------


def image_pixels(image: Any, what: str) -> Tensor:
    """Pixels (1 or 3, H, W) uint8 of a PIL image, tensor or array.

    Raises:
        UserError: if it is none of these, has another shape or number of channels, is partly
            transparent, or its values are not uint8, uint16, bool, or floats in [0, 1].
    """
    if isinstance(image, Image.Image):
        image = pil_array(image, what)
    if not isinstance(image, (Tensor, np.ndarray)):
        raise UserError(f"{what} is a {type(image).__name__}: give a PIL image, tensor or array")
    if image.ndim not in (2, 3):
        raise UserError(f"{what} has shape {tuple(image.shape)}: images are (C, H, W) or (H, W, C)")
    return _batch_pixels(image[None], what)[0]


def _batch_pixels(images: Any, what: str) -> Tensor:
    """Pixels (N, 1 or 3, H, W) uint8 of tensors or arrays (N, H, W), with channels or without."""
    last = isinstance(images, np.ndarray)  # arrays have them last, if both are possible
    values = torch.as_tensor(images).as_subclass(Tensor).detach().cpu()
    shape, channels = tuple(values.shape), (1, 3)
    if len(values) == 0:
        raise UserError(f"{what} has no images: give at least 2, one of them to validate on")
    if values.ndim == 3:
        values = values[:, None]
    elif values.ndim == 4 and shape[3] in channels and (last or shape[1] not in channels):
        values = rearrange(values, "n h w c -> n c h w")
    if values.ndim != 4 or values.shape[1] not in channels:
        raise UserError(
            f"{what}: an image of shape {shape[1:]} has no 1 or 3 channels: images are (H, W), "
            "(C, H, W) or (H, W, C)"
        )
    if values.dtype == torch.uint8:
        return values.contiguous()
    if values.dtype in LEVELS:
        values = values.float() / LEVELS[values.dtype]
    if not values.is_floating_point():
        raise UserError(
            f"{what}: values are {str(values.dtype).removeprefix('torch.')}: convert images to "
            "uint8 (0..255), uint16, or floats in [0, 1]"
        )
    low, high = values.aminmax()
    if not (low >= 0 and high <= 1):
        raise UserError(
            f"{what}: values from {float(low):.3g} to {float(high):.3g}: images are floats in "
            "[0, 1] or uint8 in 0..255; leave out the normalisation, or divide by 255"
        )
    return (255 * values.float()).round().to(torch.uint8).contiguous()


def with_channels(images: Tensor, channels: Literal[1, 3] | int, what: str) -> Tensor:
    """Images (N, C, H, W) with ``channels``: gray ones are repeated.

    Raises:
        UserError: if they are in colour, and ``channels`` is 1.
    """
    if images.shape[1] > channels and (images != images[:, :1]).any():
        raise UserError(f"{what}: an image is in colour among gray images: convert it to gray")
    return images[:, :channels].expand(-1, channels, -1, -1).contiguous()
