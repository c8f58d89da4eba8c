"""Jacobians and their spectra against closed forms and finite differences."""

import pytest
import torch
from torch import nn

from ebmkit import Gaussian, UserError
from ebmkit.evaluation.jacobian import Jacobian, jacobian, spectrum
from ebmkit.models import DirectDenoiser

SIGMA = 0.1


@pytest.fixture
def mixture_and_noisy_image(mixture):
    """The mixture in float64 and one of its samples with noise."""
    mixture.double()
    x, _ = mixture.sample(1)
    return mixture, x[0] + SIGMA * torch.randn_like(x[0])


@pytest.fixture
def network_and_image(network):
    """A convolutional network in float64 and an 8x8 image."""
    return network.double(), torch.rand(1, 8, 8, dtype=torch.float64)


class Linear(nn.Module):
    """D(y) = A y."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = nn.Parameter(matrix, requires_grad=False)

    def forward(self, y, sigma=None):
        return (y.flatten(1) @ self.matrix.T).reshape(y.shape)


def test_jacobian_of_gaussian_has_wiener_gains_on_its_axes(mixture_and_noisy_image):
    _, y = mixture_and_noisy_image
    axes = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0]
    variances = torch.logspace(-4, -1, 16, dtype=torch.float64)
    gains = variances / (variances + SIGMA**2)
    gaussian = Gaussian(torch.zeros_like(y), axes @ variances.diag() @ axes.T)
    operator = jacobian(gaussian, y, SIGMA)
    # rounding of matrix products in float64
    assert torch.allclose(operator.dense(), axes @ gains.diag() @ axes.T, atol=1e-11)
    found = spectrum(operator, 3, 2)
    assert torch.allclose(found.values, gains.flip(0), atol=1e-11)
    assert found.trace == pytest.approx(float(gains.sum()), abs=1e-10)
    assert found.asymmetry < 1e-11
    assert torch.allclose(found.smallest.values, gains[:2], atol=1e-11)
    overlaps = (found.largest.vectors.flatten(1) @ axes.flip(1)[:, :3]).abs()
    assert torch.allclose(overlaps, torch.eye(3, dtype=torch.float64), atol=1e-6)


def test_jacobian_of_mixture_matches_finite_differences_of_posterior_mean(mixture_and_noisy_image):
    mixture, y = mixture_and_noisy_image
    steps = 1e-6 * torch.eye(16, dtype=torch.float64).reshape(16, *y.shape)
    up, down = (mixture.posterior_mean(y + s * steps, SIGMA).flatten(1) for s in (1, -1))
    expected = ((up - down) / 2e-6).T
    found = jacobian(mixture, y, SIGMA).dense()
    assert torch.allclose(found, expected, atol=1e-6)  # the mixture's axes are rounded to float32
    assert torch.linalg.eigvalsh(found).min() > 0  # sigma^2 J is a covariance


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_products_do_not_depend_on_chunk_size(network_and_image, chunk):
    model, y = network_and_image
    v = torch.randn(7, *y.shape, dtype=torch.float64)
    whole = jacobian(model, y, SIGMA).vjp(v)
    operator = jacobian(model, y, SIGMA, chunk=chunk)
    assert torch.allclose(operator.vjp(v), whole, rtol=1e-10, atol=1e-12)
    assert operator.products == 7


def test_products_match_finite_differences_of_the_denoiser(network_and_image):
    model, y = network_and_image
    v = torch.randn_like(y)
    step = 1e-5 * v
    moved = model.denoise(torch.stack([y + step, y - step]), SIGMA)
    product = jacobian(model, y, SIGMA).vjp(v[None])[0]
    assert torch.allclose(product, (moved[0] - moved[1]) / 2e-5, atol=1e-7)


def test_jacobian_of_a_gradient_is_symmetric_up_to_rounding(network):
    y = torch.rand(1, 8, 8)
    single = spectrum(jacobian(network, y, SIGMA)).asymmetry
    assert 0 < single < 1e-5  # float32
    assert spectrum(jacobian(network.double(), y.double(), SIGMA)).asymmetry < 1e-13


@pytest.mark.slow
def test_iterative_spectrum_equals_dense_spectrum(network_and_image):
    model, y = network_and_image
    dense = spectrum(jacobian(model, y, 0.5), 3, 2, "dense")
    found = spectrum(jacobian(model, y, 0.5), 3, 2, "iterative", tolerance=1e-5)
    assert dense.values is not None
    assert found.values is None
    for one, other in ((found.largest, dense.largest), (found.smallest, dense.smallest)):
        assert torch.allclose(one.values, other.values, atol=1e-5 * float(dense.values[0]))
        overlap = (one.vectors * other.vectors).flatten(1).sum(1)
        assert torch.allclose(overlap, torch.ones_like(overlap), atol=1e-3)
    assert found.converged(1e-5)
    # a residual bounds the distance to the nearest eigenvalue
    for value, residual in zip(found.smallest.values, found.smallest.residuals, strict=True):
        assert (dense.values - value).abs().min() <= residual + 1e-12
    assert abs(found.trace - dense.trace) < 5 * found.trace_error


def test_too_few_products_give_residuals_and_no_convergence():
    rotation = torch.linalg.qr(torch.randn(400, 400, dtype=torch.float64))[0]
    values = torch.linspace(-1, 2, 400, dtype=torch.float64)
    net = Linear(rotation @ values.diag() @ rotation.T)
    operator = Jacobian(net, torch.rand(1, 20, 20, dtype=torch.float64))
    found = spectrum(operator, 2, 2, "iterative", tolerance=1e-6, products=150)
    assert not found.converged(1e-6)
    assert found.products < 400
    pairs = found.smallest
    v = pairs.vectors.flatten(1)
    expected = (v @ net.matrix.T - pairs.values[:, None] * v).norm(dim=1)
    assert torch.allclose(pairs.residuals, expected, atol=1e-10)
    assert torch.allclose(v @ v.T, torch.eye(2, dtype=torch.float64), atol=1e-10)


def test_probes_estimate_trace_and_asymmetry():
    one, other = torch.randn(2, 300, 300, dtype=torch.float64)
    matrix = one + one.T + 0.3 * other
    operator = Jacobian(Linear(matrix), torch.rand(3, 10, 10, dtype=torch.float64))
    exact = spectrum(operator, method="dense")
    found = spectrum(operator, method="iterative", products=100, tolerance=0.5)
    assert abs(found.trace - float(matrix.trace())) < 5 * found.trace_error
    expected = float((matrix - matrix.T).norm() / matrix.norm())
    assert exact.asymmetry == pytest.approx(expected, rel=1e-12)
    # standard errors: 6.5 % of 120 pairs, 1 % of the norm
    assert found.asymmetry == pytest.approx(expected, rel=0.3)


def test_direct_denoiser_has_singular_values():
    matrix = torch.randn(16, 16, dtype=torch.float64)
    y = torch.rand(1, 4, 4, dtype=torch.float64)
    operator = jacobian(DirectDenoiser(Linear(matrix)), y, SIGMA)
    found = spectrum(operator, 3, 2)
    assert not operator.symmetric
    assert torch.allclose(found.values, torch.linalg.svdvals(matrix))
    stretched = (found.largest.vectors.flatten(1) @ matrix.T).norm(dim=1)
    assert torch.allclose(stretched, found.values[:3])
    assert torch.allclose(found.smallest.values, found.values.flip(0)[:2])
    assert found.converged(1e-10)
    with pytest.raises(UserError, match=r"not symmetric.*use method dense"):
        spectrum(operator, method="iterative")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"largest": 16}, "16 largest and 2 smallest cannot be computed: request 1 to 15"),
        ({"smallest": 0}, "0 smallest cannot be computed"),
    ],
)
def test_impossible_numbers_of_eigenvalues_are_refused(mixture_and_noisy_image, arguments, words):
    mixture, y = mixture_and_noisy_image
    with pytest.raises(UserError, match=words):
        spectrum(jacobian(mixture, y, SIGMA), **arguments)


def test_dense_method_refuses_large_jacobians():
    operator = Jacobian(lambda y: 2 * y, torch.rand(1, 56, 56), chunk=1)
    with pytest.raises(UserError, match=r"3136 values is too large .*at most 3072"):
        spectrum(operator, method="dense")


@pytest.mark.parametrize("method", ["dense", "iterative"])
def test_nan_jacobian_is_refused(method):
    operator = Jacobian(lambda y: y * float("nan"), torch.rand(1, 4, 4))
    with pytest.raises(UserError, match="NaN or Inf: its training diverged"):
        spectrum(operator, method=method)
