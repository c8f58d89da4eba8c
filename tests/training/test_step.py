"""The training step: compilation, accumulation, precision, and NaN or Inf."""

import contextvars

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import ebmkit
from ebmkit.compile import optimize
from ebmkit.compute import ComputeConfig
from ebmkit.data import Batch
from ebmkit.energy import LogDensity
from ebmkit.models import JointModel
from ebmkit.models.base import Features
from ebmkit.models.layers import GroupNorm
from ebmkit.objectives import TrainingLoss, parse_objective
from ebmkit.training import resolve
from ebmkit.training.optim import make_optimizer
from ebmkit.training.step import TrainingStep

CPU = torch.device("cpu")


def draw(seed: int, count: int = 4, dtype: torch.dtype = torch.float32) -> Batch:
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 1, 8, 8, generator=g, dtype=dtype)
    eps = torch.randn(x.shape, generator=g, dtype=dtype)
    sigma = 0.05 + 0.3 * torch.rand(count, generator=g, dtype=dtype)
    labels = torch.randint(10, (count,), generator=g)
    soft = nn.functional.one_hot(labels, 10).to(dtype)
    return Batch(x, x + sigma[:, None, None, None] * eps, sigma, eps, labels, soft)


def drawn(seed: int, count: int = 4, dtype: torch.dtype = torch.float32) -> dict[str, Batch]:
    return {"classify": draw(seed, count, dtype), "denoise": draw(seed + 100, count, dtype)}


class Tiny(nn.Module):
    """One convolution and one norm, which inductor compiles in seconds."""

    num_features = 8

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3, padding=1, bias=False), GroupNorm(8)

    def forward(self, y: torch.Tensor) -> Features:
        h = self.norm(nn.functional.gelu(self.conv(y)))
        return Features(h.float().mean((2, 3)), (h,))


def gradresnet(backbone: str = "gradresnet18") -> JointModel:
    torch.manual_seed(0)
    return ebmkit.create_model(backbone, 10, 1, width=8)


def tiny() -> JointModel:
    torch.manual_seed(0)
    return JointModel(Tiny(), ebmkit.models.heads.LinearQuadraticHead(8, 10))


def make(model, objective="ce+dsm", backend="aot_eager", **compute) -> TrainingStep:
    loss = TrainingLoss(model, parse_objective(objective))
    optimizer = make_optimizer(model, resolve({}).optimizer)
    return TrainingStep(loss, optimizer, ComputeConfig(**compute), backend=backend)


def gradients(step: TrainingStep, batches) -> torch.Tensor:
    step(batches, rate=0.0)
    return torch.cat([p.grad.flatten() for p in step.parameters if p.grad is not None])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


@pytest.mark.slow
def test_traced_gradients_equal_eager_gradients():
    objective = "ce+dsm+cdsm"
    eager = gradients(make(gradresnet(), objective, compile="off"), drawn(0))
    step = make(gradresnet(), objective, compile="on")
    assert step.compiled
    assert relative(gradients(step, drawn(0)), eager) < 1e-5


@pytest.mark.slow
def test_inductor_gradients_equal_eager_gradients():
    eager = gradients(make(tiny(), "ce+cdsm", compile="off"), drawn(0))
    compiled = make(tiny(), "ce+cdsm", backend="inductor", compile="on")
    assert relative(gradients(compiled, drawn(0)), eager) < 1e-5


@pytest.mark.slow
def test_inductor_gradients_equal_eager_gradients_on_gradresnet():
    """One block per stage, because a second one doubles the compile time."""
    eager = gradients(make(gradresnet("gradresnet10"), "ce+dsm", compile="off"), drawn(0))
    compiled = make(gradresnet("gradresnet10"), "ce+dsm", backend="inductor", compile="on")
    assert relative(gradients(compiled, drawn(0)), eager) < 1e-5


def test_no_recompilation_after_the_first_step():
    # The running means, the rate and the batch change at each step, and validation evaluates the
    # same model between steps.
    step = make(tiny(), "ce+dsm", compile="on")
    step(drawn(0), rate=1e-3)
    before = counters["stats"]["unique_graphs"]
    for i in range(1, 5):
        step(drawn(i), rate=1e-3 / i)
        step.loss.model.eval()
        with torch.no_grad():
            step.loss.model.logits(drawn(i)["classify"].x)
        step.loss.model.train()
    assert before > 0
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.slow
def test_many_training_steps_can_be_compiled_in_one_process():
    # The compiler stores up to 8 graphs per code object; each training step has its own object.
    for count in range(2, 12):
        step = make(tiny(), "ce", backend="eager", compile="on")
        step(drawn(0, count), rate=1e-3)
        assert step.compiled


def test_batch_not_divisible_by_accumulate_is_refused():
    with pytest.raises(ebmkit.UserError, match="batch of 5 does not divide into 2 parts"):
        make(tiny(), accumulate=2)(drawn(0, 5), rate=1e-3)


def test_accumulated_gradient_equals_that_of_the_full_batch():
    whole = gradients(make(gradresnet().double()), drawn(0, 4, torch.float64))
    parts = make(gradresnet().double(), accumulate=2)
    assert relative(gradients(parts, drawn(0, 4, torch.float64)), whole) < 1e-12
    one = make(gradresnet().double())
    one(drawn(0, 4, torch.float64), 0.0)
    assert parts.read().parts == pytest.approx(one.read().parts, rel=1e-6)


def test_recomputed_activations_give_the_same_gradient():
    stored = gradients(make(gradresnet().double()), drawn(0, 4, torch.float64))
    again = make(gradresnet().double(), recompute=True)
    assert relative(gradients(again, drawn(0, 4, torch.float64)), stored) < 1e-12


@pytest.mark.parametrize("recompute", [False, True])
def test_step_leaves_no_context_variables(recompute):
    """A context variable that is set at every step and never reset leaks memory."""
    step = make(gradresnet(), "dsm", recompute=recompute)
    batches = drawn(0, 4)
    step(batches, 0.0)
    before = len(contextvars.copy_context())
    for _ in range(3):
        step(batches, 0.0)
    assert len(contextvars.copy_context()) == before


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_parameters_do_not_change_after_a_step_with_nan_or_inf(where):
    step = make(gradresnet())
    step(drawn(0), rate=1e-3)
    before = [p.detach().clone() for p in step.parameters]
    bad = drawn(1)
    if where == "loss":
        bad["denoise"].eps[0] = float("inf")
        step(bad, rate=1e-3)
    else:
        handle = step.parameters[0].register_hook(lambda g: g * float("nan"))
        step(bad, rate=1e-3)
        handle.remove()
    step(drawn(2), rate=1e-3)  # a device may be several steps ahead of the host
    stats = step.read()
    assert stats.failed
    assert stats.done == 1
    assert all(torch.equal(p, b) for p, b in zip(step.parameters, before, strict=True))
    if where == "loss":  # the failing step's values, not those of the last
        assert stats.parts["dsm"] == float("inf")
        assert stats.parts["ce"] < 100
    else:
        assert stats.grad_norm != stats.grad_norm


def test_bfloat16_keeps_energies_scores_and_gradients_in_float32():
    model, batch = gradresnet(), draw(0)
    seen = {}
    model.backbone.stages[0][0].register_forward_hook(
        lambda module, args, out: seen.update(map=out.dtype)
    )
    energies, (score,) = optimize(model, "bf16").value_and_grads(batch.y, None, LogDensity())
    assert seen["map"] == torch.bfloat16
    assert energies.logits.dtype == energies.log_density.dtype == torch.float32
    assert score.dtype == torch.float32
    # bfloat16 has 8 bits (0.4 % per rounding), and the untrained w.f, a factor of the score, is
    # near 0
    assert relative(score, model.score(batch.y)) < 0.2
    got = gradients(make(gradresnet(), precision="bf16"), drawn(0))
    assert got.dtype == torch.float32
    assert relative(got, gradients(make(gradresnet()), drawn(0))) < 0.1


@pytest.mark.parametrize("keep_scale", [False, True])
def test_group_norm_rounds_once_under_autocast(keep_scale):
    # Bit-identical to float32 rounded once at the end, so no statistic is rounded before.
    x = (3 + torch.randn(2, 16, 16, 16)).bfloat16()
    norm = GroupNorm(16, keep_scale=keep_scale)
    with torch.autocast("cpu", torch.bfloat16):
        got = norm(x)
    assert torch.equal(got, norm(x.float()).bfloat16())


def test_features_are_averaged_and_projected_in_float32_under_autocast():
    backbone = gradresnet().backbone
    with torch.autocast("cpu", torch.bfloat16):
        features = backbone(draw(0).x)
    assert features.maps[0].dtype == torch.bfloat16
    exact = backbone.pool(tuple(h.float() for h in features.maps), (1, 1)).squeeze(1)
    assert torch.equal(features.pooled, exact)


def test_compiling_a_score_with_batch_norm_is_refused():
    model = ebmkit.create_model("gradresnet18", 10, 1, width=8, norm="batch")
    with pytest.raises(ebmkit.UserError, match=r"BatchNorm.*use --compile off"):
        make(model, "ce+dsm", compile="on")
    assert make(model, "ce", compile="on").compiled


def test_step_that_cannot_be_compiled_fails_or_runs_eagerly(recwarn, monkeypatch):
    class NotCompilable(Tiny):
        def forward(self, y: torch.Tensor) -> Features:
            torch._dynamo.graph_break()
            return super().forward(y)

    def model() -> JointModel:
        return JointModel(NotCompilable(), ebmkit.models.heads.LinearQuadraticHead(8, 10))

    with pytest.raises(ebmkit.UserError, match=r"cannot be compiled: .*use --compile off"):
        make(model(), "ce", compile="on")(drawn(0), rate=1e-3)
    # with compile=auto, the step runs eagerly instead
    step = make(model(), "ce", compile="on")
    step.compute = ComputeConfig(compile="auto")
    with pytest.warns(UserWarning, match="not compiled, running eagerly"):
        step(drawn(0), rate=1e-3)
    step(drawn(1), rate=1e-3)
    assert step.read().done == 2
    assert step.loss.separate  # as in a step that is eager from the start


@pytest.mark.slow
def test_compiler_failure_in_the_backward_pass_falls_back_to_eager(monkeypatch):
    def backend(graph, inputs):
        from torch._dynamo.backends.common import aot_autograd

        def refuse(graph, inputs):
            raise RuntimeError("no kernel for this")

        return aot_autograd(fw_compiler=lambda g, i: g.forward, bw_compiler=refuse)(graph, inputs)

    eager = gradients(make(tiny(), "ce+dsm"), drawn(0))
    step = make(tiny(), "ce+dsm", backend=backend, compile="on")
    step.compute = ComputeConfig(compile="auto")
    with pytest.warns(UserWarning, match="not compiled, running eagerly: .*no kernel for this"):
        found = gradients(step, drawn(0))
    assert torch.equal(found, eager)
