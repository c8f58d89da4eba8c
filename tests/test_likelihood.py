"""Likelihood against closed forms, in three ways; dequantisation; bad arguments."""

import math

import pytest
import torch
from scipy.stats import norm

from ebmkit import Gaussian, GaussianMixture, ModelCard, UserError, create_model
from ebmkit.likelihood import (
    class_likelihoods,
    denoising_likelihood,
    density_level,
    dequantize,
    energy_likelihood,
    fit_gaussian,
    flow_likelihood,
    image_levels,
)
from ebmkit.models.config import create_denoiser

few_images = pytest.mark.filterwarnings("ignore:the likelihood did not converge")
"""For tests that know the error of their few images or dimensions."""


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make_mixture(dim):
    """Four components of random covariances, two of one label, on vectors."""
    means = 0.5 + 0.3 * torch.randn(4, dim, generator=generator(), dtype=torch.float64)
    axes = torch.linalg.qr(torch.randn(4, dim, dim, generator=generator(1)).double())[0]
    variances = torch.logspace(-2, -1, dim, dtype=torch.float64)
    covariances = axes * variances @ axes.mT
    weights = [0.4, 0.3, 0.2, 0.1]
    return GaussianMixture(means, covariances, weights, labels=[0, 1, 2, 0]).eval()


@pytest.fixture(params=[2, 16])
def mixture(request):
    return make_mixture(request.param)


def reference_of(mixture):
    return fit_gaussian(mixture.sample(2000, generator(3))[0])


def z_scores(found, truth):
    return (found.log_density - truth) / found.standard_error


@few_images
@pytest.mark.parametrize(("labelled", "sigma"), [(False, 0), (True, 0.1)])
def test_three_ways_agree_with_a_mixture(mixture, labelled, sigma):
    """The truth is the density of the noisy mixture, by components."""
    x, c = mixture.sample(60, generator(2))
    x = x + sigma * torch.randn(x.shape, generator=generator(4))
    noise = sigma**2 * torch.eye(x.shape[1])
    covariances = mixture._axes * mixture._variances[:, None] @ mixture._axes.mT
    parts = torch.stack(
        [
            torch.distributions.MultivariateNormal(m, v + noise).log_prob(x)
            for m, v in zip(mixture.means, covariances, strict=True)
        ],
        dim=1,
    )
    parts = parts + mixture.log_weights
    truth = parts.logsumexp(1)
    if labelled:
        own = mixture.labels == c[:, None]
        priors = torch.stack([mixture.log_weights[row].logsumexp(0) for row in own])
        truth = parts.masked_fill(~own, -math.inf).logsumexp(1) - priors
    labels = c if labelled else None
    how = {"sigma": sigma, "reference": reference_of(mixture)}
    energy = energy_likelihood(mixture, x, labels, sigma=sigma)
    assert torch.allclose(energy.log_density, truth)
    flow = flow_likelihood(mixture, x[:3], labels if labels is None else labels[:3], **how)
    assert torch.allclose(flow.log_density, truth[:3], atol=0.02)  # prior at 1000 deviations
    found = denoising_likelihood(mixture, x, labels, draws=128, **how)
    z = z_scores(found, truth)
    # heavier tails than normal: now and then a large error is not seen in 64 strata
    assert 0.4 < z.abs().median() < 1.1  # of a normal law: 0.67
    assert abs((found.log_density - truth).mean()) < 3.5 * found.mean_error
    assert found.mean_error < 0.1


@few_images
def test_hutchinson_flow_is_within_its_standard_error():
    mixture = make_mixture(16)
    x, _ = mixture.sample(20, generator(5))
    found = flow_likelihood(mixture, x, reference=reference_of(mixture), probes=8, tolerance=1e-4)
    z = z_scores(found, mixture.log_density(x))
    assert 0.6 < z.square().mean().sqrt() < 1.6  # Student's t of 7 degrees: 1.18


def test_denoising_likelihood_of_a_gaussian_is_exact():
    """With the density itself as reference nothing is left to integrate; with another, 1e-3."""
    covariance = torch.tensor([[0.3, 0.1], [0.1, 0.2]], dtype=torch.float64)
    model = Gaussian(torch.zeros(2).double(), covariance).eval()
    x = model.sample(4, generator(1))[0]
    truth = torch.distributions.MultivariateNormal(torch.zeros(2).double(), covariance).log_prob(x)
    same = denoising_likelihood(model, x, reference=model, draws=8)
    assert torch.allclose(same.log_density, truth, atol=1e-9)
    other = Gaussian(torch.full((2,), 0.01).double(), 1.02 * covariance)
    x = model.sample(300, generator(2))[0]
    found = denoising_likelihood(model, x, reference=other, draws=128)
    truth, base = model.log_density(x), other.log_density(x)
    assert float((found.log_density - truth).mean()) == pytest.approx(0, abs=1e-3)
    assert found.mean_error < 4e-4
    # what is integrated is much more than that
    assert ((found.log_density - truth).std() < 0.3 * (base - truth).std()).item()


def test_range_limit_costs_the_divergence_from_the_reference():
    """Above the range the score is the reference's: on average the result is too low by
    KL(p_sigma || q_sigma), here of two Gaussians, and `range_error` has its size."""
    dim, high = 8, 0.5
    model = Gaussian(torch.zeros(dim).double(), 0.2).eval()
    reference = Gaussian(torch.zeros(dim).double(), 0.3)
    x = model.sample(3000, generator(1))[0]
    truth = model.log_density(x)
    model.card = ModelCard(sigma_range=(0.01, high))
    level = 0.01
    y = x + level * torch.randn(x.shape, generator=generator(2))
    model_level = 0.2 + level**2
    truth = -0.5 * y.square().sum(1) / model_level - dim / 2 * math.log(2 * math.pi * model_level)
    found = denoising_likelihood(model, y, reference=reference, draws=16)
    ratio = (0.2 + high**2) / (0.3 + high**2)
    divergence = dim / 2 * (ratio - 1 - math.log(ratio))
    gap = float((truth - found.log_density).mean())
    assert gap == pytest.approx(divergence, abs=4 * found.mean_error + 0.005)
    assert divergence / 4 < found.range_error < 4 * divergence
    model.card = ModelCard(sigma_range=(0.01, 40.0))  # noise hides the image: no error is left
    assert denoising_likelihood(model, y[:500], reference=reference, draws=16).range_error < 1e-3


@few_images
def test_conditional_likelihood_uses_the_same_noise():
    """A label that the model ignores changes nothing, not even the Monte Carlo error."""
    means = torch.full((2, 3), 0.5, dtype=torch.float64)
    model = GaussianMixture(means, 0.1).eval()
    x = model.sample(5, generator())[0]
    plain = denoising_likelihood(model, x, draws=16)
    given = denoising_likelihood(model, x, 1, draws=16)
    assert torch.allclose(plain.log_density, given.log_density, atol=1e-9)
    alone = denoising_likelihood(model, x[2:3], draws=16)  # nor does the batch
    assert torch.allclose(alone.log_density, plain.log_density[2:3], atol=1e-9)


@few_images
def test_generative_classifier_equals_bayes_rule(mixture):
    """Within the standard error of the paired difference, which is below that of either label."""
    x, _ = mixture.sample(60, generator(7))
    found = class_likelihoods(mixture, x, reference=reference_of(mixture), draws=128)
    log_prior = torch.tensor([0.5, 0.3, 0.2]).log()
    truth = mixture.log_joint(x) - log_prior
    best = found.log_density.topk(2).indices
    gap, exact = (t.gather(1, best).diff(dim=1)[:, 0] for t in (found.log_density, truth))
    z = (gap - exact) / found.gap_error
    assert 0.5 < z.square().mean().sqrt() < 1.6
    posterior, bayes = found.log_posterior(log_prior).exp(), mixture(x).logits.softmax(1)
    sure = (exact - log_prior[best].flip(1).diff(dim=1)[:, 0]).abs() > 4 * found.gap_error
    assert sure.sum() > 20
    assert (posterior.argmax(1) == bayes.argmax(1))[sure].all()
    assert (found.evaluations, found.gradients) == (128, 3 * 128)
    own = denoising_likelihood(mixture, x, 1, reference=reference_of(mixture), draws=128)
    # the control variate is common to the labels, so the numbers are not the same
    error = 4 * own.standard_error + 1e-6
    assert ((own.log_density - found.log_density[:, 1]).abs() < error).all()


@few_images
def test_network_likelihood_is_the_integral_of_its_denoising_errors(network):
    """A blind network and a plain denoiser, against a fine quadrature with fresh noise."""
    denoiser = create_denoiser("dncnn", in_channels=1, depth=3, width=4).eval()
    denoiser.card = network.card
    x = torch.rand(2, 1, 8, 8, generator=generator(1))
    y = x + torch.randn(x.shape, generator=generator(2)) / 255
    reference = Gaussian(torch.full((1, 8, 8), 0.5).double(), 0.1)
    low, high = network.card.sigma_range
    logs = torch.linspace(math.log(low / 30), 0.5 * math.log(high**2 - low**2), 60).double()
    for model in (network, denoiser):
        found = denoising_likelihood(model, y, reference=reference, draws=128)
        rows = []
        for tau in logs.exp():
            noise = torch.randn(2, 1, 8, 8, generator=generator(int(1e6 * tau)))
            noise = torch.cat([noise, -noise])
            noisy, level = y.repeat(2, 1, 1, 1) + tau * noise, float((low**2 + tau**2).sqrt())
            square = [
                (noise + tau * m.score(at, level)).flatten(1).square().sum(1)
                for m, at in ((model, noisy.float()), (reference, noisy.double()))
            ]
            rows.append((square[0] - square[1]).reshape(2, 2).mean(0))
        rows = torch.stack(rows).detach()
        integral = torch.trapezoid(rows, logs, dim=0)
        truth = reference.log_density(y.double(), low) - integral
        spread = rows.diff(dim=0).square().sum(0).sqrt() * (logs[1] - logs[0])
        error = (found.standard_error.square() + spread.square()).sqrt()
        assert ((found.log_density - truth).abs() < 4 * error + 0.05).all()
        assert (error < 0.05 * found.log_density.abs() + 5).all()


@pytest.fixture
def network():
    model = create_model("gradresnet18", num_classes=3, in_channels=1, width=8, image_size=8)
    model.card = ModelCard(objective="ce+dsm", sigma_range=(1 / 255, 100 / 255), classifies=True)
    return model.eval().requires_grad_(False)


def test_bits_per_dimension_of_a_known_distribution():
    """Independent pixels of a Gaussian density: exact -log2 P(v) is a sum over cells."""
    levels = torch.linspace(0, 1, 17).double()
    density = Gaussian(torch.full((1, 4, 4), 0.4).double(), 0.2**2)
    x = density.sample(2000, generator())[0].clamp(0, 1)
    x = (x * 16).round() / 16
    edges = norm(0.4, 0.2)
    cells = edges.cdf(x.numpy() + 1 / 32) - edges.cdf(x.numpy() - 1 / 32)
    truth = -torch.from_numpy(cells).log2().flatten(1).mean(1)
    images = dequantize(x, levels)
    assert (images.images - x).abs().max() <= 1 / 32
    bits = images.bits_per_dimension(density.log_density(images.images))
    # the mean of a bound, which exceeds the truth by half the variance of log p in a cell
    jensen = (1 / 16) ** 2 / 12 / 0.2**2 / 2 / math.log(2)
    assert float(bits.mean()) == pytest.approx(float(truth.mean()) + jensen, abs=0.002)
    gaussian = dequantize(x, levels, "gaussian", sigma=1 / 64)
    wide = gaussian.bits_per_dimension(density.log_density(gaussian.images, 1 / 64))
    assert float(truth.mean()) < float(wide.mean()) < float(truth.mean()) + 1.2
    # noise over several levels: the volume is that of a cell, uniform dequantisation
    flat = dequantize(x, levels, "gaussian", sigma=0.1).log_volume
    inside = dequantize(torch.full((1, 1, 4, 4), 0.5), levels, "gaussian", sigma=0.1).log_volume
    assert float(inside) == pytest.approx(16 * math.log(16), abs=0.01)
    assert len(flat) == 2000


def test_uniform_noise_on_8_bits_needs_8_bits():
    """A uniform density on the cells gives log2 256 whatever the image."""
    x = torch.randint(0, 256, (3, 1, 8, 8), generator=generator()) / 255
    images = dequantize(x, torch.arange(256) / 255)
    density = torch.full((3,), -64 * math.log(256 / 255)).double()  # the cells have width 256/255
    assert torch.allclose(images.bits_per_dimension(density), torch.full((3,), 8.0).double())


def test_levels_are_those_of_the_data():
    assert len(image_levels(torch.arange(256) / 255)) == 256
    digits = (torch.arange(17) * 255 / 16).round() / 255
    assert torch.allclose(image_levels(digits), digits.double())
    assert image_levels(torch.rand(100)) is None
    assert image_levels(torch.tensor([0.0, 1.0])).tolist() == [0, 1]


def test_no_convergence_is_reported_and_the_result_returned():
    model = make_mixture(2)
    x = model.sample(3, generator())[0]
    with pytest.warns(UserWarning, match="did not converge: its standard error is"):
        found = denoising_likelihood(model, x, draws=8)
    assert not found.converged
    assert found.log_density.isfinite().all()


@pytest.mark.parametrize("way", [denoising_likelihood, flow_likelihood, energy_likelihood])
@pytest.mark.parametrize("c", [3, torch.tensor([0, -1])])
def test_labels_out_of_range_are_refused(way, c):
    model = make_mixture(2)
    with pytest.raises(UserError, match=r"label -?\d is out of range: this model knows 0 to 2"):
        way(model, torch.zeros(2, 2).double(), c)


def test_illegal_arguments_are_refused(network):
    x = torch.rand(2, 1, 8, 8)
    with pytest.raises(UserError, match=r"blind: use the likelihood by denoising .* or train"):
        flow_likelihood(network, x)
    with pytest.raises(
        UserError, match=r"objective tsm or diffclf.*estimate the likelihood by denoising"
    ):
        energy_likelihood(network, x)
    for sigma in (0.001, 0.5, "101/255"):
        with pytest.raises(UserError, match="outside the range that this model was trained for"):
            denoising_likelihood(network, x, sigma=sigma)
    assert density_level(network, "1/255") == density_level(network)
    with pytest.raises(UserError, match="draws 6 is not legal"):
        denoising_likelihood(network, x, draws=6)
    with pytest.raises(UserError, match="probes 1 is not legal"):
        flow_likelihood(make_mixture(2), x, probes=1)
    network.card = ModelCard(objective="ce")
    with pytest.raises(UserError, match=r"not trained to denoise .*'ce'"):
        denoising_likelihood(network, x)
    denoiser = create_denoiser("dncnn", in_channels=1, depth=3, width=4)
    with pytest.raises(UserError, match="without labels"):
        class_likelihoods(denoiser, x)


def test_images_that_cannot_be_dequantized_are_refused():
    levels = torch.linspace(0, 1, 17)
    with pytest.raises(UserError, match=r"must be in \[0, 1\], .* from 0 to 255"):
        dequantize(torch.tensor([[0.0, 255.0]]), levels)
    with pytest.raises(UserError, match="not of 17 levels"):
        dequantize(torch.tensor([[0.03]]), levels)
    with pytest.raises(UserError, match="needs a sigma above 0"):
        dequantize(torch.tensor([[0.5]]), levels, "gaussian")


def test_diverging_flow_is_reported(mixture, monkeypatch):
    class Stiff(type(mixture)):
        def _score(self, y, sigma, c):
            return super()._score(y, sigma, c) * math.nan

    mixture.__class__ = Stiff
    x = torch.zeros(2, mixture.means.shape[1]).double()
    with pytest.warns(UserWarning, match="did not converge: the score is NaN or Inf at sigma"):
        found = flow_likelihood(mixture, x)
    assert not found.converged
