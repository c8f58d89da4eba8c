r"""Linear measurements of images, with orthonormal columns.

A measurement of n numbers is :math:`m = M^\top x` with :math:`M^\top M = I`, so that :math:`M m` is
the image that explains m with the least norm, and :math:`M M^\top` projects on what was measured.
Nothing here holds a matrix.

================= ==================================================== ==========================
measurement       :math:`M^\top x`                                     :math:`M m`
================= ==================================================== ==========================
`Pixels`          the pixels of a mask                                 m there, 0 elsewhere
`BlockAverage`    means of k x k blocks, times k                       each block filled with its
                                                                       mean
`LowPass`         the low frequencies                                  the blurred image
`Compressed`      random frequencies of the image with random signs    the image of these alone
================= ==================================================== ==========================

Frequencies are taken by the discrete Hartley transform, the real part of the orthonormal Fourier
transform minus its imaginary part: it is real, orthonormal and its own inverse, and a set of
frequencies with their negatives spans the same images in both.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ebmkit.errors import UserError

__all__ = [
    "BlockAverage",
    "Compressed",
    "LowPass",
    "Measurement",
    "Pixels",
    "center_hole",
    "random_pixels",
]

Shape = tuple[int, int, int]


class Measurement(ABC):
    """A measurement of images (B, C, H, W) of one ``shape`` (C, H, W), in n numbers each.

    Attributes:
        shape: of the images.
        count: n.
    """

    shape: Shape
    count: int

    @abstractmethod
    def measure(self, x: Tensor) -> Tensor:
        """M^T x, (B, n), of images (B, C, H, W).

        Raises:
            UserError: if the images have another shape.
        """

    @abstractmethod
    def adjoint(self, m: Tensor) -> Tensor:
        """M m, images (B, C, H, W), of measurements (B, n).

        Raises:
            UserError: if there are not n numbers for each image.
        """

    def project(self, x: Tensor) -> Tensor:
        """M M^T x: what of ``x`` was measured."""
        return self.adjoint(self.measure(x))

    def impose(self, x: Tensor, m: Tensor) -> Tensor:
        """The image nearest to ``x`` whose measurements are ``m`` exactly."""
        return x + self.adjoint(m - self.measure(x))

    def _check(self, x: Tensor) -> None:
        if x.shape[1:] != self.shape:
            raise UserError(
                f"this measurement is of images {self.shape}, not {tuple(x.shape[1:])}: make it "
                "for the shape (channels, height, width) of yours"
            )

    def _check_measured(self, m: Tensor) -> None:
        if m.ndim != 2 or m.shape[1] != self.count:
            raise UserError(
                f"this measurement has {self.count} numbers of each image, (B, {self.count}), not "
                f"{tuple(m.shape)}"
            )


class _Selection(Measurement):
    """Some of the coordinates of an orthonormal transform; subclasses say which transform."""

    def __init__(self, shape: Shape, kept: Tensor) -> None:
        self.shape = _checked_shape(shape)
        self._where = torch.nonzero(kept.flatten()).flatten()
        self.count = len(self._where)
        if not self.count:
            raise UserError("nothing is measured: keep more than 0 of the image")

    def measure(self, x: Tensor) -> Tensor:
        self._check(x)
        return self._forth(x).flatten(1)[:, self._where.to(x.device)]

    def adjoint(self, m: Tensor) -> Tensor:
        self._check_measured(m)
        whole = m.new_zeros(len(m), math.prod(self.shape))
        whole[:, self._where.to(m.device)] = m
        return self._back(whole.reshape(-1, *self.shape))

    def _forth(self, x: Tensor) -> Tensor:
        return x

    def _back(self, coordinates: Tensor) -> Tensor:
        return coordinates


class Pixels(_Selection):
    """The pixels of a mask, for inpainting the others.

    Args:
        shape: of the images (C, H, W).
        known: (H, W) or (C, H, W) bool, where pixels are known.

    Raises:
        UserError: if the mask has another size, or no pixel is known.
    """

    def __init__(self, shape: Shape, known: Tensor) -> None:
        if tuple(known.shape) not in (tuple(shape), tuple(shape[1:])):
            raise UserError(
                f"a mask of {' x '.join(map(str, known.shape))} does not fit images of "
                f"{shape[1]} x {shape[2]}: give one of their height and width"
            )
        super().__init__(shape, known.bool().expand(shape))


class BlockAverage(Measurement):
    """Means of blocks of ``factor`` x ``factor`` pixels, for super-resolution.

    Measurements are the means times the factor, so that columns have norm 1.

    Args:
        shape: of the images (C, H, W).
        factor: side of the blocks.

    Raises:
        UserError: if the factor is below 2 or does not divide height and width.
    """

    def __init__(self, shape: Shape, factor: int) -> None:
        self.shape = _checked_shape(shape)
        channels, height, width = shape
        if factor < 2 or height % factor or width % factor:
            raise UserError(
                f"factor {factor} does not divide images of {height} x {width} into blocks: take a "
                "common divisor of 2 or more"
            )
        self.factor = factor
        self.small = (channels, height // factor, width // factor)
        self.count = math.prod(self.small)

    def measure(self, x: Tensor) -> Tensor:
        self._check(x)
        return self.factor * torch.nn.functional.avg_pool2d(x, self.factor).flatten(1)

    def adjoint(self, m: Tensor) -> Tensor:
        self._check_measured(m)
        means = m.reshape(-1, *self.small) / self.factor
        return means.repeat_interleave(self.factor, -1).repeat_interleave(self.factor, -2)

    def small_images(self, m: Tensor) -> Tensor:
        """The images of block means (B, C, H / factor, W / factor) that ``m`` holds."""
        self._check_measured(m)
        return m.reshape(-1, *self.small) / self.factor

    def of_small_images(self, small: Tensor) -> Tensor:
        """The measurements (B, n) that small images (B, C, H / factor, W / factor) are."""
        measured = self.factor * small.flatten(1)
        self._check_measured(measured)
        return measured


class LowPass(_Selection):
    """The frequencies up to a radius, for deblurring: an ideal low-pass filter.

    Args:
        shape: of the images (C, H, W).
        share: of all frequencies, those of the smallest radius, at least this share of them; above
            0 and up to 1.

    Raises:
        UserError: if the share is not legal.
    """

    def __init__(self, shape: Shape, share: float) -> None:
        _check_share(share)
        _, height, width = _checked_shape(shape)
        rows, columns = torch.fft.fftfreq(height), torch.fft.fftfreq(width)
        radius = (rows[:, None].double().square() + columns.double().square()).sqrt()
        needed = max(1, math.ceil(share * radius.numel()))
        limit = radius.flatten().sort().values[needed - 1]
        super().__init__(shape, (radius <= limit + 1e-9).expand(shape))

    def _forth(self, x: Tensor) -> Tensor:
        return _hartley(x, (-2, -1))

    def _back(self, coordinates: Tensor) -> Tensor:
        return _hartley(coordinates, (-2, -1))


class Compressed(_Selection):
    """Random frequencies of the image with random signs: compressed sensing.

    The signs spread every image over all frequencies, so each measurement sees all pixels, much as
    a random orthonormal projection does.

    Args:
        shape: of the images (C, H, W).
        share: of the number of entries that is measured, above 0 and up to 1.
        seed: of signs and frequencies.

    Raises:
        UserError: if the share is not legal.
    """

    def __init__(self, shape: Shape, share: float, seed: int = 0) -> None:
        _check_share(share)
        generator = torch.Generator().manual_seed(seed)
        total = math.prod(_checked_shape(shape))
        self._signs = torch.randint(0, 2, (total,), generator=generator) * 2 - 1
        super().__init__(shape, _random_choice(total, share, generator))

    def _forth(self, x: Tensor) -> Tensor:
        return _hartley(x.flatten(1) * self._signs.to(x), (-1,)).reshape(x.shape)

    def _back(self, coordinates: Tensor) -> Tensor:
        spread = _hartley(coordinates.flatten(1), (-1,)) * self._signs.to(coordinates)
        return spread.reshape(coordinates.shape)


def center_hole(shape: Shape, share: float = 0.25) -> Pixels:
    """All pixels but a rectangle in the middle, of ``share`` of the area.

    Raises:
        UserError: if the share is not legal, or leaves no hole.
    """
    _check_share(share)
    _, height, width = _checked_shape(shape)
    high, wide = round(height * math.sqrt(share)), round(width * math.sqrt(share))
    if not high or not wide or (high, wide) == (height, width):
        raise UserError(f"a hole of {share:g} of {height} x {width} pixels is none, or all of them")
    known = torch.ones(height, width, dtype=torch.bool)
    top, left = (height - high) // 2, (width - wide) // 2
    known[top : top + high, left : left + wide] = False
    return Pixels(shape, known)


def random_pixels(shape: Shape, share: float, seed: int = 0) -> Pixels:
    """A random ``share`` of the pixels, all channels of each.

    Raises:
        UserError: if the share is not legal.
    """
    _check_share(share)
    _, height, width = _checked_shape(shape)
    generator = torch.Generator().manual_seed(seed)
    return Pixels(shape, _random_choice(height * width, share, generator).reshape(height, width))


def _random_choice(total: int, share: float, generator: torch.Generator) -> Tensor:
    """Which of ``total`` are kept, (total,) bool: that share of them, and at least one."""
    kept = torch.zeros(total, dtype=torch.bool)
    kept[torch.randperm(total, generator=generator)[: max(1, round(share * total))]] = True
    return kept


def _hartley(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The orthonormal discrete Hartley transform over ``dims``, its own inverse."""
    found = torch.fft.fftn(x, dim=dims, norm="ortho")
    coordinates: Tensor = found.real - found.imag
    return coordinates


def _checked_shape(shape: Shape) -> Shape:
    if len(shape) != 3 or min(shape) < 1:
        raise UserError(f"images have a shape (channels, height, width), not {tuple(shape)}")
    return (shape[0], shape[1], shape[2])


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise UserError(f"share {share} must be above 0 and at most 1")
