"""Implicit score matching compared with closed forms: value, minimiser, probes and cost."""

import math

import pytest
import torch
from ebmkit_tests.support.small_models import gradients

import ebmkit
from ebmkit.data import Batch, ImageSet
from ebmkit.energy import hessian_products
from ebmkit.errors import UserError
from ebmkit.models import HEADS
from ebmkit.objectives import ModelOutput, TrainingLoss, parse_objective
from ebmkit.objectives.score_matching import (
    EXACT_TRACE,
    hyvarinen,
    implicit_score_matching,
    rademacher_probes,
    trace_vectors,
)
from ebmkit.training import resolve
from ebmkit.training.cost import step_flops
from ebmkit.training.setup import build_model, check_terms

SIGMA = 0.3


def mixture(entries: int) -> ebmkit.GaussianMixture:
    """Three Gaussians with full covariances and two labels, in float64."""
    g = torch.Generator().manual_seed(5)
    means = torch.randn(3, entries, generator=g, dtype=torch.float64)
    roots = torch.randn(3, entries, entries, generator=g, dtype=torch.float64) / entries**0.5
    covariances = roots @ roots.mT + 0.1 * torch.eye(entries, dtype=torch.float64)
    return ebmkit.GaussianMixture(means, covariances, labels=[0, 1, 0])


def draw(model: ebmkit.GaussianMixture, count: int) -> Batch:
    x, labels = model.sample(count)
    eps = torch.randn_like(x)
    sigma = torch.full((count,), SIGMA, dtype=x.dtype)
    return Batch(x, x + SIGMA * eps, sigma, eps, labels, labels)


def within(values: torch.Tensor, expected: float, errors: float = 4) -> bool:
    """Whether the mean of ``values`` is within ``errors`` standard errors of ``expected``."""
    return abs(float(values.mean()) - expected) < errors * float(values.std()) / len(values) ** 0.5


@pytest.mark.parametrize("use_autograd", [True, False])
def test_value_equals_hyvarinens_formula(use_autograd):
    """Reference: finite differences of the log-density, with errors of about 1e-5 at step 1e-3."""
    model, step = mixture(3), 1e-3
    y = torch.randn(5, 3, dtype=torch.float64)
    vectors = [e.expand_as(y) for e in torch.eye(3, dtype=y.dtype)]
    _, score, products = hessian_products(model, y, SIGMA, vectors, use_autograd)
    found = hyvarinen(score, vectors, products)
    expected = torch.zeros_like(found)
    for along in step * torch.eye(3, dtype=torch.float64):
        down, here, up = (model.log_density(y + k * along, SIGMA) for k in (-1, 0, 1))
        expected += 0.5 * ((up - down) / (2 * step)).square() + (up - 2 * here + down) / step**2
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_trace_estimate_of_many_entries_is_unbiased():
    """E[v' H v] over the probes v is the trace of H."""
    entries = EXACT_TRACE + 4
    model = mixture(entries)
    batch = draw(model, 2000)
    basis = [e.expand_as(batch.y) for e in torch.eye(entries, dtype=torch.float64)]
    vectors = trace_vectors(batch)
    assert len(vectors) == 1
    _, score, products = hessian_products(model, batch.y, SIGMA, [*vectors, *basis])
    score, products = score.detach(), [product.detach() for product in products]
    trace = sum(product[:, i] for i, product in enumerate(products[1:]))
    estimate = hyvarinen(score, vectors, products[:1]) - 0.5 * score.square().sum(1)
    assert estimate.sub(trace).std() > 0.1
    assert within(estimate - trace, 0)


def test_noise_of_the_image_is_a_biased_probe():
    """E[eps' H(y) eps] differs from E[tr H(y)], because eps and y are dependent.

    In one dimension with two peaks: H is largest between them, where eps is large.
    """
    peaks = torch.tensor([[-0.6], [0.6]], dtype=torch.float64)
    model = ebmkit.GaussianMixture(peaks, 0.02)
    batch = draw(model, 40_000)
    _, _, (hessian,) = hessian_products(model, batch.y, SIGMA, [torch.ones_like(batch.y)])
    assert not within(((batch.eps.square() - 1) * hessian.detach()).sum(1), 0, errors=10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probes_are_signs_uncorrelated_with_the_noise(dtype):
    eps = torch.randn(4000, 50, dtype=dtype)
    signs = rademacher_probes(eps)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(
        signs[7:9], rademacher_probes(eps[7:9])
    )  # the probe depends on the image only
    products = [
        signs,
        signs * eps,
        signs * eps.abs(),
        signs * eps.roll(1, 1),
        signs * signs.roll(1),
    ]
    for product in [*products, signs * signs.roll(1, 1)]:
        assert within(product.flatten(), 0)


def test_expected_loss_equals_denoising_score_matching():
    """E[ism] = E[dsm] for any score: here of mixtures at wrong noise levels, 2 and 20 entries.

    So both have the same minimisers, and ism differs from the Fisher divergence by a constant.
    """
    for entries in (2, EXACT_TRACE + 4):
        model = mixture(entries)
        batch = draw(model, 20_000)
        exact = model.score(batch.y, sigma=SIGMA)
        rests = []
        for level in (0.1, 0.3, 0.8):
            vectors = trace_vectors(batch)
            energies, score, products = hessian_products(model, batch.y, level, vectors)
            products = [product.detach() for product in products]
            output = ModelOutput(energies, score.detach(), products)
            dsm = (SIGMA * output.score + batch.eps).square().mean(1)
            ism = implicit_score_matching(output, batch)
            assert within(ism - dsm, 0)
            rests.append(ism - SIGMA**2 * (output.score - exact).square().mean(1))
        assert within(rests[0] - rests[1], 0)
        assert within(rests[2] - rests[1], 0)


class OneGaussian(ebmkit.EnergyModel):
    """A Gaussian with a free mean and precision."""

    def __init__(self):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.root = torch.nn.Parameter(torch.eye(2, dtype=torch.float64))

    def forward(self, y, sigma=None):
        z = (y - self.mean) @ self.root
        return ebmkit.Energies(y.new_zeros(len(y), 0), -0.5 * z.square().sum(1))

    def fit(self, objective, batch):
        loss = TrainingLoss(self, parse_objective(objective))
        search = torch.optim.LBFGS(
            self.parameters(), max_iter=100, tolerance_grad=1e-9, tolerance_change=0,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure():
            search.zero_grad()
            total = loss({"denoise": batch}).total
            total.backward()
            return total

        search.step(closure)
        return self.mean.detach(), (self.root @ self.root.T).detach()


def test_best_gaussian_has_mean_and_covariance_of_the_samples():
    """Score matching with a Gaussian model finds mean and covariance of the samples exactly.

    This is the closed-form estimate for any samples (Hyvarinen 2005, section 3.1). Denoising score
    matching has the same minimiser in expectation; with 20,000 samples its error is about 2 %, a
    fifth of the tolerance.
    """
    batch = draw(mixture(2), 20_000)
    best = torch.linalg.inv(torch.cov(batch.y.T, correction=0))
    for name, tolerance in (("1*ism", 1e-6), ("1*dsm", 0.1)):
        mean, precision = OneGaussian().fit(name, batch)
        torch.testing.assert_close(precision, best, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(mean, batch.y.mean(0), rtol=0, atol=tolerance)


def images(count: int, side: int) -> Batch:
    x, eps = torch.rand(2, count, 1, side, side, dtype=torch.float64)
    eps = torch.randn_like(eps)
    sigma = torch.full((count,), SIGMA, dtype=x.dtype)
    labels = torch.arange(count) % 3
    soft = torch.nn.functional.one_hot(labels, 3).double()
    return Batch(x, x + SIGMA * eps, sigma, eps, labels, soft)


def network(head: str = "linear-quadratic", name: str = "mlp-sigma") -> ebmkit.JointModel:
    options = {"kernel": 3} if "mlp" in name else {}
    return ebmkit.create_model(name, 3, 1, head=head, width=8, **options).double()


@pytest.mark.parametrize("side", [2, 5])
@pytest.mark.parametrize("head", sorted(HEADS))
def test_vjp_and_autograd_give_the_same_losses_and_gradients(head, side):
    model, batch = network(head), {"denoise": images(4, side)}
    loss = TrainingLoss(model, parse_objective("ce+ism"), streams={"ce": "denoise"})
    loss.use_autograd = False
    first = loss(batch)
    loss.use_autograd = True
    second = loss(batch)
    torch.testing.assert_close(first.values, second.values)
    with torch.no_grad():
        torch.testing.assert_close(loss(batch).values, second.values)
    assert (second.values[1] - 1).abs() > 1e-6  # a zero score gives 1
    for a, b in zip(*(gradients(l.total, model) for l in (first, second)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


@pytest.mark.slow
def test_loss_compiles_to_one_graph():
    model, batch = network(), {"denoise": images(4, 5)}
    loss = TrainingLoss(model, parse_objective("ism"))
    compiled = torch.compile(lambda b: loss.forward(b), fullgraph=True, backend="aot_eager")
    found, expected = compiled(batch), loss(batch)
    torch.testing.assert_close(found.total, expected.total)
    for a, b in zip(*(gradients(l.total, model) for l in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_gradient_does_not_depend_on_how_the_batch_is_split():
    model, batch = network(), images(4, 5)
    loss = TrainingLoss(model, parse_objective("ism"))
    whole = gradients(loss({"denoise": batch}).total, model)
    parts = [batch.rows(slice(i, i + 1)) for i in range(4)]
    each = [gradients(loss({"denoise": part}).total, model) for part in parts]
    for w, *found in zip(whole, *each, strict=True):
        torch.testing.assert_close(w, sum(found) / 4)


def test_summary_of_negative_losses_is_finite():
    loss = TrainingLoss(network(), parse_objective("ce+ism"))
    assert loss.summary({"ce": 0.5, "ism": -0.25}) == 0.25
    assert math.isfinite(loss.summary({"ce": 0.5, "ism": 0.0}))


def test_step_costs_twice_that_of_denoising_score_matching():
    """In forward passes: energy and score 2, their derivative by the image 2, the gradient 8.

    The sum is 12, compared with 6 for dsm (`ebmkit.training.cost`), counted on fake tensors.
    """
    costs = {}
    for name in ("dsm", "ism"):
        loss = TrainingLoss(network(name="mlp").float(), parse_objective(name))
        costs[name] = step_flops(loss, {"denoise": (4, 1, 8, 8)})[name]
    assert costs["ism"] / costs["dsm"] == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"backbone": "dncnn"}, "is a plain denoiser"),
        ({"backbone": "resnet18"}, "BatchNorm mixes"),
        ({"model": {"backbone": {"activation": "relu"}}}, "misses the kinks of ReLU"),
    ],
    ids=["denoiser", "batch-norm", "relu"],
)
def test_networks_without_a_second_derivative_are_refused(layer, message):
    small = {"objective": "ism", "model": {"backbone": {"width": 8}}}
    config = resolve(small, layer)
    pixels, labels = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.arange(4)
    images = ImageSet(pixels, labels, ("a", "b", "c", "d"))
    loss = TrainingLoss(build_model(config, images), parse_objective("ism"))
    with pytest.raises(UserError, match=message):
        check_terms(loss, config, images)
