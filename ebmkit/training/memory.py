r"""What memory a training step needs, what a device has, and how large a batch fits.

With bytes :math:`b_t(n)` alive at moment t of a step of n images (`ebmkit.training.trace`),

.. math::
    \text{total} = \text{parameters} + \text{optimiser} + \max_t b_t(n), \qquad
    b_t(n) = b_t(0) + n\,b_t' ,

so two rehearsals give the largest n that fits in M bytes, :math:`\min_t (M - b_t(0)) / b_t'`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch

from ebmkit.errors import UserError
from ebmkit.objectives import TrainingLoss
from ebmkit.training.trace import Shapes, trace_step

__all__ = [
    "Memory",
    "available_memory",
    "check_fits",
    "format_bytes",
    "largest_batch",
    "step_memory",
    "too_large",
]

ADAMW_STATES = 2
"""Numbers that AdamW keeps of each parameter."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a training step takes on its device.

    Attributes:
        parameters: parameters and buffers.
        gradients: of the parameters.
        optimizer: states of the optimiser, and averaged weights where there are any.
        activations: at the peak, what is alive beyond the room that the gradients need in the end:
            the batch, what is saved for the backward pass, intermediate results.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """The sum: the peak of the step."""
        return self.parameters + self.gradients + self.optimizer + self.activations


def step_memory(
    loss: TrainingLoss, shapes: Shapes, states: int | Fraction = ADAMW_STATES, accumulate: int = 1
) -> Memory:
    """Memory of one eager training step, without running it.

    Exact for the tensors of the step. Not in it: what Muon's update holds for a moment, about six
    times the matrices, when the activations are gone; workspaces of convolution libraries, what the
    allocator wastes, the data set, and, on CUDA, the context (about half a GB) and the batch that
    is drawn ahead.

    Args:
        loss: model and objectives, on the device and in the precision to train in.
        shapes: images of each stream of ``loss``, for this process.
        states: numbers that the optimiser keeps of each parameter; 2 for AdamW, 3 with averaged
            weights.
        accumulate: parts that each batch is split into.
    """
    step = trace_step(loss, shapes, accumulate)
    fixed, optimizer = _fixed(loss, states)
    return Memory(fixed, step.gradients, optimizer, max(step.live) - step.gradients)


def largest_batch(
    loss: TrainingLoss,
    shapes: Shapes,
    limit: int,
    states: int | Fraction = ADAMW_STATES,
    accumulate: int = 1,
) -> dict[str, int] | None:
    """The largest batch of each stream, in the proportions of ``shapes``, that ``limit`` allows.

    Args:
        loss, shapes, states, accumulate: as for `step_memory`.
        limit: bytes for the whole step, parameters and optimiser included.

    Returns:
        Stream -> number of images, a multiple of ``accumulate``; None if not even one image of each
        fits in each part.
    """
    left = limit - sum(_fixed(loss, states))
    two, four = (
        trace_step(loss, {n: (k * s[0], *s[1:]) for n, s in shapes.items()}, accumulate).live
        for k in (2, 4)  # not 1: a batch of one image may be laid out differently
    )
    scale = math.inf  # in batches of `shapes`
    for at_two, at_four in zip(two, four, strict=True):
        slope = (at_four - at_two) / 2
        if slope > 0:
            scale = min(scale, 2 + (left - at_two) / slope)
        elif at_two > left:
            return None
    sizes = {
        name: accumulate * math.floor(scale * shapes[name][0] / accumulate + 1e-9)
        for name in loss.streams
    }
    return sizes if all(size > 0 for size in sizes.values()) else None


def check_fits(
    loss: TrainingLoss,
    shapes: Shapes,
    states: int | Fraction = ADAMW_STATES,
    accumulate: int = 1,
    ranks: int = 1,
    free: int | None = None,
    fields: Mapping[str, str] | None = None,
    memory: Memory | None = None,
) -> Memory:
    """The memory of a step, if the device has it free. Ask before the first step.

    Args:
        loss, shapes, states, accumulate: as for `step_memory`.
        ranks: processes that share each batch; ``shapes`` are of one of them.
        free: bytes that may be taken beyond the parameters; by default `available_memory`.
        fields: as for `too_large`.
        memory: of the step, if it is known; by default `step_memory`.

    Raises:
        UserError: if it has not; the message says what would fit.
    """
    memory = memory or step_memory(loss, shapes, states, accumulate)
    device = next(loss.parameters()).device
    if free is None:
        free = available_memory(device)
        if free is not None and device.type == "cpu":  # all processes of this machine share it
            free //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if free is not None and memory.total - memory.parameters > free:
        raise too_large(loss, shapes, free + memory.parameters, states, accumulate, ranks, fields)
    return memory


def too_large(
    loss: TrainingLoss,
    shapes: Shapes,
    limit: int,
    states: int | Fraction = ADAMW_STATES,
    accumulate: int = 1,
    ranks: int = 1,
    fields: Mapping[str, str] | None = None,
) -> UserError:
    """The error that tells of a step for which the memory does not suffice, and what would fit.

    Args:
        loss, shapes, states, accumulate: as for `step_memory`.
        limit: bytes for the whole step, parameters and optimiser included.
        ranks: processes that share each batch.
        fields: stream -> configuration of the sizes in question; by default ``streams.NAME``.
    """
    fields = fields or {name: f"streams.{name}" for name in loss.streams}
    device = next(loss.parameters()).device
    need = step_memory(loss, shapes, states, accumulate).total
    problem = (
        f"a training step needs {format_bytes(need)} of memory and has {format_bytes(limit)} "
        f"on {device}: "
    )
    sizes = largest_batch(loss, shapes, limit, states, accumulate)
    if sizes is None:
        return UserError(
            f"{problem}not even one image of each stream fits; set a smaller model.backbone.width"
        )
    largest = " and ".join(
        f"{fields[name]}.batch_size={size * ranks}" for name, size in sizes.items()
    )
    parts = _parts_that_fit(loss, shapes, limit, states, accumulate)
    split = f", or compute.accumulate={parts} to keep the batch" if parts else ""
    return UserError(f"{problem}set {largest} at most{split}")


def available_memory(device: torch.device) -> int | None:
    """Bytes that this process can still take on ``device``; None where it cannot be found out.

    On CUDA what is free on the device or kept unused by PyTorch's allocator; on a CPU the memory
    that the system can give without swapping, within the limits of the process's control groups.
    """
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limits = [*_system_free(), *_group_free()]
    return max(0, min(limits)) if limits else None


def format_bytes(count: float) -> str:
    """``count`` bytes as people read them, in powers of 1000.

    >>> format_bytes(1.57e9)
    '1.6 GB'
    """
    for unit in ("B", "kB", "MB"):
        if abs(count) < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _fixed(loss: TrainingLoss, states: int | Fraction) -> tuple[int, int]:
    """Bytes of parameters with buffers, and of the optimiser."""
    weights = sum(t.nbytes for t in [*loss.parameters(), *loss.buffers()])
    return weights, int(states * sum(p.nbytes for p in loss.parameters() if p.requires_grad))


def _parts_that_fit(
    loss: TrainingLoss, shapes: Shapes, limit: int, states: int | Fraction, accumulate: int
) -> int | None:
    """The smallest number of parts, above ``accumulate``, that divides all batches and fits."""
    common = math.gcd(*(shapes[name][0] for name in loss.streams))
    for parts in range(accumulate + 1, common + 1):
        if common % parts == 0 and step_memory(loss, shapes, states, parts).total <= limit:
            return parts
    return None


def _system_free() -> Iterator[int]:
    """Memory of the machine: what Linux says is available, elsewhere all there is."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) * 1024
                return
    except OSError:
        pass
    try:
        yield os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return


def _group_free(
    groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Iterator[int]:
    """Room below the limit of each control group of this process, page cache not counted."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            names, top = ("memory.max", "memory.current", "inactive_file"), root
        elif "memory" in controllers.split(","):  # version 1
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            top = root / "memory"
        else:
            continue
        folder = top / path.lstrip("/")
        for group in [folder, *folder.parents]:
            if group == top or top in group.parents:
                yield from _room(group, *names)


def _room(group: Path, limit: str, usage: str, cache: str) -> Iterator[int]:
    try:
        most = int((group / limit).read_text())
        used = int((group / usage).read_text())
        pairs = [line.split() for line in (group / "memory.stat").read_text().splitlines()]
    except (OSError, ValueError):  # no such group here, or no limit ("max")
        return
    yield most - used + sum(int(value) for name, value in pairs if name == cache)
