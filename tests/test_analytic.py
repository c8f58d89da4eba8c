"""The closed-form models, on which other tests rely, against independent sources."""

import math

import pytest
import torch
from torch import distributions as D

from ebmkit import Gaussian, GaussianMixture, UserError

SIGMAS = [1e-4, 25 / 255, 1.0, 100.0]


def mixture_2d() -> GaussianMixture:
    """Three components with full covariances, two labels, unequal weights, on the plane."""
    means = torch.tensor([[-1.0, 0.5], [1.5, 0.0], [0.2, -1.3]], dtype=torch.float64)
    roots = torch.tensor(
        [[[0.6, 0.0], [0.3, 0.4]], [[0.5, 0.0], [-0.2, 0.3]], [[0.3, 0.0], [0.0, 0.7]]],
        dtype=torch.float64,
    )
    return GaussianMixture(means, roots @ roots.mT, weights=[0.2, 0.3, 0.5], labels=[0, 1, 0])


def torch_mixture(model: GaussianMixture, sigma: float, components: list[int]) -> D.Distribution:
    """PyTorch's mixture of ``components`` of `mixture_2d` with noise ``sigma``."""
    roots = torch.tensor(
        [[[0.6, 0.0], [0.3, 0.4]], [[0.5, 0.0], [-0.2, 0.3]], [[0.3, 0.0], [0.0, 0.7]]],
        dtype=torch.float64,
    )
    noisy = roots @ roots.mT + sigma**2 * torch.eye(2, dtype=torch.float64)
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)[components]
    return D.MixtureSameFamily(
        D.Categorical(weights),
        D.MultivariateNormal(model.means[components], noisy[components]),
    )


@pytest.mark.parametrize("sigma", SIGMAS)
def test_log_density_equals_torch_distributions(sigma):
    model = mixture_2d()
    y = 3 * torch.randn(20, 2, dtype=torch.float64)
    expected = torch_mixture(model, sigma, [0, 1, 2]).log_prob(y)
    torch.testing.assert_close(model.log_density(y, sigma), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_class_posterior_is_bayes_rule(sigma):
    model = mixture_2d()
    y = 2 * torch.randn(20, 2, dtype=torch.float64)
    joint = torch.stack(
        [
            math.log(0.7) + torch_mixture(model, sigma, [0, 2]).log_prob(y),
            math.log(0.3) + torch_mixture(model, sigma, [1]).log_prob(y),
        ],
        dim=1,
    )
    torch.testing.assert_close(model.log_joint(y, sigma), joint, rtol=1e-9, atol=1e-9)
    posterior = model(y, sigma).log_posterior()
    torch.testing.assert_close(posterior.exp(), joint.softmax(1), rtol=1e-8, atol=1e-12)


def test_the_density_integrates_to_one():
    model = mixture_2d()
    axis = torch.linspace(-8, 8, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    cell = (axis[1] - axis[0]) ** 2
    for sigma in (0.0, 0.3):
        # the trapezoid rule on a smooth function that vanishes at the border converges faster than
        # any power of the step (0.04, narrowest deviation 0.2)
        total = model.log_density(grid, sigma).exp().sum() * cell
        assert total == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("label", [None, 0, 1])
def test_tweedie_denoiser_equals_the_posterior_mean(sigma, label):
    """`denoise` differentiates the density, `posterior_mean` does not: a sign error shows."""
    model = mixture_2d()
    x, _ = model.sample(30)
    y = x + sigma * torch.randn_like(x)
    # Tweedie adds sigma^2 score to y: cancellation where |y| exceeds |x|, 1e-16 * |y|
    torch.testing.assert_close(
        model.denoise(y, sigma, label), model.posterior_mean(y, sigma, label), rtol=1e-9, atol=1e-9
    )


def test_posterior_mean_equals_numerical_integration():
    """E[x|y] as a sum over a grid of clean x, without conjugacy."""
    model, sigma = mixture_2d(), 0.4
    axis = torch.linspace(-7, 7, 281, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)
    y = torch.tensor([[0.3, -0.2], [1.0, 1.0], [-2.0, 0.1]], dtype=torch.float64)
    log_p = model.log_density(x)[None] - (y[:, None] - x).square().sum(2) / (2 * sigma**2)
    expected = log_p.softmax(1) @ x
    torch.testing.assert_close(model.posterior_mean(y, sigma), expected, rtol=0, atol=1e-8)


def test_noise_may_differ_per_image_and_images_have_any_shape():
    means = torch.rand(3, 1, 4, 5, dtype=torch.float64)
    model = GaussianMixture(means, torch.tensor([0.01, 0.02, 0.05]), labels=[0, 1, 1])
    y = torch.rand(4, 1, 4, 5, dtype=torch.float64)
    sigma = torch.tensor([0.05, 0.1, 0.5, 2.0], dtype=torch.float64)
    c = torch.tensor([0, 1, 1, 0])
    together = model.denoise(y, sigma, c)
    alone = [model.denoise(y[i : i + 1], float(sigma[i]), c[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(together, model.posterior_mean(y, sigma, c), rtol=1e-10, atol=1e-10)


def test_gaussian_denoiser_shrinks_towards_the_mean():
    mean = torch.full((1, 2, 2), 0.5, dtype=torch.float64)
    model = Gaussian(mean, 0.04)
    y = torch.rand(3, 1, 2, 2, dtype=torch.float64)
    expected = 0.5 + 0.04 / (0.04 + 0.01) * (y - 0.5)
    torch.testing.assert_close(model.denoise(y, 0.1), expected)
    torch.testing.assert_close(model.score(y, sigma=0.1), -(y - 0.5) / 0.05)
    assert model.num_classes == 1


def test_float_weights_are_not_rounded():
    model = GaussianMixture(torch.zeros(3, 2, dtype=torch.float64), weights=[0.1, 0.2, 0.7])
    expected = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    torch.testing.assert_close(model.log_weights.exp(), expected, rtol=1e-14, atol=0)


# --- blind score for a distribution of sigma -----------------------------------------------------


def test_blind_score_with_one_sigma_is_the_score():
    model = mixture_2d()
    y = torch.randn(10, 2, dtype=torch.float64)
    one = torch.tensor([0.3], dtype=torch.float64)
    c = torch.tensor([0, 1] * 5)
    for label in (None, c):
        torch.testing.assert_close(model.blind_score(y, one, c=label), model.score(y, 0.3, label))


@pytest.mark.parametrize("label", [None, 0, 1])
def test_blind_score_is_the_regression_of_the_noise_on_the_image(label):
    """The minimiser of E||sigma s(y) + eps||^2 over functions of y, by numerical integration.

    Setting the derivative to zero at every y gives s(y) = -E[sigma eps | y] / E[sigma^2 | y], with
    sigma eps = y - x. Both expectations are sums over a grid of clean x and the distribution of
    sigma, without scores, densities of noisy images or Tweedie's formula.
    """
    means = torch.tensor([[-1.0], [0.4], [1.5]], dtype=torch.float64)
    variances = torch.tensor([0.09, 0.04, 0.16], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    tags = torch.tensor([0, 1, 1])
    model = GaussianMixture(means, variances, weights, tags)
    sigmas = torch.tensor([0.1, 0.5, 1.2], dtype=torch.float64)
    law = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    y = torch.linspace(-2.5, 2.5, 11, dtype=torch.float64)

    x = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    normal = torch.exp(-((x[:, None] - means[:, 0]) ** 2) / (2 * variances)) / variances.sqrt()
    own = torch.ones(3) if label is None else tags == label
    prior = (normal * weights * own).sum(1)  # p(x) or p(x, c)
    eps = (y[:, None, None] - x[:, None]) / sigmas  # (Y, X, S)
    joint = prior[:, None] * law * torch.exp(-eps.square() / 2) / sigmas  # p(x, sigma, y)
    top = (joint * sigmas * eps).sum((1, 2))
    bottom = (joint * sigmas.square()).sum((1, 2))

    got = model.blind_score(y[:, None], sigmas, law, label)[:, 0]
    torch.testing.assert_close(got, -top / bottom, rtol=1e-8, atol=1e-8)


def test_blind_score_is_the_gradient_of_one_log_density():
    """E[sigma^2 s | y] / E[sigma^2 | y] is the gradient of log sum_sigma pi sigma^2 p_sigma."""
    means = torch.tensor([[0.2, 0.3], [0.8, 0.6]], dtype=torch.float64)
    mixture = GaussianMixture(means, 0.02)
    levels = torch.tensor([0.05, 0.1, 0.4], dtype=torch.float64)
    law = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    y = torch.rand(6, 2, dtype=torch.float64).requires_grad_()
    logs = torch.stack([mixture.log_density(y, float(s)) for s in levels])
    density = (logs + law.log()[:, None] + 2 * levels.log()[:, None]).logsumexp(0)
    (gradient,) = torch.autograd.grad(density.sum(), y)
    torch.testing.assert_close(mixture.blind_score(y.detach(), levels, law), gradient)


def dsm_loss(predict, x, sigma, noise) -> torch.Tensor:
    """Per-sample ||sigma s(y) + eps||^2, (B,)."""
    return (sigma[:, None] * predict(x + sigma[:, None] * noise) + noise).square().sum(1)


@pytest.mark.parametrize("levels", [[0.4], [0.1, 0.4, 1.5]], ids=["one-sigma", "law"])
def test_denoising_score_matching_is_minimal_at_the_closed_form(levels):
    """DSM is quadratic in s, so at its minimiser the slope in every direction g(y) vanishes.

    Slopes are means over samples with known standard errors. For directions that shift, scale,
    rotate and bend the score they must be 0 within 4 standard errors. The control: the score of a
    wrong sigma, half the score and the negative score must fail by far.
    """
    model = mixture_2d()
    count = 40_000
    sigmas = torch.tensor(levels, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    x, _ = model.sample(count, generator)
    sigma = sigmas[torch.randint(len(levels), (count,), generator=generator)]
    noise = torch.randn(count, 2, dtype=torch.float64, generator=generator)
    y = x + sigma[:, None] * noise

    exact = model.blind_score(y, sigmas)
    turned = torch.stack([-y[:, 1], y[:, 0]], dim=1)
    directions = [torch.ones_like(y), y, turned, y.sin(), exact, exact.tanh()]

    def worst(score: torch.Tensor) -> float:
        """The largest |slope| over the directions, in standard errors."""
        residual = sigma[:, None] * (sigma[:, None] * score + noise)
        slopes = torch.stack([(residual * g).sum(1) for g in directions])
        return float((slopes.mean(1).abs() / (slopes.std(1) / count**0.5)).max())

    assert worst(exact) < 4
    assert worst(0.5 * exact) > 20
    assert worst(-exact) > 20
    if len(levels) > 1:
        assert worst(model.score(y, sigma=levels[1])) > 20
        assert worst(torch.stack([model.score(y, sigma=s) for s in levels]).mean(0)) > 20


def test_least_squares_score_matching_recovers_a_gaussian_score():
    """A linear s(y) = A y + b, fitted by least squares, equals the closed-form score."""
    mean = torch.tensor([0.5, -0.2], dtype=torch.float64)
    root = torch.tensor([[0.6, 0.0], [0.3, 0.4]], dtype=torch.float64)
    model, sigma, count = Gaussian(mean, root @ root.mT), 0.4, 100_000
    x, _ = model.sample(count)
    noise = torch.randn_like(x)
    features = torch.cat([x + sigma * noise, torch.ones(count, 1, dtype=torch.float64)], dim=1)
    fitted = torch.linalg.lstsq(sigma * features, -noise).solution
    y = torch.randn(50, 2, dtype=torch.float64)
    got = torch.cat([y, torch.ones(50, 1, dtype=torch.float64)], dim=1) @ fitted
    # standard error of a coefficient: 1 / (sigma sqrt(n) std(y)) = 0.016; |y| < 3, 4 errors
    torch.testing.assert_close(got, model.score(y, sigma=sigma), rtol=0, atol=0.15)


def test_samples_have_the_moments_of_the_mixture():
    model, count = mixture_2d(), 20_000
    x, labels = model.sample(count, torch.Generator().manual_seed(3))
    reference = torch_mixture(model, 0.0, [0, 1, 2])
    error = (x.mean(0) - reference.mean).abs() / (reference.variance / count).sqrt()
    assert error.max() < 4
    spread = (x - x.mean(0)).square()
    error = (spread.mean(0) - reference.variance).abs() / (spread.std(0) / count**0.5)
    assert error.max() < 4
    assert labels.double().mean() == pytest.approx(0.3, abs=4 * (0.21 / count) ** 0.5)
    # label 1 is component 1 alone, with its off-diagonal covariance
    own = x[labels == 1]
    products = (own[:, 0] - 1.5) * own[:, 1]
    assert products.mean() == pytest.approx(-0.1, abs=4 * float(products.std()) / len(own) ** 0.5)


def test_samples_have_the_given_covariance():
    """In four dimensions, where the matrix of eigenvectors is not symmetric."""
    root, count = torch.randn(4, 4, dtype=torch.float64), 20_000
    covariance = root @ root.T
    x, _ = Gaussian(torch.zeros(4, dtype=torch.float64), covariance).sample(count)
    products = x[:, :, None] * x[:, None]
    error = (products.mean(0) - covariance).abs() / (products.std(0) / count**0.5)
    assert error.max() < 4


def test_the_same_generator_draws_the_same_samples():
    model = mixture_2d()
    first, second = (model.sample(5, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


# --- invalid arguments ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"covariances": torch.eye(3)}, "need covariances of shape"),
        ({"covariances": -1.0}, "positive definite"),
        ({"covariances": torch.tensor([1.0, 0.0])}, "positive definite"),
        ({"weights": [0.5]}, "non-negative weights"),
        ({"weights": [1.5, -0.5]}, "non-negative weights"),
        ({"labels": [0]}, "as many labels"),
        ({"labels": [0, 2]}, "without gaps"),
        ({"labels": [-1, 0]}, "without gaps"),
    ],
)
def test_invalid_mixtures_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        GaussianMixture(torch.zeros(2, 2), **arguments)


def test_images_of_another_shape_are_refused():
    with pytest.raises(UserError, match=r"has shape \(2,\), not \(3,\)"):
        mixture_2d().log_density(torch.zeros(1, 3, dtype=torch.float64))


def test_noise_conditional_model_requires_sigma():
    model, y = mixture_2d(), torch.zeros(1, 2, dtype=torch.float64)
    with pytest.raises(UserError, match="give sigma"):
        model.denoise(y)
    with pytest.raises(UserError, match="give sigma"):
        model.estimate_sigma(y)
