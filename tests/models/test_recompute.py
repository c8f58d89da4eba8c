"""Activation checkpointing inside a score: same derivatives, less memory."""

import itertools

import pytest
import torch
from torch import nn
from torch.func import grad, jacrev, vjp
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ebmkit import create_model
from ebmkit.energy import LogDensity, value_and_grads
from ebmkit.errors import UserError
from ebmkit.models.gradresnet import Block, GradResNetConfig
from ebmkit.models.recompute import recompute


class Recomputed(nn.Module):
    """A block under activation checkpointing."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return recompute(self.block, x)


def network(recomputed, dtype=torch.float64, **options):
    """A GradResNet18 of width 8, with every block recomputed or none."""
    torch.manual_seed(0)
    model = create_model("gradresnet18", 3, in_channels=3, width=8, **options).to(dtype)
    if recomputed:
        for stage in model.backbone.stages:
            for i, block in enumerate(stage):
                stage[i] = Recomputed(block)
    return model


def energies_and_scores(model, y, labels):
    """Energies and both scores by the functional path, as in a training step."""
    targets = LogDensity(), LogDensity(labels)
    return value_and_grads(model, y, None, *targets, use_autograd=False)


def dsm(model, y, labels, eps):
    targets = [LogDensity()]
    _, (score,) = value_and_grads(model, y, None, *targets, use_autograd=False)
    return (0.1 * score + eps).square().flatten(1).sum(1).mean()


def ce(model, y, labels, eps):
    return nn.functional.cross_entropy(model(y).logits, labels)


def both_scores(model, y, labels, eps):
    _, (score, conditional) = energies_and_scores(model, y, labels)
    plain = (0.1 * score + eps).square().flatten(1).sum(1).mean()
    return plain + (conditional + eps).square().mean()


def joint(model, y, labels, eps):
    energies, (score, _) = energies_and_scores(model, y, labels)
    plain = (0.1 * score + eps).square().flatten(1).sum(1).mean()
    return nn.functional.cross_entropy(energies.logits, labels) + plain


def batch(size=4, pixels=16, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    shape = (size, 3, pixels, pixels)
    y, eps = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    return y, torch.arange(size) % 3, eps


def relative_difference(first, second):
    return ((first - second).norm() / second.norm()).item()


# --- unchanged derivatives ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (ce, {}),
        (both_scores, {}),
        (joint, {"norm": "scale", "bias": True}),
        *(
            pytest.param(loss, {"norm": "scale", "bias": True}, marks=pytest.mark.slow)
            for loss in (dsm, ce, both_scores)
        ),
    ],
)
def test_losses_and_gradients_are_unchanged(loss, options):
    """Equal up to the order of sums: 1e-9 is 5 million times the rounding of float64."""
    y, labels, eps = batch()
    plain, recomputed = network(False, **options), network(True, **options)
    values = []
    for model in (plain, recomputed):
        value = loss(model, y, labels, eps)
        value.backward()
        values.append(value.detach())
    torch.testing.assert_close(*values, rtol=1e-12, atol=0)
    for (name, p), q in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        if p.grad is None or not p.grad.any():  # cross-entropy does not use the density
            assert q.grad is None or not q.grad.any(), name
        else:
            assert relative_difference(q.grad, p.grad) < 1e-9, name


def test_score_by_autograd_is_unchanged():
    """Uses `torch.autograd.grad(create_graph=True)` instead of `torch.func.vjp`."""
    y, _, eps = batch()
    gradients = []
    for model in (network(False), network(True)):
        leaf = y.clone().requires_grad_()
        (score,) = torch.autograd.grad(model(leaf).log_density.sum(), leaf, create_graph=True)
        (score + eps).square().sum().backward()
        gradients.append([leaf.grad, *(p.grad for p in model.backbone.parameters())])
    for first, second in zip(*gradients, strict=True):
        assert relative_difference(second, first) < 1e-9


def tiny():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.GELU(), nn.Conv2d(3, 2, 1)).double()


@pytest.mark.slow
def test_derivatives_match_finite_differences():
    """First, second and, through the score, third derivatives, by input and parameters."""
    block, x = tiny(), torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)

    def score(x, *_):
        out, vjp_fn = vjp(lambda image: recompute(block, image), x)
        return vjp_fn(torch.ones_like(out))[0]

    inputs = (x, *block.parameters())  # perturbed in place, so the block uses them
    assert torch.autograd.gradcheck(lambda x, *_: recompute(block, x), inputs)
    assert torch.autograd.gradgradcheck(lambda x, *_: recompute(block, x), inputs)
    assert torch.autograd.gradgradcheck(score, inputs)


def test_nested_transforms():
    """Hessians, and gradients by parameters of a gradient by the image."""
    block, x = tiny(), torch.randn(1, 2, 3, 3, dtype=torch.float64)

    def density(run):
        return lambda image: run(image).square().sum()

    def recomputed(image):
        return recompute(block, image)

    expected = jacrev(grad(density(block)))(x)
    torch.testing.assert_close(jacrev(grad(density(recomputed)))(x), expected)

    def by_parameters(module):
        def loss(parameters):
            run = density(lambda y: torch.func.functional_call(module, parameters, (y,)))
            return grad(run)(x).square().sum()

        return grad(loss)({name: p.detach() for name, p in module.named_parameters()})

    expected = by_parameters(block)
    for name, gradient in by_parameters(Recomputed(block)).items():
        torch.testing.assert_close(gradient, expected[name.removeprefix("block.")])


def test_frozen_shared_and_absent_parameters():
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(recompute(nn.GELU(), x).sum(), x)
    assert torch.equal(gradient, torch.autograd.grad(nn.GELU()(x).sum(), x)[0])
    block = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4), nn.Linear(4, 4)).double()
    block[2].weight = block[0].weight
    block[3].weight.requires_grad_(False)
    block(x).square().sum().backward()
    expected = {name: p.grad for name, p in block.named_parameters()}
    block.zero_grad()
    recompute(block, x).square().sum().backward()
    assert block[3].weight.grad is None
    for name, p in block.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])


# --- memory and cost ------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operations returned and that are still referenced; their peak."""

    def __init__(self, ignored):
        super().__init__()
        self.ignored = {StorageWeakRef(t.untyped_storage()).cdata for t in ignored}
        self.held = {}
        self.peak = 0

    def bytes(self):
        self.held = {key: item for key, item in self.held.items() if not item[0].expired()}
        return sum(size for _, size in self.held.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                reference = StorageWeakRef(tensor.untyped_storage())
                if reference.cdata not in self.ignored:
                    self.held[reference.cdata] = (reference, tensor.untyped_storage().nbytes())
        self.peak = max(self.peak, self.bytes())
        return out


@pytest.mark.parametrize(
    ("loss", "stored_ratio", "peak_ratio"),
    [(dsm, 3.5, 1.7), pytest.param(ce, 3.5, 2.0, marks=pytest.mark.slow)],
)
def test_a_step_stores_less_and_has_a_lower_peak(loss, stored_ratio, peak_ratio):
    """Bytes stored for the outer backward pass, and peak bytes of a step, on 32x32 images.

    Measured: 3.7 and 1.9 for score matching, 3.8 and 2.1 for cross-entropy. The peak includes the
    graph of one block, and the first two of the eight blocks are half of the network.
    """
    y, labels, eps = batch(16, 32, torch.float32)
    stored, peak = [], []
    for recomputed in (False, True):
        model = network(recomputed, torch.float32)
        with LiveBytes([*model.parameters(), y, eps]) as live:
            value = loss(model, y, labels, eps)
            stored.append(live.bytes())
            value.backward()
        peak.append(live.peak)
    assert stored[0] > stored_ratio * stored[1]
    assert peak[0] > peak_ratio * peak[1]


class ConvolutionCounter(TorchDispatchMode):
    """Counts convolutions, their gradients by input, and their gradients by weight."""

    def __init__(self):
        super().__init__()
        self.forward = self.by_input = self.by_weight = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution.default:
            self.forward += 1
        if function is torch.ops.aten.convolution_backward.default:
            self.by_input += args[-1][0]
            self.by_weight += args[-1][1]
        return function(*args, **(kwargs or {}))


def test_a_score_costs_one_more_forward_pass_and_no_gradient_of_parameters():
    """20 convolutions: the stem, two in each of 8 blocks, and 3 projections."""
    y = batch()[0]
    for model, forward in ((network(False), 20), (network(True), 20 + 19)):
        with ConvolutionCounter() as counted:
            _, (score,) = value_and_grads(model, y, None, LogDensity(), use_autograd=False)
        assert score.requires_grad
        assert (counted.forward, counted.by_input, counted.by_weight) == (forward, 20, 0)


class AutocastRecorder(nn.Module):
    """Two linear layers that record at each call whether autocast is enabled."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8, False))
        self.autocast = []

    def forward(self, x):
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        return self.layers(x)


def test_without_gradients_a_block_runs_once():
    block, x = AutocastRecorder(), torch.randn(2, 8)
    for mode in (torch.no_grad(), torch.inference_mode()):
        block.autocast.clear()
        with mode:
            out = recompute(block, x)
        assert len(block.autocast) == 1
        assert out.grad_fn is None
        torch.testing.assert_close(out, block(x))


def test_recompute_on_the_meta_device():
    """The meta device has shapes only and does not support autocast."""
    block, x = tiny().to("meta"), torch.empty(1, 2, 3, 3, dtype=torch.float64, device="meta")
    out, vjp_fn = vjp(lambda image: recompute(block, image), x)
    assert vjp_fn(out)[0].shape == x.shape


# --- autocast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("states", list(itertools.product([False, True], repeat=3)), ids=str)
def test_recomputation_uses_the_autocast_of_the_first_run(states):
    """Forward, score and outer gradient, each with and without autocast: equal to the plain block.

    The cache of autocast is disabled, because it accumulates gradients in bfloat16.
    """
    block = AutocastRecorder()
    x, start = torch.randn(4, 8), torch.randn(4, 8)
    found = []
    for run in (block, Recomputed(block)):
        in_forward, in_vjp, in_outer = (
            torch.autocast("cpu", torch.bfloat16, enabled=on, cache_enabled=False) for on in states
        )
        block.autocast.clear()
        with in_forward:
            out, vjp_fn = vjp(run, x)
        with in_vjp:
            (score,) = vjp_fn(start.to(out.dtype))
        loss = (score.float() + 1).square().sum()
        with in_outer:
            gradients = torch.autograd.grad(loss, list(block.parameters()))
        assert set(block.autocast) == {states[0]}
        found.append([out, score, *gradients])
    for plain, recomputed in zip(*found, strict=True):
        assert recomputed.dtype == plain.dtype
        torch.testing.assert_close(recomputed, plain)


def test_bfloat16_gradients_of_a_block_match():
    """With autocast's cache, as in training: equal up to a few bfloat16 roundings (2^-8 each)."""
    torch.manual_seed(0)
    block = Block(8, 16, 2, GradResNetConfig(width=8))
    x, start = torch.randn(4, 8, 8, 8), torch.randn(4, 16, 4, 4)
    found = []
    for run, enabled in ((block, True), (Recomputed(block), True), (block, False)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out, vjp_fn = vjp(run, x)
            (score,) = vjp_fn(start.to(out.dtype))
        found.append(torch.autograd.grad(score.float().square().sum(), list(block.parameters())))
    for plain, recomputed, exact in zip(*found, strict=True):
        assert relative_difference(recomputed, plain) < 2**-7
        assert relative_difference(recomputed, exact) > 2**-10  # bfloat16 was used


# --- errors and torch.compile ---------------------------------------------------------------------


def test_batch_norm_and_dropout_are_refused_in_training_only():
    x = torch.randn(4, 8, 4, 4)
    for block, fix in (
        (Block(8, 8, 1, GradResNetConfig(width=8, norm="batch")), "norm=group"),
        (nn.Sequential(nn.Conv2d(8, 8, 1), nn.Dropout(0.1)), "p to 0"),
    ):
        with pytest.raises(UserError, match=rf"{fix}.* or switch activation checkpointing off"):
            recompute(block.train(), x)
        with torch.no_grad():
            recompute(block, x)  # runs once
        block.eval()
        expected = torch.autograd.grad(block(x).square().sum(), list(block.parameters()))
        found = torch.autograd.grad(recompute(block, x).square().sum(), list(block.parameters()))
        torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_compiled_score_is_unchanged():
    block, x = tiny(), torch.randn(1, 2, 3, 3, dtype=torch.float64)

    def loss(image):
        out, vjp_fn = vjp(lambda at: recompute(block, at), image)
        return vjp_fn(torch.ones_like(out))[0].square().sum()

    parameters = [p for p in block.parameters() if p.ndim > 1]
    expected = torch.autograd.grad(loss(x), parameters)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), parameters), expected)
