"""Noise-conditional energies that are normalised at every noise level."""

from __future__ import annotations

import pytest
import torch

from ebmkit.analytic import Gaussian
from ebmkit.errors import UserError, validated
from ebmkit.models import MLPConfig, ModelConfig

MEAN, STD = (0.4, 0.5, 0.6), 0.2


def make_model(seed=0, **options):
    torch.manual_seed(seed)
    config = ModelConfig(
        backbone=MLPConfig(width=16, noise_conditional=True),
        head={"kind": "linear"},
        in_channels=3,
        num_classes=3,
        input_mean=MEAN,
        input_std=STD,
        preconditioned=True,
        **options,
    )
    model = config.build().double()
    for p in model.parameters():  # as after training: nothing is 0
        torch.nn.init.normal_(p, std=0.3)
    return model


def points(count=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 1, 1, dtype=torch.float64, generator=generator)


def test_far_above_the_data_density_and_score_are_the_gaussians():
    model, sigma = make_model(), 1e6 * STD
    y = points() + sigma * torch.randn(6, 3, 1, 1, dtype=torch.float64)
    mean = torch.tensor(MEAN, dtype=torch.float64).reshape(3, 1, 1)
    exact = Gaussian(mean, STD**2)
    # the network adds a share s / sigma = 1e-6 of n, which is of order 1, and of its gradient
    assert torch.allclose(model.log_density(y, sigma), exact.log_density(y, sigma), atol=1e-4)
    assert torch.allclose(sigma * model.score(y, sigma), sigma * exact.score(y, sigma), atol=1e-4)


def test_at_the_start_the_density_is_the_gaussians_at_every_level():
    model = ModelConfig(
        backbone=MLPConfig(width=16, noise_conditional=True),
        head={"kind": "linear"},
        in_channels=3,
        num_classes=3,
        input_mean=MEAN,
        input_std=STD,
        preconditioned=True,
    ).build()
    exact = Gaussian(torch.tensor(MEAN).reshape(3, 1, 1), STD**2)
    y, sigma = points().float(), torch.tensor([0.002, 0.1, 0.3, 1.0, 10.0, 40.0])
    assert torch.allclose(model.log_density(y, sigma), exact.log_density(y, sigma), rtol=1e-5)


def test_without_sigma_it_is_the_lowest_level():
    model, y = make_model(sigma_min=0.01), points()
    for sigma in (0.01, 0.0, 0.005):  # lower levels, too
        assert torch.equal(model.log_density(y), model.log_density(y, sigma))
    assert not torch.equal(model.log_density(y), model.log_density(y, 0.02))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"backbone": MLPConfig()}, "takes sigma"),
        ({"head": {"kind": "logit"}}, "--head linear"),
        ({"input_std": (0.1, 0.2, 0.3)}, "one number"),
    ],
)
def test_unsuitable_components_are_refused(fields, sentence):
    config = {
        "backbone": MLPConfig(noise_conditional=True),
        "head": {"kind": "linear"},
        "in_channels": 3,
        "preconditioned": True,
    }
    with pytest.raises(UserError, match=sentence):
        validated(ModelConfig, config | fields, "model")
