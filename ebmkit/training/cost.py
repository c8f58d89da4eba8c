r"""Cost of a training step: floating-point operations, memory and time, before and after a run.

The step runs on fake tensors, which have shapes, types, devices and storages but no data, with a
copy of the model that needs no memory either. A `Recorder` counts for every operation

- the *FLOPs* of matrix products and convolutions, two per multiply-add, in the forward, backward
  and double backward passes, by the formulas of `torch.utils.flop_counter`;
- the *live bytes*: each storage counts from the operation that allocates it until its release.

A step of one stream costs about :math:`3 + 3k` forward passes if k different scores enter the loss:
ce costs 3, dsm 6, and dsm with cdsm on one batch 9; a cross-entropy on that batch adds nothing. A
Hessian-vector product differentiates once more, so ism costs 12. The count is exact for the eager
step; it differs from this rule by up to 3 %, for ism by 10 %.

The total is parameters, optimiser and :math:`\max_t b_t(n)`, with :math:`b_t(n) = b_t(0) + n\,b_t'`
live bytes at moment t of a step of n images. So two traces give the largest n that fits in M
bytes, :math:`\min_t (M - b_t(0)) / b_t'`. Not counted: memory that an operation allocates and
releases internally (workspaces of convolution libraries), and the overhead of the allocator.

A step of F operations on a device with a matrix rate of R FLOP/s (`ebmkit.compute.matrix_rate`)
takes at least :math:`F / R`; a step of t seconds reaches :math:`F / (R t)`, its MFU (model FLOPs
utilisation). t is the median over the intervals between two log rows, without validations and
checkpoints, and without the first interval (warm-up) if there are others. If sizes change during
the run, F and t are means over its steps.
"""

from __future__ import annotations

import copy
import gc
import math
import os
import statistics
import time
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from operator import add
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (  # the meta device has no autocast
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ebmkit.compute import available_memory, matrix_rate
from ebmkit.data import Batch
from ebmkit.data.schedule import Stage
from ebmkit.energy import EnergyModel, ScoreModel, WeightedLogProbability
from ebmkit.errors import UserError
from ebmkit.objectives import TrainingLoss

Shapes = Mapping[str, tuple[int, int, int, int]]
"""Stream -> shape (B, C, H, W) of the images that this process draws from it per step."""

ADAMW_STATES = 2  # state values of AdamW per parameter
MAX_TIMED_INTERVALS = 1000  # maximum number that a stopwatch keeps before it merges neighbours

M = TypeVar("M", bound=nn.Module)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts FLOPs and live bytes of the operations in its context, on real or fake tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.live: list[int] = [0]  # live bytes after each operation that allocates a storage
        self._now, self._bytes = 0, dict[int, int]()

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count the storages of ``tensors`` that are not counted yet."""
        fresh = {s._cdata: s for s in (t.untyped_storage() for t in tensors)}
        fresh = {key: storage for key, storage in fresh.items() if key not in self._bytes}
        for key, storage in fresh.items():
            self._bytes[key] = storage.nbytes()
            self._now += storage.nbytes()
            weakref.finalize(storage, self._release, key).atexit = False
        if fresh:
            self.live.append(self._now)

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Exclude ``tensors`` and their views from the count."""
        self._bytes |= {tensor.untyped_storage()._cdata: 0 for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += int(count(*args, **kwargs, out_val=out))
        self.hold(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out

    def _release(self, key: int) -> None:
        self._now -= self._bytes.pop(key)


class StepTrace(NamedTuple):
    """FLOPs and memory of a traced step."""

    flops: int  # forward and backward, whole batch
    live: tuple[int, ...]  # live bytes at each moment, without parameters, buffers and optimiser
    gradients: int  # bytes of the parameters' gradients, which are live at the end
    unused: tuple[str, ...]  # names, within the loss, of trained parameters without gradient


def trace_step(loss: TrainingLoss, shapes: Shapes, accumulate: int = 1) -> StepTrace:
    """Run forward and backward of ``loss`` on fake batches of ``shapes``; ``loss`` is unchanged.

    The eager step is traced, even if ``loss`` is compiled. ``accumulate`` is that of `Budget`.

    Raises:
        UserError: if an objective or the network reads values of its tensors.
    """
    recorder = Recorder()
    parts_run = min(accumulate, 2)  # all parts after the first are alike
    with _fake(loss) as fake:
        fake.train().zero_grad(set_to_none=True)
        batches = {name: _batch(fake, name, shapes[name]) for name in loss.streams}
        recorder.ignore([*fake.parameters(), *fake.buffers()])
        recorder.hold(t for batch in batches.values() for t in batch.tensors)
        with recorder, torch.enable_grad():
            for _ in range(parts_run):
                part = {n: b.rows(slice(-(-len(b.x) // accumulate))) for n, b in batches.items()}
                for group in [{n: b} for n, b in part.items()] if loss.separate else [part]:
                    try:
                        fake(group).total.backward()
                    except (DataDependentOutputException, DynamicOutputShapeException) as error:
                        raise UserError(
                            "an objective or the network reads values of its tensors (by if, "
                            f"float() or .item(): {error}), so the cost of a step cannot be "
                            "estimated: use tensor operations, such as torch.where"
                        ) from None
        trained = [(name, p) for name, p in fake.named_parameters() if p.requires_grad]
        gradients = sum(p.grad.nbytes for _, p in trained if p.grad is not None)
        unused = tuple(name for name, p in trained if p.grad is None)
    flops = recorder.flops * accumulate // parts_run
    return StepTrace(flops, tuple(recorder.live), gradients, unused)


def network_flops(
    model: ScoreModel,
    shape: tuple[int, int, int, int],
    of: Literal["forward", "score", "posteriors"] = "forward",
) -> int:
    """FLOPs of a model on a batch of ``shape`` (B, C, H, W), two per multiply-add: of the forward
    pass, the score, or the gradient of log-posteriors, which an attack needs."""
    recorder = Recorder()
    with _fake(model) as fake, torch.no_grad():
        fake.eval()
        y = torch.empty(shape, device=next(fake.parameters()).device)
        sigma = torch.empty(shape[0], device=y.device) if model.noise_conditional else None
        with recorder:
            if of == "posteriors":
                assert isinstance(fake, EnergyModel)
                weights = torch.ones(len(y), fake.num_classes, device=y.device)
                fake.value_and_grads(y, sigma, WeightedLogProbability(weights))
            elif of == "score":
                fake.score(y, sigma)
            else:
                fake(y, sigma)
    return recorder.flops


@contextmanager
def _fake(module: M) -> Iterator[M]:
    """A fake copy of ``module``; within the context new tensors are fake and warnings are off."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [*module.parameters(), *module.buffers()]
        yield copy.deepcopy(module, {id(t): mode.from_tensor(t) for t in tensors})


def _batch(loss: TrainingLoss, stream: str, shape: tuple[int, int, int, int]) -> Batch:
    """A batch of ``stream`` with all columns that its objectives need."""
    classes, device = loss.model.num_classes, next(loss.parameters()).device
    count = shape[0]
    x, y, eps = (torch.empty(shape, device=device) for _ in range(3))
    batch = Batch(x, y, torch.empty(count, device=device), eps, None, None)
    if classes:
        labels = torch.empty(count, dtype=torch.int64, device=device)
        batch = batch._replace(labels=labels, soft=torch.empty(count, classes, device=device))
    for term in loss.terms:
        if loss.stream_of[term.name] == stream:
            columns = {column: torch.empty_like(x) for column in term.objective.columns}
            batch = batch.with_columns(term.name, columns)
    return batch


def step_flops(
    loss: TrainingLoss, shapes: Shapes, gradients: int = 1, update_flops: int = 0
) -> dict[str, int]:
    """FLOPs of forward and backward; objectives of one stream share work and are one entry.

    A step of a Langevin chain or an attack is a forward pass and one vjp with respect to the image.
    The last two arguments are those of `Budget`.

    Returns:
        Names joined by + -> FLOPs, as ``{"ce": ..., "dsm+cdsm": ...}``. Entries for negatives,
        attacks and Muon are called "20 Langevin steps", "7 attack steps" and "optimiser".
    """
    flops = {}
    for stream in loss.streams:
        own = copy.copy(loss)
        own.terms = tuple(term for term in loss.terms if loss.stream_of[term.name] == stream)
        names = "+".join(term.name for term in own.terms)
        flops[names] = gradients * trace_step(own, shapes).flops
        for extra in (term.objective.extra_passes for term in own.terms):
            if extra is not None:
                of: Literal["score", "posteriors"] = "posteriors" if extra.of_labels else "score"
                taken = extra.gradients * network_flops(loss.model, shapes[stream], of)
                if extra.forwards:
                    taken += extra.forwards * network_flops(loss.model, shapes[stream])
                flops[extra.name] = flops.get(extra.name, 0) + taken
    if update_flops:
        flops["optimiser"] = update_flops
    return flops


class Memory(NamedTuple):
    """Bytes that a training step needs on its device.

    Activations are the live bytes at the peak minus the size of the gradients: the batch, tensors
    saved for the backward pass, intermediate results.
    """

    parameters: int  # and buffers
    gradients: int
    optimizer: int  # its states, and averaged weights if there are any
    activations: int

    @property
    def total(self) -> int:
        """Peak memory of the step, the sum of the fields."""
        return sum(self)


def step_memory(
    loss: TrainingLoss, shapes: Shapes, states: int | Fraction = ADAMW_STATES, accumulate: int = 1
) -> Memory:
    """Memory of one eager training step, without running it; arguments are those of `Budget`.

    Exact for the tensors of the step. Not included: temporary tensors of Muon's update (about six
    times the matrices, after the activations are released), the overhead of the allocator, the data
    set, and, on CUDA, the context (about half a GB) and the prefetched batch.
    """
    step = trace_step(loss, shapes, accumulate)
    weights = sum(t.nbytes for t in [*loss.parameters(), *loss.buffers()])
    optimizer = int(states * sum(p.nbytes for p in loss.parameters() if p.requires_grad))
    return Memory(weights, step.gradients, optimizer, max(step.live) - step.gradients)


@dataclass(frozen=True)
class StepCost:
    """Cost of a training step for one process."""

    parameters: int  # number of trained parameters
    flops: dict[str, int]
    """Objectives that share a forward pass -> mean FLOPs per step."""
    memory: Memory  # of the largest step
    rate: float  # matrix rate of the device at the run's precision, FLOP/s
    steps: int  # number of steps
    stages: Mapping[str, int] = field(default_factory=dict)
    """Description of each stage of the run -> FLOPs per step; empty if there is only one."""

    @property
    def step_flops(self) -> int:
        """FLOPs per step."""
        return sum(self.flops.values())

    @property
    def run_flops(self) -> int:
        """FLOPs of all steps."""
        return self.step_flops * self.steps

    @property
    def least_seconds(self) -> float:
        """Time of all steps at the full matrix rate, seconds."""
        return self.run_flops / self.rate

    def mfu(self, seconds: float) -> float:
        """Share of the matrix rate that a step of ``seconds`` reaches, 0 to 1."""
        return self.step_flops / (self.rate * seconds)

    def rows(self) -> list[tuple[str, str]]:
        """Names and values to print."""
        parts = self.memory._asdict().items()
        memory = ", ".join(f"{name} {format_bytes(count)}" for name, count in parts)
        memory = memory.replace("optimizer", "optimiser")
        terms = {n if n.endswith("steps") else f"{n} step": c for n, c in self.flops.items()}
        return [
            ("parameters", f"{self.parameters:,}"),
            *((text, with_prefix(count) + "FLOP a step") for text, count in self.stages.items()),
            *((text, with_prefix(count) + "FLOP") for text, count in terms.items()),
            (f"all {self.steps:,} steps", with_prefix(self.run_flops) + "FLOP"),
            ("memory", f"{format_bytes(self.memory.total)} ({memory})"),
            ("matrix rate", with_prefix(self.rate) + "FLOP/s"),
            ("time at that rate", format_seconds(self.least_seconds)),
        ]


@dataclass(frozen=True)
class Budget:
    """Predicts the cost of a run before its steps are taken."""

    loss: TrainingLoss  # model and objectives, on the device and at the precision of training
    plan: Sequence[tuple[Stage, Shapes]]
    """Stages of the run, each with the shapes that this process draws per step."""
    states: int | Fraction = ADAMW_STATES  # state values of the optimiser per parameter
    accumulate: int = 1  # number of parts that each batch is split into
    processes: int = 1  # number of processes that share each batch
    gradients: int = 1  # gradients per step; 2 for sharpness-aware minimisation
    update_flops: int = 0  # FLOPs of the optimiser's matrix products
    _memories: dict[object, Memory] = field(default_factory=dict, init=False)

    @property
    def device(self) -> torch.device:
        """Device of the loss."""
        return next(self.loss.parameters()).device

    def memory(self, shapes: Shapes) -> Memory:
        """Memory of a step with ``shapes``."""
        key = tuple(shapes.items())
        if key not in self._memories:
            self._memories[key] = step_memory(self.loss, shapes, self.states, self.accumulate)
        return self._memories[key]

    def cost(self, steps: int, first: int = 0) -> StepCost:
        """Cost of steps ``first`` .. ``steps`` - 1, with the measured matrix rate of the device."""
        loss = self.loss
        lengths: list[int] = []
        counts: list[dict[str, int]] = []
        memories: list[Memory] = []
        stages: dict[str, int] = {}
        for stage, shapes in self.plan:
            start, stop = max(first, stage.start), min(steps, stage.stop)
            if start >= stop:
                continue
            lengths.append(stop - start)
            counts.append(step_flops(loss, shapes, self.gradients, self.update_flops))
            memories.append(self.memory(shapes))
            sizes = [
                f"{name} {b}x{h}x{w}" for name in loss.streams for b, _, h, w in [shapes[name]]
            ]
            text = f"steps {start + 1:,} to {stop:,}: {', '.join(sizes)}"
            stages[text] = sum(counts[-1].values())
        total = sum(lengths)
        mean = {
            name: round(sum(n * own[name] for n, own in zip(lengths, counts, strict=True)) / total)
            for name in counts[0]
        }
        return StepCost(
            sum(p.numel() for p in loss.parameters() if p.requires_grad),
            mean,
            max(memories, key=lambda memory: memory.total),
            matrix_rate(self.device, loss.precision),
            total,
            stages if len(stages) > 1 else {},
        )

    def check(self, free: int | None = None) -> Memory:
        """Memory of the largest step; call this before the first step.

        Raises:
            UserError: if that is more than ``free`` bytes (by default `available_memory`) beyond
                the parameters; the message names the largest batch that fits.
        """
        if free is None:
            free = available_memory(self.device)
            if free is not None and self.device.type == "cpu":  # shared by this machine's processes
                free //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        for stage, shapes in self.plan:
            memory = self.memory(shapes)
            if free is not None and memory.total - memory.parameters > free:
                raise self.too_large(shapes, free + memory.parameters, stage.fields)
        return max((self.memory(shapes) for _, shapes in self.plan), key=lambda own: own.total)

    def largest_batch(self, shapes: Shapes, limit: int) -> dict[str, int] | None:
        """Stream -> largest batch size that fits in ``limit`` bytes, parameters and optimiser
        included. Sizes have the proportions of ``shapes`` and are multiples of ``accumulate``. None
        if not even one image of each stream fits in each part."""

        def live(factor: int) -> tuple[int, ...]:
            larger = {name: (factor * b, *rest) for name, (b, *rest) in shapes.items()}
            return trace_step(self.loss, cast("Shapes", larger), self.accumulate).live

        memory = self.memory(shapes)
        left = limit - memory.parameters - memory.optimizer
        two, four = live(2), live(4)  # not 1: a batch of one image may be laid out differently
        scale = math.inf  # in multiples of `shapes`
        for at_two, at_four in zip(two, four, strict=True):
            slope = (at_four - at_two) / 2
            if slope > 0:
                scale = min(scale, 2 + (left - at_two) / slope)
            elif at_two > left:
                return None
        parts, streams = self.accumulate, self.loss.streams
        sizes = {n: parts * math.floor(scale * shapes[n][0] / parts + 1e-9) for n in streams}
        return sizes if all(size > 0 for size in sizes.values()) else None

    def too_large(
        self, shapes: Shapes, limit: int, fields: Mapping[str, str] | None = None
    ) -> UserError:
        """Return the error for a step of ``shapes`` that does not fit in ``limit`` bytes.

        ``fields``: stream -> configuration field of its sizes, by default ``streams.NAME``.
        """
        fields = fields or {name: f"streams.{name}" for name in self.loss.streams}
        problem = (
            f"a training step needs {format_bytes(self.memory(shapes).total)} of memory and has "
            f"{format_bytes(limit)} on {self.device}: "
        )
        sizes = self.largest_batch(shapes, limit)
        if sizes is None:
            problem += "not even one image of each stream fits; set a smaller model.backbone.width"
            return UserError(problem)
        largest = " and ".join(
            f"{fields[name]}.batch_size={size * self.processes}" for name, size in sizes.items()
        )
        common = math.gcd(*(shapes[name][0] for name in self.loss.streams))
        for parts in (n for n in range(self.accumulate + 1, common + 1) if common % n == 0):
            if step_memory(self.loss, shapes, self.states, parts).total <= limit:
                largest += f" at most, or compute.accumulate={parts} to keep the batch"
                return UserError(f"{problem}set {largest}")
        return UserError(f"{problem}set {largest} at most")

    def out_of_memory(self, held: int, step: int = 0) -> UserError:
        """Return the error for a step that ran out of memory; it names the largest batch that fits.

        The caller must hold no reference to tensors of ``step``, nor to its exception. ``held`` is
        the size of parameters and optimiser states, which are already allocated, in bytes.
        """
        stage, shapes = next(own for own in reversed(self.plan) if own[0].start <= step)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return self.too_large(shapes, (available_memory(self.device) or 0) + held, stage.fields)


class TimedInterval(NamedTuple):
    """Interval of timed steps: number of steps, seconds, seconds of waiting for data, stage."""

    steps: int
    seconds: float
    data: float
    stage: int

    def __add__(self, other: TimedInterval) -> TimedInterval:  # type: ignore[override]
        sums = self.steps + other.steps, self.seconds + other.seconds, self.data + other.data
        return TimedInterval(*sums, self.stage)


class Stopwatch:
    """Times intervals of steps, and the waiting for data within them."""

    def __init__(self) -> None:
        self.stretches: list[TimedInterval] = []
        self.lengths: Mapping[int, int] | None = None
        """Stage of the run -> its weight in `seconds`; None: the number of timed steps."""
        self.restart()

    def restart(self) -> None:
        """Start a new interval."""
        self._begun, self._steps, self._data = time.perf_counter(), 0, 0.0

    def step(self, data_seconds: float) -> None:
        """Count a step, of which ``data_seconds`` were spent waiting for its batches."""
        self._steps += 1
        self._data += data_seconds

    def stop(self, stage: int = 0) -> float:
        """End the interval, which lies in ``stage``, and start another; return seconds per step."""
        seconds, steps = time.perf_counter() - self._begun, max(1, self._steps)
        self.stretches.append(TimedInterval(steps, seconds, self._data, stage))
        if len(self.stretches) > MAX_TIMED_INTERVALS:  # merge neighbours, except the first
            self.stretches = [
                own
                for first, *rest in self._by_stage()
                for own in (first, *map(add, rest[::2], rest[1::2]), *rest[len(rest) & ~1 :])
            ]
        self.restart()
        return seconds / steps

    @property
    def seconds(self) -> float:
        """Seconds per step: the median in each stage, weighted by the steps of the stages."""
        total = steps = 0.0
        for own in self._by_stage():
            length = self.lengths[own[0].stage] if self.lengths else sum(s.steps for s in own)
            total += length * statistics.median(s.seconds / s.steps for s in own[1:] or own)
            steps += length
        return total / steps

    @property
    def data_share(self) -> float:
        """Share of the time that the host waited for data, 0 to 1."""
        settled = [s for own in self._by_stage() for s in own[1:] or own]
        return sum(s.data for s in settled) / sum(s.seconds for s in settled)

    def _by_stage(self) -> list[list[TimedInterval]]:
        stages = dict.fromkeys(s.stage for s in self.stretches)
        return [[s for s in self.stretches if s.stage == stage] for stage in stages]


@dataclass(frozen=True)
class RunStats:
    """Measured cost of a run; written to ``RUN/cost.json``."""

    steps: int  # timed steps (a resumed run counts only those since the resume)
    step_seconds: float  # median, averaged over stages of the run
    images_per_s: float  # over all streams and processes
    data_share: float  # share of the time that the host waited for data
    peak_memory: int  # bytes; on CUDA of tensors on the device, on a CPU of the whole process
    flops: dict[str, int]
    """Objectives that share a forward pass -> mean FLOPs per step of one process."""
    matrix_rate: float  # measured rate of matrix products at this precision, FLOP/s
    share: float  # MFU: share of that rate that the steps reached
    precision: str
    compiled: bool
    processes: int
    device: str

    def sentence(self) -> str:
        """One-line summary for the end of a run."""
        step, rate = with_prefix(sum(self.flops.values())), with_prefix(self.matrix_rate)
        return (
            f"{format_seconds(self.step_seconds)} a step ({self.data_share:.1%} of it for data), "
            f"{self.images_per_s:,.0f} images/s, peak memory {format_bytes(self.peak_memory)}, "
            f"{step}FLOP a step: {self.share:.0%} of the matrix rate of {self.processes} x "
            f"{self.device} ({rate}FLOP/s in {self.precision})"
        )


def format_bytes(count: float) -> str:
    """Format ``count`` bytes with a decimal prefix.

    >>> format_bytes(1.57e9)
    '1.57 GB'
    """
    return f"{with_prefix(count)}B"


def with_prefix(count: float) -> str:
    """Format ``count`` with a decimal prefix, to be followed by a unit such as FLOP.

    >>> with_prefix(6.71e16)
    '67.1 P'
    """
    for prefix in ("", "k", "M", "G", "T", "P"):
        if count < 999.5:
            return f"{count:.3g} {prefix}"
        count /= 1000
    return f"{count:.3g} E"


def format_seconds(seconds: float) -> str:
    """Format ``seconds`` in a suitable unit.

    >>> format_seconds(5400)
    '1.5 h'
    """
    for unit, length in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"
