"""`linearity` and its suite on homogeneous models, whose degree follows from Euler's identity."""

import pytest
import torch
from ebmkit_tests.support.mixture_world import Drawn
from torch import nn

from ebmkit import Energies, EnergyModel, UserError, create_model, evaluation
from ebmkit.evaluation.jacobian import jacobian
from ebmkit.evaluation.linearity import directional, linearity, linearity_grid, theory, theory_of
from ebmkit.evaluation.suite import noisy_batches
from ebmkit.models import DirectDenoiser
from ebmkit.models.layers import GroupNorm

SIGMA = 0.1


@pytest.fixture
def evaluate(tmp_path):
    def run(model, data, plots=False, **options):
        results = evaluation.evaluate(
            model,
            data,
            ["linearity"],
            tmp_path,
            options={"linearity": {"sigmas": ["15/255", "0.2"], **options}},
            plots=plots,
        )
        return results["linearity"].document

    return run


class Cubic(EnergyModel):
    """log p(y) = -||y||^3: homogeneous of degree 3, blind, no labels."""

    def forward(self, y, sigma=None):
        flat = y.flatten(1)
        return Energies(flat[:, :0], -(flat.norm(dim=1) ** 3))


def test_a_cubic_density_has_degree_three(evaluate, tmp_path):
    images = Drawn(torch.rand(20, 1, 4, 4), None)
    document = evaluate(Cubic().eval(), images, images=12, plots=True)
    assert document["images"] == 12
    assert [level["sigma"] for level in document["levels"]] == [15 / 255, 0.2]
    for level in document["levels"]:
        degree = level["degree"]
        assert degree["value"] == pytest.approx(3, abs=1e-4)
        assert degree["count"] == 12
        assert level["of_change"]["value"] == pytest.approx(1, abs=1e-4)
        assert level["explained"]["value"] == pytest.approx(1, abs=1e-6)
        assert level["euler_degree"] is None  # log p may have an unknown constant
    assert document["theory"] is None
    assert (tmp_path / "linearity.png").stat().st_size > 10_000


class ShiftedGaussian(EnergyModel):
    """log p(y) = -(y - m)^2 / 2: D - y = -sigma^2 (y - m), D - J y = sigma^2 m; not homogeneous."""

    m = 0.5

    def forward(self, y, sigma=None):
        flat = y.flatten(1)
        return Energies(flat[:, :0], -(flat - self.m).square().sum(1) / 2)


def test_degree_is_a_ratio_of_sums_over_images(evaluate):
    """Denoising hardly changes one image: its own ratio is an outlier, the ratio of sums is not."""
    images = Drawn(torch.linspace(0, 1, 12).reshape(12, 1, 1, 1), None)
    for level in evaluate(ShiftedGaussian().eval(), images)["levels"]:
        sigma = level["sigma"]
        ((_, y, *_),) = noisy_batches(images, sigma, batch_size=12)
        y = y.flatten().double()
        off = y - ShiftedGaussian.m
        own = 2 + ShiftedGaussian.m / off
        pooled = 2 + ShiftedGaussian.m * float(off.sum() / off.square().sum())
        assert (own - pooled).abs().max() > 10
        assert level["degree"]["value"] == pytest.approx(pooled, abs=1e-3)
        assert level["degree"]["low"] < pooled < level["degree"]["high"]
        size = float((12 * ShiftedGaussian.m**2 / off.square().sum()).sqrt())
        assert level["of_change"]["value"] == pytest.approx(size, rel=1e-3)
        assert level["of_change"]["low"] >= 0


def test_one_image_has_a_degree_and_no_interval(tmp_path):
    images = Drawn(torch.rand(1, 1, 4, 4), None)
    results = evaluation.evaluate(Cubic().eval(), images, ["linearity"], tmp_path, plots=False)
    degree = results["linearity"].document["levels"][0]["degree"]
    assert degree["value"] == pytest.approx(3, abs=1e-4)
    assert degree["low"] is None


def test_levels_summarise_the_first_images(network, random_images, evaluate):
    document = evaluate(network, random_images, images=10)
    for level in document["levels"]:
        sigma = level["sigma"]
        ((_, y, *_),) = noisy_batches(random_images.first(10), sigma, batch_size=10)
        found = linearity(network, y, sigma)
        moved = (network.denoise(y, sigma) - y).flatten(1).double().square().sum(1)
        means = {n: getattr(found, n).mean() for n in ("error", "unexplained", "explained")}
        means["degree"] = (found.degree * moved).sum() / moved.sum()
        means["of_change"] = ((found.of_change.square() * moved).sum() / moved.sum()).sqrt()
        for name, expected in means.items():
            assert level[name]["value"] == pytest.approx(float(expected), rel=1e-3)
            assert level[name]["low"] < level[name]["value"] < level[name]["high"]
        euler = found.along.sum() / network.log_density(y).double().sum()
        assert level["euler_degree"]["value"] == pytest.approx(float(euler), rel=1e-3)
    assert document["theory"]["degree"] is None
    assert "GELU" in document["theory"]["why"]


@pytest.mark.filterwarnings("ignore:a score is differentiated through ReLU")
@pytest.mark.parametrize("norm", ["group", "scale"])
def test_both_degrees_match_theory(norm, random_images, evaluate):
    model = create_model(num_classes=3, in_channels=1, width=8, norm=norm, activation="relu")
    model.backbone.stem.weight.data *= 100  # eps of the norms is far below variances
    document = evaluate(model.eval().requires_grad_(False), random_images, images=6)
    expected = {"group": 0, "scale": 2}[norm]
    assert document["theory"]["degree"] == expected
    for level in document["levels"]:
        assert level["degree"]["value"] == pytest.approx(expected, abs=0.05)
        assert level["euler_degree"]["value"] == pytest.approx(expected, abs=0.05)


def test_locally_linear_denoiser_has_only_rounding_error(evaluate):
    class CenteredGaussian(EnergyModel):
        def forward(self, y, sigma=None):
            return Energies(y.flatten(1)[:, :0], -y.flatten(1).square().sum(1))

    document = evaluate(CenteredGaussian().eval(), Drawn(torch.rand(4, 1, 4, 4), None))
    for level in document["levels"]:
        assert level["error"]["value"] < 1e-5
        assert level["explained"] is None


@pytest.mark.slow
def test_grid_figure_is_written(network, random_images, evaluate, tmp_path):
    levels = evaluate(network, random_images, images=4)["levels"]
    cells = [
        {
            "norm": norm,
            "activation": activation,
            "bias": bias,
            "levels": levels,
            "theory": theory(norm, activation, bias)._asdict(),
        }
        for norm in ("group", "scale")
        for activation in ("gelu", "relu")
        for bias in (False, True)
    ]
    linearity_grid(cells, tmp_path / "grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "words"),
    [({"sigmas": []}, "sigmas"), ({"images": 1}, "images"), ({"sigmas": ["25"]}, "25/255")],
)
def test_illegal_settings_are_refused(options, words, network, random_images, evaluate):
    with pytest.raises(UserError, match=words):
        evaluate(network, random_images, **options)


@pytest.fixture
def mixture_and_noisy_image(mixture):
    """The mixture in float64 and one of its samples with noise."""
    mixture.double()
    x, _ = mixture.sample(1)
    return mixture, x[0] + SIGMA * torch.randn_like(x[0])


class Homogeneous(EnergyModel):
    """log p(t y) = t^k log p(y)."""

    def __init__(self, degree):
        super().__init__()
        self.degree = degree
        self.register_buffer("scales", torch.linspace(0.5, 2, 16, dtype=torch.float64))

    def forward(self, y, sigma=None):
        flat = y.flatten(1)
        form, size = (self.scales * flat.square()).sum(1), flat.square().sum(1)
        return Energies(flat[:, :0], -form * size ** (self.degree / 2 - 1))


def test_product_with_asymmetric_jacobian_is_not_transposed():
    y, v = torch.rand(2, 1, 3, 4, dtype=torch.float64), torch.randn(2, 1, 3, 4).double()
    clean, product = directional(lambda y: y * y * y.roll(1, -1), y, v, symmetric=False)
    after = y.roll(1, -1)
    assert torch.allclose(clean, y * y * after)
    assert torch.allclose(product, 2 * y * after * v + y * y * v.roll(1, -1))


@pytest.mark.parametrize("degree", [0, 0.5, 1, 2, 3])
def test_homogeneous_densities_have_their_degree(degree):
    y = torch.rand(5, 1, 4, 4, dtype=torch.float64) + 0.1
    model = Homogeneous(degree)
    found = linearity(model, y, SIGMA)
    ones = torch.ones(5, dtype=torch.float64)
    assert torch.allclose(found.degree, degree * ones, atol=1e-10)
    assert torch.allclose(found.of_change, abs(2 - degree) * ones, atol=1e-10)
    assert found.unexplained.max() < 1e-12
    assert torch.allclose(found.along, degree * model.log_density(y), atol=1e-10)
    if degree == 2:
        assert found.error.max() < 1e-12  # locally linear: D(y) = J(y) y
    else:
        assert torch.allclose(found.explained, ones)


def test_unexplained_part_of_inhomogeneous_density_is_the_fit_residual(mixture_and_noisy_image):
    mixture, y = mixture_and_noisy_image
    found = linearity(mixture, y[None], SIGMA)
    clean = mixture.posterior_mean(y[None], SIGMA).flatten()
    rest = clean - jacobian(mixture, y, SIGMA).dense() @ y.flatten()
    change = clean - y.flatten()
    share = (rest @ change) ** 2 / (rest @ rest) / (change @ change)
    assert found.error.item() == pytest.approx(float(rest.norm() / clean.norm()), rel=1e-6)
    assert found.explained.item() == pytest.approx(float(share), rel=1e-5)
    left = rest - (2 - found.degree) * change
    assert found.unexplained.item() == pytest.approx(float(left.norm() / clean.norm()), rel=1e-5)
    assert abs(float(left @ change)) < 1e-6  # the residual of the fit is orthogonal to the change


def test_a_bias_free_relu_denoiser_is_locally_linear():
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.ReLU())
    net.append(nn.Conv2d(8, 1, 3, padding=1, bias=False)).double()

    class Blind(nn.Module):
        def forward(self, y, sigma=None):
            return net(y)

    y = torch.rand(2, 1, 6, 6, dtype=torch.float64)
    assert linearity(DirectDenoiser(Blind()), y, SIGMA).error.max() < 1e-13
    net[0].bias = nn.Parameter(torch.ones(8, dtype=torch.float64))
    assert linearity(DirectDenoiser(Blind()), y, SIGMA).error.min() > 1e-3


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm", ["group", "scale"])
@pytest.mark.filterwarnings("ignore:a score is differentiated through ReLU")
def test_degree_of_networks_matches_theory(norm, activation, bias):
    model = create_model(
        num_classes=3, in_channels=1, width=8, norm=norm, activation=activation, bias=bias
    )
    model = model.eval().requires_grad_(False).double()
    for module in model.modules():
        if isinstance(module, GroupNorm):
            module.eps = 0.0  # a positive eps changes the degree in the third digit
    expected = theory(norm, activation, bias)
    assert theory_of(model) == expected
    found = linearity(model, torch.rand(2, 1, 8, 8, dtype=torch.float64), SIGMA)
    if expected.degree is None:
        assert found.explained.max() < 0.99
    else:
        # group statistics lose digits by cancellation; other degrees differ by far more
        assert (found.degree - expected.degree).abs().max() < 1e-8
        assert found.unexplained.max() < 1e-9


def test_batch_norm_logit_head_and_input_mean_have_no_degree():
    assert theory("none", "relu", False).degree == 2
    for broken in (
        theory("batch", "relu", False),
        theory("scale", "relu", False, head="logit"),
        theory("scale", "relu", False, input_mean=0.5),
    ):
        assert broken.degree is None
    assert theory_of(Homogeneous(2)) is None
