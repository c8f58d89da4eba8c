r"""Linear inverse problems: measurements of images, baseline solutions, and the table of tasks.

A measurement consists of n numbers :math:`m = M^\top x` with :math:`M^\top M = I`. So :math:`M m`
is the minimum-norm image with measurements m, and :math:`M M^\top` projects onto the measured
subspace. The matrices are never formed.

============== =============================== ======================= ===========================
measurement    :math:`M^\top x`                :math:`M m`             simple solutions, for a
                                                                       comparison (`baselines`)
============== =============================== ======================= ===========================
`Pixels`       the pixels of a mask            m at these pixels, 0    mean of the known pixels;
                                               elsewhere               nearest known pixel; with
                                                                       scikit-image biharmonic
                                                                       inpainting (Damelin & Hoang
                                                                       2018)
`BlockAverage` means of k x k blocks, times k  each block filled with  :math:`M m`; bicubic
                                               its mean                interpolation
`LowPass`      the low frequencies             the blurred image       :math:`M m` on gray
`Compressed`   random frequencies of the image the image with only     :math:`M m` on gray
               with random signs               these frequencies
============== =============================== ======================= ===========================

Frequencies are those of the discrete Hartley transform: the real part of the orthonormal Fourier
transform minus its imaginary part. It is real, orthonormal and its own inverse. A set of
frequencies that contains their negatives spans the same images in both transforms.
"""

from __future__ import annotations

import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor

from ebmkit.errors import UserError
from ebmkit.randomness import seeded_generator
from ebmkit.registry import find

Shape = tuple[int, int, int]

BIHARMONIC = 5000
"""Maximum number of unknown pixels for biharmonic inpainting, a linear system of that size."""


class Measurement(ABC):
    """Measurement of n = ``count`` numbers of each image of ``shape`` (C, H, W).

    Raises:
        UserError: if the shape is not legal, or ``count`` is 0.
    """

    def __init__(self, shape: Shape, count: int) -> None:
        self.shape, self.count = _checked_shape(shape), count
        if not count:
            raise UserError("nothing is measured: keep more than 0 of the image")

    def measure(self, x: Tensor) -> Tensor:
        """Measure images (B, C, H, W): M^T x, (B, n); a `UserError` if they have another shape."""
        if x.shape[1:] != self.shape:
            raise UserError(
                f"this measurement is of images {self.shape}, not {tuple(x.shape[1:])}: make it "
                "for the shape (channels, height, width) of yours"
            )
        return self._measure(x)

    def adjoint(self, m: Tensor) -> Tensor:
        """Map measurements (B, n) to images M m (B, C, H, W); a `UserError` for another shape."""
        if m.ndim != 2 or m.shape[1] != self.count:
            raise UserError(
                f"this measurement has {self.count} numbers of each image, (B, {self.count}), not "
                f"{tuple(m.shape)}"
            )
        return self._adjoint(m)

    @abstractmethod
    def _measure(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _adjoint(self, m: Tensor) -> Tensor: ...

    def project(self, x: Tensor) -> Tensor:
        """Project ``x`` onto the measured subspace: M M^T x."""
        return self.adjoint(self.measure(x))

    def impose(self, x: Tensor, m: Tensor) -> Tensor:
        """Return the images nearest to ``x`` whose measurements are exactly ``m``."""
        return x + self.adjoint(m - self.measure(x))

    def on_gray(self, m: Tensor) -> Tensor:
        """Return the image (C, H, W) nearest to gray with the measurements ``m`` (1, n)."""
        return self.impose(torch.full((1, *self.shape), 0.5, device=m.device), m)[0]

    def baselines(self, m: Tensor) -> dict[str, Tensor]:
        """Simple solutions (C, H, W) for the measurements (1, n), by name, clipped to [0, 1]."""
        return {name: image.clamp(0, 1) for name, image in self._simple(m).items()}

    def _simple(self, m: Tensor) -> dict[str, Tensor]:
        return {"pseudo-inverse": self.on_gray(m)}


class _Selection(Measurement):
    """The ``known`` coordinates (C, H, W) bool of an orthonormal transform (here the identity)."""

    def __init__(self, shape: Shape, known: Tensor) -> None:
        self._where = torch.nonzero(known.flatten()).flatten()
        super().__init__(shape, len(self._where))

    def _measure(self, x: Tensor) -> Tensor:
        return self._transform(x).flatten(1)[:, self._where.to(x.device)]

    def _adjoint(self, m: Tensor) -> Tensor:
        whole = m.new_zeros(len(m), math.prod(self.shape))
        whole[:, self._where.to(m.device)] = m
        return self._inverse(whole.reshape(-1, *self.shape))

    def _transform(self, x: Tensor) -> Tensor:
        return x

    def _inverse(self, coordinates: Tensor) -> Tensor:
        return self._transform(coordinates)


class Pixels(_Selection):
    """The pixels that a mask ``known``, (H, W) or (C, H, W) bool, marks; for inpainting.

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

    def _simple(self, m: Tensor) -> dict[str, Tensor]:
        from scipy.ndimage import distance_transform_edt

        image = self.on_gray(m)
        known = self.adjoint(torch.ones(1, self.count, device=m.device))[0] > 0.5  # (C, H, W)
        flat, near = image.clone(), image.clone()
        for channel, there in enumerate(known):
            flat[channel, ~there] = image[channel, there].mean()
            _, places = distance_transform_edt(~there.cpu().numpy(), return_indices=True)
            rows, columns = torch.from_numpy(places)
            near[channel] = image[channel, rows, columns]
        found = {"mean": flat, "nearest": near}
        missing = ~known[0]
        if importlib.util.find_spec("skimage") and 0 < int(missing.sum()) <= BIHARMONIC:
            from skimage.restoration import inpaint_biharmonic

            pixels = rearrange(image.cpu().double(), "c h w -> h w c").numpy()
            filled = inpaint_biharmonic(pixels, missing.cpu().numpy(), channel_axis=-1)
            found["biharmonic"] = rearrange(torch.from_numpy(filled), "h w c -> c h w").to(image)
        return found


class BlockAverage(Measurement):
    """Means of blocks of ``factor`` x ``factor`` pixels, for super-resolution.

    Raises:
        UserError: if the factor is below 2 or does not divide height and width.
    """

    def __init__(self, shape: Shape, factor: int) -> None:
        channels, height, width = _checked_shape(shape)
        if factor < 2 or height % factor or width % factor:
            raise UserError(
                f"factor {factor} does not divide images of {height} x {width} into blocks: take a "
                "common divisor of 2 or more"
            )
        self.factor, self.small = factor, (channels, height // factor, width // factor)
        super().__init__(shape, math.prod(self.small))

    def _measure(self, x: Tensor) -> Tensor:
        return self.factor * torch.nn.functional.avg_pool2d(x, self.factor).flatten(1)

    def _adjoint(self, m: Tensor) -> Tensor:
        return repeat(
            self.small_images(m), "b c h w -> b c (h k) (w l)", k=self.factor, l=self.factor
        )

    def _simple(self, m: Tensor) -> dict[str, Tensor]:
        # with antialias the cubic kernel is Keys', a = -1/2, as in Pillow and Matlab
        how: dict[str, Any] = {"mode": "bicubic", "align_corners": False, "antialias": True}
        large = torch.nn.functional.interpolate(self.small_images(m), self.shape[1:], **how)
        return {"nearest": self.on_gray(m), "bicubic": large[0]}

    def small_images(self, m: Tensor) -> Tensor:
        """Block means (B, C, H / factor, W / factor) from measurements ``m`` (B, n)."""
        return m.reshape(-1, *self.small) / self.factor

    def of_small_images(self, small: Tensor) -> Tensor:
        """Measurements (B, n) from block means ``small`` (B, C, H / factor, W / factor)."""
        return self.factor * small.flatten(1)


class LowPass(_Selection):
    """Ideal low-pass filter: the frequencies up to a radius, for deblurring.

    The radius is the smallest with at least ``share`` of all frequencies, above 0 and up to 1.

    Raises:
        UserError: if the share is not legal.
    """

    def __init__(self, shape: Shape, share: float) -> None:
        _, height, width = _checked_shape(shape, share)
        rows, columns = torch.fft.fftfreq(height), torch.fft.fftfreq(width)
        radius = (rows[:, None].double().square() + columns.double().square()).sqrt()
        needed = max(1, math.ceil(share * radius.numel()))
        limit = radius.flatten().sort().values[needed - 1]
        super().__init__(shape, (radius <= limit + 1e-9).expand(shape))

    def _simple(self, m: Tensor) -> dict[str, Tensor]:
        return {"low-passed": self.on_gray(m)}

    def _transform(self, x: Tensor) -> Tensor:
        return _hartley(x, (-2, -1))


class Compressed(_Selection):
    """Compressed sensing: random frequencies of the image with random signs.

    The signs spread every image over all frequencies, so each measurement depends on all pixels, as
    in a random orthonormal projection. A ``share`` of the number of entries is measured, above 0
    and up to 1; ``seed`` is the random seed of signs and frequencies.

    Raises:
        UserError: if the share is not legal.
    """

    def __init__(self, shape: Shape, share: float, seed: int = 0) -> None:
        generator = seeded_generator(seed)
        total = math.prod(_checked_shape(shape, share))
        self._signs = torch.randint(0, 2, (total,), generator=generator) * 2 - 1
        super().__init__(shape, _random_choice(total, share, generator))

    def _transform(self, x: Tensor) -> Tensor:
        return _hartley(x.flatten(1) * self._signs.to(x), (-1,)).reshape(x.shape)

    def _inverse(self, coordinates: Tensor) -> Tensor:
        spread = _hartley(coordinates.flatten(1), (-1,)) * self._signs.to(coordinates)
        return spread.reshape(coordinates.shape)


def center_hole(shape: Shape, share: float = 0.25) -> Pixels:
    """All pixels except a rectangle in the centre that covers ``share`` of the area.

    Raises:
        UserError: if the share is not legal, or the hole is empty or the whole image.
    """
    _, height, width = _checked_shape(shape, share)
    high, wide = round(height * math.sqrt(share)), round(width * math.sqrt(share))
    if not high or not wide or (high, wide) == (height, width):
        raise UserError(f"share {share:g} of {height} x {width} pixels leaves no hole, or no pixel")
    known = torch.ones(height, width, dtype=torch.bool)
    top, left = (height - high) // 2, (width - wide) // 2
    known[top : top + high, left : left + wide] = False
    return Pixels(shape, known)


def random_pixels(shape: Shape, share: float, seed: int = 0) -> Pixels:
    """A random ``share`` of the pixels, with all their channels.

    Raises:
        UserError: if the share is not legal.
    """
    _, height, width = _checked_shape(shape, share)
    generator = seeded_generator(seed)
    return Pixels(shape, _random_choice(height * width, share, generator).reshape(height, width))


def _random_choice(total: int, share: float, generator: torch.Generator) -> Tensor:
    """Random mask (total,) bool, true for a ``share`` of the entries, at least one."""
    known = torch.zeros(total, dtype=torch.bool)
    known[torch.randperm(total, generator=generator)[: max(1, round(share * total))]] = True
    return known


def _hartley(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Orthonormal discrete Hartley transform over ``dims``; it is its own inverse."""
    found = torch.fft.fftn(x, dim=dims, norm="ortho")
    coordinates: Tensor = found.real - found.imag
    return coordinates


def _checked_shape(shape: Shape, share: float = 1.0) -> Shape:
    if len(shape) != 3 or min(shape) < 1:
        raise UserError(f"images have a shape (channels, height, width), not {tuple(shape)}")
    if not 0 < share <= 1:
        raise UserError(f"share {share} must be above 0 and at most 1")
    return (shape[0], shape[1], shape[2])


# --- tasks ---------------------------------------------------------------------------------------


class TaskOptions(NamedTuple):
    """Options of a measurement; None: the default of the task."""

    mask: Tensor | None = None  # (H, W) bool, true where the image is to be filled in
    share: float | None = None  # missing (inpaint) or known (other tasks) share of the image
    factor: int | None = None  # upscaling factor of super-resolution
    seed: int = 0  # random seed of pixels and frequencies


@dataclass(frozen=True)
class Task:
    """A named restoration task."""

    name: str
    description: str
    make: Callable[[Shape, TaskOptions], Measurement]  # its options are resolved
    defaults: dict[str, Any]  # the options of the task and their default values
    from_measured: bool = True  # whether a measurement can be given as an image

    def resolved(self, options: TaskOptions) -> TaskOptions:
        """Fill in the defaults of the task."""
        missing = {k: v for k, v in self.defaults.items() if getattr(options, k) is None}
        return options._replace(**missing)

    def measurement(self, shape: Shape, options: TaskOptions) -> Measurement:
        """Build the measurement for images of ``shape``.

        Raises:
            UserError: if the task does not have an option, or its value does not fit the shape.
        """
        for name in ("mask", "share", "factor"):
            if getattr(options, name) is not None and name not in self.defaults:
                own = " or ".join(f"--{o}" for o in self.defaults)
                raise UserError(f"task {self.name} has no --{name}: it takes {own}")
        return self.make(shape, self.resolved(options))

    def degrade(
        self, image: Tensor, options: TaskOptions, measured: bool = False
    ) -> tuple[Measurement, Tensor, Tensor | None]:
        """Measure an ``image`` (C, H, W) in [0, 1]; with ``measured``, it is the measurement.

        A measured image has missing parts (inpaint), is small (superres), or blurred (deblur).
        Super-resolution of a clean image drops rows and columns at the bottom and the right that do
        not fill a block.

        Returns:
            The measurement, its values (1, n), and the clean image (C, H, W), None if unknown.

        Raises:
            UserError: if the task does not have an option, its value does not fit the image, or
                the task does not accept a measured image.
        """
        if measured and not self.from_measured:
            raise UserError(f"task {self.name} needs the clean image: leave out --measured")
        channels, height, width = image.shape
        factor = self.resolved(options).factor or 1
        if measured and factor > 1:
            blocks = self.measurement((channels, height * factor, width * factor), options)
            assert isinstance(blocks, BlockAverage)
            return blocks, blocks.of_small_images(image[None]), None
        image = image[:, : height - height % factor, : width - width % factor]
        measurement = self.measurement((channels, *image.shape[1:]), options)
        return measurement, measurement.measure(image[None]), None if measured else image


def _inpaint(shape: Shape, options: TaskOptions) -> Measurement:
    if options.mask is None:
        return center_hole(shape, options.share or 0.0)
    if not bool(options.mask.any()):
        raise UserError("the mask is black everywhere: paint the area to fill in white")
    return Pixels(shape, ~options.mask)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "inpaint",
            "fill in the white area of a mask, or a hole in the centre of the image",
            _inpaint,
            {"mask": None, "share": 0.1},
        ),
        Task(
            "random-pixels",
            "restore an image from a random share of its pixels",
            lambda shape, own: random_pixels(shape, own.share or 0.0, own.seed),
            {"share": 0.5},
            from_measured=False,
        ),
        Task(
            "superres",
            "super-resolution, from the means of blocks",
            lambda shape, own: BlockAverage(shape, own.factor or 0),
            {"factor": 2},
        ),
        Task(
            "deblur",
            "restore an image from its lowest frequencies",
            lambda shape, own: LowPass(shape, own.share or 0.0),
            {"share": 0.25},
        ),
        Task(
            "compressed",
            "compressed sensing, from random projections",
            lambda shape, own: Compressed(shape, own.share or 0.0, own.seed),
            {"share": 0.25},
            from_measured=False,
        ),
    )
}
"""All tasks, by name."""


def find_task(name: str) -> Task:
    """Return the task called ``name``.

    Raises:
        UserError: if it is unknown; the error suggests the nearest name.
    """
    return find("task", TASKS, name)
