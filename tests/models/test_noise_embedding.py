"""Noise embedding: scale and shift after norms, and GradResNets with sigma as an input."""

import pytest
import torch

from ebmkit import JointModel, UserError
from ebmkit.energy import LogDensity
from ebmkit.errors import validated
from ebmkit.models import GradResNet, GradResNetConfig, LinearQuadraticHead
from ebmkit.models.layers import GroupNorm
from ebmkit.models.noise_embedding import NoiseEmbedding


def randomize(model):
    """Give the weights that are 0 at the start random values."""
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return model


def network(seed=0, **options):
    torch.manual_seed(seed)
    return GradResNet(1, GradResNetConfig(width=8, **options))


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (64, 1, 32, 32)], ids=["small", "large"])
@pytest.mark.parametrize("norm", ["group", "scale"])
def test_a_noise_conditional_network_begins_as_the_blind_one(norm, shape):
    """The same bits, with PyTorch's derivatives (small) and with those of the package (large)."""
    blind, own = network(norm=norm), network(norm=norm, noise_embedding=16)
    assert not own.load_state_dict(blind.state_dict(), strict=False).unexpected_keys
    y = torch.rand(shape, requires_grad=True)
    pooled = blind(y).pooled, own(y, torch.rand(shape[0])).pooled
    assert torch.equal(*pooled)
    assert torch.equal(*(torch.autograd.grad(f.square().sum(), y)[0] for f in pooled))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [4, 64])
def test_modulation_is_a_scale_and_a_shift_after_the_norm(size, bias):
    """Value, gradients and the gradients of these, as a score and a time score need them."""
    torch.manual_seed(0)
    norm = randomize(GroupNorm(16, bias=bias).double())
    x = torch.randn(3, 16, size, size, dtype=torch.float64, requires_grad=True)
    modulation = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    scale, shift = modulation[:, :, None, None].chunk(2, dim=1)
    norm.plain = True
    expected = (1 + scale) * norm(x) + shift
    norm.plain = False
    probe = torch.randn_like(x)
    for value in (
        norm(x, modulation),
        norm(x.contiguous(memory_format=torch.channels_last), modulation),
    ):
        torch.testing.assert_close(value, expected)
        found = []
        for y in (value, expected):
            inputs = x, modulation
            by_x, by_modulation = torch.autograd.grad((y**3).sum(), inputs, create_graph=True)
            loss = (by_x * probe).sum() + by_modulation.square().sum()
            of_sums = torch.autograd.grad(by_modulation.square().sum(), x, retain_graph=True)
            of_loss = torch.autograd.grad(loss, (*inputs, *norm.parameters()), retain_graph=True)
            found.append((by_x, by_modulation, *of_sums, *of_loss))
        for own, reference in zip(*found, strict=True):
            torch.testing.assert_close(own, reference)


def test_each_image_has_the_noise_level_of_its_own():
    own = randomize(network(noise_embedding=16)).double()
    y, sigma = torch.rand(3, 1, 8, 8, dtype=torch.float64), torch.tensor([0.01, 0.3, 20.0])
    together = own(y, sigma.double()).pooled
    for i in range(3):
        torch.testing.assert_close(
            own(y[i : i + 1], sigma[i : i + 1].double()).pooled[0], together[i]
        )
    assert not torch.allclose(own(y, sigma.double().flip(0)).pooled, together, rtol=0.01)


def test_embedding_tells_levels_apart_and_is_differentiable_down_to_zero():
    torch.manual_seed(0)
    embedding = NoiseEmbedding(64).double()
    sigma = torch.logspace(-3, 1.6, 200, dtype=torch.float64).requires_grad_()
    distances = torch.cdist(embedding(sigma), embedding(sigma)).detach()
    apart = (sigma[:, None] / sigma).log().abs().detach() > 0.2  # a fifth of sigma
    assert distances[apart].min() > 0.1 * distances.median()
    (slope,) = torch.autograd.grad(embedding(sigma).sum(), sigma)
    assert (slope * sigma).abs().max() < 100  # by log sigma
    assert embedding(torch.zeros(1, dtype=torch.float64)).isfinite().all()


def test_recomputed_activations_give_the_same_gradients():
    own = randomize(network(noise_embedding=16)).double()
    model = JointModel(own, LinearQuadraticHead(own.num_features, 3).double(), in_channels=1)
    y, sigma = torch.rand(2, 1, 8, 8, dtype=torch.float64), torch.rand(2, dtype=torch.float64)
    found = []
    for on in (False, True):
        model.set_recompute(on)
        _, (score,) = model.value_and_grads(y, sigma, LogDensity())
        loss = score.square().sum()
        found.append(torch.autograd.grad(loss, own.parameters(), allow_unused=True))
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain)


@pytest.mark.parametrize(
    "options", [{"norm": "none"}, {"norm": "batch"}, {"norm_everywhere": True}]
)
def test_embedding_needs_a_group_norm_at_the_end_of_blocks(options):
    with pytest.raises(UserError, match="noise_embedding 16 needs a group norm"):
        validated(GradResNetConfig, {"noise_embedding": 16, **options}, "backbone")
