"""The constants of equation (4) against closed forms, published values and each other."""

import math

import pytest
import torch
from scipy.integrate import quad
from torch.func import grad, jacrev

from ebmkit.errors import UserError
from ebmkit.experiments.theory.families import (
    SETTINGS,
    CentredMeans,
    ClassCovariances,
    Gaussians,
    NaiveBayes,
    SharedCovariance,
    Truth,
    moments,
)
from ebmkit.experiments.theory.fits import discriminative, expand, generative

STEP = 0.3  # of the quadrature; errors of the constants below are at most 1e-6


def gaussians(means, covariances, weights, labels=None):
    means = torch.tensor(means, dtype=torch.float64)
    covariances = torch.as_tensor(covariances, dtype=torch.float64)
    return Truth(
        means,
        covariances.expand(len(means), *covariances.shape[-2:]).contiguous(),
        torch.tensor(weights, dtype=torch.float64),
        torch.arange(len(means)) if labels is None else torch.tensor(labels),
    )


def random_covariance(dim):
    half = torch.randn(dim, dim, dtype=torch.float64)
    return half @ half.mT / dim + 0.4 * torch.eye(dim, dtype=torch.float64)


def random_truth(classes, dim, shared=True):
    means = 0.9 * torch.randn(classes, dim, dtype=torch.float64)
    one = random_covariance(dim)
    covariances = torch.stack([one if shared else random_covariance(dim) for _ in range(classes)])
    weights = torch.rand(classes, dtype=torch.float64) + 0.3
    return Truth(means, covariances, weights / weights.sum(), torch.arange(classes))


def on_an_axis(distance, first=0.5):
    return gaussians([[distance / 2, 0.0], [-distance / 2, 0.0]], torch.eye(2), [first, 1 - first])


def contrast_covariance(family, expansion):
    """Asymptotic covariance of the logit's weights (1, x_1, x_2) between two classes."""
    jacobian = jacrev(lambda t: (lambda w: w[:, 0] - w[:, 1])(family.weights(family.gaussians(t))))(
        expansion.theta
    )
    return jacobian @ expansion.covariance @ jacobian.mT


@pytest.mark.parametrize(("classes", "dim"), [(2, 1), (2, 2), (3, 2)])
def test_v_dis_of_a_nonsingular_family_is_its_number_of_parameters(classes, dim):
    """Equation (29): v_dis = m, where the conditional Fisher matrix is nonsingular."""
    means = torch.randn(classes, dim, dtype=torch.float64)
    weights = torch.rand(classes, dtype=torch.float64) + 0.3
    truth = Truth(
        means - means.mean(0),
        torch.eye(dim, dtype=torch.float64).expand(classes, dim, dim).contiguous(),
        weights / weights.sum(),
        torch.arange(classes),
    )
    family = CentredMeans(classes, dim)
    found = discriminative(family, truth.nodes(STEP))
    assert found.rank == family.num_parameters == len(found.theta)
    assert found.variance == pytest.approx(family.num_parameters, abs=1e-6)


@pytest.mark.slow
def test_constants_of_a_nonsingular_family_in_twenty_dimensions():
    setting = next(s for s in SETTINGS if s.name == "many-parameters")
    nodes = setting.truth.nodes(STEP)
    gen, dis = (f(setting.family, nodes) for f in (generative, discriminative))
    assert dis.rank == setting.family.num_parameters == 21
    assert dis.variance == pytest.approx(21, abs=1e-6)
    # Known covariance: the weights (1, x) of the logit, 2 mu and the log odds, have covariance
    # (4 / (1 - r^2)) I with r = 0 here, and the conditional Fisher matrix is A_i / 4.
    a0, _, a2 = integrals(3.0, 0.5)
    odds, first = 4 * a0 / 4, 4 * a2 / 4
    assert gen.variance == pytest.approx(odds + first + 19 * 4 * a0 / 4, abs=1e-6)


@pytest.mark.parametrize(
    ("family", "rank"),
    [
        (SharedCovariance(2, 1), 2),
        (SharedCovariance(2, 2), 3),
        (SharedCovariance(3, 2), 6),
        (SharedCovariance(4, 2), 9),
        (NaiveBayes(3, 2), 6),
        (ClassCovariances(2, 2), 6),
        (ClassCovariances(3, 1), 6),
    ],
)
def test_v_dis_of_singular_families_is_the_rank(family, rank):
    """(C - 1)(d + 1) for linear logits, (C - 1)(1 + d + d (d + 1) / 2) for quadratic ones."""
    truth = random_truth(family.num_classes, family.dim, shared=not family.quadratic)
    if isinstance(family, NaiveBayes):
        own = torch.diag_embed(truth.covariances.diagonal(0, 1, 2))
        truth = Truth(truth.means, own, truth.weights, truth.labels)
    nodes = truth.nodes(0.5)  # the identity holds at every node, so the grid may be coarse
    gen, dis = generative(family, nodes), discriminative(family, nodes)
    assert gen.rank == family.num_parameters > rank
    assert dis.rank == rank
    assert dis.variance == pytest.approx(rank, abs=1e-6)


def integrals(distance, first):
    """Efron's A_0, A_1, A_2: E[x^i exp(-D^2/8) / (pi_1 e^{Dx/2} + pi_0 e^{-Dx/2})], x ~ N(0, 1)."""

    def integrand(x, i):
        density = math.exp(-0.5 * x * x - distance**2 / 8) / math.sqrt(2 * math.pi)
        return (
            density
            * x**i
            / (first * math.exp(distance * x / 2) + (1 - first) * math.exp(-distance * x / 2))
        )

    return [quad(integrand, -12, 12, args=(i,), epsabs=1e-12)[0] for i in range(3)]


@pytest.mark.parametrize(("distance", "first"), [(1.0, 0.5), (2.5, 0.3), (3.5, 0.6)])
def test_covariances_of_two_gaussians_match_efron(distance, first):
    """Efron (1975), lemmas 1 and 2: both covariance matrices as one-dimensional integrals."""
    family, nodes = SharedCovariance(2, 2), on_an_axis(distance, first).nodes(STEP)
    gen, dis = generative(family, nodes), discriminative(family, nodes)
    both, gap = first * (1 - first), (2 * first - 1) * distance / 2
    normal = torch.tensor(
        [
            [1 + distance**2 / 4, gap, 0],
            [gap, 1 + 2 * both * distance**2, 0],
            [0, 0, 1 + both * distance**2],
        ],
        dtype=torch.float64,
    )
    a0, a1, a2 = integrals(distance, first)
    fisher = torch.tensor([[a0, a1, 0], [a1, a2, 0], [0, 0, a0]], dtype=torch.float64)
    assert torch.allclose(contrast_covariance(family, gen), normal / both, atol=1e-5)
    assert torch.allclose(
        contrast_covariance(family, dis), torch.linalg.inv(fisher) / both, atol=1e-5
    )
    assert gen.variance == pytest.approx(float((normal * fisher).sum()), abs=1e-6)


@pytest.mark.parametrize(
    ("distance", "published"), [(0.5, 1.0), (1.0, 0.995), (2.0, 0.899), (3.0, 0.641), (4.0, 0.343)]
)
def test_efficiency_of_logistic_regression_matches_published_values(distance, published):
    """Efron (1975), table 1: efficiency relative to discriminant analysis, equal priors."""
    family, nodes = SharedCovariance(2, 2), on_an_axis(distance).nodes(STEP)
    gen, dis = (contrast_covariance(family, f(family, nodes)) for f in (generative, discriminative))
    for i in (0, 2):  # the offset, and the direction across the means
        assert float(gen[i, i] / dis[i, i]) == pytest.approx(published, abs=6e-4)


@pytest.mark.parametrize("family", [SharedCovariance(3, 2), ClassCovariances(2, 2)])
def test_well_specified_families_have_no_bias_and_v_gen_below_v_dis(family):
    """Equation (28): v_gen <= v_dis, here over random truths; b = 0."""
    for _ in range(3):
        truth = random_truth(family.num_classes, family.dim, shared=not family.quadratic)
        nodes = truth.nodes(STEP)
        gen, dis = generative(family, nodes), discriminative(family, nodes)
        assert abs(gen.bias) < 1e-8
        assert abs(dis.bias) < 1e-8
        assert gen.slope.abs().max() < 1e-6
        assert 0 < gen.variance < dis.variance


def test_misspecified_discriminative_bias_is_below_generative_bias():
    for family in (SharedCovariance(2, 2), NaiveBayes(2, 2)):
        nodes = random_truth(2, 2, shared=False).nodes(STEP)
        gen, dis = generative(family, nodes), discriminative(family, nodes)
        assert 1e-4 < dis.bias < gen.bias


CORRELATED = gaussians([[0.7, 0.5], [-0.7, -0.5]], [[1.0, 0.7], [0.7, 1.0]], [0.5, 0.5])


def test_misspecified_v_gen_requires_the_drift():
    """Equation (26) alone depends on the coordinates; with the drift v does not.

    In the coordinates of mean parameters the estimate is an average of statistics: it has no
    drift, and v is the trace of their covariance times the Hessian of the error.
    """
    family, nodes = NaiveBayes(2, 2), CORRELATED.nodes(STEP)
    usual = generative(family, nodes)
    shares = nodes.shares

    def model(eta):
        mass = torch.stack([eta[0], 1 - eta[0]])
        means = torch.stack([eta[1:3] / mass[0], eta[3:5] / mass[1]])
        variances = eta[5:] - (mass[:, None] * means.square()).sum(0)
        return Gaussians(mass.log(), means, torch.diag_embed(variances).expand(2, 2, 2))

    def log_joint(eta, x):
        return family.log_joint(family.parameters(model(eta)), x)

    x = nodes.x
    zero = torch.zeros_like(x)
    one = torch.ones_like(x[:, :1])
    statistics = torch.stack(
        [torch.cat([one, x, zero, x**2], 1), torch.cat([0 * one, zero, x, x**2], 1)], 1
    )
    eta = torch.einsum("nc,nci->i", shares, statistics)
    offsets = statistics - eta
    covariance = torch.einsum("nc,nci,ncj->ij", shares, offsets, offsets)
    curvature = jacrev(grad(lambda e: -(shares * log_joint(e, x).log_softmax(1)).sum()))(eta)
    exact = float((covariance * curvature).sum())

    assert usual.variance == pytest.approx(exact, abs=1e-6)
    assert abs(usual.formula - exact) > 0.5
    averages = expand(
        lambda e, x: -log_joint(e, x),
        lambda e, x: -log_joint(e, x).log_softmax(1),
        eta,
        nodes,
    )
    assert torch.allclose(averages.covariance, covariance, atol=1e-7)
    assert averages.drift.abs().max() < 1e-6
    assert averages.formula == pytest.approx(exact, abs=1e-6)


def test_drift_of_the_pooled_covariance():
    """Estimated class means make the pooled covariance too small: -sum of class covariances."""
    family = SharedCovariance(2, 2)
    truth = random_truth(2, 2, shared=False)
    found = generative(family, truth.nodes(STEP))
    i, j = torch.tril_indices(2, 2)
    assert torch.allclose(found.drift[5:], -truth.covariances.sum(0)[i, j], atol=1e-5)
    assert found.drift[1:5].abs().max() < 1e-6
    first, last = truth.weights
    odds = -(1 - first) / (2 * first) + (1 - last) / (2 * last)
    assert float(found.drift[0]) == pytest.approx(float(odds), abs=1e-6)


def test_quadrature_integrates_moments():
    truth = random_truth(3, 2, shared=False)
    nodes = truth.nodes()
    found = moments(nodes.x, nodes.shares)
    assert torch.allclose(found.mass, truth.weights, atol=1e-10)
    assert torch.allclose(found.first, truth.weights[:, None] * truth.means, atol=1e-10)
    squares = truth.covariances + truth.means[:, :, None] * truth.means[:, None]
    assert torch.allclose(found.second, truth.weights[:, None, None] * squares, atol=1e-10)


def test_more_than_two_dimensions_must_be_isotropic():
    tilted = gaussians([[1.0, 0.0, 0.2], [-1.0, 0.0, 0.0]], torch.eye(3), [0.5, 0.5])
    with pytest.raises(UserError, match="3 dimensions must have unit covariances"):
        tilted.nodes()
