"""The perceptron, blind and noise-conditional (an NCSN): forward pass, loss and training."""

import pytest
import torch
from torch import nn

import ebmkit
from ebmkit.data import Batch, NoiseLaw
from ebmkit.errors import UserError, validated
from ebmkit.evaluation.denoise import estimates
from ebmkit.models import JointModel, LinearQuadraticHead, MLPConfig
from ebmkit.objectives import TrainingLoss, parse_objective
from ebmkit.training import RunFolder, resolve
from ebmkit.training.loop import assemble


def noise_conditional_model(**options) -> JointModel:
    backbone = MLPConfig(width=16, noise_conditional=True, **options).build(2).double()
    return JointModel(backbone, LinearQuadraticHead(16, 3, bias=True).double())


def test_mlp_on_points_matches_a_plain_perceptron():
    network = MLPConfig(width=8, depth=3).build(2)
    plain = nn.Sequential(network.first, nn.SiLU(), network.onward[0], nn.SiLU(), network.onward[1])
    y = torch.randn(5, 2)
    torch.testing.assert_close(network(y[:, :, None, None]).pooled, plain(y))


def test_mlp_on_images_averages_a_perceptron_over_patches():
    network = MLPConfig(width=8, kernel=3, depth=2).build(1).double()
    y = torch.rand(2, 1, 5, 6, dtype=torch.float64)
    patches = nn.functional.unfold(y, 3, padding=1).movedim(1, 2)  # (B, positions, 9)
    h = patches @ network.first.weight.flatten(1).T + network.first.bias
    torch.testing.assert_close(network(y).pooled, network.onward[0](nn.functional.silu(h)).mean(1))


def test_dsm_at_several_noise_levels_is_the_ncsn_loss():
    """The loss of NCSN equals dsm on a batch of mixed noise levels.

    It is the mean over levels of lambda(sigma) E|s_sigma(y) - grad log q_sigma(y|x)|^2 with
    lambda = sigma^2 (Song & Ermon 2019; eq. 2.8 of the thesis).
    """
    model, levels, count = noise_conditional_model(), torch.tensor([0.02, 0.1, 0.4]).double(), 6
    x, eps = torch.rand(count, 2, 1, 1).double(), torch.randn(3, count, 2, 1, 1).double()
    by_level = []
    for sigma, noise in zip(levels, eps, strict=True):
        y = x + sigma * noise
        target = (x - y) / sigma**2  # grad_y log N(y; x, sigma^2)
        gap = model.score(y, sigma=float(sigma)) - target
        by_level.append(sigma**2 * gap.square().flatten(1).sum(1).mean())
    ncsn = sum(by_level) / len(levels)
    sigma = levels.repeat_interleave(count)
    flat, clean = eps.flatten(0, 1), x.repeat(3, 1, 1, 1)
    batch = Batch(clean, clean + sigma[:, None, None, None] * flat, sigma, flat, None, None)
    loss = TrainingLoss(model, parse_objective("dsm-sum"))({"denoise": batch})
    torch.testing.assert_close(loss.total, ncsn)


def test_log_density_depends_continuously_on_sigma_down_to_zero():
    model, y = noise_conditional_model(), torch.rand(4, 2, 1, 1).double()
    sigma = torch.tensor([0.0, 1e-5, 0.1, 0.2]).double()
    found = model.log_density(y[:1].expand(4, -1, -1, -1), sigma)
    assert found.isfinite().all()
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)
    assert (found[2] - found[3]).abs() > 1e-3
    torch.testing.assert_close(model.logits(y), model.logits(y, 0.0))


def test_noise_conditional_model_requires_sigma():
    model, y = noise_conditional_model(), torch.rand(4, 2, 1, 1).double()
    for method in (model.estimate_sigma, model.denoise):
        with pytest.raises(UserError, match="takes the noise level as an input"):
            method(y)
    assert torch.equal(model.denoise(y, 0.1), y + 0.1**2 * model.score(y, sigma=0.1))


def test_even_kernel_is_refused():
    with pytest.raises(UserError, match="kernel 4 must be odd"):
        validated(MLPConfig, {"kernel": 4}, "backbone")


@pytest.mark.slow
@pytest.mark.usefixtures("count_cost_roughly")
def test_ncsn_trains_validates_and_loads(tmp_path):
    """The NCSN of the documentation on digits, for 4 steps, with implicit score matching added."""
    small = {
        "backbone": "mlp-sigma",
        "model": {"backbone": {"width": 8}},
        "objective": "ce+dsm+ism",
        "steps": 4,
        "validation_images": 16,
        "device": "cpu",
        "streams": {"classify": {"batch_size": 8}, "denoise": {"batch_size": 8}},
    }
    config = resolve(small, {"streams": {"denoise": {"noise": {"kind": "log-uniform"}}}})
    run = RunFolder.create(tmp_path / "ncsn", config)
    assemble(config, run).fit()
    last = [row for row in run.metrics() if row["kind"] == "validation"][-1]
    assert {"ce", "dsm", "ism", "accuracy", "psnr_25"} < last.keys()
    model = ebmkit.load(run.path)
    assert model.noise_conditional
    assert model.card.sigma_range == NoiseLaw(kind="log-uniform", min="1/255", max="100/255").range
    y, labels = torch.rand(2, 1, 8, 8), torch.tensor([1, 2])
    assert not torch.equal(model.score(y, sigma=0.05), model.score(y, sigma=0.2))
    found, predicted, level = estimates(model, y, 0.1, labels)
    assert "blind" not in found
    assert level is None
    assert torch.equal(predicted, model.logits(y, 0.1).argmax(1))
