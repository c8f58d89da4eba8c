r"""Benchmarks of speed and memory against plain eager PyTorch (``ebmkit bench``).

The plain eager step is

.. code-block:: python

    y.requires_grad_()
    (score,) = torch.autograd.grad(model(y).log_density.sum(), y, create_graph=True)
    loss = (sigma * score + eps).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

with contiguous float32 tensors, PyTorch's own layers and ``torch.optim.AdamW(model.parameters())``.
It computes the same loss and gradients as the library's step, so their times can be compared.

Clock rate and load change over time. So each candidate runs once per round, in alternating order.
With :math:`t_{k,r}` the time of candidate k in round r, its speed relative to candidate 0 is the
median over rounds of the ratios *within* a round,

.. math:: \rho_k = \operatorname{median}_r \frac{t_{0,r}}{t_{k,r}},

above 1 if k is faster. The quartiles of these ratios measure the noise.

Each candidate of a `Comparison` gives one `Row`, named after the task and the implementation, as in
``train dsm gradresnet18 w16 32x32 b64: ebmkit``. The batch size is that of the denoising stream;
joint objectives classify twice as many images, as in the paper (128 + 64).
"""

from __future__ import annotations

import copy
import gc
import itertools
import math
import os
import re
import statistics
import timeit
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import distributions
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.benchmark import timer

from ebmkit.compile import make_inference, wrap_channels_last
from ebmkit.compute import (
    ComputeConfig,
    Precision,
    available_memory,
    environment,
    pick_compile,
    pick_precision,
    set_tf32,
)
from ebmkit.data import Batch, NoiseLaw
from ebmkit.energy import EnergyModel
from ebmkit.errors import UserError
from ebmkit.models import JointModel, create_model
from ebmkit.models.convolution import Conv2d
from ebmkit.models.layers import GELU, GroupNorm
from ebmkit.objectives import BALANCE, Scale, Term, TrainingLoss, parse_objective
from ebmkit.training.config import OptimizerConfig
from ebmkit.training.cost import format_bytes
from ebmkit.training.optim import make_optimizer
from ebmkit.training.step import OutOfMemory, TrainingStep

Step = Callable[[], object]
"""The timed function: one training step, or one inference call on a batch."""

Build = Callable[[], Step]
"""Creates a step with its network, optimiser and buffers."""

Batches = Callable[[], Mapping[str, Batch]]
"""Returns the batch of each stream, at every call of a step."""

OURS, PLAIN, PLAIN_TF32 = "ebmkit", "plain eager", "plain eager, TF32"
INFERENCES = ("logits", "score", "denoise")
SCALING = "scaling dsm"
"""Task name of the points of a scaling curve."""

NUM_CLASSES = 10
"""Number of classes of the timed networks."""

SIGMA = 25 / 255
"""Noise level passed to ``denoise``, image units."""

MIN_TIMING_SECONDS, MAX_CALLS = 0.05, 50
"""Minimum seconds of a timing; a faster step is called several times, up to `MAX_CALLS`."""

PEERS = ("torchebm", "deepinv", "ebmkit")

# the defaults of torch.optim.AdamW, for equal updates of both implementations
_ADAMW = OptimizerConfig(lr=1e-3, weight_decay=1e-2, betas=(0.9, 0.999), decay_norms=True)

_NAME = re.compile(r"(?P<what>.+) (?P<backbone>\S+) w(?P<width>\d+) (?P<size>\d+)x\d+ b(?P<b>\d+)")


class BenchmarkSetting(NamedTuple):
    """Task, network, image size and batch size of a measurement.

    >>> str(BenchmarkSetting("train dsm", "gradresnet18", 16, 32, 64))
    'train dsm gradresnet18 w16 32x32 b64'
    """

    what: str
    backbone: str = "gradresnet18"
    width: int = 16
    image_size: int = 32
    batch: int = 64

    def __str__(self) -> str:
        size = f"{self.image_size}x{self.image_size}"
        return f"{self.what} {self.backbone} w{self.width} {size} b{self.batch}"

    @classmethod
    def read(cls, name: str) -> BenchmarkSetting | None:
        """Parse the setting in a row's name; None if the name contains none."""
        match = _NAME.fullmatch(name.rpartition(": ")[0])
        if match is None:
            return None
        width, size, batch = (int(match[key]) for key in ("width", "size", "b"))
        return cls(match["what"], match["backbone"], width, size, batch)


class Ratio(NamedTuple):
    """Relative speed: median, lower and upper quartile over rounds."""

    median: float
    low: float
    high: float


class Row(NamedTuple):
    """One measurement, a row of the JSON file."""

    name: str  # task: implementation
    device: str
    median_s: float  # seconds per step, median over rounds
    images_per_s: float  # from median_s
    peak_mb: float  # in 10^6 bytes (`peak_memory`)
    ratio: float | None  # speed relative to the plain eager float32 step, median over rounds
    ratio_range: tuple[float, float] | None  # lower and upper quartile of that ratio
    ratios: dict[str, Ratio]  # speed relative to each other implementation
    note: str  # conditions, such as the precision


class Comparison(NamedTuple):
    """Implementations of the same task."""

    name: str
    images: int  # number of images per step
    candidates: Mapping[str, Build]  # implementation -> builder of its step
    notes: Mapping[str, str]  # implementation -> note of its row


def interleave(
    candidates: Mapping[str, Step],
    rounds: int,
    warmup: int = 2,
    shortest: float = 0.0,
    clock: Callable[[], float] = timer,
) -> dict[str, list[float]]:
    """Time the candidates; return the seconds per call in each round, (rounds,) per candidate.

    Args:
        candidates: functions to time, by name.
        rounds: number of rounds; even rounds time the candidates in order, odd ones in reverse.
        warmup: untimed calls per candidate before the first round, at least 1.
        shortest: minimum seconds of a timing. If the last warm-up call of the fastest candidate
            took less, each timing is the mean over several calls, as many for all candidates.
        clock: clock in seconds. Default: PyTorch's, which synchronises with the device.
    """
    timers = {name: timeit.Timer(step, timer=clock) for name, step in candidates.items()}
    for step in candidates.values():
        for _ in range(warmup - 1):
            step()
    fastest = min(own.timeit(1) for own in timers.values())
    calls = min(MAX_CALLS, max(1, math.ceil(shortest / max(fastest, 1e-9))))
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds):
        gc.collect()  # timeit disables garbage collection
        for name in list(timers)[:: 1 if number % 2 == 0 else -1]:
            seconds[name].append(timers[name].timeit(calls) / calls)
    return seconds


def ratio_to(base: Sequence[float], own: Sequence[float]) -> Ratio:
    """Speed of a candidate relative to ``base``, from the seconds of the same rounds."""
    ratios = [b / o for b, o in zip(base, own, strict=True)]
    return Ratio(*(float(np.quantile(ratios, level)) for level in (0.5, 0.25, 0.75)))


def peak_memory(build: Build, device: torch.device, calls: int = 3) -> tuple[Step, int]:
    """Build a step and call it (the first calls compile); return it and its peak memory in bytes.

    The peak counts all tensors created on ``device`` since before the step was built: parameters,
    gradients, optimiser state, activations, and kernel workspaces from PyTorch's allocator.
    """

    def called() -> Step:
        step = build()
        for _ in range(calls):
            step()
        return step

    if device.type == "cuda":
        gc.collect()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step = called()
        torch.cuda.synchronize(device)
        return step, torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes to stderr
    with torch.autograd.profiler.profile(use_kineto=False, profile_memory=True) as profile:
        step = called()
    assert profile.kineto_results is not None
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    sizes = (e.nbytes() for e in events)  # type: ignore[attr-defined]  # missing in the stubs
    return step, max(itertools.accumulate(sizes, initial=0))


def measure(comparison: Comparison, device: torch.device, rounds: int) -> list[Row]:
    """Measure the memory of each candidate, then time all in alternating order; one row each.

    Raises:
        UserError: if the device has too little memory.
    """
    steps, peaks = {}, {}
    try:
        for who, build in comparison.candidates.items():
            steps[who], peaks[who] = peak_memory(build, device)
        with torch.cuda.device(device if device.type == "cuda" else -1):
            seconds = interleave(steps, rounds, warmup=1, shortest=MIN_TIMING_SECONDS)
    except (OutOfMemory, torch.OutOfMemoryError):
        raise UserError(
            f"{device} has too little memory for {comparison.name!r}: choose a smaller --batch, "
            "--width or --image-size"
        ) from None
    rows = []
    for who, own in seconds.items():
        ratios = {name: ratio_to(base, own) for name, base in seconds.items() if name != who}
        to_plain = Ratio(1.0, 1.0, 1.0) if who == PLAIN else ratios.get(PLAIN)
        median = statistics.median(own)
        rows.append(
            Row(
                name=f"{comparison.name}: {who}",
                device=str(device),
                median_s=median,
                images_per_s=comparison.images / median,
                peak_mb=peaks[who] / 1e6,
                ratio=to_plain.median if to_plain else None,
                ratio_range=(to_plain.low, to_plain.high) if to_plain else None,
                ratios=ratios,
                note=getattr(steps[who], "how", comparison.notes.get(who, "")),
            )
        )
    return rows


def document(rows: Sequence[Row]) -> dict[str, Any]:
    """Content of the JSON file: the environment with versions of peer libraries, and the rows."""
    peers = {name: found.version for name in PEERS for found in distributions(name=name)}
    return {
        "environment": environment() | {"peers": peers},
        "rows": [row._asdict() for row in rows],
    }


def network(setting: BenchmarkSetting, channels: int, device: torch.device) -> JointModel:
    """Create the network of ``setting``, with initial weights from a fixed seed.

    Raises:
        UserError: if the backbone is unknown or the width illegal.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_model(
            setting.backbone,
            num_classes=NUM_CLASSES,
            in_channels=channels,
            image_size=setting.image_size,
            width=setting.width,
        )
    return model.to(device)


def make_batch(
    count: int, channels: int, image_size: int, device: torch.device, generator: torch.Generator
) -> Batch:
    """Draw ``count`` random images (B, C, H, H) with the noise of the paper's denoising stream.

    Pixels are uniform in [0, 1]. ``generator`` is on the CPU; the batch is moved to ``device``.
    """
    shape = (count, channels, image_size, image_size)
    law = NoiseLaw(kind="squared-uniform", min=1 / 255, max=100 / 255)
    x, eps = torch.rand(shape, generator=generator), torch.randn(shape, generator=generator)
    sigma = law.sample(count, generator, "cpu")
    labels = torch.randint(NUM_CLASSES, (count,), generator=generator)
    soft = nn.functional.one_hot(labels, NUM_CLASSES).float()
    y = x + sigma[:, None, None, None] * eps
    x, y, sigma, eps, labels, soft = (t.to(device) for t in (x, y, sigma, eps, labels, soft))
    return Batch(x, y, sigma, eps, labels, soft)


def comparison(
    setting: BenchmarkSetting,
    channels: int,
    device: torch.device,
    compute: ComputeConfig | None = None,
    objective: str | None = None,
) -> Comparison:
    """Compare the library with plain eager PyTorch, in float32 and, on GPUs that have it, TF32.

    The task is the training step of ``objective`` (its `timed_terms`), or, without an objective,
    the inference call ``setting.what``, one of `INFERENCES`. ``compute`` sets precision and
    compilation of the library.

    Raises:
        UserError: if the objective, backbone, width, precision or compile mode is illegal.
    """
    compute = compute or ComputeConfig()
    model, generator = network(setting, channels, device), torch.Generator().manual_seed(0)

    def draw(count: int) -> Batch:
        return make_batch(count, channels, setting.image_size, device, generator)

    ours: Build
    plain: Callable[..., Step]
    if objective is None:
        if compute.precision == "auto":
            compute = compute.model_copy(update={"precision": "fp32"})
        images, y = setting.batch, draw(setting.batch).y
        ours = partial(library_inference, model, setting.what, y, compute)
        plain = partial(plain_inference, model, setting.what, y)
    else:
        streams = dict.fromkeys(term.objective.stream for term in timed_terms(objective))
        joint = len(streams) > 1
        counts = {n: (1 + (joint and n == "classify")) * setting.batch for n in streams}
        images, drawn = sum(counts.values()), {n: draw(count) for n, count in counts.items()}
        ours = partial(LibraryStep, model, objective, lambda: drawn, compute)
        plain = partial(PlainStep, model, objective, lambda: drawn)
    candidates: dict[str, Build] = {OURS: ours, PLAIN: plain}
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        candidates[PLAIN_TF32] = partial(plain, precision="tf32")
    compiled = "compiled" if pick_compile(compute.compile, device) else "eager"
    notes = {OURS: f"{pick_precision(compute.precision, device)}, {compiled}"}
    return Comparison(str(setting), images, candidates, notes)


def timed_terms(objective: str) -> tuple[Term, ...]:
    """The terms of ``objective``, with balanced terms in their mean form.

    Balancing only multiplies a loss by a number and tracks its running mean. The mean form is the
    standard one, so both implementations compute it.

    Raises:
        UserError: if the objective does not parse, or a term has no plain eager form.
    """
    terms = []
    for term in parse_objective(objective):
        name = f"{term.name}-mean" if term.objective.scale is Scale.BALANCED else term.name
        if name not in ("ce", "dsm-mean", "dsm-sum", "cdsm-mean", "cdsm-sum"):
            raise UserError(
                f"objective {term.name!r} has no plain eager form to compare with: use ce, dsm, "
                "cdsm, or a sum of them"
            )
        terms.append(Term(name, term.weight))
    return tuple(terms)


class LibraryStep:
    """The library's training step of ``objective``, on a copy of ``model``.

    Raises:
        UserError: see `timed_terms` and `TrainingStep`.
    """

    def __init__(
        self,
        model: EnergyModel,
        objective: str,
        batches: Batches,
        compute: ComputeConfig | None = None,
    ) -> None:
        self.model, self.batches = copy.deepcopy(model).train(), batches
        loss = TrainingLoss(self.model, timed_terms(objective), BALANCE)
        optimizer = make_optimizer(self.model, _ADAMW)
        self.step = TrainingStep(loss, optimizer, compute or ComputeConfig())

    @property
    def how(self) -> str:
        """Precision, and whether the step was compiled."""
        return f"{self.step.precision}, {'compiled' if self.step.compiled else 'eager'}"

    def __call__(self) -> None:
        set_tf32(self.step.device, self.step.precision)
        self.step(self.batches(), rate=_ADAMW.lr)


class PlainStep:
    """The plain eager training step, on a contiguous copy of ``model``; a call returns the loss.

    ``precision`` is ``fp32``, with TF32 off for convolutions too, or ``tf32``.
    """

    def __init__(
        self, model: EnergyModel, objective: str, batches: Batches, precision: Precision = "fp32"
    ) -> None:
        self.model = _plain(model).train()
        self.terms, self.batches, self.precision = timed_terms(objective), batches, precision
        self.device = next(self.model.parameters()).device
        self.optimizer = torch.optim.AdamW(self.model.parameters())

    def __call__(self) -> Tensor:
        set_tf32(self.device, self.precision)
        loss = plain_loss(self.model, self.terms, self.batches())
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss


def plain_loss(model: EnergyModel, terms: tuple[Term, ...], batches: Mapping[str, Batch]) -> Tensor:
    """The loss of ``terms``, a scalar, with scores by `torch.autograd.grad` with a graph."""
    total = torch.zeros((), device=next(model.parameters()).device)
    for stream in dict.fromkeys(term.objective.stream for term in terms):
        batch = batches[stream]
        own = [term for term in terms if term.objective.stream == stream]
        scored = any(term.objective.needs_score for term in own)
        y = batch.y.detach().requires_grad_(scored)
        energies = model(y)
        for term in own:
            if term.name == "ce":
                assert batch.soft is not None
                loss = nn.functional.cross_entropy(energies.logits, batch.soft)
            else:
                log_density = energies.log_density
                if term.objective.needs_labels:
                    assert batch.labels is not None
                    log_density = energies.log_joint().gather(1, batch.labels[:, None])
                (score,) = torch.autograd.grad(log_density.sum(), y, create_graph=True)
                squares = (batch.sigma[:, None, None, None] * score + batch.eps).square()
                summed = term.objective.scale is Scale.SUM
                loss = squares.flatten(1).sum(1).mean() if summed else squares.mean()
            total = total + (1.0 if term.weight is None else term.weight) * loss
    return total


def library_inference(
    model: EnergyModel, what: str, y: Tensor, compute: ComputeConfig | None = None
) -> Step:
    """The library's inference step: one of `INFERENCES` on noisy images ``y``, on a frozen model.

    Precision ``auto`` is float32; compilation ``auto`` is as in training.

    Raises:
        UserError: if the device does not support the precision or has no compiler.
    """
    compute = compute or ComputeConfig()
    own = copy.deepcopy(model).eval().requires_grad_(False)
    mode = "on" if pick_compile(compute.compile, y.device) else "off"
    inference = make_inference(y.device, compute.precision, mode)
    own, precision = wrap_channels_last(own, inference), inference.precision
    call = getattr(own, what)

    def step() -> Tensor:
        set_tf32(y.device, precision)
        with torch.no_grad():
            result: Tensor = call(y, SIGMA) if what == "denoise" else call(y)
            return result

    return step


def plain_inference(
    model: EnergyModel, what: str, y: Tensor, precision: Precision = "fp32"
) -> Step:
    """The plain eager inference step, by `torch.autograd.grad`."""
    own = _plain(model).eval()

    def step() -> Tensor:
        set_tf32(y.device, precision)
        if what == "logits":
            with torch.no_grad():
                return own(y).logits
        leaf = y.detach().requires_grad_()
        (score,) = torch.autograd.grad(own(leaf).log_density.sum(), leaf)
        return score if what == "score" else y + SIGMA**2 * score

    return step


def _plain(model: EnergyModel) -> EnergyModel:
    """A contiguous copy with PyTorch's own layers and derivatives."""
    own = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    for module in own.modules():
        if isinstance(module, Conv2d):
            module.__class__ = nn.Conv2d  # type: ignore[assignment]
        elif isinstance(module, GELU):
            module.__class__ = nn.GELU  # type: ignore[assignment]
        elif isinstance(module, GroupNorm):
            module.plain = True
    return own


def scaling_settings(
    base: BenchmarkSetting,
    widths: Sequence[int] = (8, 16, 32, 64),
    image_sizes: Sequence[int] = (16, 32, 64, 128),
    batches: Sequence[int] = (16, 32, 64, 128, 256),
) -> list[BenchmarkSetting]:
    """``base`` and its variants with another width, image size or batch, without duplicates."""
    changes: dict[str, Any] = {"width": widths, "image_size": image_sizes, "batch": batches}
    changed = [base._replace(**{k: value}) for k, values in changes.items() for value in values]
    return list(dict.fromkeys([base, *changed]))


def scaling(
    settings: Sequence[BenchmarkSetting],
    channels: int,
    device: torch.device,
    rounds: int,
    compute: ComputeConfig | None = None,
) -> Iterator[list[Row]]:
    """Measure the dsm step at each of ``settings``, the first of which is the base point.

    Activation memory is proportional to width, pixels and images. A point that would not fit,
    extrapolated from the base point's memory, is skipped with a warning.
    """
    peak, units = 0.0, [s.width * s.image_size**2 * s.batch for s in settings]
    for setting, unit in zip(settings, units, strict=True):
        needed, free = peak * unit / units[0], available_memory(device)
        if free is not None and needed > free:
            warnings.warn(
                f"{setting} is skipped: it needs about {format_bytes(needed)} of memory, and "
                f"{format_bytes(free)} are free",
                stacklevel=2,
            )
            yield []
            continue
        rows = measure(comparison(setting, channels, device, compute, "dsm"), device, rounds)
        if setting == settings[0]:
            peak = 1e6 * max(row.peak_mb for row in rows)
        yield rows
