r"""What a training step costs: floating-point operations, memory and time, before and after a run.

The step is run on fake tensors, which have shapes, types, devices and storages but no numbers, on a
copy of the model that takes no memory either. Every operation passes a `Recorder`, which adds up

- the *FLOPs* of matrix products and convolutions, two to a multiply-add, forward, backward and
  differentiated again, by the formulas of `torch.utils.flop_counter`;
- the *bytes alive*: each storage counts from the operation that made it until it is released.

A step of one stream comes to about :math:`3 + 3k` forward passes where k different scores enter the
loss: so ce costs 3, dsm 6, and dsm with cdsm on one batch 9; a cross-entropy beside them on the
same batch is free. A product with the Hessian differentiates once more, so ism costs 12. The count
is exact for the eager step; it is up to 3 % off this rule, for ism 10 %.

The total is parameters, optimiser and :math:`\max_t b_t(n)`, with :math:`b_t(n) = b_t(0) + n\,b_t'`
bytes alive at moment t of a step of n images: so two traces give the largest n that fits in M
bytes, :math:`\min_t (M - b_t(0)) / b_t'`. Not seen is what an operation allocates and releases
within itself (workspaces of convolution libraries), nor what an allocator wastes.

A step of F operations on a device that multiplies matrices at R per second
(`ebmkit.compute.matrix_rate`) takes at least :math:`F / R`; one that took t seconds reached
:math:`F / (R t)`, its MFU (model FLOPs utilisation). t is the median over the stretches between two
rows of the log, without validations and saving, and without the first stretch, of warm-up, where
there are others. Where sizes change along the run, F and t are means over its steps.
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
from torch._subclasses.fake_tensor import FakeTensorMode  # the meta device has no autocast
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
"""Stream -> shape (B, C, H, W) of the images that this process takes of it in a step."""

ADAMW_STATES = 2  # numbers that AdamW keeps of each parameter
MOST_STRETCHES = 1000  # that a stopwatch keeps; then neighbours are put together

M = TypeVar("M", bound=nn.Module)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the FLOPs and the bytes of the tensors made within, real or fake."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.live: list[int] = [0]  # bytes of storages, after each operation that made one
        self._now, self._bytes = 0, dict[int, int]()

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count ``tensors``, made before or just now, whose storages are not counted yet."""
        fresh = {s._cdata: s for s in (t.untyped_storage() for t in tensors)}
        fresh = {key: storage for key, storage in fresh.items() if key not in self._bytes}
        for key, storage in fresh.items():
            self._bytes[key] = storage.nbytes()
            self._now += storage.nbytes()
            weakref.finalize(storage, self._release, key).atexit = False
        if fresh:
            self.live.append(self._now)

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Never count ``tensors`` nor views of them."""
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
    """What a traced step took."""

    flops: int  # of forward and backward, of the whole batch
    live: tuple[int, ...]  # bytes at each moment, without parameters, buffers and the optimiser
    gradients: int  # bytes of the parameters' gradients, which are alive at the end
    unused: tuple[str, ...]  # names in the loss of the trained parameters that get no gradient


def trace_step(loss: TrainingLoss, shapes: Shapes, accumulate: int = 1) -> StepTrace:
    """Run forward and backward of ``loss`` on fake batches of ``shapes``; ``loss`` is untouched.

    If it is compiled, the eager step is traced. Arguments are those of `Budget`.
    """
    recorder = Recorder()
    parts_run = min(accumulate, 2)  # from the second on they are alike
    with _fake(loss) as fake:
        fake.train().zero_grad(set_to_none=True)
        batches = {name: _batch(fake, name, shapes[name]) for name in loss.streams}
        recorder.ignore([*fake.parameters(), *fake.buffers()])
        recorder.hold(t for batch in batches.values() for t in batch.tensors)
        with recorder, torch.enable_grad():
            for _ in range(parts_run):
                part = {n: b.rows(slice(-(-len(b.x) // accumulate))) for n, b in batches.items()}
                for group in [{n: b} for n, b in part.items()] if loss.separate else [part]:
                    fake(group).total.backward()
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
    """FLOPs of a model on a batch of ``shape`` (B, C, H, W), two to a multiply-add: of the forward
    pass, the score alone, or the gradient of log-posteriors, which an attack climbs."""
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
    """A copy of ``module`` without numbers; within, new tensors are fake, and nothing warns."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [*module.parameters(), *module.buffers()]
        yield copy.deepcopy(module, {id(t): mode.from_tensor(t) for t in tensors})


def _batch(loss: TrainingLoss, stream: str, shape: tuple[int, int, int, int]) -> Batch:
    """A batch of ``stream``, with all that its objectives need."""
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
    """FLOPs of forward and backward by objective; those of one stream, which share work, together.

    A step of a Langevin chain or an attack is a forward pass and one vjp to the image. The last two
    arguments are those of `Budget`.

    Returns:
        Names joined by + -> FLOPs, as ``{"ce": ..., "dsm+cdsm": ...}``; what negatives take is
        called "20 Langevin steps", attacks "7 attack steps", and Muon's products "optimiser".
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
    """Bytes that a training step takes on its device.

    Activations are what is alive at the peak beyond the room that the gradients need in the end:
    the batch, what is saved for the backward pass, intermediate results.
    """

    parameters: int  # and buffers
    gradients: int
    optimizer: int  # its states, and averaged weights where there are any
    activations: int

    @property
    def total(self) -> int:
        """The sum: the peak of the step."""
        return sum(self)


def step_memory(
    loss: TrainingLoss, shapes: Shapes, states: int | Fraction = ADAMW_STATES, accumulate: int = 1
) -> Memory:
    """Memory of one eager training step, without running it; arguments are those of `Budget`.

    Exact for the tensors of the step. Not in it: what Muon's update holds for a moment, about six
    times the matrices, when the activations are gone; what the allocator wastes, the data set, and,
    on CUDA, the context (about half a GB) and the batch that is drawn ahead.
    """
    step = trace_step(loss, shapes, accumulate)
    weights = sum(t.nbytes for t in [*loss.parameters(), *loss.buffers()])
    optimizer = int(states * sum(p.nbytes for p in loss.parameters() if p.requires_grad))
    return Memory(weights, step.gradients, optimizer, max(step.live) - step.gradients)


@dataclass(frozen=True)
class StepCost:
    """What a training step costs one process."""

    parameters: int  # how many numbers are trained
    flops: dict[str, int]
    """Objectives that share a forward pass -> FLOPs of a step, the mean over the steps."""
    memory: Memory  # of the largest step
    rate: float  # FLOP/s of matrix products on the device, in the precision of the run
    steps: int  # of the run
    stages: Mapping[str, int] = field(default_factory=dict)
    """Text about each stage of the run -> FLOPs of a step in it; empty for one alone."""

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

    def mfu(self, seconds: float) -> float:
        """Share of the matrix rate that a step of ``seconds`` reaches, 1 for all of it."""
        return self.step_flops / (self.rate * seconds)

    def rows(self) -> list[tuple[str, str]]:
        """The cost as names and values to print."""
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
    """The steps of a run, to be counted before they are taken."""

    loss: TrainingLoss  # model and objectives, on the device and in the precision to train in
    plan: Sequence[tuple[Stage, Shapes]]
    """The stages of the run, and the images that this process takes in a step of them."""
    states: int | Fraction = ADAMW_STATES  # numbers that the optimiser keeps of each parameter
    accumulate: int = 1  # parts that each batch is split into
    processes: int = 1  # how many share each batch
    gradients: int = 1  # how often a step takes the gradient; 2 for sharpness-aware minimisation
    update_flops: int = 0  # FLOPs of the optimiser's matrix products
    _memories: dict[object, Memory] = field(default_factory=dict, init=False)

    @property
    def device(self) -> torch.device:
        """Where the steps are taken."""
        return next(self.loss.parameters()).device

    def memory(self, shapes: Shapes) -> Memory:
        """Memory of a step of ``shapes``."""
        key = tuple(shapes.items())
        if key not in self._memories:
            self._memories[key] = step_memory(self.loss, shapes, self.states, self.accumulate)
        return self._memories[key]

    def cost(self, steps: int, first: int = 0) -> StepCost:
        """What steps ``first`` .. ``steps`` - 1 cost: counted, but for the device's matrix rate."""
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
        """The memory that the largest step takes, to be asked before the first step.

        Raises:
            UserError: if that is more than ``free`` bytes (by default `available_memory`) beyond
                the parameters; the message says how large a batch would fit.
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
        """Stream -> the largest batch, in the proportions of ``shapes``, that fits in ``limit``
        bytes, parameters and optimiser included: a multiple of ``accumulate``. None if not even one
        image of each fits in each part."""

        def live(factor: int) -> tuple[int, ...]:
            larger = {name: (factor * b, *rest) for name, (b, *rest) in shapes.items()}
            return trace_step(self.loss, cast("Shapes", larger), self.accumulate).live

        memory = self.memory(shapes)
        left = limit - memory.parameters - memory.optimizer
        two, four = live(2), live(4)  # not 1: a batch of one image may be laid out differently
        scale = math.inf  # in batches of `shapes`
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
        """The error for a step of ``shapes`` that does not fit; arguments as of `largest_batch`.

        ``fields`` names the configuration of each stream's sizes, by default ``streams.NAME``.
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
        """The error for a step that ran out of memory; it says how large a batch would fit.

        Nothing of ``step`` may be referred to any more, its exception included; ``held`` are the
        bytes of parameters and optimiser states, which are there already.
        """
        stage, shapes = next(own for own in reversed(self.plan) if own[0].start <= step)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return self.too_large(shapes, (available_memory(self.device) or 0) + held, stage.fields)


class Stretch(NamedTuple):
    """Steps that were timed: how many, seconds, seconds of them for data, stage of the run."""

    steps: int
    seconds: float
    data: float
    stage: int

    def __add__(self, other: Stretch) -> Stretch:  # type: ignore[override]
        sums = self.steps + other.steps, self.seconds + other.seconds, self.data + other.data
        return Stretch(*sums, self.stage)


class Stopwatch:
    """Times stretches of steps, and how much of them went into waiting for data."""

    def __init__(self) -> None:
        self.stretches: list[Stretch] = []
        self.lengths: Mapping[int, int] | None = None
        """Stage of the run -> number of its steps, to weigh it by; None: by the steps timed."""
        self.restart()

    def restart(self) -> None:
        """Begin a stretch."""
        self._begun, self._steps, self._data = time.perf_counter(), 0, 0.0

    def step(self, data_seconds: float) -> None:
        """Count a step, of which ``data_seconds`` were spent waiting for its batches."""
        self._steps += 1
        self._data += data_seconds

    def stop(self, stage: int = 0) -> float:
        """End the stretch, all in one ``stage``, and begin another; the seconds per step of it."""
        seconds, steps = time.perf_counter() - self._begun, max(1, self._steps)
        self.stretches.append(Stretch(steps, seconds, self._data, stage))
        if len(self.stretches) > MOST_STRETCHES:  # put neighbours together, but for the first
            self.stretches = [
                own
                for first, *rest in self._by_stage()
                for own in (first, *map(add, rest[::2], rest[1::2]), *rest[len(rest) & ~1 :])
            ]
        self.restart()
        return seconds / steps

    @property
    def seconds(self) -> float:
        """Seconds of a step: the median in each stage, averaged over the steps of the stages."""
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

    def _by_stage(self) -> list[list[Stretch]]:
        stages = dict.fromkeys(s.stage for s in self.stretches)
        return [[s for s in self.stretches if s.stage == stage] for stage in stages]


@dataclass(frozen=True)
class RunStats:
    """What a run took; written to ``RUN/cost.json``."""

    steps: int  # done now (a resumed run counts its own)
    step_seconds: float  # median, averaged over stages of the run
    images_per_s: float  # of all streams and processes
    data_share: float  # share of the time that the host waited for data
    peak_memory: int  # bytes; on CUDA of tensors on the device, on a CPU of the whole process
    flops: dict[str, int]
    """Objectives that share a forward pass -> FLOPs of a step of one process, on average."""
    matrix_rate: float  # FLOP/s of matrix products, measured on this device in this precision
    share: float  # share of that rate that the steps reached, their MFU
    precision: str
    compiled: bool
    processes: int
    device: str

    def sentence(self) -> str:
        """One line for the end of a run."""
        step, rate = with_prefix(sum(self.flops.values())), with_prefix(self.matrix_rate)
        return (
            f"{format_seconds(self.step_seconds)} a step ({self.data_share:.1%} of it for data), "
            f"{self.images_per_s:,.0f} images/s, peak memory {format_bytes(self.peak_memory)}, "
            f"{step}FLOP a step: {self.share:.0%} of the matrix rate of {self.processes} x "
            f"{self.device} ({rate}FLOP/s in {self.precision})"
        )


def format_bytes(count: float) -> str:
    """``count`` bytes as people read them, in powers of 1000.

    >>> format_bytes(1.57e9)
    '1.57 GB'
    """
    return f"{with_prefix(count)}B"


def with_prefix(count: float) -> str:
    """``count`` with a prefix, to be followed by a unit, as FLOP.

    >>> with_prefix(6.71e16)
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
