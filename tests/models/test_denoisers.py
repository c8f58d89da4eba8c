"""Gradient-step denoisers: D = y - grad g, log p = -g / sigma^2, and training through D."""

import pytest
import torch
from torch import nn

from ebmkit.errors import UserError
from ebmkit.models.denoisers import GradientStep
from ebmkit.models.dncnn import GraDnCNNConfig
from ebmkit.models.drunet import GSDRUNetConfig

MODELS = {
    "gs-drunet": GSDRUNetConfig(width=4, blocks=1),
    "gs-drunet-softplus": GSDRUNetConfig(width=4, blocks=1, activation="softplus"),
    "gs-drunet-blind": GSDRUNetConfig(width=4, blocks=1, noise_map=False),
    "gradncnn": GraDnCNNConfig(width=4, layers=2),
    "gradncnn-softplus": GraDnCNNConfig(width=4, layers=2, activation="softplus", bias=False),
}
SIGMA = torch.tensor([0.1, 0.3], dtype=torch.float64)


def make(name: str) -> GradientStep:
    made = MODELS[name].build_model(2).double()
    if "drunet" in name:
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.mul_(3)  # so that the inner scales affect the output
    return made


@pytest.fixture(params=sorted(MODELS))
def model(request) -> GradientStep:
    return make(request.param)


@pytest.fixture(params=["gradncnn", "gs-drunet-blind"])
def blind(request) -> GradientStep:
    return make(request.param)


@pytest.fixture
def y() -> torch.Tensor:
    return torch.rand(2, 2, 9, 6, dtype=torch.float64)


@pytest.mark.parametrize("channels", [1, 3])
def test_gs_drunet_matches_deepinv_with_shared_weights(channels):
    models = pytest.importorskip("deepinv.models")
    theirs = models.GSDRUNet(1.0, channels, channels, nc=(8, 16, 32, 64))
    ours = GSDRUNetConfig(width=8).build_model(channels)
    network = theirs.student_grad.model
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3)
    ours.potential.network.load_state_dict(network.state_dict())
    y, sigma = torch.rand(2, channels, 32, 32), torch.tensor([0.05, 0.2])
    torch.testing.assert_close(ours.denoise(y, sigma), theirs(y, sigma), rtol=1e-4, atol=1e-5)
    potential = theirs.potential(y, sigma)
    torch.testing.assert_close(-ours.log_density(y, sigma) * sigma**2, potential)


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (GSDRUNetConfig(), 17_010_624),  # deepinv's GSDRUNet()
        (GraDnCNNConfig(), 7 * (27 + 1) * 128 + 6 * 9 * 128**2 + 9 * 128 + 27),  # by its formula
    ],
    ids=str,
)
def test_parameter_counts_match_published_sizes(config, size):
    with torch.device("meta"):
        model = config.build_model(3)
    assert sum(p.numel() for p in model.parameters()) == size


def test_gs_drunet_matches_its_formula(y):
    """D = N + J^T (y - N) of the network N and its Jacobian J."""
    model = make("gs-drunet")
    n, vjp_fn = torch.func.vjp(lambda image: model.potential.network(image, SIGMA), y)
    torch.testing.assert_close(model.denoise(y, SIGMA), n + vjp_fn(y - n)[0])


def test_gradncnn_matches_its_formula(y):
    potential = GraDnCNNConfig(width=4, layers=1).build_model(2).double().potential
    z = nn.functional.elu(potential.first(y))
    z = nn.functional.elu(potential.onward[0](z) + potential.fed[0](y))
    g = (potential.last(z) + potential.last_fed(y)).sum((1, 2, 3))
    torch.testing.assert_close(potential(y), g)


def test_denoise_is_a_gradient_step_of_the_potential(model, y):
    leaf = y.clone().requires_grad_()
    g = model.potential(leaf, SIGMA)
    (gradient,) = torch.autograd.grad(g.sum(), leaf)
    torch.testing.assert_close(model.denoise(y, SIGMA), y - gradient)
    torch.testing.assert_close(model.log_density(y, SIGMA), -g / SIGMA**2)
    assert model.logits(y, SIGMA).shape == (2, 0)


def test_score_is_the_gradient_of_the_log_density(model, y):
    v = torch.randn_like(y)
    slope = (model.score(y, sigma=SIGMA) * v).flatten(1).sum(1)
    step = 1e-5
    rise = model.log_density(y + step * v, SIGMA) - model.log_density(y - step * v, SIGMA)
    torch.testing.assert_close(slope, rise / (2 * step), rtol=1e-6, atol=1e-6)


def test_parameter_gradients_through_the_denoiser(model, y):
    """Gradient of the squared error of D by all parameters, against finite differences."""
    x = torch.rand_like(y)

    def loss() -> torch.Tensor:
        return (model.denoise(y, SIGMA) - x).square().sum()

    parameters = list(model.parameters())
    directions = [torch.randn_like(p) for p in parameters]
    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    slope = sum((g * w).sum() for g, w in zip(gradients, directions, strict=True) if g is not None)
    step, losses = 1e-6, []
    for side in (1, -2):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(side * step * direction)
        losses.append(loss().detach())
    torch.testing.assert_close(slope, (losses[0] - losses[1]) / (2 * step), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["gs-drunet", "gradncnn"])
def test_second_derivatives_are_exact(name):
    potential = MODELS[name].build_model(1).double().potential
    y = torch.rand(1, 1, 8, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda image: potential(image, 0.2), y)


def test_sigma_cancels_in_a_blind_denoiser(blind, y):
    torch.testing.assert_close(blind.denoise(y), blind.denoise(y, SIGMA))
    torch.testing.assert_close(blind.denoise(y), blind.denoise(y, 25 / 255))


def test_blind_sigma_estimate_is_the_rms_of_the_step(blind, y):
    step = (blind.denoise(y) - y).flatten(1)
    level = step.square().mean(1).sqrt()
    torch.testing.assert_close(blind.estimate_sigma(y), level)
    torch.testing.assert_close(blind.score(y), blind.score(y, sigma=level))


def test_interior_pixels_do_not_depend_on_the_image_size():
    """Three convolutions give g a radius of 3 pixels, and its gradient in D one of 6."""
    model = GraDnCNNConfig(width=4, layers=1).build_model(2).double()
    large = torch.rand(1, 2, 24, 20, dtype=torch.float64)
    inside = model.denoise(large[..., 2:-3, 1:-2])[..., 6:-6, 6:-6]
    torch.testing.assert_close(inside, model.denoise(large)[..., 8:-9, 7:-8])


def test_images_of_a_batch_are_independent(model, y):
    alone = torch.cat([model.denoise(y[i : i + 1], SIGMA[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(model.denoise(y, SIGMA), alone)


def test_denoise_works_in_inference_mode(blind, y):
    expected = blind.denoise(y).detach()
    with torch.inference_mode():
        torch.testing.assert_close(blind.denoise(y), expected)
        torch.testing.assert_close(blind.denoise(y, SIGMA), expected)


def test_missing_sigma_and_wrong_channels_are_refused(model, y):
    with pytest.raises(UserError, match="give sigma"):
        model.log_density(y)
    if model.noise_conditional:
        for method in (model.denoise, model.score, model.estimate_sigma):
            with pytest.raises(UserError, match="give sigma"):
                method(y)
    with pytest.raises(UserError, match="2 channel"):
        model.denoise(y[:, :1], 0.1)
