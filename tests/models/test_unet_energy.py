"""The labelled UNet energy: an extensive log-density with labels and sigma."""

import pytest
import torch

from ebmkit.analytic import Gaussian
from ebmkit.energy import LogDensity
from ebmkit.errors import UserError
from ebmkit.models import ModelConfig, create_denoiser, create_model
from ebmkit.models.unet_energy import STD


def unet_energy(seed=0, **options):
    torch.manual_seed(seed)
    config = {"kind": "unet-energy", "width": 8, "noise_embedding": 16, **options}
    model = ModelConfig(backbone=config, in_channels=1, num_classes=3).build().double()
    for p in model.parameters():  # some are 0 at the start
        torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.fixture
def levels():
    return torch.tensor([0.02, 3.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("size", "options"), [((8, 8), {"frequencies": 2}), ((7, 5), {"blocks": 2}), ((1, 1), {})]
)
def test_score_is_the_gradient_by_finite_differences(levels, size, options):
    model = unet_energy(**options)
    y = torch.randn(2, 1, *size, dtype=torch.float64)
    direction, step = torch.randn_like(y), 1e-6
    ahead, behind = (model(y + s * direction, levels) for s in (step, -step))
    for c in (None, torch.tensor([2, 0])):
        target = LogDensity(c)
        slope = (target(ahead) - target(behind)) / (2 * step)
        score = model.score(y, levels, c)
        torch.testing.assert_close((score * direction).sum((1, 2, 3)), slope, rtol=1e-5, atol=1e-6)


def test_log_density_is_half_the_inner_product_with_an_image(levels):
    """With output weights k times as large, it is k times as large; at 0, it is 0, as at first."""
    model = unet_energy()
    y = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    first = model.log_density(y, levels)
    with torch.no_grad():
        model.out.weight *= 3
    torch.testing.assert_close(model.log_density(y, levels), 3 * first)
    fresh = create_denoiser("unet-energy", in_channels=1, width=8)
    assert not fresh.log_density(y.float(), levels.float()).any()


def test_log_density_is_extensive():
    """The score of k x k tiles of a texture does not depend on k; of pooled features as 1 / k^2."""

    def growth(model, sigma):
        few, many = (model.score(texture.repeat(1, 1, k, k), sigma).std() for k in (2, 4))
        return float((many / few).detach())

    torch.manual_seed(0)
    texture = torch.randn(1, 1, 16, 16, dtype=torch.float64)
    assert 0.75 < growth(unet_energy(), 0.1) < 1.1  # borders
    assert growth(create_model("gradresnet18", 3, in_channels=1, width=8).double(), None) < 0.5


def test_each_image_has_the_noise_level_of_its_own(levels):
    model = unet_energy()
    y = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    together = model(y, levels)
    for i in range(2):
        alone = model(y[i : i + 1], levels[i : i + 1])
        torch.testing.assert_close(alone.log_density[0], together.log_density[i])
        torch.testing.assert_close(alone.logits[0], together.logits[i])
    assert not torch.allclose(model(y, levels.flip(0)).log_density, together.log_density, rtol=0.01)


def test_recomputed_activations_give_the_same_gradients(levels):
    model, found = unet_energy(), []
    y = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    for on in (False, True):
        model.set_recompute(on)
        energies, (score,) = model.value_and_grads(y, levels, LogDensity())
        loss = score.square().sum() + energies.logits.square().sum()
        found.append(torch.autograd.grad(loss, model.parameters()))
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain)
        assert plain.any()


def test_a_model_without_labels():
    model = create_denoiser("unet-energy", in_channels=3, width=8)
    energies = model(torch.rand(2, 3, 8, 8), 0.1)
    assert energies.logits.shape == (2, 0)
    assert model.denoise(torch.rand(2, 3, 8, 8), 0.1).shape == (2, 3, 8, 8)


def test_preconditioned_it_is_a_gaussian_at_first_and_at_high_noise(levels):
    """Also a GradResNet, whose density averages over positions; sigma 40 is noise alone."""
    gradresnet = {"kind": "gradresnet", "width": 8, "noise_embedding": 16}
    for backbone, std in (({"kind": "unet-energy", "width": 8}, 0.1), (gradresnet, 0.005)):
        torch.manual_seed(0)
        facts = {"in_channels": 1, "num_classes": 3, "input_mean": 0.3, "input_std": 0.4}
        config = {"backbone": backbone, "head": {"kind": "linear"}, "reference_size": (8, 8)}
        model = ModelConfig(**facts, **config, preconditioned=True).build().double()
        exact = Gaussian(torch.full((1, 8, 8), 0.3, dtype=torch.float64), 0.4**2)
        y = torch.rand(2, 1, 8, 8, dtype=torch.float64)
        torch.testing.assert_close(model.log_density(y, levels), exact.log_density(y, levels))
        for p in (p for p in model.parameters() if not p.any()):  # gradients of order 1
            torch.nn.init.normal_(p, std=std)
        noise = 40 * torch.randn(2, 1, 8, 8, dtype=torch.float64)
        low, high = (m.score(y, 0.1) for m in (model, exact))
        assert (low - high).std() > 0.1 * high.std()
        low, high = (m.score(y + noise, 40.0) for m in (model, exact))
        assert (low - high).std() < 0.02 * high.std()  # a share s / sigma = 1 % of a network's


def test_width_and_groups_must_fit():
    with pytest.raises(UserError, match=r"width 12 is no multiple of channels_per_group 8"):
        create_denoiser("unet-energy", width=12)


def test_waves_have_the_amplitude_that_is_left_by_noise():
    """The mean of sin(w (u + noise)) is the input channel at u, for clean u in unit variance."""
    model, sigma = unet_energy(frequencies=2), torch.tensor([0.1], dtype=torch.float64)
    u = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    noisy = u + sigma / (sigma**2 + STD**2).sqrt() * torch.randn(20_000, 1, 4, 4).double()
    found = model._channels(u, sigma)[0, 1:]
    for k, waves in enumerate(found.reshape(2, 2, 4, 4)):
        for wave, function in zip(waves, (torch.sin, torch.cos), strict=True):
            mean = function(2**k * torch.pi * noisy).mean(0)[0]
            torch.testing.assert_close(mean, wave, atol=4 * 0.71 / 20_000**0.5, rtol=0)
