"""Normalisation layers: PyTorch as reference, and homogeneity of layers and networks."""

import pytest
import torch
from torch import nn

from ebmkit import create_model
from ebmkit.models.layers import GroupNorm, make_norm

TINY = 1e-30  # instead of eps = 0, which gives 0 / 0 in constant groups; 1e-5 breaks homogeneity


@pytest.fixture(params=["gradresnet10", "gradresnet18-imagenet"])
def backbone(request) -> str:
    """A GradResNet with each stem; these tests check their norms."""
    return request.param


@pytest.mark.parametrize("bias", [False, True])
def test_group_norm_matches_pytorch(bias):
    ours, theirs = GroupNorm(24, 8, bias=bias).double(), nn.GroupNorm(3, 24).double()
    with torch.no_grad():
        ours.weight.copy_(torch.randn(24))
        theirs.weight.copy_(ours.weight)
        if bias:
            ours.bias.copy_(torch.randn(24))
            theirs.bias.copy_(ours.bias)
    x = torch.randn(2, 24, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


def test_scale_keeping_norm_matches_its_formula():
    norm = GroupNorm(16, 8, keep_scale=True).double()
    x = torch.randn(2, 16, 5, 3, dtype=torch.float64) * torch.rand(2, 16, 1, 1)
    groups = x.reshape(2, 2, -1)
    deviation = groups.std(2, unbiased=False)
    centred = groups - groups.mean(2, keepdim=True)
    expected = centred / deviation[..., None] * deviation.mean(1)[:, None, None]
    # the formula has no eps; the layer adds 1e-5 to variances of about 0.3
    torch.testing.assert_close(norm(x), expected.reshape(x.shape), rtol=1e-3, atol=1e-3)
    norm.eps = TINY
    torch.testing.assert_close(norm(x), expected.reshape(x.shape))


@pytest.mark.parametrize(("keep_scale", "degree"), [(False, 0), (True, 1)])
def test_degree_of_homogeneity_of_norms(keep_scale, degree):
    norm = GroupNorm(16, 8, keep_scale=keep_scale, eps=TINY).double()
    x = torch.randn(2, 16, 4, 4, dtype=torch.float64)
    for factor in (0.01, 3.0, 1000.0):
        torch.testing.assert_close(norm(factor * x), factor**degree * norm(x))


@pytest.mark.parametrize("keep_scale", [False, True])
def test_norms_are_twice_differentiable(keep_scale):
    """By image and weight, against finite differences; training through a score needs them."""
    norm = GroupNorm(4, 2, keep_scale=keep_scale).double()
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64, requires_grad=True)

    def function(x, weight):
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    weight = torch.rand(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, weight))
    assert torch.autograd.gradgradcheck(function, (x, weight))


@pytest.mark.parametrize(("norm", "degree"), [("group", 0), ("scale", 2), ("none", 2)])
def test_eulers_identity_of_the_network(backbone, size, norm, degree):
    """With ReLU and no bias log p is homogeneous: y . score = degree * log p.

    Degree 0 (plain norm): the score is orthogonal to the image, so no noise along y is removed.
    Degree 2 (scale-keeping, no norm): D(y) = J y exactly, the local linearity of CDN section 4.2.
    """
    model = create_model(backbone, 3, in_channels=1, width=8, norm=norm, activation="relu").double()
    for module in model.modules():
        if isinstance(module, GroupNorm):
            module.eps = TINY
    model._warned = True  # about ReLU: see test_ablations
    y = torch.rand(2, 1, size, size, dtype=torch.float64)
    score, log_density = model.score(y), model.log_density(y)
    along = (y * score).flatten(1).sum(1)
    scale = (y.flatten(1).norm(dim=1) * score.detach().flatten(1).norm(dim=1)).max().item()
    torch.testing.assert_close(along, degree * log_density, rtol=1e-9, atol=1e-10 * scale)
    torch.testing.assert_close(model.log_density(3 * y), 3**degree * log_density)
    denoised, vjp_fn = torch.func.vjp(lambda z: model.denoise(z, 0.1), y)
    jacobian_times_y = vjp_fn(y)[0]  # the Jacobian is symmetric
    torch.testing.assert_close(denoised - jacobian_times_y, (2 - degree) * 0.1**2 * score)


def test_norm_none_is_the_identity_and_batch_norm_has_an_optional_bias():
    assert isinstance(make_norm("none", 16, 8, bias=False), nn.Identity)
    assert make_norm("batch", 16, 8, bias=False).bias is None
    assert make_norm("batch", 16, 8, bias=True).bias is not None


def test_channels_not_divisible_into_groups_are_refused():
    with pytest.raises(ValueError, match="12 channels cannot be split into groups of 8"):
        GroupNorm(12, 8)
