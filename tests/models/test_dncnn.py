"""DnCNN: deepinv as reference, published sizes and state dicts, homogeneity without biases."""

import pytest
import torch
from torch import nn

from ebmkit.errors import UserError
from ebmkit.models import DirectDenoiser
from ebmkit.models.dncnn import BiasFreeBatchNorm, DnCNN, DnCNNConfig, convert_dncnn

WIDTH = 6


def published_net(depth: int, channels: int, norm: bool, biases: str, eps: float) -> nn.Sequential:
    """The layers of the published code, with running statistics like those of a trained network.

    Args:
        biases: which convolutions have a bias: all (KAIR), first (cszn/DnCNN), none (SaoYan).
    """
    layers, widths = [], [channels, *[WIDTH] * (depth - 1), channels]
    for i in range(depth):
        bias = biases == "all" or (biases == "first" and i == 0)
        layers.append(nn.Conv2d(widths[i], widths[i + 1], 3, padding=1, bias=bias))
        if norm and 0 < i < depth - 1:
            layers.append(nn.BatchNorm2d(WIDTH, eps=eps))
            nn.init.uniform_(layers[-1].weight, 0.02, 0.08)
            nn.init.normal_(layers[-1].bias, std=0.1)
            nn.init.normal_(layers[-1].running_mean, std=0.01)
            nn.init.uniform_(layers[-1].running_var, 1e-4, 1e-2)  # small, so that eps matters
        if i < depth - 1:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers).eval()


PUBLISHED = {
    "KAIR": ("model.", 17, 1, False, "all", 1e-4),
    "KAIR-blind-colour": ("model.", 20, 3, False, "all", 1e-4),
    "KAIR-with-norms": ("model.", 17, 1, True, "all", 1e-4),
    "cszn": ("dncnn.", 17, 1, True, "first", 1e-4),
    "SaoYan": ("module.dncnn.", 17, 3, True, "none", 1e-5),
    "SaoYan-blind": ("dncnn.", 20, 1, True, "none", 1e-5),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_converted_published_weights_give_the_same_outputs(name):
    prefix, depth, channels, norm, biases, eps = PUBLISHED[name]
    theirs = published_net(depth, channels, norm, biases, eps)
    state = {f"{prefix}{key}": value for key, value in theirs.state_dict().items()}
    config, in_channels, ours = convert_dncnn(state)
    assert (config.depth, config.width, in_channels) == (depth, WIDTH, channels)
    network = DnCNN(in_channels, config).double()
    network.load_state_dict(ours)
    y = torch.rand(2, channels, 9, 11, dtype=torch.float64)
    residual = theirs.double()(y).detach()
    spread = float(residual.std())
    assert spread > 1e-3
    # the converted weights are float32
    torch.testing.assert_close(y - network(y), residual, rtol=1e-4, atol=1e-4 * spread)
    if norm:
        _, _, other = convert_dncnn(state, eps=10 * eps)
        network.load_state_dict(other)
        assert (y - network(y) - residual).std() > 1e-3 * spread  # a wrong eps is detected


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("depth", [17, 20])
def test_converted_deepinv_weights_match_deepinv(depth, channels):
    models = pytest.importorskip("deepinv.models")
    theirs = models.DnCNN(channels, channels, depth=depth, nf=WIDTH, pretrained=None)
    for module in theirs.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.bias, std=0.1)
    config, in_channels, state = convert_dncnn(theirs.state_dict())
    network = DnCNN(in_channels, config)
    network.load_state_dict(state)
    y = torch.rand(2, channels, 13, 10)
    torch.testing.assert_close(network(y), theirs(y))


def drop(name):
    return lambda state: state.pop(name)


def put(name, shape):
    return lambda state: state.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("dncnn.8.weight"), "'dncnn.8.weight' is missing"),
        (drop("dncnn.9.running_var"), "'dncnn.9.running_var' is missing"),
        (drop("dncnn.0.weight"), "'dncnn.0.weight' is missing"),
        (put("dncnn.8.gamma", (1,)), "'dncnn.8.gamma' is no parameter"),
        (put("step", (1,)), "'step' is no parameter"),
        (put("dncnn.8.weight", (WIDTH, WIDTH, 5, 5)), r"'dncnn.8.weight' is \(6, 6, 5, 5\) and"),
        (put("dncnn.0.weight", (WIDTH, 2, 3, 3)), "'dncnn.47.weight' is .* 2 channel"),  # FDnCNN
        (drop("dncnn.47.weight"), "16 convolutions, the last 'dncnn.44'"),
        (lambda state: state.clear(), "'nothing' is no parameter"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mismatched_weights_error_names_the_first_mismatch(change, message):
    plain = published_net(17, 1, True, "none", 1e-5)
    state = {f"dncnn.{key}": value for key, value in plain.state_dict().items()}
    convert_dncnn(state)
    change(state)
    with pytest.raises(UserError, match=message):
        convert_dncnn(state)


def test_weights_of_another_network_are_refused():
    with pytest.raises(UserError, match=r"'m_head.weight' is no parameter of a published DnCNN"):
        convert_dncnn({"m_head.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("channels", "options", "published"),
    [
        (1, {}, 556_096),  # cszn/DnCNN and Zhang et al.'s DnCNN-S
        (3, {"depth": 20}, 669_376),
        (1, {"norm": "none"}, 555_137),  # KAIR's files, norms folded
        (1, {"norm": "none", "depth": 20}, 665_921),  # KAIR's and deepinv's blind
        (3, {"norm": "none", "depth": 20}, 668_227),
        (1, {"bias": False, "norm": "none"}, 554_112),
        (1, {"bias": False}, 555_072),
    ],
    ids=str,
)
def test_parameter_counts_match_published_sizes(channels, options, published):
    with torch.device("meta"):
        network = DnCNNConfig(**options).build(channels)
    assert sum(p.numel() for p in network.parameters()) == published


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_network_without_biases_is_homogeneous(norm):
    network = DnCNNConfig(depth=5, width=8, norm=norm, bias=False).build(3).double()
    network(torch.randn(4, 3, 8, 8, dtype=torch.float64))  # running variances other than 1
    network.eval()
    y = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    assert not torch.allclose(network(y), y)
    for a in (1e-3, 40.0):
        torch.testing.assert_close(network(a * y), a * network(y), rtol=1e-12, atol=0)


def test_network_with_biases_is_not_homogeneous():
    network = DnCNNConfig(depth=5, width=8).build(3)
    network(torch.randn(4, 3, 8, 8))  # running means other than 0
    assert network.eval()(torch.zeros(1, 3, 8, 8)).abs().max() > 1e-6


@pytest.mark.parametrize("training", [True, False])
def test_bias_free_batch_norm_preserves_the_mean(training):
    """w x / s is w (x - m) / s with w m / s added back."""
    norm = BiasFreeBatchNorm(4).double()
    nn.init.normal_(norm.weight)
    x = 3 * torch.randn(5, 4, 6, 7, dtype=torch.float64) + torch.arange(4.0)[:, None, None]
    norm(x)
    norm.train(training)
    mean = x.mean((0, 2, 3))
    running = torch.lerp(torch.ones(4).double(), x.var((0, 2, 3), unbiased=False), 0.1)
    torch.testing.assert_close(norm.running_var, running)
    variance = x.var((0, 2, 3), unbiased=False) if training else running
    plain = nn.functional.batch_norm(x, mean, variance, norm.weight, eps=norm.eps)
    shift = norm.weight * mean / (variance + norm.eps).sqrt()
    torch.testing.assert_close(norm(x), plain + shift[:, None, None])


def test_direct_denoiser_is_blind_and_detects_batch_norm():
    for bias in (True, False):
        model = DirectDenoiser(DnCNNConfig(depth=4, width=8, bias=bias).build(1), 1).eval()
        assert model.has_batch_norm
        y = torch.rand(2, 1, 9, 9)
        assert torch.equal(model.denoise(y), model.denoise(y, sigma=0.1))
