"""The suite ``linearity`` against homogeneous models, whose degree is known."""

import pytest
import torch
from mixture_world import Drawn

from ebmkit import Energies, EnergyModel, UserError, create_model, evaluation
from ebmkit.evaluation.context import noisy_batches
from ebmkit.evaluation.linearity import linearity, linearity_grid, theory


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
        assert level["euler_degree"] is None  # only where log p has no unknown constant
    assert document["theory"] is None
    assert (tmp_path / "linearity.png").stat().st_size > 10_000


class Hill(EnergyModel):
    """log p(y) = -(y - m)^2 / 2: D - y = -sigma^2 (y - m) and D - J y = sigma^2 m, of no degree."""

    m = 0.5

    def forward(self, y, sigma=None):
        flat = y.flatten(1)
        return Energies(flat[:, :0], -(flat - self.m).square().sum(1) / 2)


def test_no_single_image_decides_a_pooled_ratio(evaluate):
    """One image is hardly changed, so that its own ratios are far off: the sums do not mind."""
    images = Drawn(torch.linspace(0, 1, 12).reshape(12, 1, 1, 1), None)
    for level in evaluate(Hill().eval(), images)["levels"]:
        sigma = level["sigma"]
        ((_, y, _),) = noisy_batches(images, sigma, batch_size=12)
        y = y.flatten().double()
        off = y - Hill.m
        own = 2 + Hill.m / off
        pooled = 2 + Hill.m * float(off.sum() / off.square().sum())
        assert (own - pooled).abs().max() > 10
        assert level["degree"]["value"] == pytest.approx(pooled, abs=1e-3)
        assert level["degree"]["low"] < pooled < level["degree"]["high"]
        size = float((12 * Hill.m**2 / off.square().sum()).sqrt())
        assert level["of_change"]["value"] == pytest.approx(size, rel=1e-3)
        assert level["of_change"]["low"] >= 0


def test_one_image_has_a_degree_and_no_interval(tmp_path):
    images = Drawn(torch.rand(1, 1, 4, 4), None)
    results = evaluation.evaluate(Cubic().eval(), images, ["linearity"], tmp_path, plots=False)
    degree = results["linearity"].document["levels"][0]["degree"]
    assert degree["value"] == pytest.approx(3, abs=1e-4)
    assert degree["low"] is None


def test_levels_sum_up_the_first_images(network, squares, evaluate):
    document = evaluate(network, squares, images=10)
    for level in document["levels"]:
        sigma = level["sigma"]
        ((_, y, _),) = noisy_batches(squares.first(10), sigma, batch_size=10)
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
def test_both_degrees_meet_the_theory(norm, squares, evaluate):
    model = create_model(num_classes=3, in_channels=1, width=8, norm=norm, activation="relu")
    model.backbone.stem.weight.data *= 100  # so that the norms' eps is far below variances
    document = evaluate(model.eval().requires_grad_(False), squares, images=6)
    expected = {"group": 0, "scale": 2}[norm]
    assert document["theory"]["degree"] == expected
    for level in document["levels"]:
        assert level["degree"]["value"] == pytest.approx(expected, abs=0.05)
        assert level["euler_degree"]["value"] == pytest.approx(expected, abs=0.05)


def test_a_locally_linear_denoiser_leaves_only_rounding(evaluate):
    class Bowl(EnergyModel):
        def forward(self, y, sigma=None):
            return Energies(y.flatten(1)[:, :0], -y.flatten(1).square().sum(1))

    document = evaluate(Bowl().eval(), Drawn(torch.rand(4, 1, 4, 4), None))
    for level in document["levels"]:
        assert level["error"]["value"] < 1e-5
        assert level["explained"] is None


def test_the_grid_shows_each_network_beside_its_theory(network, squares, evaluate, tmp_path):
    levels = evaluate(network, squares, images=4)["levels"]
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
def test_illegal_settings_are_refused(options, words, network, squares, evaluate):
    with pytest.raises(UserError, match=words):
        evaluate(network, squares, **options)
