"""What pictures are restored from: the table of tasks, each a linear measurement of the image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ebmkit.errors import UserError
from ebmkit.registry import find
from ebmkit.sampling.inverse import (
    BlockAverage,
    Compressed,
    LowPass,
    Measurement,
    Pixels,
    center_hole,
    random_pixels,
)

__all__ = ["TASKS", "Degraded", "Task", "TaskOptions", "degrade", "find_task"]

Shape = tuple[int, int, int]


class TaskOptions(NamedTuple):
    """What a measurement is made of; None: the task's own.

    Attributes:
        mask: (H, W) bool, true where the picture is to be filled in.
        share: of the image: that is missing (inpaint), or that is known (the others).
        factor: by which super-resolution enlarges.
        seed: of random pixels and random frequencies.
    """

    mask: Tensor | None = None
    share: float | None = None
    factor: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Task:
    """A task that has a name.

    Attributes:
        name: of the table.
        about: one line.
        make: shape (C, H, W) and options to the measurement.
        takes: the options that it looks at.
        share: where none is given.
        from_measured: whether the measured picture is a picture that one can have.
    """

    name: str
    description: str
    make: Callable[[Shape, TaskOptions], Measurement]
    takes: tuple[str, ...]
    share: float | None = None
    from_measured: bool = True

    def measurement(self, shape: Shape, options: TaskOptions) -> Measurement:
        """The measurement of images of ``shape``.

        Raises:
            UserError: if an option is not the task's, or not legal for the shape.
        """
        for name in ("mask", "share", "factor"):
            if getattr(options, name) is not None and name not in self.takes:
                own = " or ".join(f"--{o}" for o in self.takes)
                raise UserError(f"task {self.name} has no --{name}: it takes {own}")
        if options.share is None:
            options = options._replace(share=self.share)
        return self.make(shape, options)


class Degraded(NamedTuple):
    """A picture, and what is known of it.

    Attributes:
        measurement: which numbers are known.
        measured: (1, n), what they are.
        look: (C, H, W), the known on gray ground, for people and as a baseline.
        clean: (C, H, W), the picture itself; None where only measurements are known.
    """

    measurement: Measurement
    measured: Tensor
    look: Tensor
    clean: Tensor | None


def degrade(task: Task, picture: Tensor, options: TaskOptions, measured: bool = False) -> Degraded:
    """Measure a ``picture`` (C, H, W), or take it for the measured one.

    Super-resolution of a clean picture leaves out rows and columns at the bottom and at the right
    that make no whole block.

    Args:
        task: which.
        picture: in [0, 1].
        options: of the measurement.
        measured: whether the picture is what was measured: with the parts to fill in (inpaint,
            random-pixels), small (superres), or blurred (deblur).

    Raises:
        UserError: if an option is not the task's or not legal for the picture, or no picture can
            be what was measured.
    """
    if measured and not task.from_measured:
        raise UserError(f"task {task.name} measures no picture: give the clean one, and leave out "
                        "--measured")  # fmt: skip
    if task.name == "superres":
        factor = options.factor or 2
        channels, height, width = picture.shape
        if measured:
            shape = (channels, height * factor, width * factor)
            blocks = task.measurement(shape, options)
            assert isinstance(blocks, BlockAverage)
            numbers = blocks.of_small_images(picture[None])
            return _seen(blocks, numbers, None)
        if factor >= 2:
            picture = picture[:, : height - height % factor, : width - width % factor]
    channels, height, width = picture.shape
    measurement = task.measurement((channels, height, width), options)
    numbers = measurement.measure(picture[None])
    return _seen(measurement, numbers, None if measured else picture)


def find_task(name: str) -> Task:
    """The entry of `TASKS` called ``name``.

    Raises:
        UserError: if there is none; it names the nearest.
    """
    return find("task", TASKS, name)


def _seen(measurement: Measurement, numbers: Tensor, clean: Tensor | None) -> Degraded:
    gray = torch.full((1, *measurement.shape), 0.5, device=numbers.device)
    return Degraded(measurement, numbers, measurement.impose(gray, numbers)[0], clean)


def _inpaint(shape: Shape, options: TaskOptions) -> Measurement:
    if options.mask is None:
        assert options.share is not None
        return center_hole(shape, options.share)
    if not bool(options.mask.any()):
        raise UserError("the mask is black everywhere: paint white what is to be filled in")
    return Pixels(shape, ~options.mask)


def _random_pixels(shape: Shape, options: TaskOptions) -> Measurement:
    assert options.share is not None
    return random_pixels(shape, options.share, options.seed)


def _superres(shape: Shape, options: TaskOptions) -> Measurement:
    return BlockAverage(shape, 2 if options.factor is None else options.factor)


def _deblur(shape: Shape, options: TaskOptions) -> Measurement:
    assert options.share is not None
    return LowPass(shape, options.share)


def _compressed(shape: Shape, options: TaskOptions) -> Measurement:
    assert options.share is not None
    return Compressed(shape, options.share, options.seed)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "inpaint",
            "fill in the white area of a mask, or a hole in the centre of the image",
            _inpaint,
            ("mask", "share"),
            0.1,
        ),
        Task(
            "random-pixels",
            "restore an image from a random share of its pixels",
            _random_pixels,
            ("share",),
            0.5,
            False,
        ),
        Task("superres", "super-resolution, from the means of blocks", _superres, ("factor",)),
        Task("deblur", "restore an image from its lowest frequencies", _deblur, ("share",), 0.25),
        Task(
            "compressed",
            "compressed sensing, from random projections",
            _compressed,
            ("share",),
            0.25,
            False,
        ),
    )
}
"""All tasks, by name."""
