"""FLOPs and memory of a training step: traced without running it, compared with a real step."""

import contextlib
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ebmkit
from ebmkit.compute import matrix_rate
from ebmkit.data import Batch
from ebmkit.data.schedule import Stage
from ebmkit.errors import UserError
from ebmkit.models.base import Features
from ebmkit.models.heads import LinearQuadraticHead
from ebmkit.objectives import TrainingLoss, parse_objective
from ebmkit.training import cost as cost_module
from ebmkit.training.cost import (
    Budget,
    Memory,
    Recorder,
    StepCost,
    network_flops,
    step_flops,
    step_memory,
    trace_step,
)

SHAPES = {"classify": (8, 1, 16, 16), "denoise": (4, 1, 16, 16)}
PAPER = {"classify": (128, 3, 32, 32), "denoise": (64, 3, 32, 32)}
CASES = [  # objective, streams of terms, forward passes of a step by stream
    ("ce+dsm", {}, {"ce": 3, "dsm": 6}),
    ("ce+dsm", {"ce": "denoise"}, {"ce+dsm": 6}),
    ("dsm+cdsm", {}, {"dsm+cdsm": 9}),
]


def loss_of(
    objective: str, streams=None, width: int = 8, channels: int = 1, backbone: str = "gradresnet10"
) -> TrainingLoss:
    model = ebmkit.create_model(backbone, 10, channels, width=width)
    return TrainingLoss(model, parse_objective(objective), streams=streams).train()


class TinyBackbone(nn.Module):
    """One convolution with an activation, for tests that do not depend on the network."""

    num_features = 8

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)

    def forward(self, y: torch.Tensor) -> Features:
        return Features(nn.functional.gelu(self.conv(y)).mean((2, 3)))


def tiny_loss(objective: str = "ce+dsm") -> TrainingLoss:
    model = ebmkit.JointModel(TinyBackbone(), LinearQuadraticHead(8, 10))
    return TrainingLoss(model, parse_objective(objective))


def budget(loss: TrainingLoss, steps: int = 1, **options) -> Budget:
    return Budget(loss, [(Stage(0, steps, {}), SHAPES)], **options)


def draw(shape: tuple[int, ...]) -> Batch:
    x, eps = torch.rand(shape), torch.randn(shape)
    sigma = torch.full(shape[:1], 0.1)
    labels = torch.randint(10, shape[:1])
    soft = torch.nn.functional.one_hot(labels, 10).float()
    return Batch(x, x + 0.1 * eps, sigma, eps, labels, soft)


def batches_of(loss: TrainingLoss, shapes=SHAPES) -> dict[str, Batch]:
    return {name: draw(shapes[name]) for name in loss.streams}


class NoModuleTracker(contextlib.nullcontext):
    """Replaces the counter's module tracker, which does not support gradients within the step."""

    parents = frozenset({"Global"})


def counter() -> FlopCounterMode:
    mode = FlopCounterMode(display=False)
    mode.mod_tracker = NoModuleTracker()
    return mode


@pytest.mark.parametrize(
    ("objective", "streams", "passes"),
    [CASES[0], pytest.param(*CASES[1], marks=pytest.mark.slow), CASES[2]],
)
def test_flops_equal_those_torch_counts_in_a_real_step(objective, streams, passes):
    loss = loss_of(objective, streams)
    with counter() as counted:
        loss(batches_of(loss)).total.backward()
    flops = step_flops(loss, SHAPES)
    assert sum(flops.values()) == counted.get_total_flops()
    assert flops.keys() == passes.keys()


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "streams", "passes"), CASES)
def test_step_costs_three_passes_and_three_more_for_each_score(objective, streams, passes):
    # 3 %: the second derivative of a strided convolution is computed on a larger window and
    # cropped, and cross-entropy alone needs no gradient with respect to the image.
    loss = loss_of(objective, streams, 64, 3, "gradresnet18")
    forward = network_flops(loss.model, (1, 3, 32, 32))
    for (name, count), stream in zip(step_flops(loss, PAPER).items(), loss.streams, strict=True):
        assert count == pytest.approx(passes[name] * PAPER[stream][0] * forward, rel=0.03)


@pytest.mark.slow
def test_cost_of_the_paper_network_and_recipe():
    # 11.2 M parameters, 1.11 GFLOP per forward pass, about 66 PFLOP for 78k steps of 128 + 64
    # images. The last number counts 3 and 6 passes per step, which is accurate to 3 %.
    loss = loss_of("ce+dsm", None, 64, 3, "gradresnet18")
    assert network_flops(loss.model, (1, 3, 32, 32)) == pytest.approx(1.11e9, rel=0.005)
    cost = StepCost(
        sum(p.numel() for p in loss.parameters()),
        step_flops(loss, PAPER),
        Memory(0, 0, 0, 0),
        rate=1e12,
        steps=78_000,
    )
    assert cost.parameters == pytest.approx(11.2e6, rel=0.005)
    assert cost.run_flops == pytest.approx(66e15, rel=0.03)
    assert cost.least_seconds == pytest.approx(66e3, rel=0.03)
    assert cost.mfu(2 * cost.step_flops / 1e12) == pytest.approx(0.5)


def record_real_step(loss: TrainingLoss, batches: dict[str, Batch], parts: int = 1) -> Recorder:
    recorder = Recorder()
    recorder.ignore([*loss.parameters(), *loss.buffers()])
    recorder.hold(t for batch in batches.values() for t in batch.tensors)
    with recorder:
        for k in range(parts):
            own = {n: Batch(*(t.chunk(parts)[k] for t in b[:6])) for n, b in batches.items()}
            loss(own).total.backward()
    return recorder


@pytest.mark.parametrize(
    ("objective", "precision"),
    [
        pytest.param("ce", "fp32", marks=pytest.mark.slow),
        pytest.param("ce+dsm", "bf16", marks=pytest.mark.slow),
        ("dsm+cdsm", "fp32"),
    ],
)
def test_traced_memory_peak_equals_that_of_real_tensors(objective, precision):
    loss = loss_of(objective)
    loss.precision = precision
    real = record_real_step(loss, batches_of(loss))
    traced = trace_step(loss, SHAPES)
    assert max(traced.live) == max(real.live)
    assert traced.gradients == sum(p.grad.nbytes for p in loss.parameters() if p.grad is not None)
    assert trace_step(loss, SHAPES) == traced  # existing gradients change nothing


@pytest.mark.slow
def test_traced_peak_matches_the_profiler_up_to_convolution_workspaces():
    # The profiler records every allocation. In addition, a convolution copies its input and output
    # into its own layout; the copies live within one operation, so a few of the largest maps
    # bound them: 2 maps with AVX-512, slightly more with AVX2.
    shapes = dict.fromkeys(SHAPES, (32, 3, 16, 16))
    loss = loss_of("dsm", channels=3, backbone="gradresnet18")
    batches = batches_of(loss, shapes)
    loss(batches).total.backward()
    loss.zero_grad()
    activity = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(
        activities=[activity], profile_memory=True, acc_events=True
    ) as profile:
        loss(batches).total.backward()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    drawn = sum(t.nbytes for batch in batches.values() for t in batch[:6])
    largest_map = 4 * 32 * 8 * 16 * 16
    assert 0 <= drawn + peak - max(trace_step(loss, shapes).live) <= 3 * largest_map


def test_tracing_does_not_change_the_loss(monkeypatch):
    loss = tiny_loss()
    monkeypatch.setattr(loss, "_compiled_call_impl", lambda *_: pytest.fail("ran compiled"))
    before = [p.clone() for p in loss.parameters()]
    state = torch.get_rng_state()
    memory = step_memory(loss, SHAPES)
    assert all(torch.equal(p, q) for p, q in zip(loss.parameters(), before, strict=True))
    assert all(p.grad is None for p in loss.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert memory.parameters == sum(p.nbytes for p in loss.parameters()) + loss.running.nbytes
    assert memory.optimizer == 2 * memory.gradients
    rows = dict(budget(loss, steps=10).cost(10).rows())
    assert list(rows)[:4] == ["parameters", "ce step", "dsm step", "all 10 steps"]


class ReadingBackbone(TinyBackbone):
    def forward(self, y: torch.Tensor) -> Features:
        return super().forward(y / float(y.max()))


def test_network_that_reads_values_is_named_in_one_sentence():
    model = ebmkit.JointModel(ReadingBackbone(), LinearQuadraticHead(8, 10))
    loss = TrainingLoss(model, parse_objective("ce"))
    with pytest.raises(UserError, match=r"reads values of its tensors .*use tensor operations"):
        trace_step(loss, {"classify": (2, 1, 8, 8)})


def test_traced_cost_of_an_accumulated_step_equals_the_real_cost():
    shapes = {"classify": (6, 1, 16, 16), "denoise": (3, 1, 16, 16)}
    loss = tiny_loss()
    parts = trace_step(loss, shapes, accumulate=3)
    real = record_real_step(loss, batches_of(loss, shapes), parts=3)
    assert max(parts.live) == max(real.live)
    assert parts.flops == real.flops == trace_step(loss, shapes).flops
    assert max(parts.live) < max(trace_step(loss, shapes).live)


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_largest_batch_fits_and_the_next_larger_does_not(accumulate):
    loss = tiny_loss()
    limit = int(2.7 * step_memory(loss, SHAPES, accumulate=accumulate).total)
    found = budget(loss, accumulate=accumulate).largest_batch(SHAPES, limit)
    assert all(size % accumulate == 0 for size in found.values())
    assert found["classify"] >= 2 * SHAPES["classify"][0]

    def total(sizes: dict[str, int]) -> int:
        shapes = {name: (size, *SHAPES[name][1:]) for name, size in sizes.items()}
        return step_memory(loss, shapes, accumulate=accumulate).total

    more = {
        "classify": found["classify"] + 2 * accumulate,
        "denoise": found["denoise"] + accumulate,
    }
    assert total(found) <= limit < total(more)


def test_step_that_exceeds_memory_is_refused_with_batch_sizes_that_fit():
    loss = tiny_loss()
    need = step_memory(loss, SHAPES)
    assert budget(loss).check(need.total - need.parameters) == need
    with pytest.raises(UserError) as caught:
        budget(loss).check(need.total - need.parameters - 1)
    message = str(caught.value)
    assert "on cpu: set streams.classify.batch_size=7 and streams.denoise.batch_size=3" in message
    assert "compute.accumulate=2" in message
    shared = str(budget(loss, processes=3).too_large(SHAPES, need.total - 1))
    assert "streams.classify.batch_size=21 and streams.denoise.batch_size=9" in shared
    assert "not even one image" in str(budget(loss).too_large(SHAPES, need.parameters))


def test_budget_traces_each_set_of_shapes_once(monkeypatch):
    calls, none = [], Memory(0, 0, 0, 0)
    monkeypatch.setattr(cost_module, "step_memory", lambda *given: calls.append(given) or none)
    own, small = budget(tiny_loss()), {name: (2, *shape[1:]) for name, shape in SHAPES.items()}
    for shapes, known in ((SHAPES, 1), (SHAPES, 1), (small, 2), (SHAPES, 2)):
        own.memory(shapes)
        assert len(calls) == known


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_estimate_matches_cuda(precision):
    # 10 %: convolution workspaces, and the allocator rounds blocks up
    loss = loss_of("ce+dsm", None, 64, 3, "gradresnet18").cuda()
    loss.model.to(memory_format=torch.channels_last)
    loss.precision = precision
    expected = step_memory(loss, PAPER)
    batches = {
        name: Batch(*(t.cuda() for t in batch[:6]))
        for name, batch in batches_of(loss, PAPER).items()
    }
    torch.cuda.reset_peak_memory_stats()
    loss(batches).total.backward()
    peak = torch.cuda.max_memory_allocated() + expected.optimizer
    assert math.isclose(peak, expected.total, rel_tol=0.1)
    assert matrix_rate(torch.device("cuda"), precision) > 1e12
