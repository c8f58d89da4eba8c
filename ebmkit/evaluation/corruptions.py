r"""Corruptions of images at five strengths, after Hendrycks and Dietterich (arXiv 1903.12261).

For an image x in [0, 1] and a constant c, the result always clipped to [0, 1]:

================== =================================================== ==========================
``poisson``        :math:`\mathrm{Poisson}(c\,x)/c`                    c: photons at white
``speckle``        :math:`x + c\,x\,\epsilon`                          c: deviation at white
``salt-and-pepper`` each value is replaced with probability c,         c: share of values
                   by 0 or 1 alike
``blur``           :math:`x * \mathcal N(0, c^2 I)`, border repeated   c: deviation in pixels
``contrast``       :math:`\bar x + c\,(x - \bar x)`, channel means     c: factor
``jpeg``           written as JPEG and read again, 8 bits              c: quality, 1 to 95
================== =================================================== ==========================

The constants are those of the scripts that made CIFAR-10-C and ImageNet-C (``make_cifar_c.py`` and
``make_imagenet_c.py`` of github.com/hendrycks/robustness), under the names ``shot_noise``,
``speckle_noise``, ``impulse_noise``, ``gaussian_blur``, ``contrast`` and ``jpeg_compression``. The
published images are rounded down to 8 bits; ours are not, but for JPEG's own.

Random numbers are drawn on the CPU from one generator per (seed, corruption, image), so that an
image is corrupted alike in every set, batch and process. Strengths share it: in ``speckle`` and
``salt-and-pepper`` a stronger corruption is more of the same one.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ebmkit.errors import UserError

__all__ = [
    "CORRUPTIONS",
    "STRENGTHS",
    "Constants",
    "Corruption",
    "constants_for",
    "corrupt",
    "corruption_generator",
]

STRENGTHS = (1, 2, 3, 4, 5)

Constants = Literal["cifar", "imagenet"]

LARGEST_CIFAR = 96
"""Side from which on the constants for small images are too weak to matter."""


class Corruption(NamedTuple):
    """A kind of corruption.

    Attributes:
        about: one line.
        unit: what its constant is.
        cifar: the constant at strengths 1 to 5 for images of 32x32, as in CIFAR-10-C.
        imagenet: the same for images of 224x224, as in ImageNet-C.
        apply: an image (C, H, W) in [0, 1], a constant and a generator, to the corrupted image.
    """

    description: str
    unit: str
    cifar: tuple[float, ...]
    imagenet: tuple[float, ...]
    apply: Callable[[Tensor, float, torch.Generator], Tensor]

    def constant(self, strength: int, kind: Constants) -> float:
        """The constant at ``strength`` 1 to 5."""
        return (self.cifar if kind == "cifar" else self.imagenet)[strength - 1]


def corrupt(x: Tensor, name: str, constant: float, seed: int = 0, first: int = 0) -> Tensor:
    """Corrupt images.

    Args:
        x: (B, C, H, W) in [0, 1].
        name: of the `CORRUPTIONS`.
        constant: how much; what it means depends on the corruption.
        seed: of the random numbers.
        first: number of the first image in its set; the others follow.

    Returns:
        (B, C, H, W) in [0, 1], on the device of x and of its type.
    """
    apply = CORRUPTIONS[name].apply
    done = [
        apply(image, constant, corruption_generator(seed, name, first + i)).clamp(0, 1)
        for i, image in enumerate(x.cpu())
    ]
    return torch.stack(done).to(x)


def constants_for(image_size: tuple[int, int]) -> Constants:
    """Which published constants suit images of ``image_size``: below 96 pixels CIFAR-10-C's."""
    return "cifar" if min(image_size) < LARGEST_CIFAR else "imagenet"


def corruption_generator(seed: int, name: str, index: int) -> torch.Generator:
    """The generator of corruption ``name`` of image number ``index``."""
    key = hashlib.sha256(f"corruption {name} {seed} {index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:7]))


def _poisson(x: Tensor, photons: float, generator: torch.Generator) -> Tensor:
    return torch.poisson(photons * x, generator=generator) / photons


def _speckle(x: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    return x + deviation * x * torch.randn(x.shape, generator=generator, dtype=x.dtype)


def _salt_and_pepper(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    hit = torch.rand(x.shape, generator=generator) < share
    salt = torch.rand(x.shape, generator=generator) < 0.5
    return torch.where(hit, salt.to(x.dtype), x)


def _blur(x: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    from scipy.ndimage import gaussian_filter

    return torch.from_numpy(
        gaussian_filter(x.numpy(), (0, deviation, deviation), mode="nearest", truncate=4.0)
    )


def _contrast(x: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    mean = x.mean(dim=(1, 2), keepdim=True)
    return mean + factor * (x - mean)


def _jpeg(x: Tensor, quality: float, generator: torch.Generator) -> Tensor:
    from PIL import Image

    if x.shape[0] not in (1, 3):
        raise UserError(f"JPEG holds 1 or 3 channels, not {x.shape[0]}: leave out corruption jpeg")
    pixels = (255 * x).round().byte().movedim(0, -1).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if x.shape[0] == 1 else pixels).save(
        buffer, "JPEG", quality=int(quality)
    )
    with Image.open(buffer) as image:
        read = torch.from_numpy(np.array(image))
    return (read[None] if read.ndim == 2 else read.movedim(-1, 0)).to(x.dtype) / 255


CORRUPTIONS: dict[str, Corruption] = {
    "poisson": Corruption(
        "shot noise of counted photons",
        "photons at white",
        (500, 250, 100, 75, 50),
        (60, 25, 12, 5, 3),
        _poisson,
    ),
    "speckle": Corruption(
        "noise in proportion to brightness",
        "deviation at white",
        (0.06, 0.1, 0.12, 0.16, 0.2),
        (0.15, 0.2, 0.35, 0.45, 0.6),
        _speckle,
    ),
    "salt-and-pepper": Corruption(
        "values replaced by black or white",
        "share of values",
        (0.01, 0.02, 0.03, 0.05, 0.07),
        (0.03, 0.06, 0.09, 0.17, 0.27),
        _salt_and_pepper,
    ),
    "blur": Corruption(
        "Gaussian blur",
        "deviation in pixels",
        (0.4, 0.6, 0.7, 0.8, 1.0),
        (1, 2, 3, 4, 6),
        _blur,
    ),
    "contrast": Corruption(
        "less contrast",
        "factor",
        (0.75, 0.5, 0.4, 0.3, 0.15),
        (0.4, 0.3, 0.2, 0.1, 0.05),
        _contrast,
    ),
    "jpeg": Corruption(
        "JPEG compression",
        "quality",
        (80, 65, 58, 50, 40),
        (25, 18, 15, 10, 7),
        _jpeg,
    ),
}
"""The kinds of corruption, by name."""
