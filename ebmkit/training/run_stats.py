r"""What a run really took, beside what it was counted to take.

A step of F floating-point operations that lasted t seconds used the share :math:`F / (R t)` of a
device that multiplies matrices at R per second. t is the median over the stretches between two rows
of the log, without validations and saving, and without the first stretch (compilers and caches warm
up in it) where there are others. Where batch and image sizes change along the run, F and t are
means over its steps, and each stage has a median of its own.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import torch

from ebmkit.errors import UserError
from ebmkit.objectives import TrainingLoss
from ebmkit.training.cost import Effort, Plan, StepCost, format_flops, format_seconds, run_cost
from ebmkit.training.memory import (
    ADAMW_STATES,
    Memory,
    available_memory,
    check_fits,
    format_bytes,
    step_memory,
    too_large,
)
from ebmkit.training.trace import Shapes

__all__ = ["Budget", "RunStats", "Stopwatch", "peak_memory"]


class Stretch(NamedTuple):
    """Steps that were timed: how many, seconds, seconds of them for data, stage of the run."""

    steps: int
    seconds: float
    data: float
    stage: int


MOST_STRETCHES = 1000
"""That a stopwatch keeps; then neighbours are put together."""


class Stopwatch:
    """Times stretches of steps, and how much of them went into waiting for data.

    Attributes:
        stretches: those that were timed.
        lengths: stage of the run -> number of its steps, to weigh the stages by; None: by the
            steps that were timed.
    """

    def __init__(self) -> None:
        self.stretches: list[Stretch] = []
        self.lengths: Mapping[int, int] | None = None
        self.restart()

    def restart(self) -> None:
        """Begin a stretch."""
        self._begun, self._steps, self._data = time.perf_counter(), 0, 0.0

    def step(self, data_seconds: float) -> None:
        """Count a step, of which ``data_seconds`` were spent waiting for its batches."""
        self._steps += 1
        self._data += data_seconds

    def stop(self, stage: int = 0) -> float:
        """End the stretch and begin another; seconds per step of the one that ended.

        Args:
            stage: of the run, that all of its steps were in.
        """
        seconds = time.perf_counter() - self._begun
        steps = max(1, self._steps)
        self.stretches.append(Stretch(steps, seconds, self._data, stage))
        if len(self.stretches) > MOST_STRETCHES:
            self.stretches = [s for own in self._by_stage().values() for s in _paired(own)]
        self.restart()
        return seconds / steps

    @property
    def seconds(self) -> float:
        """Seconds of a step: the median in each stage, averaged over the steps of the stages."""
        total = steps = 0.0
        for stage, own in self._by_stage().items():
            length = self.lengths[stage] if self.lengths else sum(s.steps for s in own)
            settled = own[1:] or own
            total += length * statistics.median(s.seconds / s.steps for s in settled)
            steps += length
        return total / steps

    @property
    def data_share(self) -> float:
        """Share of the time that the host waited for data, 0 to 1."""
        settled = [s for own in self._by_stage().values() for s in own[1:] or own]
        return sum(s.data for s in settled) / sum(s.seconds for s in settled)

    def _by_stage(self) -> dict[int, list[Stretch]]:
        found: dict[int, list[Stretch]] = {}
        for stretch in self.stretches:
            found.setdefault(stretch.stage, []).append(stretch)
        return found


def _paired(stretches: list[Stretch]) -> list[Stretch]:
    """Neighbours of one stage put together; the first, in which things warm up, stays alone."""
    first, *rest = stretches
    pairs = [
        Stretch(a.steps + b.steps, a.seconds + b.seconds, a.data + b.data, a.stage)
        for a, b in zip(rest[::2], rest[1::2], strict=False)
    ]
    return [first, *pairs, *rest[len(pairs) * 2 :]]


_MEMORIES: dict[object, Memory] = {}
"""What was counted in this process, by all that the count depends on."""


@dataclass(frozen=True)
class Budget:
    """The steps of a run, to be counted before they are taken.

    Args:
        loss: model and objectives, on the device and in the precision to train in.
        plan: the stages of the run, and the images that this process takes in a step of them.
        states: numbers that the optimiser keeps of each parameter.
        accumulate: parts that each batch is split into.
        processes: how many share each batch.
        effort: what a step does beside one gradient.
        described: configurations of run and model as text, device included. A process counts the
            memory of a step once for each; None: each time, as for a model composed by hand.
    """

    loss: TrainingLoss
    plan: Plan
    states: int | Fraction = ADAMW_STATES
    accumulate: int = 1
    processes: int = 1
    effort: Effort | None = None
    described: str | None = None

    def check(self) -> Memory:
        """The memory that the largest step takes.

        Raises:
            UserError: if the device has less free; the message says how large a batch would fit.
        """
        needs = [
            check_fits(
                self.loss,
                shapes,
                self.states,
                self.accumulate,
                self.processes,
                fields=stage.fields,
                memory=self._memory(shapes),
            )
            for stage, shapes in self.plan
        ]
        return max(needs, key=lambda memory: memory.total)

    def _memory(self, shapes: Shapes) -> Memory:
        if self.described is None:
            return step_memory(self.loss, shapes, self.states, self.accumulate)
        key = (self.described, tuple(shapes.items()), self.states, self.accumulate)
        if key not in _MEMORIES:
            _MEMORIES[key] = step_memory(self.loss, shapes, self.states, self.accumulate)
        return _MEMORIES[key]

    def cost(self, steps: int, first: int = 0) -> StepCost:
        """What steps ``first`` .. ``steps`` - 1 cost: counted, but for the device's matrix rate."""
        cut = [
            (stage._replace(start=max(first, stage.start), stop=min(steps, stage.stop)), shapes)
            for stage, shapes in self.plan
        ]
        plan = [(stage, shapes) for stage, shapes in cut if stage.start < stage.stop]
        return run_cost(self.loss, plan, self.states, self.accumulate, self.effort)

    def too_large(self, held: int, step: int = 0) -> UserError:
        """The error for a step that ran out of memory; it says how large a batch would fit.

        To be asked when nothing of the step is referred to any more, its exception included.

        Args:
            held: bytes of parameters and optimiser states, which are there already.
            step: of the run.
        """
        stage, shapes = next(own for own in reversed(self.plan) if own[0].start <= step)
        device = next(self.loss.parameters()).device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        limit = (available_memory(device) or 0) + held
        return too_large(
            self.loss,
            shapes,
            limit,
            self.states,
            self.accumulate,
            self.processes,
            stage.fields,
        )


@dataclass(frozen=True)
class RunStats:
    """What a run took; written to ``RUN/cost.json``.

    Attributes:
        steps: steps done now (a continued run counts its own).
        step_seconds: median seconds of a step, averaged over stages of the run.
        images_per_s: images of all streams and processes.
        data_share: share of the time that the host waited for data.
        peak_memory: bytes; on CUDA of tensors on the device, on a CPU of the whole process.
        flops: objectives that share a forward pass -> FLOPs of a step of one process, on average.
        matrix_rate: FLOP/s of matrix products, measured on this device in this precision.
        share: share of that rate that the steps reached.
        precision, compiled, processes, device: how it was computed.
    """

    steps: int
    step_seconds: float
    images_per_s: float
    data_share: float
    peak_memory: int
    flops: dict[str, int]
    matrix_rate: float
    share: float
    precision: str
    compiled: bool
    processes: int
    device: str

    @classmethod
    def of(
        cls, cost: StepCost, watch: Stopwatch, images_per_step: float, **circumstances: Any
    ) -> RunStats:
        """From what was counted and what was timed."""
        seconds = watch.seconds
        return cls(
            steps=sum(stretch.steps for stretch in watch.stretches),
            step_seconds=seconds,
            images_per_s=images_per_step / seconds,
            data_share=watch.data_share,
            flops=cost.flops,
            matrix_rate=cost.rate,
            share=cost.share(seconds),
            **circumstances,
        )

    def document(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def sentence(self) -> str:
        """One line for the end of a run."""
        return (
            f"{format_seconds(self.step_seconds)} a step ({self.data_share:.1%} of it for data), "
            f"{self.images_per_s:,.0f} images/s, "
            f"peak memory {format_bytes(self.peak_memory)}, "
            f"{format_flops(sum(self.flops.values()))}FLOP a step: {self.share:.0%} of the matrix "
            f"rate of {self.processes} x {self.device} ({format_flops(self.matrix_rate)}FLOP/s "
            f"in {self.precision})"
        )


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a CUDA device, or the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
