"""GroupNorm and GELU with second derivatives in closed form, compared with PyTorch's."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ebmkit import create_model
from ebmkit.bench import PlainStep, plain_inference
from ebmkit.models import convolution, layers
from ebmkit.models.layers import GELU, GroupNorm

LAYERS = ["norm", "norm with bias", "gelu", "both"]


@pytest.fixture(autouse=True)
def _closed_forms_for_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "SMALL", 0)


def _pair(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module, Tensor]:
    """Our layer, PyTorch's, and images whose mean is not 0 and whose deviation is not 1."""
    torch.manual_seed(0)
    own: nn.Module = GELU()
    if name != "gelu":
        own = GroupNorm(6, 2, bias="bias" in name, eps=0.1)  # large: a derivative without eps fails
        own = nn.Sequential(own, GELU()) if name == "both" else own
    for parameter in own.parameters():
        nn.init.normal_(parameter, 1)
    plain = copy.deepcopy(own)
    for module in plain.modules():
        if isinstance(module, GroupNorm):
            module.plain = True
        elif isinstance(module, GELU):
            module.__class__ = nn.GELU
    x = 0.5 + 2 * torch.randn(3, 6, 4, 5)
    return own.to(dtype), plain.to(dtype), x.to(dtype)


def _energy(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(1 * x).sin().sum((1, 2, 3))


def _by_autograd(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    out = _energy(layer, leaf)
    return out, torch.autograd.grad(out.sum(), leaf, create_graph=True)[0]


def _by_vjp(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    out, vjp_fn = torch.func.vjp(lambda image: _energy(layer, image), x)
    return out, vjp_fn(torch.ones_like(out))[0]


Score = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]


@pytest.mark.parametrize("score", [_by_autograd, _by_vjp])
@pytest.mark.parametrize("name", LAYERS)
def test_score_and_its_gradient_match_pytorch(name: str, score: Score) -> None:
    found = []
    own, plain, x = _pair(name)
    for layer in (own, plain):
        x.requires_grad_(score is _by_vjp)
        out, s = score(layer, x)
        loss = (s + 1).square().mean() + out.mean()
        inputs = [*layer.parameters(), *([x] if score is _by_vjp else [])]
        found.append([out, s, *(torch.autograd.grad(loss, inputs) if inputs else ())])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("graph", [False, True], ids=["values", "graph"])
@pytest.mark.parametrize("name", LAYERS)
def test_derivatives_up_to_third_order_match_pytorch(name: str, graph: bool) -> None:
    """By image and weights, including mixed ones; the second with and without `create_graph`."""
    own, plain, x = _pair(name)
    v = torch.randn_like(x)

    def derivatives(layer: nn.Module) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        every = [leaf, *layer.parameters()]
        first = torch.autograd.grad(_energy(layer, leaf).sum(), every, create_graph=True)
        options = {"create_graph": graph, "retain_graph": True}
        along = torch.autograd.grad(first[0], every, v, **options)
        squares = torch.autograd.grad(sum(g.square().sum() for g in first), every, **options)
        found = [*first, *along, *squares]
        if graph:
            total = sum((g * torch.ones_like(g).cumsum(0)).sum() for g in (*along, *squares))
            found += torch.autograd.grad(total, every)
        return found

    torch.testing.assert_close(derivatives(own), derivatives(plain), rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning")  # of forward derivatives
@pytest.mark.parametrize("name", LAYERS)
def test_gradcheck(name: str) -> None:
    own, _, x = _pair(name)
    x = x[:1, :, :2, :3].clone().requires_grad_()
    names = [n for n, _ in own.named_parameters()]

    def call(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(own, dict(zip(names, weights, strict=True)), (x,))

    inputs = (x, *(p.detach().clone().requires_grad_() for p in own.parameters()))
    assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning")  # of forward derivatives
@pytest.mark.parametrize("name", LAYERS)
def test_functional_transforms_match_pytorch(name: str) -> None:
    own, plain, x = _pair(name)
    x = x[:, :, :2, :3].contiguous()

    def energy(module: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda image: _energy(module, image[None])[0]

    def results(module: nn.Module) -> list[Tensor]:
        of_image = energy(module)
        found = [
            torch.func.vmap(transform(of_image))(x)
            for transform in (torch.func.grad, torch.func.hessian, torch.func.jacfwd)
        ]
        found += torch.func.jvp(torch.func.grad(of_image), (x[0],), (x[1],))
        vjp_fn = torch.func.vjp(torch.func.grad(of_image), x[0])[1]
        found += torch.func.vmap(vjp_fn)(x.cos())
        weights = {n: p.detach() for n, p in module.named_parameters()}

        def loss(weights: dict[str, Tensor], image: Tensor) -> Tensor:
            def of(z: Tensor) -> Tensor:
                return torch.func.functional_call(module, weights, (z[None],)).sin().sum()

            return torch.func.grad(of)(image).square().sum()

        if weights:
            found += torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x).values()
            many = {n: torch.stack([w, w.cos(), w.sin()]) for n, w in weights.items()}
            found += torch.func.vmap(torch.func.grad(loss), (0, None))(many, x[0]).values()
            moved = {n: w.cos() for n, w in weights.items()}
            gradient = torch.func.grad(lambda w: loss(w, x[0]))
            found += torch.func.jvp(gradient, (weights,), (moved,))[1].values()

            def score(weights: dict[str, Tensor]) -> Tensor:
                def of(z: Tensor) -> Tensor:
                    return torch.func.functional_call(module, weights, (z[None],)).sin().sum()

                return torch.func.grad(of)(x[0])

            found.append(torch.func.jvp(score, (weights,), (moved,))[1])
        return found

    torch.testing.assert_close(results(own), results(plain), rtol=1e-10, atol=1e-10)


class _OperationRecorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_score_computes_no_weight_gradient() -> None:
    """Autograd sums the weight gradient over images; a score does not request that sum."""
    own, _, x = _pair("norm")
    x.requires_grad_()
    out = own(x)
    with _OperationRecorder() as score:
        (s,) = torch.autograd.grad(out, x, torch.ones_like(out), create_graph=True)
    assert score.found.count("native_group_norm_backward") == 1
    assert "sum" not in score.found
    with _OperationRecorder() as both:
        torch.autograd.grad(s, own.weight, torch.ones_like(s))
    assert both.found.count("native_group_norm_backward") == 2


def test_conditions_that_select_the_pytorch_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    own, _, x = _pair("both")

    def names(x: Tensor) -> tuple[bool, bool]:
        norm, activation = own
        h = norm(x)
        assert isinstance(activation, GELU)
        return "_GroupNormFunction" in str(h.grad_fn), "_Gelu" in str(activation(h).grad_fn)

    x.requires_grad_()
    assert names(x) == (True, True)
    assert names(x.to(memory_format=torch.channels_last)) == (False, True)
    with torch.no_grad():
        assert names(x) == (False, False)
    own.requires_grad_(False)
    assert names(x) == (False, True)
    own.requires_grad_(True)
    own[0].plain = True
    assert names(x) == (False, True)
    own[0].plain = False
    monkeypatch.setattr(layers, "SMALL", x.numel())
    assert names(x) == (False, False)


@pytest.mark.parametrize("name", LAYERS)
def test_memory_layouts_match_pytorch(name: str) -> None:
    """Values, layout and derivatives, also for cotangents of another layout or stride."""
    own, plain, x = _pair(name)
    last = x.to(memory_format=torch.channels_last)
    assert own(last).is_contiguous(memory_format=torch.channels_last)
    for at, cotangent in ((x, torch.ones(()).expand(x.shape)), (x, last.cos()), (last, x.cos())):
        found = []
        for layer in (own, plain):
            leaf = at.detach().requires_grad_()
            out = layer(leaf)
            (s,) = torch.autograd.grad(out, leaf, cotangent.double(), create_graph=True)
            found.append([out, s, torch.autograd.grad(s, leaf, cotangent.double())[0]])
        torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("score", [_by_autograd, _by_vjp])
def test_autocast_matches_pytorch(score: Score) -> None:
    """Input and output are bfloat16; statistics and derivatives of the norm are float32."""
    own, plain, x = _pair("both", torch.float32)
    found = []
    for layer in (own, plain):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            assert layer(x.bfloat16()).dtype == torch.bfloat16
            out, s = score(layer, x.bfloat16())
        loss = (s.float() + 1).square().mean() + out.float().mean()
        found.append([s, *torch.autograd.grad(loss, list(layer.parameters()))])
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("recompute", [False, True])
def test_network_gradients_match_plain_layers(recompute: bool) -> None:
    """Gradients of a loss of the score, with and without activation checkpointing."""
    torch.manual_seed(0)
    own = create_model("gradresnet18", 3, in_channels=1, width=8).double().train()
    plain = copy.deepcopy(own)
    for module in plain.modules():
        if isinstance(module, GroupNorm):
            module.plain = True
        elif isinstance(module, GELU):
            module.__class__ = nn.GELU
    own.backbone.recompute = recompute
    y = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    found = []
    for model in (own, plain):
        loss = (model.score(y) + 1).square().mean()
        found.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_benchmark_baseline_uses_pytorch_layers() -> None:
    model = create_model("gradresnet18", 3, in_channels=1, width=8)
    step = PlainStep(model, "dsm", dict)
    kinds = {type(m) for m in step.model.modules()}
    assert GELU not in kinds
    assert nn.GELU in kinds
    assert all(m.plain for m in step.model.modules() if isinstance(m, GroupNorm))
    assert not any(m.plain for m in model.modules() if isinstance(m, GroupNorm))
    assert callable(plain_inference(model, "score", torch.rand(1, 1, 8, 8)))


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_compiles_without_a_graph_break(name: str) -> None:
    own, plain, x = _pair(name)
    x.requires_grad_()
    for backend in ("aot_eager", "inductor"):
        call = torch.compile(lambda x: _by_vjp(own, x), fullgraph=True, backend=backend)
        torch.testing.assert_close(call(x), _by_vjp(plain, x))


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning")  # of forward derivatives
def test_jvp_of_a_score_equals_its_vjp(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Jacobian J of a score is symmetric, so forward mode (J v) equals reverse mode (J^T v)."""
    monkeypatch.setattr(convolution, "SMALL", 0)
    model = create_model("gradresnet18", num_classes=3, in_channels=1, width=8).double()
    y, v = torch.rand(2, 1, 1, 8, 8, dtype=torch.float64)
    forwards = torch.func.jvp(model.score, (y,), (v,))[1]
    torch.testing.assert_close(forwards, torch.func.vjp(model.score, y)[1](v)[0])
