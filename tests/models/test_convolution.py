"""The convolution with cheaper second derivatives, compared with PyTorch's."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ebmkit.compute import prepare_compiler
from ebmkit.models import convolution as module_under_test
from ebmkit.models.convolution import Conv2d

SHAPES = [
    {"in_channels": 3, "out_channels": 4, "kernel_size": 3, "padding": 1},
    {
        "in_channels": 3,
        "out_channels": 4,
        "kernel_size": 3,
        "padding": 1,
        "stride": 2,
        "bias": False,
    },
    {"in_channels": 4, "out_channels": 6, "kernel_size": 1, "stride": 2, "bias": False},
    {"in_channels": 4, "out_channels": 6, "kernel_size": 1, "stride": (2, 3)},
    {"in_channels": 4, "out_channels": 6, "kernel_size": (3, 2), "dilation": 2, "groups": 2},
    {"in_channels": 2, "out_channels": 3, "kernel_size": 2, "stride": 2, "bias": False},
]


@pytest.fixture(autouse=True)
def _custom_convolution_for_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "SMALL", 0)


Score = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]


def _pair(shape: dict, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    own = Conv2d(**shape).to(dtype)
    plain = nn.Conv2d(**shape).to(dtype)
    plain.load_state_dict(own.state_dict())
    return own, plain, torch.randn(2, shape["in_channels"], 9, 8, dtype=dtype)


def _energy(convolution: nn.Module, y: Tensor) -> Tensor:
    return nn.functional.gelu(convolution(1 * y)).square().sum((1, 2, 3))


def _by_autograd(convolution: nn.Module, y: Tensor) -> tuple[Tensor, Tensor]:
    leaf = y.detach().requires_grad_()
    out = _energy(convolution, leaf)
    return out, torch.autograd.grad(out.sum(), leaf, create_graph=True)[0]


def _by_vjp(convolution: nn.Module, y: Tensor) -> tuple[Tensor, Tensor]:
    out, vjp_fn = torch.func.vjp(lambda image: _energy(convolution, image), y)
    return out, vjp_fn(torch.ones_like(out))[0]


def _parameter_gradients(convolution: nn.Module, y: Tensor, score: Score) -> list[Tensor]:
    out, s = score(convolution, y)
    loss = (s + 1).square().mean() + out.mean()
    return [loss.detach(), *torch.autograd.grad(loss, list(convolution.parameters()))]


@pytest.mark.parametrize("score", [_by_autograd, _by_vjp])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_score_and_its_gradient_match_pytorch(shape: dict, score: Score) -> None:
    own, plain, y = _pair(shape)
    assert torch.equal(own(y), plain(y)) or own(y).allclose(plain(y), rtol=1e-12)
    torch.testing.assert_close(score(own, y), score(plain, y), rtol=1e-10, atol=1e-10)
    found, expected = (_parameter_gradients(m, y, score) for m in (own, plain))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_third_derivatives_match_pytorch(shape: dict) -> None:
    own, plain, y = _pair(shape)
    v = torch.randn_like(y)

    def gradients(convolution: nn.Module) -> list[Tensor]:
        leaf = y.clone().requires_grad_()
        (s,) = torch.autograd.grad(_energy(convolution, leaf).sum(), leaf, create_graph=True)
        (product,) = torch.autograd.grad(s, leaf, v, create_graph=True)
        return list(torch.autograd.grad((v * product).sum(), [leaf, *convolution.parameters()]))

    torch.testing.assert_close(gradients(own), gradients(plain), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_the_weight_gradient_match_pytorch(shape: dict) -> None:
    own, plain, y = _pair(shape)

    def gradients(convolution: nn.Module) -> list[Tensor]:
        leaf = y.clone().requires_grad_()
        weights = list(convolution.parameters())
        first = torch.autograd.grad(_energy(convolution, leaf).sum(), weights, create_graph=True)
        size = sum(g.pow(3).sum() for g in first)
        second = torch.autograd.grad(size, [leaf, *weights], create_graph=True)
        third = torch.autograd.grad(sum(g.sin().sum() for g in second), [leaf, *weights])
        return [*first, *second, *third]

    torch.testing.assert_close(gradients(own), gradients(plain), rtol=1e-10, atol=1e-9)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning")  # of forward derivatives
@pytest.mark.parametrize("shape", SHAPES[1:3], ids=str)
def test_gradcheck(shape: dict) -> None:
    own, _, y = _pair(shape)
    y = y[:1, :, :4, :5].clone().requires_grad_()
    weight = own.weight.detach().clone().requires_grad_()

    def call(y: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(own, {"weight": weight}, (y,))

    assert torch.autograd.gradcheck(call, (y, weight), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, (y, weight))


class _ConvolutionRecorder(TorchDispatchMode):
    """Records each convolution: its kernel size, or its gradient, by input (I) or weight (W)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            self.found.append(tuple(args[1].shape[2:]))
        elif func is torch.ops.aten.convolution_backward.default:
            self.found.append({0: "I", 1: "W"}[list(args[-1]).index(True)])
            assert sum(args[-1]) == 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("score", [_by_autograd, _by_vjp])
def test_score_computes_no_weight_gradient_and_no_image_sized_kernel(score: Score) -> None:
    own, _, y = _pair(SHAPES[1])
    with _ConvolutionRecorder() as first:
        out, s = score(own, y)
    assert first.found == [(3, 3), "I"]
    with _ConvolutionRecorder() as second:
        torch.autograd.grad((s + 1).square().mean() + out.mean(), own.weight)
    assert sorted(map(str, second.found)) in (["(3, 3)", "W", "W"], ["(3, 3)", "I", "W", "W"])


def test_small_convolutions_use_the_pytorch_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    own, _, y = _pair(SHAPES[0])
    names = []
    for small in (0, 1e9):
        monkeypatch.setattr(module_under_test, "SMALL", small)
        names.append(type(own(y).grad_fn).__name__)
    assert names == ["_ConvolutionBackward", "ConvolutionBackward0"]


def test_frozen_weights_and_no_grad() -> None:
    own, plain, y = _pair(SHAPES[0])
    for module in (own, plain):
        module.requires_grad_(False)
    torch.testing.assert_close(_by_autograd(own, y)[1], _by_autograd(plain, y)[1])
    torch.testing.assert_close(_by_vjp(own, y)[1], _by_vjp(plain, y)[1])
    with torch.no_grad():
        assert torch.equal(own(y), plain(y))


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning")  # of forward derivatives
def test_functional_transforms_match_pytorch() -> None:
    own, plain, y = _pair(SHAPES[0])
    y = y[:, :, :4, :4]
    jvp = torch.func.jvp

    def energy(module: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda image: _energy(module, image[None])[0]

    for transform in (torch.func.grad, torch.func.hessian, lambda f: torch.func.jacfwd(f)):
        own_values = torch.func.vmap(transform(energy(own)))(y)
        torch.testing.assert_close(own_values, torch.func.vmap(transform(energy(plain)))(y))
    for module in (own, plain):
        module.products = jvp(torch.func.grad(energy(module)), (y[0],), (y[1],))
    torch.testing.assert_close(own.products, plain.products)

    def of_weights(module: nn.Module) -> Tensor:
        def loss(weights: dict[str, Tensor], image: Tensor) -> Tensor:
            s = torch.func.grad(
                lambda z: nn.functional.gelu(
                    torch.func.functional_call(module, weights, (z[None],))
                ).sum()
            )(image)
            return s.square().sum()

        weights = {name: p.detach() for name, p in module.named_parameters()}
        return torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, y)

    torch.testing.assert_close(of_weights(own), of_weights(plain))

    def along_weights(module: nn.Module, power: int) -> Tensor:
        def loss(weight: Tensor) -> Tensor:
            out = torch.func.functional_call(module, {"weight": weight}, (y,))
            return out.pow(power).sum()

        at = module.weight.detach()
        return torch.func.jvp(torch.func.grad(loss), (at,), (at.cos(),))[1]

    for power in (1, 3):
        torch.testing.assert_close(along_weights(own, power), along_weights(plain, power))


@pytest.mark.parametrize("score", [_by_autograd, _by_vjp])
def test_autocast_matches_pytorch(score: Score) -> None:
    own, plain, y = _pair(SHAPES[1], torch.float32)
    found = []
    for module in (own, plain):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            out, s = score(module, y)
        assert module(y).dtype == torch.float32
        loss = (s.float() + 1).square().mean() + out.float().mean()
        found.append([s, *torch.autograd.grad(loss, list(module.parameters()))])
    torch.testing.assert_close(*found, rtol=2e-2, atol=2e-2)
    assert [t.dtype for t in found[0]] == [t.dtype for t in found[1]]


def test_channels_last_is_preserved() -> None:
    own, plain, y = _pair(SHAPES[0], torch.float32)
    own, y = (t.to(memory_format=torch.channels_last) for t in (own, y))
    assert own(y).is_contiguous(memory_format=torch.channels_last)
    expected = _parameter_gradients(plain, y.contiguous(), _by_autograd)
    found = _parameter_gradients(own, y, _by_autograd)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flop_count_matches_pytorch(device: str) -> None:
    own, plain, y = _pair(SHAPES[0], torch.float32)
    counts = []
    for module in (own, plain):
        with FlopCounterMode(display=False) as counter:
            out, s = _by_autograd(module.to(device), y.to(device))
            (s.square().mean() + out.mean()).backward()
        counts.append(counter.get_total_flops())
    # both implementations of the weight gradient count the same
    assert counts[0] == counts[1]


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES[1:2], ids=str)
def test_compiled_gradient_has_no_image_sized_kernel(shape: dict) -> None:
    own, plain, y = _pair(shape)
    kernels = _ConvolutionRecorder()

    prepare_compiler()
    call = torch.compile(lambda y: _by_vjp(own, y), fullgraph=True, backend="aot_eager")
    out, s = call(y)
    with kernels:
        found = torch.autograd.grad((s + 1).square().mean() + out.mean(), own.weight)
    expected = _parameter_gradients(plain, y, _by_vjp)
    torch.testing.assert_close(found[0], expected[1], rtol=1e-10, atol=1e-10)
    assert all(size in ("I", "W") or max(size) <= 3 for size in kernels.found)
    inductor = torch.compile(lambda y: _by_vjp(own, y), fullgraph=True)(y)
    torch.testing.assert_close(inductor, _by_vjp(plain, y))


def test_copies_and_state_dict() -> None:
    own, plain, _ = _pair(SHAPES[0])
    assert list(own.state_dict()) == list(plain.state_dict())
    assert torch.equal(copy.deepcopy(own).weight, own.weight)
