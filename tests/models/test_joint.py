"""Size scaling: the plain formula up to the reference size, above it log p grows with the area."""

import itertools
from typing import get_args

import pytest
import torch
from torch import nn

from ebmkit import Energies, JointModel, create_model
from ebmkit.inference import spread
from ebmkit.models import Features, LinearQuadraticHead
from ebmkit.models.joint import SizeScaling, half_overlapping_tiles

REFERENCE = 32  # a multiple of twice the total stride of every preset


@pytest.fixture(params=["gradresnet10", "gradresnet18-imagenet"])
def backbone(request) -> str:
    """A GradResNet with each stem; these tests check their norms and size scaling."""
    return request.param


@pytest.fixture(params=get_args(SizeScaling))
def size_scaling(request):
    return request.param


def make(backbone, size_scaling, circular):
    """A model in float64; ``circular`` gives its convolutions periodic padding."""
    torch.manual_seed(0)
    size = {"image_size": REFERENCE, "size_scaling": size_scaling}
    model = create_model(backbone, 3, in_channels=1, width=8, **size).double()
    for module in model.modules():
        if circular and isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"
    return model


def image(*shape):
    return torch.rand(1, 1, *shape, dtype=torch.float64)


@pytest.mark.parametrize("count", [2, 3])
def test_log_density_of_a_periodic_tiling_scales_with_its_copies(backbone, size_scaling, count):
    """With periodic padding the maps of an n x n tiling are copies of the maps of one image.

    Their statistics are equal, so log p and the logits are exactly n^2 times those of the image.
    This includes tiles: a crop at half a tile is the image rolled by a multiple of the stride.
    """
    model = make(backbone, size_scaling, circular=True)
    y = image(REFERENCE, REFERENCE)
    one, many = model(y), model(y.tile(count, count))
    torch.testing.assert_close(many.log_density, count**2 * one.log_density)
    torch.testing.assert_close(many.logits, count**2 * one.logits)


@pytest.mark.parametrize("size_scaling", ["windows", "factor"])
@pytest.mark.parametrize("count", [2, 3])
def test_score_of_a_periodic_tiling_repeats_the_score_of_one_copy(backbone, size_scaling, count):
    """The score of a pixel, and so its denoised value, does not depend on the image size.

    This does not hold for tiles, because the crops at the borders are smaller.
    """
    model = make(backbone, size_scaling, circular=True)
    y = image(REFERENCE, REFERENCE)
    many = y.tile(count, count)
    torch.testing.assert_close(model.score(many), model.score(y).tile(count, count))
    # the gradient of log p(0|y) / p(1|y) repeats too; that of log p(c|y) does not, because the
    # logits are n^2 times as large and change the posterior
    odds = [model.label_score(z, 0) - model.label_score(z, 1) for z in (many, y)]
    torch.testing.assert_close(odds[0], odds[1].tile(count, count))


def test_score_shrinks_without_size_scaling(backbone):
    """With average pooling alone, each of 4 copies has 1/4 of the score."""
    model = make(backbone, "windows", circular=True)
    model.reference_size = None
    y = image(REFERENCE, REFERENCE)
    torch.testing.assert_close(model.log_density(y.tile(2, 2)), model.log_density(y))
    torch.testing.assert_close(model.score(y.tile(2, 2)), model.score(y).tile(2, 2) / 4)


def test_size_scaling_has_no_effect_up_to_the_reference_area(backbone, size_scaling):
    model = make(backbone, size_scaling, circular=False)
    images = [image(*shape) for shape in ((32, 32), (20, 32), (9, 7), (16, 64))]
    scaled = [model(y) for y in images]
    model.reference_size = None
    for y, energies in zip(images, scaled, strict=True):
        plain = model(y)
        assert torch.equal(energies.log_density, plain.log_density), y.shape
        assert torch.equal(energies.logits, plain.logits), y.shape


@pytest.mark.parametrize("shape", [(33, 47), (70, 40), (16, 100), (64, 33)], ids=str)
def test_every_pixel_has_a_score_at_odd_sizes(backbone, size_scaling, shape):
    """The score is not 0 at any pixel and matches a finite difference."""
    model, y = make(backbone, size_scaling, circular=False), image(*shape)
    score = model.score(y)
    assert (score != 0).all()
    direction, step = torch.randn_like(y), 1e-6  # as in test_identities
    slope = model.log_density(y + step * direction) - model.log_density(y - step * direction)
    scale = float(score.detach().norm())
    expected = (score * direction).flatten(1).sum(1)
    torch.testing.assert_close(expected, slope / (2 * step), rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.parametrize("size_scaling", ["windows", "factor"])
def test_log_density_is_continuous_at_the_reference_size(size_scaling):
    """One row more than the reference size multiplies the plain formula by 33/32."""
    model, y = make("gradresnet18", size_scaling, circular=False), image(REFERENCE + 1, REFERENCE)
    grown = model.log_density(y)
    model.reference_size = None
    torch.testing.assert_close(grown, 33 / 32 * model.log_density(y))


def test_windows_use_separate_features_for_each_part():
    """An image of two different halves, with expected values computed by hand."""

    class Pixels(nn.Module):
        num_features = 1

        def forward(self, y):
            return Features(y.mean(dim=(2, 3)), (y,))

        def pool(self, maps, grid):
            return nn.functional.adaptive_avg_pool2d(maps[0], grid).flatten(2).transpose(1, 2)

    head = LinearQuadraticHead(1, 0)
    nn.init.ones_(head.density.weight)
    y = torch.cat([torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)], dim=3)
    energies = {
        size_scaling: JointModel(Pixels(), head, 1, (4, 4), size_scaling).log_density(y).item()
        for size_scaling in get_args(SizeScaling)
    }
    assert energies["windows"] == pytest.approx(-0.5 * (0**2 + 1**2))
    assert energies["factor"] == pytest.approx(-0.5 * 2 * 0.5**2)
    # crops are twice the reference, so one holds the whole image
    assert energies["tiles"] == pytest.approx(-0.5 * 2 * 0.5**2)
    long = torch.cat([y, y], dim=3)  # 0 1 0 1: crops 0, 01, 10, 01, 1 cover it twice
    tiled = JointModel(Pixels(), head, 1, (4, 4), "tiles").log_density(long).item()
    assert tiled == pytest.approx(-0.5 * (0**2 + 3 * 2 * 0.5**2 + 1**2) / 2)


def test_half_overlapping_tiles_cover_every_position_equally_often():
    for length in range(1, 70):
        covered = [0] * length
        for start, stop in half_overlapping_tiles(length, 8):
            assert 0 < stop - start <= 8
            for i in range(start, stop):
                covered[i] += 1
        assert set(covered) == ({1} if length <= 8 else {2}), length


@pytest.mark.parametrize("shape", [(70, 70), (100, 40), (20, 200), (129, 67)], ids=str)
def test_tiles_weight_every_pixel_equally(shape):
    """With the mean of the image as feature and log p, log p = sum of pixels / reference area."""

    class Mean(nn.Module):
        num_features = 1

        def forward(self, y):
            return Features(y.mean(dim=(2, 3)))

    class IdentityHead(nn.Module):
        num_classes = 0

        def forward(self, pooled):
            return Energies(pooled.new_zeros(len(pooled), 0), pooled[:, 0])

    model = JointModel(Mean(), IdentityHead(), 1, (32, 32), "tiles")
    y = image(*shape)
    torch.testing.assert_close(model.log_density(y), y.sum()[None] / 32**2)
    torch.testing.assert_close(model.score(y), torch.full_like(y, 1 / 32**2))


def test_spread_reaches_both_ends_in_steps_of_at_most_the_stride():
    for length in range(1, 70):
        tile = min(8, length)
        starts = spread(length, tile, 4)
        assert starts[0] == 0
        assert starts[-1] == length - tile
        assert all(0 < b - a <= 4 for a, b in itertools.pairwise(starts)), length
