"""ResNet and WideResNet: torchvision as reference, published sizes, gradients, any image size."""

from contextlib import nullcontext

import pytest
import torch
import torchvision
from torch import nn

from ebmkit import JointModel
from ebmkit.errors import UserError, validated
from ebmkit.models import LinearQuadraticHead
from ebmkit.models.resnet import ResNetConfig
from ebmkit.models.wideresnet import WideResNetConfig

JEM = {"norm": "none", "bias": True, "activation": "leaky_relu", "block": "jem"}
NETWORKS = {
    "resnet18": ResNetConfig(width=4),
    "resnet50": ResNetConfig(width=4, depth=50),
    "resnet18-imagenet": ResNetConfig(width=4, stem="imagenet"),
    "wideresnet": WideResNetConfig(depth=10, width=8),
    "wideresnet-group": WideResNetConfig(depth=10, width=8, norm="group"),
    "wideresnet-jem": WideResNetConfig(depth=10, width=8, **JEM),
}


@pytest.fixture(params=sorted(NETWORKS))
def backbone(request) -> nn.Module:
    """A float64 network in evaluation mode, with other than the initial running statistics."""
    network = NETWORKS[request.param].build(2).double()
    network(torch.randn(8, 2, 16, 16, dtype=torch.float64))
    return network.eval()


def count(config, classes: int) -> int:
    """Number of parameters, including a linear classifier of ``classes``."""
    with torch.device("meta"):
        network = config.build(3)
    return sum(p.numel() for p in network.parameters()) + (network.num_features + 1) * classes


@pytest.mark.parametrize(
    ("config", "classes", "published"),
    [
        (ResNetConfig(depth=18, stem="imagenet"), 1000, 11_689_512),  # torchvision's tables
        (ResNetConfig(depth=34, stem="imagenet"), 1000, 21_797_672),
        (ResNetConfig(depth=50, stem="imagenet"), 1000, 25_557_032),
        (ResNetConfig(), 10, 11_173_962),
        (WideResNetConfig(), 10, 36_479_194),  # "36.5 M", Zagoruyko & Komodakis, table 4
        (WideResNetConfig(depth=40, width=64), 10, 8_949_210),  # "8.9 M"
        (WideResNetConfig(depth=16, width=128), 10, 10_961_370),  # "11.0 M"
        # without the norms' weights and biases, with the convolutions' biases
        (WideResNetConfig(**JEM), 10, 36_479_194 - 2 * 8_976 + 10_096),
    ],
    ids=str,
)
def test_parameter_counts_match_published_sizes(config, classes, published):
    assert count(config, classes) == published


@pytest.mark.parametrize("name", ["resnet18", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_imagenet_form_matches_torchvision_with_shared_weights(name):
    theirs = getattr(torchvision.models, name)(num_classes=5)
    ours = ResNetConfig(depth=int(name[6:]), stem="imagenet").build(3)
    y = torch.randn(2, 3, 40, 33)
    theirs(torch.randn(4, 3, 40, 33))  # running statistics other than 0 and 1
    unused = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert unused.missing_keys == []
    assert unused.unexpected_keys == ["fc.weight", "fc.bias"]
    with torch.no_grad():
        expected = theirs.eval()(y)
        torch.testing.assert_close(theirs.fc(ours.eval()(y).pooled), expected)


def test_the_cifar_form_keeps_32x32_through_stage_1():
    maps = ResNetConfig(width=4).build(3)(torch.rand(2, 3, 32, 32)).maps
    assert maps[-1].shape == (2, 32, 4, 4)  # strides 1, 1, 2, 2, 2 and no max-pool


def test_jem_form_matches_its_formula():
    """One block of each group: P x + C2 a(C1 a(x)), the stride in C2 and P, biases everywhere."""
    network = WideResNetConfig(depth=10, width=8, **JEM).build(3).double()
    p = dict(network.named_parameters())
    assert all(f"{name.removesuffix('.weight')}.bias" in p for name in p if "weight" in name)
    conv, act = nn.functional.conv2d, lambda h: nn.functional.leaky_relu(h, 0.2)
    y = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    h = conv(y, p["stem.weight"], p["stem.bias"], padding=1)
    for i, stride in enumerate((1, 2, 2)):
        w = {k.removeprefix(f"blocks.{i}."): v for k, v in p.items() if f"blocks.{i}." in k}
        inner = act(conv(act(h), w["conv1.weight"], w["conv1.bias"], 1, 1))
        short = conv(h, w["shortcut.weight"], w["shortcut.bias"], stride)
        h = short + conv(inner, w["conv2.weight"], w["conv2.bias"], stride, 1)
    torch.testing.assert_close(network(y).pooled, act(h).mean((2, 3)))


def test_published_form_shares_the_first_activation_with_the_shortcut():
    network = WideResNetConfig(depth=10, width=8).build(3)
    block = network.blocks[0].eval()  # 16 -> 8 channels: with a projection
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 16, 5, 5)
    expected = block.shortcut(torch.relu(block.norm1(x)))
    torch.testing.assert_close(block(x), expected)
    assert block.conv1.stride == (1, 1)
    assert network.blocks[1].conv1.stride == (2, 2)


def test_score_is_the_gradient_of_the_log_density(backbone):
    model = JointModel(backbone, LinearQuadraticHead(backbone.num_features, 3).double())
    y = torch.rand(2, 2, 9, 9, dtype=torch.float64)
    v = torch.randn_like(y)
    warns = model.has_batch_norm or model.kinked_activation == "ReLU"
    with pytest.warns(UserWarning, match="differentiated") if warns else nullcontext():
        slope = (model.score(y) * v).flatten(1).sum(1)
    step = 1e-7  # central differences, far from most kinks of ReLU
    rise = model.log_density(y + step * v) - model.log_density(y - step * v)
    torch.testing.assert_close(slope, rise / (2 * step), rtol=1e-5, atol=1e-7)


def test_images_of_any_size(backbone):
    for shape in ((1, 1), (1, 7), (8, 8), (17, 5)):
        y = torch.rand(3, 2, *shape, dtype=torch.float64)
        features = backbone(y)
        assert features.pooled.shape == (3, backbone.num_features)
        torch.testing.assert_close(features.pooled[1:2], backbone(y[1:2]).pooled)


def test_mean_over_windows_is_the_global_pooling(backbone):
    features = backbone(torch.rand(2, 2, 64, 64, dtype=torch.float64))
    windows = backbone.pool(features.maps, (2, 1))
    assert windows.shape == (2, 2, backbone.num_features)
    torch.testing.assert_close(windows.mean(1), features.pooled)


def test_recomputation_supports_the_jem_form_and_refuses_batch_norm():
    y = torch.rand(2, 3, 8, 8)
    network = WideResNetConfig(depth=10, width=8, **JEM).build(3)
    expected = network(y).pooled
    network.recompute = True
    torch.testing.assert_close(network(y).pooled, expected)
    network = WideResNetConfig(depth=10, width=8).build(3)
    network.recompute = True
    with pytest.raises(UserError, match="BatchNorm2d in training mode"):
        network(y)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"depth": 27}, "6n \\+ 4"), ({"norm": "group", "width": 12}, "multiple of 8")],
    ids=str,
)
def test_invalid_depth_and_width_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        validated(WideResNetConfig, options, "backbone")
