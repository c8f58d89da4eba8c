"""Contracts of every kind of preset: gradients, any image size, same bits, the paper's sizes."""

import pytest
import torch
from ebmkit_tests.support.small_models import DEEPER, PAIRS
from torch import nn

import ebmkit
from ebmkit.energy import LogDensity
from ebmkit.models import (
    BACKBONES,
    HEADS,
    Backbone,
    GradResNet,
    GradResNetConfig,
    Head,
    LinearQuadraticHead,
    WindowedBackbone,
)
from ebmkit.models.layers import GroupNorm

pytestmark = pytest.mark.filterwarnings("ignore:a score is differentiated through")


def create_model(*names, **options):
    """A model in evaluation mode, where BatchNorm normalises each image independently."""
    return ebmkit.create_model(*names, **options).eval()


GRADRESNETS = sorted(n for n, p in BACKBONES.items() if p.config.kind == "gradresnet")


def joint_loss(model, y, labels):
    """Cross-entropy plus denoising score matching, as in CDN eq. 13."""
    energies, (score,) = model.value_and_grads(y, None, LogDensity())
    dsm = (0.1 * score + torch.randn_like(y)).square().flatten(1).sum(1).mean()
    return nn.functional.cross_entropy(energies.logits, labels) + dsm


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_every_parameter_gets_a_gradient(backbone, head, size):
    check_every_parameter_gets_a_gradient(backbone, head, size)


@pytest.mark.parametrize("options", [{"norm": "scale"}, {"bias": True}, {"norm": "none"}], ids=str)
@pytest.mark.parametrize("head", sorted(HEADS))
def test_every_parameter_of_a_variant_gets_a_gradient(head, options):
    check_every_parameter_gets_a_gradient("gradresnet18", head, 8, **options)


def check_every_parameter_gets_a_gradient(backbone, head, size, **options):
    model = create_model(backbone, 3, in_channels=1, head=head, width=8, **options)
    for p in (
        p for p in model.parameters() if p.ndim > 1 and not p.any()
    ):  # else what precedes it gets none
        nn.init.normal_(p, std=0.1)
    y = torch.rand(2, 1, size, size)
    joint_loss(model, y, torch.tensor([0, 2])).backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_state_dict_round_trip(backbone, head, images):
    options = {"num_classes": 3, "in_channels": 1, "head": head, "width": 8}
    first, second = (create_model(backbone, **options).double() for _ in range(2))
    assert not torch.equal(first.score(images), second.score(images))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.logits(images), second.logits(images))
    assert torch.equal(first.score(images), second.score(images))


def test_same_seed_gives_bit_identical_scores(backbone, head, images):
    scores = []
    for _ in range(2):
        torch.manual_seed(5)
        model = create_model(backbone, 3, in_channels=1, head=head, width=8).double()
        scores.append(model.score(images))
    assert torch.equal(*scores)


@pytest.mark.parametrize(
    "backbone",
    [
        pytest.param(
            name, marks=[pytest.mark.slow] if name in ("resnet50", "wideresnet28-10") else []
        )
        for name in sorted(BACKBONES.keys() - DEEPER)
    ],
)
def test_images_of_any_size(backbone):
    """Shapes are right, values are finite and scores are not 0, down to images of one pixel."""
    shapes = {1: [(33, 47), (1, 1), (3, 2)], 3: [(1, 7), (5, 64), (1, 1)]}
    for channels, sizes in shapes.items():
        for size in sizes:
            torch.manual_seed(0)
            model = create_model(backbone, 3, in_channels=channels, width=8).double()
            y = torch.rand(2, channels, *size, dtype=torch.float64)
            features = model.backbone(y)
            assert features.pooled.shape == (2, model.backbone.num_features)
            score = model.score(y)
            assert score.shape == y.shape
            assert score.isfinite().all()
            assert score[0].any(), size
            assert model.denoise(y, 0.1 if model.noise_conditional else None).isfinite().all()


def test_presets_satisfy_the_protocols(model):
    assert isinstance(model.backbone, Backbone)
    assert isinstance(model.backbone, WindowedBackbone)
    assert isinstance(model.head, Head)
    assert model.num_classes == model.head.num_classes == 3


@pytest.mark.parametrize("backbone", sorted(BACKBONES.keys() - DEEPER))
def test_pooling_over_windows_averages_the_maps(backbone, size):
    """Features of a window pool its part of the maps; their mean is the global pooling."""
    network = create_model(backbone, 3, width=8).double().backbone
    features = network(torch.rand(2, 3, 2 * size, 2 * size, dtype=torch.float64))
    windows = network.pool(features.maps, (2, 2))
    torch.testing.assert_close(windows.mean(1), features.pooled)  # even maps have equal windows
    corner = tuple(m[:, :, m.shape[2] // 2 :, : m.shape[3] // 2] for m in features.maps)
    torch.testing.assert_close(windows[:, 2], network.pool(corner, (1, 1)).squeeze(1))


def test_denoise_is_tweedies_formula(model, images):
    expected = images + 0.1**2 * model.score(images, sigma=0.1)
    assert torch.equal(model.denoise(images, 0.1), expected)


# --- the paper's network -------------------------------------------------------------------------


def test_default_network_has_the_papers_size():
    """CDN section 3.2: 11.2 million parameters and K = 736 features at width 64."""
    network = create_model("gradresnet18", 10, width=64).backbone
    assert network.num_features == 736
    count = sum(p.numel() for p in network.parameters())
    assert round(count / 1e6, 1) == 11.2
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert sum(c.kernel_size == (3, 3) for c in convolutions) == 1 + 16
    assert sum(c.kernel_size == (1, 1) for c in convolutions) == 3
    assert not any(isinstance(m, nn.MaxPool2d | nn.Dropout) for m in network.modules())


def test_depth_34_has_3_4_6_3_blocks():
    network = GradResNet(3, GradResNetConfig(depth=34, width=8))
    assert [len(stage) for stage in network.stages] == [3, 4, 6, 3]
    assert network.num_features == 11.5 * 8


@pytest.mark.parametrize(("name", "shrink"), [("gradresnet18", 8), ("gradresnet18-imagenet", 16)])
def test_widths_and_total_strides_match_the_paper(name, shrink):
    network = create_model(name, 3, width=8).backbone
    maps = network(torch.rand(1, 3, 64, 64)).maps
    assert [m.shape[1] for m in maps] == [8, 16, 32, 64]
    assert maps[-1].shape[-1] == 64 // shrink


@pytest.mark.parametrize("head", sorted(HEADS))
@pytest.mark.parametrize("backbone", [n for n in GRADRESNETS if n != "gradresnet18-sigma"])
def test_presets_have_no_bias_and_option_bias_adds_one_to_every_layer(backbone, head):
    free = create_model(backbone, 3, head=head, width=8)
    assert [n for n, _ in free.named_parameters() if n.endswith("bias")] == []
    biased = create_model(backbone, 3, head=head, width=8, bias=True).backbone
    layers = [m for m in biased.modules() if isinstance(m, nn.Conv2d | nn.Linear | GroupNorm)]
    assert len(layers) > 20
    assert all(m.bias is not None for m in layers)


def test_head_bias_shifts_logits_and_log_density():
    head = LinearQuadraticHead(4, 3, bias=True)
    with torch.no_grad():
        head.classifier.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
        head.density.bias.fill_(2.0)
    energies = head(torch.zeros(1, 4))
    assert energies.logits.tolist() == [[1.0, 2.0, 3.0]]
    assert energies.log_density.tolist() == [-2.0]


def test_without_side_connections_only_the_last_stage_is_pooled():
    network = GradResNet(3, GradResNetConfig(width=8, side_connections=False))
    y = torch.rand(2, 3, 8, 8)
    features = network(y)
    assert network.num_features == 64
    assert len(features.maps) == 1
    torch.testing.assert_close(features.pooled, features.maps[0].mean(dim=(2, 3)))


def test_number_of_norms_by_option():
    def norms(**options):
        network = GradResNet(3, GradResNetConfig(width=8, **options))
        return sum(isinstance(m, GroupNorm | nn.BatchNorm2d) for m in network.modules())

    assert norms() == 8 + 3  # one per block, one per projecting shortcut
    assert norms(shortcut_norm=False) == 8
    assert norms(norm="none") == 0
    assert norms(norm="batch") == 8 + 3
    assert norms(norm_everywhere=True) == 16 + 3  # after every convolution but the stem


@pytest.mark.parametrize("backbone", GRADRESNETS)
def test_blocks_end_with_a_norm(backbone, size):
    """CDN figure 2: a norm follows the activation, so each group has mean 0 and deviation 1."""
    network = create_model(backbone, 3, width=8).double().backbone
    for maps in network(torch.rand(1, 3, 2 * size, 2 * size, dtype=torch.float64)).maps:
        groups = maps.reshape(maps.shape[1] // 8, -1)
        torch.testing.assert_close(groups.mean(1), torch.zeros_like(groups[:, 0]))
        # eps = 1e-5, added to the variance of the input, lowers the deviation slightly
        assert (groups.std(1, unbiased=False) > 0.98).all()


def test_input_normalisation_keeps_scores_in_image_units():
    """The score of f((y - mean) / std) is the score of f at that point, divided by std."""
    plain = create_model(width=8, num_classes=3).double()
    y = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    expected = plain.score((y - 0.4) / 0.25) / 0.25
    plain.input_mean, plain.input_std = 0.4, 0.25
    torch.testing.assert_close(plain.score(y), expected)


def test_backbone_presets_have_a_description_and_build():
    for name, preset in BACKBONES.items():
        assert preset.description, name
        if preset.config.kind == "gradresnet":
            assert preset.config.build(3).num_features == 11.5 * preset.config.width


def test_model_without_classes():
    model = create_model(width=8, num_classes=0, in_channels=1).double()
    y = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    assert model.logits(y).shape == (2, 0)
    (gradient,) = torch.autograd.grad(model.log_density(y.requires_grad_()).sum(), y)
    torch.testing.assert_close(model.score(y), gradient)
