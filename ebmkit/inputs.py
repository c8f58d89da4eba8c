"""Arguments of the public methods of models, converted and checked in one place.

`ScoreModel.inputs` calls these functions in every public method; training calls `forward` and is
not affected. Nothing here waits for a GPU, except for labels: types, shapes and devices of tensors
are checked and their values are not; values of NumPy arrays and Python numbers are checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ebmkit.compute import in_functional_transform
from ebmkit.errors import UserError, shown
from ebmkit.noise import check_sigma, parse_sigma

ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> the transposition that makes the image upright."""
SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N")
"""Pillow modes of 16-bit gray images."""

LEVELS: dict[Any, int] = {
    **{torch.bool: 1, torch.uint8: 255, torch.uint16: 65535},
    **{np.dtype("bool"): 1, np.dtype("uint8"): 255, np.dtype("uint16"): 65535},
}
"""Highest level of images of other types than floats."""

NEEDED = "images must be floats in [0, 1] (noisy ones may exceed it) or 8-bit or 16-bit levels"


def image_batch(y: Any, channels: int | None, like: Tensor | None = None) -> Tensor:
    """Convert images to a tensor of floats in image units.

    Args:
        y: a tensor (B, C, H, W), uint8 and uint16 are divided by 255 and 65535; a NumPy array
            (H, W), (H, W, C), (C, H, W), (B, H, W, C) or (B, C, H, W); or a PIL image
            (`pil_array`). A gray array (H, W) or PIL image is repeated for a model of colours.
        channels: C of the model; None: 1 or 3.
        like: a parameter of the model, whose device tensors must have; NumPy arrays are moved to
            it, and get its dtype, or float32 if it is of lower precision.

    Raises:
        UserError: for other types, other integers, levels as floats, or a tensor on another device.
    """
    if not isinstance(y, Tensor):
        y = torch.from_numpy(_float_array(y, channels))
        if like is not None:
            y = y.to(like.device, torch.promote_types(y.dtype, like.dtype))
    assert isinstance(y, Tensor)
    if torch.compiler.is_compiling():
        return y
    if y.dtype in LEVELS:
        y = y.float() / LEVELS[y.dtype]
    elif not y.is_floating_point():
        raise UserError(f"{NEEDED}, not {y.dtype}")
    if like is not None and y.device != like.device:
        raise UserError(
            f"the images are on {y.device} and the model on {like.device}: move them by "
            f".to({str(like.device)!r})"
        )
    return _differentiable(y)


def _float_array(y: Any, channels: int | None) -> np.ndarray[Any, Any]:
    """A NumPy array or PIL image as (B, C, H, W) float32 in image units."""
    if isinstance(y, Image.Image):
        y = pil_array(y, "the image")
        if channels == 1 and y.ndim == 3 and (y == y[..., :1]).all():
            y = y[..., 0]  # stored in colour, and no pixel is
    if not isinstance(y, np.ndarray):
        wrong = type(y).__name__
        raise UserError(
            f"images must be a tensor (B, C, H, W), a NumPy array or a PIL image, not {wrong}"
        )
    if y.dtype not in LEVELS and y.dtype.kind != "f":
        raise UserError(f"{NEEDED}, not {y.dtype}")
    legal = (1, 3) if channels is None else (channels,)
    if y.ndim == 2:
        y = np.broadcast_to(y, (1, channels or 1, *y.shape))
    elif y.ndim == 3:
        y = (np.moveaxis(y, 2, 0) if y.shape[2] in legal else y)[None]
    elif y.ndim == 4 and y.shape[1] not in legal and y.shape[3] in legal:
        y = np.moveaxis(y, 3, 1)
    bytes_as_floats = y.dtype.kind == "f" and y.size and 2 < y.max() <= 255 and y.min() >= 0
    if bytes_as_floats and (y == np.round(y)).all():
        raise UserError(
            f"the array holds whole numbers up to {y.max():g}, it seems levels of 8 bits, and "
            "images are in [0, 1]: divide it by 255"
        )
    levels = np.array(y, np.float32, order="C")  # a copy, which PyTorch may own
    return levels / np.float32(LEVELS.get(y.dtype, 1))


class DecodedImage(NamedTuple):
    """A decoded image.

    Attributes:
        image: Pillow image of mode L, RGB or 16-bit gray.
        mode: Pillow mode of the file.
        notes: warnings about conversions.
    """

    image: Image.Image
    mode: str
    notes: tuple[str, ...]

    @property
    def is_16_bit(self) -> bool:
        """Whether the image is 16-bit gray."""
        return self.image.mode not in ("L", "RGB")


def upright_image(image: Image.Image, what: str) -> DecodedImage:
    """Apply the orientation of a Pillow image and convert it to L, RGB or 16-bit gray.

    Raises:
        UserError: if it is partly transparent or has 32 bits per pixel; ``what`` names the image.
    """
    mode, notes = image.mode, []
    if mode in ("F", "I"):
        raise UserError(f"{what} has 32 bits per pixel: convert it to 8 bits, or to 16-bit gray")
    image.load()
    turn = _TURNS.get(image.getexif().get(ORIENTATION, 1))
    upright = image if turn is None else image.transpose(turn)
    if upright.mode in SIXTEEN_BIT:
        return DecodedImage(upright, mode, ())
    if upright.has_transparency_data:
        alpha = upright.convert("RGBA").getchannel("A")
        if alpha.getextrema() != (255, 255):
            raise UserError(f"{what} is partly transparent: flatten it onto a background first")
        notes.append(f"{what} has an alpha channel, fully opaque, which is ignored")
    gray = upright.mode in ("1", "L", "LA", "La")
    return DecodedImage(upright.convert("L" if gray else "RGB"), mode, tuple(notes))


def pil_array(image: Image.Image, what: str) -> np.ndarray[Any, Any]:
    """Levels (H, W) or (H, W, 3) of a PIL image: uint8, or uint16 of 16-bit gray.

    The orientation is applied; palettes and an opaque alpha channel are converted.

    Raises:
        UserError: as `upright_image`.
    """
    found = upright_image(image, what)
    return np.array(found.image, np.uint16 if found.is_16_bit else np.uint8)


def noise_level(
    sigma: Any, batch: int, at_zero: bool = False, trained_to: float | None = None
) -> float | Tensor | None:
    """Check a noise level: a number, text such as ``"25/255"``, a tensor (B,), or None.

    Args:
        sigma: noise level, image units. Values of tensors are not checked.
        batch: B, the number of images.
        at_zero: whether 0 is legal.
        trained_to: highest level of the training; whole numbers above it and 1 are refused.

    Raises:
        UserError: if it is not legal (`check_sigma`), or the number of levels is not 1 or B.
    """
    if isinstance(sigma, str):
        return parse_sigma(sigma, at_zero)
    if isinstance(sigma, np.ndarray):
        sigma = torch.as_tensor(sigma)
    check_sigma(sigma, at_zero, trained_to)
    if not isinstance(sigma, Tensor):
        return None if sigma is None else float(sigma)
    if sigma.numel() != batch and sigma.numel() != 1:
        raise UserError(
            f"{batch} images need a number as sigma, or one per image, not {tuple(sigma.shape)}"
        )
    return _differentiable(sigma)


def class_labels(c: Any, y: Tensor, num_classes: int, names: Sequence[str] = ()) -> Tensor:
    """Labels as an int64 tensor (B,) on the device of the images ``y``.

    Args:
        c: an integer or a class name for all images, or one per image.
        y: images (B, ...).
        num_classes: C.
        names: class names in label order, if known.

    Raises:
        UserError: if there are no labels, or a label is not a known name or in 0 .. C - 1.
    """
    if num_classes == 0:
        raise UserError("this model was trained without labels: leave the label out")
    if isinstance(c, str):
        c = _number(c, num_classes, names)
    elif isinstance(c, (list, tuple)) and any(isinstance(each, str) for each in c):
        c = [_number(each, num_classes, names) if isinstance(each, str) else each for each in c]
    labels = torch.as_tensor(c, device=y.device)
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise UserError(f"labels must be whole numbers, not {labels.dtype}")
    labels = labels.long().reshape(-1).expand(len(y)) if labels.ndim == 0 else labels.long()
    if labels.shape != y.shape[:1]:
        raise UserError(f"{len(y)} images need {len(y)} labels, not {tuple(labels.shape)}")
    if isinstance(c, Integral):
        outside = [] if 0 <= int(c) < num_classes else [int(c)]
    elif torch.compiler.is_compiling() or in_functional_transform():
        return labels  # the caller of the compiled function checks the values
    else:
        outside = labels[(labels < 0) | (labels >= num_classes)].tolist()
    if outside:
        known = _known(num_classes, names)
        raise UserError(f"label {int(outside[0])} is out of range: this model knows {known}")
    return _differentiable(labels)


def _number(name: str, num_classes: int, names: Sequence[str]) -> int:
    if name not in names:
        known = _known(num_classes, names)
        raise UserError(f"label {shown(name)} is unknown: this model knows {known}")
    return list(names).index(name)


def _known(num_classes: int, names: Sequence[str]) -> str:
    return f"0 to {num_classes - 1}" + (f" or {', '.join(names)}" if names else "")


def _differentiable(x: Tensor) -> Tensor:
    """Clone a tensor made in inference mode, which can never be differentiated."""
    if torch.compiler.is_compiling() or not x.is_inference():
        return x
    with torch.inference_mode(False):
        return x.clone()
