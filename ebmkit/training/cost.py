r"""What a training run costs, before it runs, and the share of the device that it reached.

A step of F floating-point operations on a device that multiplies matrices at R per second takes at
least :math:`F / R`; one that took t seconds reached the share :math:`F / (R t)`. R is measured, not
read off a data sheet: a product of two large square matrices in the precision of the run. F is
counted (`ebmkit.training.trace`): matrix products and convolutions alone, which is nearly all.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction

import torch

from ebmkit.compute import Precision
from ebmkit.data.schedule import Stage
from ebmkit.objectives import TrainingLoss
from ebmkit.training.memory import ADAMW_STATES, Memory, format_bytes, step_memory
from ebmkit.training.trace import Shapes, forward_flops, score_flops, trace_step

__all__ = ["Effort", "Plan", "StepCost", "matrix_rate", "run_cost", "step_cost", "step_flops"]

Plan = Sequence[tuple[Stage, Shapes]]
"""The stages of a run, with the shapes that this process takes of each stream in them."""


@dataclass(frozen=True)
class Effort:
    """What a training step does beside the gradient of one loss.

    Attributes:
        gradients: how often the gradient is taken; 2 for sharpness-aware minimisation.
        update_flops: FLOPs of the optimiser's matrix products.
    """

    gradients: int = 1
    update_flops: int = 0


@dataclass(frozen=True)
class StepCost:
    """What a training step costs one process.

    Attributes:
        parameters: how many numbers are trained.
        flops: objectives that share a forward pass -> FLOPs of a step; the mean over the steps,
            where sizes change along the run.
        memory: bytes; of the largest step.
        rate: FLOP/s of matrix products on the device, in the precision of the run.
        steps: steps of the run.
        stages: text about each stage of the run -> FLOPs of a step in it; empty for one alone.
    """

    parameters: int
    flops: dict[str, int]
    memory: Memory
    rate: float
    steps: int
    stages: Mapping[str, int] = field(default_factory=dict)

    @property
    def step_flops(self) -> int:
        """FLOPs of a step."""
        return sum(self.flops.values())

    @property
    def run_flops(self) -> int:
        """FLOPs of all steps."""
        return self.step_flops * self.steps

    @property
    def least_seconds(self) -> float:
        """Seconds that all steps would take at the full matrix rate."""
        return self.run_flops / self.rate

    def share(self, seconds: float) -> float:
        """Share of the matrix rate that a step of ``seconds`` reaches, 1 for all of it."""
        return self.step_flops / (self.rate * seconds)

    def rows(self) -> list[tuple[str, str]]:
        """The cost as names and values to print."""
        memory = self.memory
        return [
            ("parameters", f"{self.parameters:,}"),
            *((text, format_flops(count) + "FLOP a step") for text, count in self.stages.items()),
            *((_of_a_step(name), format_flops(n) + "FLOP") for name, n in self.flops.items()),
            (f"all {self.steps:,} steps", format_flops(self.run_flops) + "FLOP"),
            (
                "memory",
                f"{format_bytes(memory.total)} (parameters {format_bytes(memory.parameters)}, "
                f"gradients {format_bytes(memory.gradients)}, optimiser "
                f"{format_bytes(memory.optimizer)}, activations "
                f"{format_bytes(memory.activations)})",
            ),
            ("matrix rate", format_flops(self.rate) + "FLOP/s"),
            ("time at that rate", format_seconds(self.least_seconds)),
        ]


def step_cost(
    loss: TrainingLoss,
    shapes: Shapes,
    steps: int,
    states: int | Fraction = ADAMW_STATES,
    accumulate: int = 1,
    memory: Memory | None = None,
    effort: Effort | None = None,
) -> StepCost:
    """Count and measure what a run of ``steps`` steps costs.

    Args:
        loss: model and objectives, on the device and in the precision to train in.
        shapes: images of each stream of ``loss``, for this process.
        steps: optimiser steps of the run.
        states, accumulate: as for `ebmkit.training.memory.step_memory`.
        memory: of the step, if it is known already.
        effort: what the step does beside one gradient.
    """
    device = next(loss.parameters()).device
    return StepCost(
        sum(p.numel() for p in loss.parameters() if p.requires_grad),
        step_flops(loss, shapes, effort),
        memory or step_memory(loss, shapes, states, accumulate),
        matrix_rate(device, loss.precision),
        steps,
    )


def run_cost(
    loss: TrainingLoss,
    plan: Plan,
    states: int | Fraction = ADAMW_STATES,
    accumulate: int = 1,
    effort: Effort | None = None,
) -> StepCost:
    """Count and measure what the stages of a run cost together.

    Args:
        loss: model and objectives, on the device and in the precision to train in.
        plan: its stages; what is asked for may be a part of a run.
        states, accumulate: as for `ebmkit.training.memory.step_memory`.
        effort: what a step does beside one gradient.
    """
    lengths = [stage.stop - stage.start for stage, _ in plan]
    steps = sum(lengths)
    memory = max(
        (step_memory(loss, shapes, states, accumulate) for _, shapes in plan),
        key=lambda memory: memory.total,
    )
    if len(plan) == 1:
        return step_cost(loss, plan[0][1], steps, states, accumulate, memory, effort)
    counts = [step_flops(loss, shapes, effort) for _, shapes in plan]
    mean = {
        name: round(sum(n * own[name] for n, own in zip(lengths, counts, strict=True)) / steps)
        for name in counts[0]
    }
    texts = [_stage_text(loss, stage, shapes) for stage, shapes in plan]
    return StepCost(
        sum(p.numel() for p in loss.parameters() if p.requires_grad),
        mean,
        memory,
        matrix_rate(next(loss.parameters()).device, loss.precision),
        steps,
        {text: sum(own.values()) for text, own in zip(texts, counts, strict=True)},
    )


def _of_a_step(name: str) -> str:
    return name if name.endswith("steps") else f"{name} step"


def _stage_text(loss: TrainingLoss, stage: Stage, shapes: Shapes) -> str:
    """As "steps 1 to 100: classify 512x224x224, denoise 64x128x128"."""
    own = {name: shapes[name] for name in loss.streams}
    sizes = [f"{name} {count}x{height}x{width}" for name, (count, _, height, width) in own.items()]
    return f"steps {stage.start + 1:,} to {stage.stop:,}: {', '.join(sizes)}"


def step_flops(loss: TrainingLoss, shapes: Shapes, effort: Effort | None = None) -> dict[str, int]:
    """FLOPs of forward and backward by objective; those of one stream, which share work, together.

    Activation checkpointing counts as often as it computes. A Langevin step, and a step of an
    attack, is a forward pass and one pull-back to the image, about 2 forward passes.

    Returns:
        Names joined by + -> FLOPs, as ``{"ce": ..., "dsm+cdsm": ...}``; what negatives take is
        called "20 Langevin steps", attacks "7 attack steps", and Muon's products "optimiser".
    """
    effort = effort or Effort()
    flops = {}
    for stream in loss.streams:
        own = copy.copy(loss)
        own.terms = tuple(term for term in loss.terms if loss.stream_of[term.name] == stream)
        names = "+".join(term.name for term in own.terms)
        flops[names] = effort.gradients * trace_step(own, shapes).flops
        for extra in (term.objective.extra_passes for term in own.terms):
            if extra is not None:
                taken = extra.gradients * score_flops(loss.model, shapes[stream], extra.of_labels)
                if extra.forwards:
                    forward = shapes[stream][0] * forward_flops(loss.model, shapes[stream][1:])
                    taken += extra.forwards * forward
                flops[extra.name] = flops.get(extra.name, 0) + taken
    if effort.update_flops:
        flops["optimiser"] = effort.update_flops
    return flops


def matrix_rate(device: torch.device, precision: Precision = "fp32") -> float:
    """FLOP/s of a product of two square matrices: 8192 x 8192 on CUDA, 1024 x 1024 on a CPU.

    The median of at least 3 products of random matrices after warm-up, in well under a second.
    """
    cuda = device.type == "cuda"
    size = 8192 if cuda else 1024
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    a, b = torch.randn(2, size, size, device=device, generator=generator).to(dtype)
    out = torch.empty_like(a)
    seconds: list[float] = []
    with torch.inference_mode(), _tf32(cuda, precision):
        _timed(a, b, out)
        start = time.perf_counter()
        while len(seconds) < 3 or (len(seconds) < 20 and time.perf_counter() - start < 0.3):
            seconds.append(_timed(a, b, out))
    return 2 * size**3 / statistics.median(seconds)


def _timed(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> float:
    """Seconds that ``a @ b`` takes on its device."""
    if a.device.type != "cuda":
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        return time.perf_counter() - start
    stream = torch.cuda.current_stream(a.device)
    begin, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    begin.record(stream)
    torch.mm(a, b, out=out)
    end.record(stream)
    end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / 1000


@contextmanager
def _tf32(cuda: bool, precision: Precision) -> Iterator[None]:
    """Within, float32 products are rounded to TF32 exactly if ``precision`` says so."""
    if not cuda:
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        matmul.allow_tf32 = before


def format_flops(count: float) -> str:
    """``count`` with a prefix, to be followed by FLOP or FLOP/s.

    >>> format_flops(6.71e16)
    '67.1 P'
    """
    for prefix in ("", "k", "M", "G", "T", "P"):
        if count < 999.5:
            return f"{count:.3g} {prefix}"
        count /= 1000
    return f"{count:.3g} E"


def format_seconds(seconds: float) -> str:
    """``seconds`` in the unit that people would choose.

    >>> format_seconds(5400)
    '1.5 h'
    """
    for unit, length in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"
