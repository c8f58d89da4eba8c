"""Fits and the constants of equation (4) against closed forms, published values, each other."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import linprog
from sklearn.linear_model import LogisticRegression
from torch.func import grad, jacrev

from ebmkit.errors import UserError
from ebmkit.experiments.theory.families import (
    SETTINGS,
    CentredMeans,
    ClassCovariances,
    Gaussians,
    NaiveBayes,
    Setting,
    SharedCovariance,
    Truth,
    moments,
)
from ebmkit.experiments.theory.fits import (
    ExcessError,
    Point,
    discriminative,
    expand,
    fit_bias,
    fit_variance,
    generative,
    measure,
    softmax_regression,
)

BY_NAME = {setting.name: setting for setting in SETTINGS}


def limits(setting, step=0.3):
    nodes = setting.truth.nodes(step)
    gen, dis = generative(setting.family, nodes), discriminative(setting.family, nodes)
    return gen, dis, setting.family.weights(setting.family.gaussians(dis.theta))


@pytest.mark.parametrize(
    "name",
    [
        s.name
        if s.name in ("shared-covariance", "two-humps")
        else pytest.param(s.name, marks=pytest.mark.slow)
        for s in SETTINGS
        if s.truth.dim == 2
    ],
)
def test_quadrature_grid_of_the_excess_error_is_fine_enough(name):
    """The error at the limit and away from it, against a finer and wider grid."""
    setting = BY_NAME[name]
    weights = setting.family.weights(generative_limit(setting))
    around = torch.stack([weights, 1.3 * weights, 0.7 * weights])
    assert (
        ExcessError(setting)(around) - ExcessError(setting, 0.08, 9.0)(around)
    ).abs().max() < 1e-7


def generative_limit(setting):
    nodes = setting.truth.nodes(0.3)
    return setting.family.gaussians(generative(setting.family, nodes).theta)


def test_excess_error_in_twenty_dimensions_matches_samples():
    setting = BY_NAME["many-parameters"]
    weights = torch.randn(1, 21, 2, dtype=torch.float64) / 4
    weights[0, 1, 0] += 2
    x, _ = setting.truth.sample(40_000)
    log_p = setting.truth.logits(x).log_softmax(1)
    log_q = (setting.family.features(x) @ weights[0]).log_softmax(1)
    each = (log_p.exp() * (log_p - log_q)).sum(1)
    spread = float(each.std()) / len(each) ** 0.5
    assert float(ExcessError(setting)(weights)[0]) == pytest.approx(
        float(each.mean()), abs=4 * spread
    )


@pytest.mark.slow
def test_measured_v_of_a_nonsingular_family_matches_the_constants():
    """n (excess - b) tends to v / 2: the number of parameters for the discriminative fit."""
    setting = BY_NAME["centred-means"]
    gen, dis, start = limits(setting)
    points = [measure(setting, n, 160, start) for n in (800, 1600, 3200)]
    for k, expansion in enumerate((gen, dis)):
        found = fit_variance([p[k] for p in points], expansion.bias)
        assert found.error < 0.12 * expansion.variance
        assert abs(found.value - expansion.variance) < 4 * found.error


def test_measured_misspecified_v_gen_is_the_one_with_drift():
    """Strongly correlated features and naive Bayes: equation (26) is rejected, v is not."""
    eye = torch.tensor([[1.0, 0.7], [0.7, 1.0]], dtype=torch.float64)
    truth = Truth(
        torch.tensor([[0.7, 0.5], [-0.7, -0.5]], dtype=torch.float64),
        eye.expand(2, 2, 2).contiguous(),
        torch.full((2,), 0.5, dtype=torch.float64),
        torch.arange(2),
    )
    setting = Setting("correlated", "", "", truth, NaiveBayes(2, 2), False, 25)
    gen, _, start = limits(setting)
    n = 400
    point = measure(setting, n, 1200, start)[0]
    found, error = 2 * n * (point.excess - gen.bias), 2 * n * point.error
    assert abs(found - gen.variance) < 4 * error
    assert found - gen.formula > 5 * error


def test_measured_errors_depend_on_the_seed_only():
    setting = BY_NAME["two-humps"]
    _, _, start = limits(setting)
    once, again, other = (measure(setting, 100, 20, start, seed) for seed in (3, 3, 4))
    assert once == again
    assert once != other


def test_sets_without_a_fit_are_counted_and_skipped():
    setting = BY_NAME["many-parameters"]
    gen, dis = measure(setting, 30, 40, torch.zeros(21, 2, dtype=torch.float64))
    assert gen.without == 0
    assert dis.without > 30  # 21 directions separate 30 samples nearly always
    alone, _ = measure(BY_NAME["two-humps"], 2, 40, torch.zeros(3, 2, dtype=torch.float64))
    assert alone.without == 40  # two samples have no pooled covariance


def test_least_squares_recovers_exact_expansions():
    exact = [Point(n, 100, 0, 0.02 + 3 / n + 40 / n**2, 1 / n) for n in (100, 200, 400, 800)]
    assert fit_bias(exact).value == pytest.approx(0.02, abs=1e-12)
    assert fit_variance(exact, 0.02).value == pytest.approx(6, abs=1e-9)
    alone = fit_variance([Point(100, 100, 0, 0.03, 1e-3), Point(200, 400, 0, 0.015, 2.5e-4)], 0.0)
    # 2 n e is 6 at both, with errors 0.2 and 0.1: the line's value at 1/n = 0 is 2 * b - a.
    assert alone.value == pytest.approx(6)
    assert alone.error == pytest.approx((4 * 0.1**2 + 0.2**2) ** 0.5)


@pytest.mark.parametrize("classes", [2, 3])
def test_softmax_regression_matches_scikit_learn(classes):
    labels = torch.arange(60) % classes
    x = torch.randn(60, 2, dtype=torch.float64)
    x = x + 0.8 * torch.randn(classes, 2, dtype=torch.float64)[labels]
    shares = torch.nn.functional.one_hot(labels, classes).double() / 60
    family = ClassCovariances(classes, 2)
    found = softmax_regression(family.features(x)[None], shares[None])
    peer = LogisticRegression(C=np.inf, tol=1e-12, max_iter=10_000, solver="newton-cg")
    peer.fit(family.features(x)[:, 1:].numpy(), labels.numpy())
    assert found.solved.all()
    probabilities = (family.features(x) @ found.weights[0]).softmax(1).numpy()
    assert np.allclose(
        probabilities, peer.predict_proba(family.features(x)[:, 1:].numpy()), atol=1e-6
    )


def test_small_sets_are_solved_exactly_if_not_separable():
    """Linear programming decides separability; both outcomes occur. Newton starts at random."""
    count, size = 100, 12
    x = torch.randn(count, size, 2, dtype=torch.float64)
    labels = torch.arange(size) % 2
    x[:, labels == 0, 0] += 1.6
    family = SharedCovariance(2, 2)
    shares = torch.nn.functional.one_hot(labels, 2).double().expand(count, size, 2) / size
    features = family.features(x)
    found = softmax_regression(features, shares, torch.randn(3, 2, dtype=torch.float64))
    signed = features * (1 - 2 * labels)[:, None]
    separable = [
        linprog([0, 0, 0], A_ub=-one.numpy(), b_ub=-np.ones(size), bounds=(None, None)).status == 0
        for one in signed
    ]
    assert 15 < sum(separable) < 85
    assert found.solved.tolist() == [not s for s in separable]
    solved = found.solved
    probabilities = (features @ found.weights).softmax(2)
    slopes = features.mT @ (probabilities / size - shares)
    assert slopes[solved].abs().max() < 1e-8


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
        pytest.param(SharedCovariance(3, 2), 6, marks=pytest.mark.slow),
        pytest.param(SharedCovariance(4, 2), 9, marks=pytest.mark.slow),
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


@pytest.mark.parametrize(
    ("distance", "first"), [(2.5, 0.3), pytest.param(3.5, 0.6, marks=pytest.mark.slow)]
)
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
    ("distance", "published"),
    [
        (2.0, 0.899),
        (4.0, 0.343),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in ((0.5, 1.0), (1.0, 0.995), (3.0, 0.641))
        ),
    ],
)
def test_efficiency_of_logistic_regression_matches_published_values(distance, published):
    """Efron (1975), table 1: efficiency relative to discriminant analysis, equal priors."""
    family, nodes = SharedCovariance(2, 2), on_an_axis(distance).nodes(STEP)
    gen, dis = (contrast_covariance(family, f(family, nodes)) for f in (generative, discriminative))
    for i in (0, 2):  # the offset, and the direction across the means
        assert float(gen[i, i] / dis[i, i]) == pytest.approx(published, abs=6e-4)


@pytest.mark.parametrize("family", [SharedCovariance(3, 2), ClassCovariances(2, 2)])
def test_well_specified_families_have_no_bias_and_v_gen_below_v_dis(family):
    """Equation (28): v_gen <= v_dis, here of a random truth; b = 0."""
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
