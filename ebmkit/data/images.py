"""Read image files (PNG, JPEG, TIFF) as tensors in [0, 1], and write them.

Reading applies the EXIF orientation, converts palettes to colours and keeps 16 bits of gray images.
Ambiguous files (transparent, animated, with several pages) are refused with advice. Size and type
are checked in the header, before pixels are decoded.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ebmkit.errors import UserError, first_line
from ebmkit.inputs import ORIENTATION, SIXTEEN_BIT, DecodedImage, upright_image
from ebmkit.storage import write_atomically

MAX_PIXELS = 170_000_000
"""Maximum number of pixels of an image; larger ones are refused as decompression bombs."""

MAX_PIXELS_IN_SET = 89_000_000
"""Maximum for images of a data set, which many processes read; also Pillow's warning limit."""

MAX_SCANS = 200
"""Maximum number of scans of a progressive JPEG; encoders write about 10."""

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "PPM")
WRITERS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF"}
_GRAY = ("1", "L", "LA", "I", "F", *SIXTEEN_BIT)

# Exceptions of Pillow's decoders on damaged or malicious files.
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    MemoryError,
    struct.error,
)


class LoadedImage(NamedTuple):
    """Result of `read_image`.

    Attributes:
        image: (C, H, W) float32 in [0, 1], C = 1 or 3.
        bits: bits per channel in the file, 8 or 16; an argument of `write_image`.
        mode: Pillow mode of the file, such as "L", "RGB", "P", "I;16".
    """

    image: Tensor
    bits: int
    mode: str

    @property
    def was_gray(self) -> bool:
        """Whether the file is gray, even if ``image`` has three channels."""
        return self.mode in _GRAY


def read_image(path: Path | str, channels: int | None = None) -> LoadedImage:
    """Read an image.

    Args:
        path: PNG, JPEG or TIFF file (BMP, WebP, still GIF and PNM work too).
        channels: input channels of the model. 3: a gray image is repeated. 1: a colour image is
            refused unless its three channels are equal. None: as in the file.

    Raises:
        UserError: if the file is missing, empty, not an image, damaged, larger than `MAX_PIXELS`,
            animated, transparent, has more than 16 bits, or is in colour with ``channels`` 1.
    """
    path = Path(path)
    opened = open_image(path)
    for note in opened.notes:
        warnings.warn(note, stacklevel=2)
    pixels = np.asarray(opened.image)
    bits, top = (16, 65535) if opened.is_16_bit else (8, 255)
    pixels = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, 2, 0)
    levels = pixels.astype(np.float32, order="C")
    levels /= top  # in place: a large image takes gigabytes
    image = torch.from_numpy(levels)
    if channels == 1 and len(image) == 3 and bool((image == image[:1]).all()):
        image = image[:1]
    elif channels == 3:
        image = image.expand(3, -1, -1).contiguous()
    if channels not in (None, len(image)):
        raise UserError(
            f"{str(path)!r} is in colour and the model takes {channels} channel: convert it to gray"
        )
    return LoadedImage(image, bits, opened.mode)


def write_image(image: Tensor, path: Path | str, overwrite: bool = False, bits: int = 8) -> None:
    """Write an image atomically.

    Args:
        image: (C, H, W), C = 1 or 3; clipped to [0, 1].
        path: output file; the suffix selects PNG, JPEG (quality 95) or TIFF.
        overwrite: replace an existing file.
        bits: bits per channel, 8 or 16; 16 only applies to gray PNG and TIFF.

    Raises:
        UserError: if the file exists, the suffix is unknown, a pixel is NaN or Inf, or the file
            cannot be written.
    """
    path = Path(path)
    kind = WRITERS.get(path.suffix.lower())
    if kind is None:
        raise UserError(
            f"cannot write {str(path)!r}: the name must end in one of {', '.join(WRITERS)}"
        )
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise UserError(f"an image is (1 or 3, H, W), not {tuple(image.shape)}")
    if path.exists() and not overwrite:
        raise UserError(f"{str(path)!r} exists: move it away, or choose another name")
    if not bool(image.isfinite().all()):
        raise UserError(f"cannot write {str(path)!r}: the image has NaN or Inf pixels")
    levels = rearrange(image.detach().cpu().double().clamp(0, 1), "c h w -> h w c").numpy()
    levels = levels[:, :, 0] if image.shape[0] == 1 else levels
    deep = bits == 16 and levels.ndim == 2 and kind != "JPEG"
    pixels = np.round(levels * (65535 if deep else 255)).astype(np.uint16 if deep else np.uint8)
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    buffer = io.BytesIO()
    try:
        Image.fromarray(pixels).save(buffer, kind, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {str(path)!r} as {kind}: {error}") from None
    write_atomically(path, buffer.getvalue())


def open_image(path: Path, most: int = MAX_PIXELS) -> DecodedImage:
    """Open, check and decode an image of at most ``most`` pixels; raises as `read_image`."""
    with _opened(path, most) as image:
        _check_header(image, path)
        return _decoded(image, path)


def image_header(path: Path, most: int = MAX_PIXELS_IN_SET) -> tuple[int, tuple[int, int]]:
    """Channels (1 or 3) and (height, width) of an image of at most ``most`` pixels.

    Reads only the header; raises as `read_image` for errors that the header shows.
    """
    with _opened(path, most) as image:
        turned = image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
        size = image.size if turned else image.size[::-1]
        return 1 if image.mode in _GRAY else 3, size


def is_coloured(image: Image.Image) -> bool:
    """Whether the channels of a decoded image differ at some pixel."""
    pixels = np.asarray(image)
    return image.mode == "RGB" and bool((pixels != pixels[..., :1]).any())


@contextlib.contextmanager
def _opened(path: Path, most: int) -> Iterator[Image.Image]:
    """Open a file of at most ``most`` pixels with Pillow; translates errors to `UserError`."""
    _check_file(path)
    large = f"{str(path)!r} has more than {most // 10**6} megapixels: cut it into smaller ones"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warnings: size is checked below
            with Image.open(path, formats=_FORMATS) as image:
                if image.width * image.height > most:
                    raise UserError(large)
                yield image
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(large) from None
    except UnidentifiedImageError:
        raise UserError(
            f"{str(path)!r} is not an image that can be read: give an 8-bit PNG, JPEG or TIFF "
            "(or 16-bit gray)"
        ) from None
    except _BROKEN as error:
        raise UserError(
            f"{str(path)!r} is damaged or incomplete and cannot be read "
            f"({first_line(error)}): get the file again"
        ) from None


def _check_file(path: Path) -> None:
    try:
        found = path.stat()
    except FileNotFoundError:
        raise UserError(f"there is no file {str(path)!r}: check the name") from None
    except (OSError, ValueError) as error:  # a name too long, links in a circle, a null byte
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{str(path)!r} cannot be opened ({reason}): check the name") from None
    if stat.S_ISDIR(found.st_mode):
        raise UserError(f"{str(path)!r} is a folder: name an image in it")
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{str(path)!r} is not an ordinary file: give a PNG, JPEG or TIFF file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{str(path)!r} may not be read: check its permissions")
    if found.st_size == 0:
        raise UserError(f"{str(path)!r} is empty: get the file again")


def _check_header(image: Image.Image, path: Path) -> None:
    """Refuse animated images and JPEGs with too many scans, before decoding."""
    if _has_more(image):
        raise UserError(f"{str(path)!r} is animated or has several pages: save one of them alone")
    if image.info.get("progressive") and path.read_bytes().count(b"\xff\xda") > MAX_SCANS:
        raise UserError(
            f"{str(path)!r} is a JPEG with more than {MAX_SCANS} scans, which take very long to "
            "decode: save it again"
        )


def _has_more(image: Image.Image) -> bool:
    """Whether the file has a second image; counting all of them would take long."""
    if image.format == "MPO":  # thumbnails of a camera
        return False
    if image.format != "TIFF":
        return bool(getattr(image, "is_animated", False))
    try:
        image.seek(1)
    except EOFError:
        return False
    return True


def _decoded(image: Image.Image, path: Path) -> DecodedImage:
    """Decode, apply the orientation, and convert to L, RGB or 16-bit gray."""
    with path.open("rb") as file:
        header = file.read(26)
    found = upright_image(image, repr(str(path)))
    if image.format == "PNG" and header[24] == 16 and header[25] != 0:  # bit depth; not gray
        note = f"{str(path)!r} has 16-bit colour, which is read with 8 bits"
        return found._replace(notes=(note, *found.notes))
    return found
