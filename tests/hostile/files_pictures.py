"""Image files with false sizes, decompression bombs, endless devices, and other file types."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from ebmkit_tests.hostile.case import Case
from ebmkit_tests.hostile.files_hdf5 import zeros_packed
from ebmkit_tests.hostile.making import GIGAPIXEL, Make, encoded, fifo, link, png, png_chunk
from PIL import Image

from ebmkit.data import read_image

SMALL = zlib.compress(bytes(8 * 9))
"""Compressed pixels of a gray 8x8 PNG."""


def tiff(entries: list[tuple[int, int, int, int]], rest: bytes = b"", following: int = 0) -> bytes:
    rows = b"".join(struct.pack("<HHLL", *entry) for entry in sorted(entries))
    return (
        struct.pack("<2sHLH", b"II", 42, 8, len(entries)) + rows + struct.pack("<L", following)
    ) + rest


def overlapping_tags(count: int = 60_000, size: int = 700_000) -> bytes:
    """Tags that all refer to the same bytes; copying each one takes 42 gigabytes."""
    content = tiff([(1000 + i, 1, size, 8) for i in range(count)])
    return content + bytes(max(0, 8 + size - len(content)))


def image_tags(width: int, height: int, strip: int, length: int, more=()) -> list:
    return [
        *((256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)),
        *((273, 4, 1, strip), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, length)),
        *more,
    ]


def jpeg_with_exif(content: bytes) -> bytes:
    plain = encoded("JPEG")
    parts = [b"Exif\0\0" + content[i : i + 65_000] for i in range(0, len(content), 65_000)]
    segments = b"".join(b"\xff\xe1" + struct.pack(">H", len(p) + 2) + p for p in parts)
    return plain[:2] + segments + plain[2:]


def jpeg_of_many_scans() -> bytes:
    """A progressive JPEG whose last scan is repeated 20,000 times."""
    content = encoded("JPEG", (2048, 2048), "L", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * 20_000 + content[-2:]


def gif_of_many_frames(count: int = 300_000) -> bytes:
    content = encoded("GIF", (1, 1), "P")
    start = content.index(b"\x2c")
    return content[:start] + content[start:-1] * count + b"\x3b"


def tiff_of_many_pages(count: int = 200_000) -> bytes:
    pages, at = [], 8
    for _ in range(count):
        entries = image_tags(1, 1, 8, 1)
        length = 2 + 12 * len(entries) + 4
        pages.append(tiff(entries, following=at + length)[8:])
        at += length
    return struct.pack("<2sHL", b"II", 42, 8) + b"".join(pages)


def tiff_pages_in_a_circle() -> bytes:
    return tiff(image_tags(4, 4, 8, 16), bytes(16), following=8)


def sized_jpeg(width: int, height: int) -> bytes:
    content = bytearray(encoded("JPEG"))
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def sized_bmp(width: int, height: int) -> bytes:
    content = bytearray(encoded("BMP"))
    content[18:26] = struct.pack("<ii", width, height)
    return bytes(content)


def lossless_webp(width: int, height: int) -> bytes:
    return encoded("WEBP", (width, height), lossless=True, quality=0, method=0)


def image(content: bytes | Callable[[], bytes], name: str = "picture.png") -> Make:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content())
        return folder / name

    return make


TEXT_BOMB = png_chunk(b"zTXt", b"k\0\0" + zeros_packed(256))
PROFILE_BOMB = png_chunk(b"iCCP", b"k\0\0" + zeros_packed(256))
I_TEXT_BOMB = png_chunk(b"iTXt", b"k\0\1\0\0\0" + zeros_packed(256))

CASES = [
    Case("png of 10 gigapixels", "image", image(png(10**5, 10**5, GIGAPIXEL)), "170 megapixels"),
    Case("png of 2^31 columns", "image", image(png(2**31 - 1, 1, SMALL)), "megapixels|damaged"),
    Case("png of no columns", "image", image(png(0, 8, SMALL)), "damaged|cannot be read|not a"),
    Case("png with less data than pixels", "image", image(png(8000, 8000, SMALL)), "damaged"),
    Case("png with more data than pixels", "image", image(png(8, 8, zeros_packed(256))), None),
    Case("png with a text of 256 MiB", "image", image(png(8, 8, SMALL, TEXT_BOMB)), "damaged"),
    Case(
        "png with a UTF-8 text of 256 MiB", "image", image(png(8, 8, SMALL, I_TEXT_BOMB)), "damaged"
    ),
    Case(
        "png with a profile of 256 MiB",
        "image",
        image(png(8, 8, SMALL, PROFILE_BOMB)),
        "damaged",
    ),
    Case(
        "png with 200,000 texts",
        "image",
        image(lambda: png(8, 8, SMALL, *[png_chunk(b"tEXt", b"k\0" + b"v" * 400)] * 200_000)),
        "damaged",
    ),
    Case("truncated png", "image", image(encoded("PNG", (64, 64))[:-30]), "damaged"),
    Case("script called png", "image", image(b"#!/bin/sh\ntouch marker\n" * 9), "not an image"),
    Case("postscript called png", "image", image(b"%!PS-Adobe-3.0 EPSF-3.0\n"), "not an im"),
    Case("svg called png", "image", image(b"<svg xmlns='x'><image/></svg>"), "not an image"),
    Case("fits called png", "image", image(b"SIMPLE  =" + b" " * 3000), "not an image"),
    Case("tiff called png", "image", image(encoded("TIFF")), None),
    Case(
        "apng",
        "image",
        image(encoded("PNG", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")])),
        "animated",
    ),
    Case("jpeg of 4 gigapixels", "image", image(sized_jpeg(65_000, 65_000), "p.jpg"), "megapix"),
    Case(
        "jpeg with less data than pixels",
        "image",
        image(sized_jpeg(9000, 9000)),
        None,
        1900,
        slow=True,
    ),
    Case(
        "jpeg with overlapping tags",
        "image",
        image(lambda: jpeg_with_exif(overlapping_tags()), "picture.jpg"),
        None,
    ),
    Case("jpeg of 20,000 repeats", "image", image(jpeg_of_many_scans, "p.jpg"), "scans"),
    Case("truncated jpeg", "image", image(encoded("JPEG", (64, 64))[:-200], "p.jpg"), "damaged"),
    Case("tiff with overlapping tags", "image", image(overlapping_tags, "p.tif"), "not an imag"),
    Case(
        "tiff strip beyond the file",
        "image",
        image(tiff(image_tags(64, 64, 2**31, 4096)), "p.tif"),
        "damaged",
    ),
    Case(
        "tiff strip of four gigabytes",
        "image",
        image(tiff(image_tags(64, 64, 8, 2**32 - 1)), "p.tif"),
        "damaged|not an image",
    ),
    Case(
        "tiff of 10 gigapixels",
        "image",
        image(tiff(image_tags(10**5, 10**5, 8, 100)), "p.tif"),
        "megapixels",
    ),
    Case("tiff of 200,000 pages", "image", image(tiff_of_many_pages, "p.tif"), "several pages"),
    Case("circular tiff pages", "image", image(tiff_pages_in_a_circle, "p.tif"), None),
    Case("gif of 300,000 frames", "image", image(gif_of_many_frames, "p.gif"), "animated"),
    Case("bmp of 4 gigapixels", "image", image(sized_bmp(65_000, 65_000), "p.bmp"), "megapixels"),
    Case("bmp of minus 8 columns", "image", image(sized_bmp(-8, 8), "p.bmp"), "megapix"),
    Case("ppm of a terapixel", "image", image(b"P6 1000000 1000000 255\n", "p.ppm"), "megapixel"),
    Case(
        "ppm with a width of a million digits",
        "image",
        image(b"P6 " + b"9" * 10**6 + b" 1 255\n", "p.ppm"),
        "damaged|not an image",
    ),
    Case(
        "webp of 268 megapixels",
        "image",
        image(lambda: lossless_webp(16_383, 16_383), "p.webp"),
        "megapixels",
        200,
        slow=True,
    ),
    Case(
        "webp with overlapping tags",
        "image",
        image(lambda: encoded("WEBP", exif=overlapping_tags()), "p.webp"),
        None,
    ),
    Case("image that is a pipe", "image", fifo("picture.png"), "not an ordinary file"),
    Case("image that is /dev/zero", "image", link("picture.png", "/dev/zero"), "not an ordinary"),
    Case("image that is a link to itself", "image", link("p.png", "p.png"), "cannot be opened"),
    Case("image whose name is too long", "image", lambda f: f / ("x" * 300 + ".png"), "cannot"),
]


OPENERS = {"image": read_image}

Image.init()  # Pillow loads its plugins at the first image, which is not part of a case
