"""Gradient ascent on a label's density, and its class-Gaussian starts."""

import pytest
import torch
from ebmkit_tests.support import known_targets as known

from ebmkit import GaussianMixture
from ebmkit.errors import UserError
from ebmkit.sampling import (
    Ascent,
    Chains,
    ClassGaussians,
    Langevin,
    density_of,
    label_density_of,
    score_of,
)


def model():
    means = torch.tensor([0.3, 0.7], dtype=torch.float64)[:, None, None, None].expand(2, 1, 3, 3)
    return GaussianMixture(means + 0.02 * torch.arange(9).reshape(3, 3), 0.05)


def start():
    return torch.rand(6, 1, 3, 3, dtype=torch.float64, generator=known.generator())


def test_plain_ascent_is_langevin_at_temperature_zero_exactly():
    target, x = model(), start()
    for c in (None, 1):
        plain = Ascent(density_of(target, c), 0.01, "plain", bounds=None)
        cold = Langevin(score_of(target, c), 0.01, temperature=0.0)
        assert torch.equal(known.run(plain, x, 20), known.run(cold, x, 20, seed=9))


@pytest.mark.parametrize("direction", ["l2", "plain", "sign"])
def test_steps_have_the_documented_length_and_raise_the_label_probability(direction):
    target, x = model(), start()
    sampler = Ascent(label_density_of(target, 1), 0.002, direction, bounds=None)
    moved, info = sampler.step(sampler.init(x), known.generator())
    change, gradient = (moved.x - x).flatten(1), target.label_score(x, 1).flatten(1)
    if direction == "plain":
        torch.testing.assert_close(change, 0.002 * gradient)
    if direction == "l2":
        torch.testing.assert_close(change.norm(dim=1), torch.full((6,), 0.002).double())
        assert (torch.cosine_similarity(change, gradient) > 1 - 1e-9).all()
    if direction == "sign":
        torch.testing.assert_close(change, 0.002 * gradient.sign())
    torch.testing.assert_close(info.move, change.square().mean(1).sqrt())
    before, after = (target.logits(y).log_softmax(1)[:, 1] for y in (x, moved.x))
    assert (after > before).all()


def test_ascent_reaches_the_requested_label():
    target = model()
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    x = known.run(Ascent(label_density_of(target, labels), 0.1), start(), 30)
    assert torch.equal(target.logits(x).argmax(1), labels)
    assert x.min() >= 0
    assert x.max() <= 1


@pytest.mark.parametrize("ball", ["l2", "linf"])
def test_chains_stay_in_the_ball(ball):
    """Steps lead out of the ball and are projected, so chains end on its surface."""
    target, x = model(), start()
    sampler = Ascent(label_density_of(target, 1), 0.1, radius=0.15, ball=ball, bounds=None)
    offset = (known.run(sampler, x, 20) - x).flatten(1)
    norm = offset.norm(dim=1) if ball == "l2" else offset.abs().amax(1)
    torch.testing.assert_close(norm, torch.full((6,), 0.15, dtype=torch.float64))


@pytest.mark.parametrize(("direction", "ball"), [("l2", "l2"), ("sign", "linf")])
def test_settings_per_chain_match_chains_run_alone(direction, ball):
    target, x = model(), start()
    steps, radii = torch.rand(2, 6, dtype=torch.float64, generator=known.generator()) / 5 + 0.02
    low, high = torch.full((6,), -torch.inf).double(), torch.full((6,), torch.inf).double()
    low[0], high[0] = 0.4, 0.6
    density = label_density_of(target, 1)
    together = known.run(Ascent(density, steps, direction, radii, ball, (low, high)), x, 5)
    for i in range(6):
        bounds = (float(low[i]), float(high[i]))
        one = Ascent(density, float(steps[i]), direction, float(radii[i]), ball, bounds)
        alone = known.run(one, x[i : i + 1], 5)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-12)
    assert together[0].max() <= 0.6


def test_zero_gradient_does_not_move_and_nan_gradient_is_divergence():
    sampler = Ascent(lambda x, sigma=None: (x.sum(1), torch.zeros_like(x)), 0.5, bounds=None)
    x = torch.rand(3, 4)
    assert torch.equal(known.run(sampler, x, 2), x)
    broken = Ascent(lambda x, sigma=None: (x.sum(1), x * torch.nan), 0.5)
    chains = Chains(broken, broken.init(x))
    chains.run(2, known.generator())
    assert chains.diverged == {0: 1, 1: 1, 2: 1}


def test_class_gaussians_have_mean_and_covariance_of_their_class():
    """Within 4 standard errors; that of the covariance holds for Gaussian samples."""
    images = torch.randn(40, 1, 2, 2, dtype=torch.float64, generator=known.generator())
    labels = torch.arange(40) % 2
    images[labels == 1] = 3 + images[labels == 1] @ torch.tensor([[1.0, 0.5], [0.2, 2.0]]).double()
    count = 20_000
    requested = torch.arange(count) % 2
    samples = (
        ClassGaussians(images, labels)
        .sample(len(requested), known.generator(2), requested)
        .flatten(1)
    )
    for label in (0, 1):
        own = images[labels == label].flatten(1)
        drawn, cov = samples[requested == label], own.T.cov()
        error = (drawn.mean(0) - own.mean(0)).abs() / (cov.diag() / len(drawn)).sqrt()
        assert error.max() < 4
        spread = (cov.diag()[:, None] * cov.diag() + cov**2) / len(drawn)
        assert ((drawn.T.cov() - cov).abs() / spread.sqrt()).max() < 4
    with pytest.raises(UserError, match="class 1 has 1 image"):
        ClassGaussians(images, (labels * 0).index_fill(0, torch.tensor([3]), 1))


def test_class_gaussians_refuse_labels_without_images():
    gaussians = ClassGaussians(torch.rand(8, 1, 2, 2), torch.arange(8) % 2)
    with pytest.raises(UserError, match="label 5 has 0 images"):
        gaussians.sample(2, known.generator(), torch.tensor([0, 5]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"direction": "l3"}, "unknown direction 'l3'"),
        ({"ball": "l1"}, "unknown ball 'l1'"),
        ({"step_size": 0}, "step size 0 must be"),
        ({"radius": -1.0}, "radius -1.0 must be"),
    ],
)
def test_illegal_settings_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        Ascent(label_density_of(model(), 0), **arguments)
