"""Image files: pixels are read and written exactly, other files give a one-line error."""

import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from ebmkit.data import images as module
from ebmkit.data.images import image_header, read_image, write_image
from ebmkit.errors import UserError

GRAY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
COLOUR = np.stack([GRAY, GRAY[::-1], GRAY[:, ::-1]], 2)


def save(array, path, **options):
    Image.fromarray(array).save(path, **options)
    return path


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour, data):
    """A PNG file, byte by byte."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(data))
        + png_chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("suffix", ["png", "tif", "tiff", "bmp", "webp"])
def test_pixels_are_file_values_over_255(tmp_path, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    decoded = read_image(save(COLOUR, tmp_path / f"a.{suffix}", **options))
    assert torch.equal(decoded.image, torch.from_numpy(COLOUR).permute(2, 0, 1) / 255)
    assert (decoded.bits, decoded.mode) == (8, "RGB")


def test_jpeg_matches_pillow(tmp_path):
    path = save(COLOUR, tmp_path / "a.JPG", format="JPEG")
    decoded = torch.from_numpy(np.array(Image.open(path)))
    assert torch.equal(read_image(path).image, decoded.permute(2, 0, 1) / 255)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_gray_round_trip_is_exact(tmp_path, suffix):
    values = (np.arange(48) * 1365).astype(np.uint16).reshape(6, 8)
    decoded = read_image(save(values, tmp_path / f"a.{suffix}"))
    assert decoded.bits == 16
    expected = torch.from_numpy(values.astype(np.float32) / 65535)
    assert torch.equal(decoded.image[0], expected)
    write_image(decoded.image, tmp_path / f"b.{suffix}", bits=16)
    assert np.array_equal(np.array(Image.open(tmp_path / f"b.{suffix}")), values)


def test_big_endian_16_bit_tiff(tmp_path):
    values = (np.arange(48) * 1365).astype(np.uint16).reshape(6, 8)
    path = tmp_path / "a.tif"
    Image.frombytes("I;16B", (8, 6), values.astype(">u2").tobytes()).save(path)
    decoded = read_image(path)
    assert torch.equal(decoded.image[0], torch.from_numpy(values.astype(np.float32) / 65535))


def test_16_bit_colour_is_read_with_a_warning(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(1, 1, 16, 2, b"\x00" + struct.pack(">HHH", 65535, 0, 0x8000)))
    with pytest.warns(UserWarning, match="16-bit colour"):
        decoded = read_image(path)
    assert torch.equal(decoded.image.flatten(), torch.tensor([255.0, 0.0, 128.0]) / 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(GRAY, tmp_path / "a.png", exif=exif)
    upright = {  # meaning of the tag in the EXIF standard
        1: GRAY,
        2: GRAY[:, ::-1],
        3: GRAY[::-1, ::-1],
        4: GRAY[::-1],
        5: GRAY.T,
        6: np.rot90(GRAY, -1),
        7: GRAY[::-1, ::-1].T,
        8: np.rot90(GRAY),
    }[orientation]
    assert torch.equal(read_image(path).image[0], torch.from_numpy(upright.copy()) / 255)
    assert image_header(path) == (1, upright.shape)


def test_palette_is_converted_to_rgb(tmp_path):
    path = tmp_path / "a.png"
    paletted = Image.fromarray(COLOUR).quantize(16)
    paletted.save(path)
    expected = torch.from_numpy(np.array(paletted.convert("RGB"))).permute(2, 0, 1) / 255
    decoded = read_image(path)
    assert decoded.mode == "P"
    assert torch.equal(decoded.image, expected)


def test_one_bit_images_are_black_and_white(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(GRAY > 100).save(path)
    assert torch.equal(read_image(path).image[0], torch.from_numpy(GRAY > 100).float())


def test_opaque_alpha_is_dropped_with_a_warning(tmp_path):
    opaque = np.concatenate([COLOUR, np.full((6, 8, 1), 255, np.uint8)], 2)
    with pytest.warns(UserWarning, match="alpha"):
        decoded = read_image(save(opaque, tmp_path / "a.png"))
    assert torch.equal(decoded.image, torch.from_numpy(COLOUR).permute(2, 0, 1) / 255)


def test_gray_is_repeated_to_rgb_and_colour_is_not_converted_to_gray(tmp_path):
    gray = read_image(save(GRAY, tmp_path / "gray.png"), channels=3).image
    assert gray.shape == (3, 6, 8)
    assert torch.equal(gray, gray[:1].expand(3, 6, 8))
    with pytest.raises(UserError, match="convert it to gray"):
        read_image(save(COLOUR, tmp_path / "colour.png"), channels=1)
    same = save(np.stack([GRAY] * 3, 2), tmp_path / "same.png")
    assert torch.equal(read_image(same, channels=1).image, gray[:1])


def test_jpeg_with_a_preview_is_read_as_one_image(tmp_path):
    path = tmp_path / "a.jpg"
    first, preview = Image.fromarray(COLOUR), Image.fromarray(COLOUR[:2, :2])
    first.save(path, format="MPO", save_all=True, append_images=[preview])
    assert read_image(path).image.shape == (3, 6, 8)


def unreadable_path(tmp_path, what):
    """A path that is not a readable image."""
    path = tmp_path / f"{what}.png"
    if what == "missing":
        return path
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "empty":
        path.touch()
    elif what == "text":
        path.write_text("not a picture")
    elif what == "truncated png":
        save(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8), path)
        path.write_bytes(path.read_bytes()[:4000])
    elif what == "truncated jpeg":
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
        save(noise, path, format="JPEG")
        path.write_bytes(path.read_bytes()[:1500])
    elif what == "corrupt":
        save(COLOUR, path)
        content = bytearray(path.read_bytes())
        content[45:55] = b"\xff" * 10
        path.write_bytes(bytes(content))
    elif what == "header only":
        path.write_bytes(png(8, 8, 8, 2, b"")[:20])
    elif what == "bomb":
        path.write_bytes(png(60_000, 60_000, 8, 0, b"\x00" * 1000))
    elif what == "smaller bomb":  # below Pillow's error, above its warning and our limit
        path.write_bytes(png(17_500, 10_000, 8, 0, b"\x00" * 1000))
    elif what == "text bomb":
        text = png_chunk(b"zTXt", b"a\x00\x00" + zlib.compress(b"\x00" * (80 << 20)))
        content = png(1, 1, 8, 0, b"\x00\x00")
        path.write_bytes(content[:33] + text + content[33:])
    elif what == "transparent":
        alpha = np.full((6, 8, 1), 200, np.uint8)
        save(np.concatenate([COLOUR, alpha], 2), path)
    elif what == "transparent palette":
        Image.fromarray(COLOUR).quantize(16).save(path, transparency=0)
    elif what == "animated png":
        Image.fromarray(GRAY).save(path, save_all=True, append_images=[Image.fromarray(GRAY + 1)])
    elif what == "animated gif":
        path = path.with_suffix(".gif")
        Image.fromarray(GRAY).save(path, save_all=True, append_images=[Image.fromarray(GRAY + 1)])
    elif what == "pages":
        path = path.with_suffix(".tif")
        Image.fromarray(GRAY).save(path, save_all=True, append_images=[Image.fromarray(GRAY)])
    elif what == "floats":
        path = save(GRAY.astype(np.float32), path.with_suffix(".tif"))
    elif what == "32 bits":
        path = save(GRAY.astype(np.int32), path.with_suffix(".tif"))
    return path


UNREADABLE = {
    "missing": "there is no file",
    "folder": "is a folder",
    "pipe": "not an ordinary file",
    "empty": "is empty",
    "text": "not an image",
    "truncated png": "damaged or incomplete",
    "truncated jpeg": "damaged or incomplete",
    "corrupt": "damaged or incomplete",
    "header only": "damaged or incomplete|not an image",
    "bomb": "megapixels",
    "smaller bomb": "megapixels",
    "text bomb": "damaged or incomplete",
    "transparent": "flatten",
    "transparent palette": "flatten",
    "animated png": "animated",
    "animated gif": "animated",
    "pages": "several pages",
    "floats": "32 bits",
    "32 bits": "32 bits",
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_unreadable_paths_give_a_one_line_error(tmp_path, what):
    path = unreadable_path(tmp_path, what)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's warnings do not reach the user
        with pytest.raises(UserError, match=UNREADABLE[what]) as caught:
            read_image(path)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_decompression_bomb_is_refused_before_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_decoded", lambda *_: pytest.fail("decoded"))
    for what in ("bomb", "smaller bomb"):
        with pytest.raises(UserError, match="170 megapixels"):
            read_image(unreadable_path(tmp_path, what))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff"])
@pytest.mark.parametrize("channels", [1, 3])
def test_written_images_round_trip_exactly(tmp_path, suffix, channels):
    image = torch.randint(256, (channels, 5, 7)) / 255
    write_image(image, tmp_path / f"a{suffix}")
    assert torch.equal(read_image(tmp_path / f"a{suffix}").image, image)


def test_writing_rounds_and_clips(tmp_path):
    write_image(torch.tensor([[[-1.0, 0.5019, 0.5021, 9.0]]]), tmp_path / "a.png")
    assert np.array(Image.open(tmp_path / "a.png")).tolist() == [[0, 128, 128, 255]]


def test_jpeg_round_trip_is_close(tmp_path):
    smooth = torch.linspace(0, 1, 64).expand(3, 64, 64)
    write_image(smooth, tmp_path / "a.jpg", bits=16)
    assert (read_image(tmp_path / "a.jpg").image - smooth).abs().max() < 4 / 255


def test_existing_file_is_replaced_only_with_overwrite(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"precious")
    with pytest.raises(UserError, match="exists"):
        write_image(torch.zeros(1, 2, 2), path)
    assert path.read_bytes() == b"precious"
    write_image(torch.zeros(1, 2, 2), path, overwrite=True)
    assert not read_image(path).image.any()
    assert os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize(
    ("image", "name", "message"),
    [
        (torch.zeros(1, 2, 2), "a.gif", "must end in"),
        (torch.zeros(2, 2, 2), "a.png", "1 or 3"),
        (torch.full((1, 2, 2), torch.nan), "a.png", "NaN or Inf"),
        (torch.zeros(1, 2, 2), "absent/a.png", "cannot write"),
        (torch.zeros(1, 1, 70_000), "a.jpg", "cannot write"),
    ],
)
def test_invalid_images_and_paths_are_not_written(tmp_path, image, name, message):
    with pytest.raises(UserError, match=message):
        write_image(image, tmp_path / name)
    assert not os.listdir(tmp_path)
