"""DRUNet: deepinv as reference, published sizes and state dicts, sigma, any image size."""

import pytest
import torch

from ebmkit.errors import UserError
from ebmkit.models.drunet import DRUNet, DRUNetConfig, convert_drunet


def narrow(**options) -> DRUNet:
    network = DRUNetConfig(width=4, blocks=1, **options).build(3).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3)  # so that the inner scales affect the output
    return network


@pytest.mark.parametrize("channels", [1, 3])
def test_drunet_matches_deepinv_with_shared_weights(channels):
    models = pytest.importorskip("deepinv.models")
    theirs = models.DRUNet(channels, channels, nc=(8, 16, 32, 64), nb=2, pretrained=None)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(3)
    config, in_channels, state = convert_drunet(theirs.state_dict())
    assert config == DRUNetConfig(width=8, blocks=2)
    ours = DRUNet(in_channels, config)
    ours.load_state_dict(state)
    y = torch.rand(2, channels, 40, 32)
    for sigma in (0.1, torch.tensor([0.02, 0.3])):
        torch.testing.assert_close(ours(y, sigma), theirs(y, sigma))
    assert not torch.allclose(ours(y, 0.1), ours(y, 0.2), rtol=1e-3)


@pytest.mark.parametrize(
    ("channels", "options", "published"),
    [
        (1, {}, 32_638_656),  # cszn/DPIR
        (3, {}, 32_640_960),
        (3, {"noise_map": False}, 32_640_384),  # without 64 * 9 weights of the noise map
        (3, {"blocks": 2}, 17_010_624),  # as in GS-DRUNet
    ],
    ids=str,
)
def test_parameter_counts_match_published_sizes(channels, options, published):
    with torch.device("meta"):
        network = DRUNetConfig(**options).build(channels)
    assert sum(p.numel() for p in network.parameters()) == published


def test_relu_network_is_homogeneous_in_image_and_sigma():
    y = torch.randn(2, 3, 16, 8, dtype=torch.float64)
    network, blind = narrow(), narrow(noise_map=False)
    for a in (1e-3, 40.0):
        exact = {"rtol": 1e-10, "atol": a * 1e-12}
        torch.testing.assert_close(network(a * y, a * 0.1), a * network(y, 0.1), **exact)
        torch.testing.assert_close(blind(a * y), a * blind(y), **exact)
    assert not torch.allclose(network(40 * y, 0.1), 40 * network(y, 0.1), rtol=1e-3)


def test_each_image_has_its_own_noise_level():
    network = narrow()
    y = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    both = network(y, torch.tensor([0.1, 0.4]).double())
    torch.testing.assert_close(both, torch.cat([network(y[:1], 0.1), network(y[1:], 0.4)]))


def test_blind_form_ignores_sigma_and_the_other_requires_it():
    y = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    blind = narrow(noise_map=False)
    assert torch.equal(blind(y), blind(y, 0.1))
    with pytest.raises(UserError, match="give sigma"):
        narrow()(y)


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (17, 8), (9, 30)], ids=str)
def test_other_sizes_are_padded_by_replication_and_cropped(shape):
    network = narrow()
    y = torch.rand(2, 3, *shape, dtype=torch.float64)
    rows = torch.arange(-(-shape[0] // 8) * 8).clamp_max(shape[0] - 1)
    columns = torch.arange(-(-shape[1] // 8) * 8).clamp_max(shape[1] - 1)
    padded = network(y[:, :, rows][..., columns], 0.1)
    torch.testing.assert_close(network(y, 0.1), padded[..., : shape[0], : shape[1]])


def test_state_dict_with_data_parallel_prefix_is_converted():
    network = narrow(noise_map=False)
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    config, channels, ours = convert_drunet(state)
    assert (config, channels) == (DRUNetConfig(width=4, blocks=1, noise_map=False), 3)
    assert all(torch.equal(ours[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("m_tail.weight", None, "'m_tail.weight' is missing"),
        ("m_up2.1.res.0.weight", None, "'m_up2.1.res.0.weight' is missing"),
        ("m_up2.1.res.0.bias", torch.zeros(8), "'m_up2.1.res.0.bias' is no parameter"),
        ("m_down1.1.weight", torch.zeros(8, 4, 3, 3), r"'m_down1.1.weight' is \(8, 4, 3, 3\)"),
    ],
    ids=str,
)
def test_mismatched_weights_error_names_the_first_mismatch(name, value, message):
    state = narrow().state_dict()
    state.pop(name, None)
    if value is not None:
        state[name] = value
    with pytest.raises(UserError, match=message):
        convert_drunet(state)
