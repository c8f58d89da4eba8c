"""Wrapped models: equal quantities, compiled or not, in each precision; no graph is kept."""

import gc

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

from ebmkit import Energies, EnergyModel, GaussianMixture, UserError, create_model, energy, optimize
from ebmkit.compile import COMPILE_THRESHOLD_SECONDS, MAX_SIZES, Inference, unwrapped


class Small(EnergyModel):
    """A smooth blind network of two convolutions."""

    num_classes = 3

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 4, 3, padding=1), nn.GELU()
        )

    def forward(self, y, sigma=None):
        features = self.layers(y).mean(dim=(2, 3))
        return Energies(features[:, :3], 50 * features[:, 3])


class Counting:
    """A compiler backend that runs the traced graph eagerly and counts graphs."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return aot_eager(graph, inputs)


@pytest.fixture
def small():
    return Small().eval().requires_grad_(False)


@pytest.fixture
def counting():
    return Counting()


@pytest.fixture
def y():
    return torch.rand(4, 1, 6, 6)


C = torch.tensor([0, 2, 1, 1])
QUANTITIES = {
    "score": lambda model, y: model.score(y),
    "conditional score": lambda model, y: model.score(y, c=C),
    "label score": lambda model, y: model.label_score(y, C),
    "denoised": lambda model, y: model.denoise(y, 0.1),
    "denoised given the label": lambda model, y: model.denoise(y, 0.1, C),
    "denoised blindly": lambda model, y: model.denoise(y),
    "sigma": lambda model, y: model.estimate_sigma(y),
    "logits": lambda model, y: model.logits(y),
    "log-density": lambda model, y: model.log_density(y),
    "log-joint": lambda model, y: model.log_joint(y, 0.1),
}


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("score", "denoised given the label", "logits", "log-joint")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in QUANTITIES
    ],
)
def test_compiled_quantities_equal_eager_ones(name, small, counting, y):
    quantity = QUANTITIES[name]
    expected = quantity(small, y)
    wrapped = Inference(mode="on", backend=counting).wrap(small)
    for _ in range(3):  # the first call is eager, the second compiles
        # the same operations, but sigma is squared in float32 instead of float64
        torch.testing.assert_close(quantity(wrapped, y), expected, rtol=1e-6, atol=1e-7)
    assert counting.graphs == 1


def test_new_noise_level_does_not_recompile(counting):
    """The exact denoiser of a mixture, with sigma as an input."""
    means = torch.rand(2, 1, 3, 3, dtype=torch.float64)
    mixture = GaussianMixture(means, 0.05)
    levels = [0.1, 0.2, 0.3, torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)]
    y = torch.rand(4, 1, 3, 3, dtype=torch.float64)
    wrapped = Inference(mode="on", backend=counting).wrap(mixture)
    for level in levels:
        expected = mixture.posterior_mean(y, level)
        torch.testing.assert_close(wrapped.denoise(y, level), expected)
        assert not wrapped.denoise(y, level).requires_grad
    assert counting.graphs == 1


def test_sizes_that_do_not_repeat_are_never_compiled(small, counting, y):
    inference = Inference(mode="on", backend=counting)
    wrapped = inference.wrap(small)
    for count in (4, 3, 4, 1, 4, 3):
        wrapped.score(y[:count])
    assert counting.graphs == 0
    assert not inference.compiled
    for count in (4, 4, 3, 4, 1, 4):
        torch.testing.assert_close(wrapped.score(y[:count]), small.score(y[:count]))
    assert counting.graphs == 1
    assert inference.compiled


@pytest.mark.slow
def test_at_most_max_sizes_are_compiled(small, counting):
    wrapped = Inference(mode="on", backend=counting).wrap(small)
    for count in range(1, MAX_SIZES + 3):
        for _ in range(2):
            assert wrapped.log_density(torch.rand(count, 1, 4, 4)).shape == (count,)
    assert counting.graphs == MAX_SIZES


@pytest.mark.slow
def test_new_weights_do_not_recompile(counting):
    model = create_model("gradresnet10", 3, in_channels=1, width=8, image_size=8).eval()
    model.requires_grad_(False)
    y = torch.rand(2, 1, 8, 8)
    wrapped = Inference(mode="on", backend=counting).wrap(model)
    for _ in range(2):
        for parameter in model.parameters():  # weights are inputs of the graph
            parameter.mul_(1.1)
        expected = model.score(y)
        for _ in range(2):
            torch.testing.assert_close(wrapped.score(y), expected)
    assert counting.graphs == 1


def test_auto_compiles_once_enough_work_is_expected(small, counting, y):
    inference = Inference(mode="auto", backend=counting)
    wrapped = inference.wrap(small)
    inference.expect(COMPILE_THRESHOLD_SECONDS / 2)
    for _ in range(3):
        wrapped.score(y)
    assert counting.graphs == 0
    inference.expect(2 * COMPILE_THRESHOLD_SECONDS)
    for _ in range(3):
        wrapped.score(y)
    assert counting.graphs == 1


def test_wrapper_exposes_attributes_and_parameters_of_the_model(small):
    wrapped = optimize(small)
    assert isinstance(wrapped, EnergyModel)
    assert (wrapped.num_classes, wrapped.noise_conditional) == (3, False)
    assert unwrapped(wrapped) is small
    assert {id(p) for p in wrapped.parameters()} == {id(p) for p in small.parameters()}


# --- no graph is kept ----------------------------------------------------------------------------


def living_tensors():
    return sum(issubclass(type(value), torch.Tensor) for value in gc.get_objects())


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, "off") for name in QUANTITIES),
        ("score", "on"),
        pytest.param("denoised", "on", marks=pytest.mark.slow),
    ],
)
def test_frozen_model_keeps_no_tensors(name, mode, small, counting, y):
    """Also without `no_grad`, and without garbage collection."""
    quantity = QUANTITIES[name]
    small = Inference(mode=mode, backend=counting).wrap(small)
    for _ in range(3):
        assert quantity(small, y).grad_fn is None
    gc.collect()
    gc.disable()
    try:
        before = living_tensors()
        for _ in range(5):
            quantity(small, y)
        assert living_tensors() == before
    finally:
        gc.enable()


def test_a_frozen_model_records_no_second_derivatives(small, y, monkeypatch):
    """Only a model with trainable parameters records the graph of the score."""
    recorded, original = [], energy.value_and_grads

    def spy(*arguments, record):
        recorded.append(record)
        return original(*arguments, record=record)

    monkeypatch.setattr(energy, "value_and_grads", spy)
    small.score(y)
    small.requires_grad_(True).score(y)
    assert recorded == [False, True]


def test_calls_that_need_gradients_are_not_compiled(small, counting, y):
    weight = next(small.requires_grad_(True).parameters())
    expected = torch.autograd.grad(small.score(y).square().sum(), weight)
    wrapped = Inference(mode="on", backend=counting).wrap(small)
    for _ in range(3):
        found = torch.autograd.grad(wrapped.score(y).square().sum(), weight)
        assert torch.equal(found[0], expected[0])
    small.requires_grad_(False)
    leaf = y.clone().requires_grad_()
    assert wrapped.log_density(leaf).requires_grad
    gradient = torch.func.grad(lambda image: wrapped.log_density(image).sum())(y)
    torch.testing.assert_close(gradient, small.score(y))
    assert counting.graphs == 0


def test_score_supports_double_backward_and_functional_transforms(small, y):
    leaf, v = y.clone().requires_grad_(), torch.randn_like(y)
    (product,) = torch.autograd.grad(small.score(leaf), leaf, v)
    functional = torch.func.vjp(small.score, y)[1](v)[0]
    torch.testing.assert_close(functional, product)
    torch.testing.assert_close(energy.hessian_products(small, y, None, [v])[2][0], product)


def test_a_trainable_model_is_compiled_under_no_grad(small, counting, y):
    small.requires_grad_(True)
    expected = small.score(y).detach()
    wrapped = Inference(mode="on", backend=counting).wrap(small)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(wrapped.score(y), expected)
    with torch.inference_mode():
        made_there = y.clone()
        torch.testing.assert_close(wrapped.score(made_there, sigma=0.1), expected)
        torch.testing.assert_close(wrapped.score(made_there), expected)
    assert counting.graphs == 1


# --- precision -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_bf16_applies_to_the_network_only(small, counting, y):
    expected = {name: quantity(small, y) for name, quantity in QUANTITIES.items()}
    wrapped = Inference("bf16", "on", counting).wrap(small)
    for name, quantity in QUANTITIES.items():
        for _ in range(2):
            found = quantity(wrapped, y)
            assert found.dtype == torch.float32
            error = (found - expected[name]).norm() / expected[name].norm()
            # bfloat16 has 8 bits: relative error 2^-9 per rounding, a few of which add up
            assert error < 2e-2, name
    assert not torch.equal(wrapped.score(y), expected["score"])
    assert torch.equal(small.score(y), expected["score"])  # the model is unchanged


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp16"}, "precision 'fp16'"),
        ({"precision": "tf32"}, "needs an NVIDIA GPU"),
        ({"compile": "yes"}, "compile mode 'yes'"),
    ],
)
def test_unsupported_precisions_and_modes_are_refused(options, message, small):
    with pytest.raises(UserError, match=message):
        optimize(small, **options)


def test_auto_is_float32_and_eager_on_a_cpu(small):
    inference = optimize(small, "auto", "auto").inference
    assert (inference.precision, inference.mode) == ("fp32", "off")


# --- models that cannot be compiled --------------------------------------------------------------


class GraphBreak(Small):
    """Its forward pass contains a graph break."""

    def forward(self, y, sigma=None):
        torch._dynamo.graph_break()
        return super().forward(y, sigma)


def test_model_that_cannot_be_compiled_raises_or_runs_eagerly(y, counting):
    model = GraphBreak().eval().requires_grad_(False)
    expected = model.score(y)
    wrapped = Inference(mode="on", backend=counting).wrap(model)
    wrapped.score(y)
    with pytest.raises(UserError, match=r"cannot be compiled: .* use --compile off"):
        wrapped.score(y)
    inference = Inference(mode="auto", backend=counting)
    inference.expect(2 * COMPILE_THRESHOLD_SECONDS)
    wrapped = inference.wrap(model)
    wrapped.score(y)
    with pytest.warns(UserWarning, match="not compiled, running eagerly"):
        assert torch.equal(wrapped.score(y), expected)
    assert torch.equal(wrapped.score(y), expected)  # without a second attempt


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # warnings of the compiler
def test_default_compiler_gives_the_same_scores():
    model = create_model("gradresnet10", 3, in_channels=1, width=8, image_size=8).eval()
    model.requires_grad_(False)
    y, c = torch.rand(4, 1, 8, 8), torch.tensor([0, 2, 1, 1])
    expected = model.score(y), model.denoise(y, 0.1, c)
    wrapped = optimize(model, compile="on")
    for _ in range(3):
        found = wrapped.score(y), wrapped.denoise(y, 0.1, c)
        for a, b in zip(found, expected, strict=True):
            # sums in another order: 1e-7 per sum, up to 1e-5 for 10 layers forward and backward
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
    assert wrapped.inference.compiled
