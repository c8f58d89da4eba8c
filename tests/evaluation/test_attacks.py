"""Attacks on classifiers with known distance to the decision boundary."""

import math
import warnings
from itertools import cycle

import numpy as np
import pytest
import torch
from ebmkit_tests.support.mixture_world import SIDE, near_the_plane, two_gaussians

from ebmkit import EnergyModel, GaussianMixture, UserError, create_model
from ebmkit.attacks import NORMS, noise_of_norm, random_start, search_steps
from ebmkit.energy import Energies
from ebmkit.evaluation import attacks
from ebmkit.evaluation.attacks import (
    DEFENCES,
    Attack,
    Defence,
    DefendedClassifier,
)
from ebmkit.randomness import image_generators, image_noise

STRENGTHS = [0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32]
GRID = {"linf": [0.01, 0.02, 0.04], "l2": [0.05, 0.1, 0.2]}


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        pytest.param(name, norm, marks=[pytest.mark.slow] if name == "refine" else [])
        for name, norm in ((DEFENCES[0], NORMS[1]), *zip(DEFENCES, cycle(NORMS), strict=False))
    ],
)
def test_minimal_epsilon_equals_distance_to_boundary(name, norm):
    """The minimal epsilon is the distance, rounded up to the grid; without defence in both norms.

    Images within 3 % of a value of the grid, 0 included, are excluded. The mean of n draws of noise
    moves the boundary by sigma / sqrt(n) and the median by 1.25 times that; for random defences,
    images within five such deviations are excluded as well.
    """
    model, sigma, draws = two_gaussians(), 0.03, 256
    x, labels, distances = near_the_plane(model, 100)
    defence = Defence(name, sigma, 2 * (name == "refine"), 0.004, sigma / math.sqrt(2))
    target = DefendedClassifier(model, defence, draws=4)
    noise = image_noise(x, draws * defence.noises, "") if defence.random else None
    found = Attack(norm, steps=15).minimal_epsilons(target, x, labels, GRID[norm], noise)
    grid = torch.tensor([0, *GRID[norm], math.inf], dtype=torch.float64)
    exact = grid[torch.bucketize(distances[norm].double(), grid)]
    unsure = 0.03 * distances[norm]
    if target.defence.random:
        per_l2 = float((distances[norm] / distances["l2"])[0])
        unsure += per_l2 * 5 * 1.25 * sigma / math.sqrt(draws)
    clear = ((distances[norm][:, None] - grid[:-1]).abs() > unsure[:, None]).all(1)
    assert clear.sum() > 20
    assert len(exact[clear].unique()) >= 3
    assert torch.equal(found[clear], exact[clear])


def test_one_step_suffices_for_linear_classifier_and_random_noise_does_not():
    model = two_gaussians()
    x, labels, distances = near_the_plane(model)
    target = DefendedClassifier(model, Defence("direct"))
    for norm in NORMS:
        epsilon = float(distances[norm].median()) * 1.001
        step, noise = (
            Attack(norm, kind).succeeds(target, x, labels, epsilon)
            for kind in ("one-step", "noise")
        )
        assert torch.equal(step, distances[norm] < epsilon)
        assert noise.sum() < 0.4 * step.sum()
        assert not (noise & ~step).any()


def foolbox_attack(attack, target, x, labels, epsilon, starts):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its imports from scipy
        import eagerpy
        import foolbox.attacks as fa
        from foolbox import PyTorchModel
    linf = attack.norm == "linf"
    if attack.kind == "one-step":
        other = fa.LinfFastGradientAttack() if linf else fa.L2FastGradientAttack()
    else:
        kind = (
            fa.LinfProjectedGradientDescentAttack if linf else fa.L2ProjectedGradientDescentAttack
        )
        other = kind(rel_stepsize=attack.stepsize, steps=attack.steps)
        other.get_random_start = lambda x0, epsilon: eagerpy.astensor(starts)
    bounded = PyTorchModel(target, bounds=(0, 1), device="cpu")
    return other(bounded, x, labels, epsilons=epsilon)[1]


@pytest.mark.parametrize("kind", ["pgd", "one-step"])
@pytest.mark.parametrize("norm", NORMS)
def test_attack_equals_foolbox_from_same_starts(norm, kind):
    """In float64 up to rounding, with pixels at 0 and 1, through the denoising defence."""
    model = two_gaussians().double()
    x = torch.rand(20, 1, SIDE, SIDE, dtype=torch.float64).mul(1.4).sub(0.2).clamp(0, 1)
    labels = model.logits(x).argmax(1)
    target = DefendedClassifier(model, Defence("denoise", 0.05))
    attack = Attack(norm, kind, steps=7, stepsize=0.3)
    found = attack.perturbed(target, x, labels, 0.3, "seed")
    starts = random_start(x, 0.3, norm, image_generators(x, "seed"))
    expected = foolbox_attack(attack, target, x, labels, 0.3, starts)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert (found - x).abs().amax(dim=(1, 2, 3)).min() > 0.01


@pytest.mark.parametrize("norm", NORMS)
def test_noise_has_requested_norm_after_clipping(norm):
    x = torch.rand(50, 1, SIDE, SIDE).mul(1.4).sub(0.2).clamp(0, 1)
    change = (noise_of_norm(x, 0.2, norm, image_generators(x, "")) - x).flatten(1)
    if norm == "l2":
        torch.testing.assert_close(change.norm(dim=1), torch.full((50,), 0.2))
        far = noise_of_norm(x, 9.0, norm, image_generators(x, ""))
        assert torch.minimum(far, 1 - far).max() < 1e-6  # unreachable: all pixels end at 0 or 1
    else:
        assert change.abs().max() <= 0.2 + 1e-6
        # smaller only where clipping acts
        assert (change.abs().amax(dim=1) > 0.199).float().mean() > 0.5


@pytest.mark.parametrize("norm", NORMS)
def test_perturbations_stay_in_ball_and_image_range(norm):
    model = two_gaussians()
    x = torch.rand(20, 1, SIDE, SIDE).round()  # pixels are 0 or 1, so clipping acts
    labels = model.logits(x).argmax(1)
    target = DefendedClassifier(model, Defence("direct"))
    for kind in ("pgd", "one-step", "noise"):
        found = Attack(norm, kind).perturbed(target, x, labels, 0.3)
        change = (found - x).flatten(1)
        size = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
        assert found.min() >= 0
        assert found.max() <= 1
        assert size.max() <= 0.3 * (1 + 1e-5)
        assert size.min() > 0.01  # every image is changed


def test_gradients_through_defences_match_finite_differences():
    """Central differences in float64: the error is about 1e-7 of the value."""
    model = create_model("gradresnet18", num_classes=3, in_channels=1, width=8, image_size=8)
    model = model.double().eval()
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    for name in DEFENCES:
        target = DefendedClassifier(model, Defence(name, 0.1, 2 * (name == "refine"), 0.1, 0.1))
        noise = torch.randn(4, 1, 8, 8, dtype=torch.float64)
        value = target.log_posterior(x, noise)[:, 1].sum()
        (gradient,) = torch.autograd.grad(value, x)
        direction = torch.randn_like(x)
        with torch.no_grad():
            up, down = (
                target.log_posterior(x + step * direction, noise)[:, 1].sum()
                for step in (1e-5, -1e-5)
            )
        slope = (gradient * direction).sum()
        assert slope.abs() > 1e-4
        assert torch.allclose((up - down) / 2e-5, slope, rtol=1e-5)


def test_refinement_averages_posterior_over_langevin_chains():
    """Two chains of three steps with the score of two Gaussians of equal variance, written out."""
    variance, step, deviation = 0.02, 0.005, 0.04
    model = two_gaussians(variance).double()
    x = near_the_plane(model)[0][:5]
    defence = Defence("refine", 0.0, 3, step, deviation)
    target = DefendedClassifier(model, defence)
    noise = image_noise(x, 2 * defence.noises, "chains")
    ends = target.purify(x, noise)
    by_hand = []
    for i in range(5):
        for chain in noise[i].split(3):
            y = x[i]
            for xi in chain:
                squares = (y - model.means).flatten(1).square().sum(1)
                weights = (-squares / (2 * variance)).softmax(0)
                score = (torch.einsum("k,kchw->chw", weights, model.means) - y) / variance
                y = y + step * score + deviation * xi
            by_hand.append(y)
    assert torch.allclose(ends, torch.stack(by_hand), atol=1e-12)
    averaged = model.logits(ends).softmax(1).reshape(5, 2, 2).mean(1)
    assert torch.allclose(target.log_posterior(x, noise).exp(), averaged, atol=1e-12)


def test_refinement_with_zero_steps_equals_direct():
    model = two_gaussians()
    x = near_the_plane(model)[0][:5]
    nothing = Defence("refine", steps=0)
    assert not nothing.random
    assert torch.equal(
        DefendedClassifier(model, nothing)(x), DefendedClassifier(model, Defence("direct"))(x)
    )


def test_default_refinement_step_matches_jem_on_minus_one_to_one():
    """u' = u + grad_u log p(u) + 0.01 xi for u = 2x - 1, with a wide Gaussian in both units."""
    ours = GaussianMixture(torch.full((1, 1, 2, 2), 0.6, dtype=torch.float64), 1.5)
    theirs = GaussianMixture(2 * ours.means - 1, 4 * 1.5)
    x = torch.rand(3, 1, 2, 2, dtype=torch.float64)
    u, noise = 2 * x - 1, torch.randn(1, 1, 2, 2, dtype=torch.float64)
    expected = u + theirs.score(u) + 0.01 * noise
    found = DefendedClassifier(ours, Defence("refine", steps=1)).purify(x, noise)
    assert torch.allclose(2 * found - 1, expected, atol=1e-12)


def test_gradient_of_many_draws_matches_gradient_of_expectation():
    """E p(c|x + sigma eps) by Gauss-Hermite quadrature and 40,000 draws: 5 standard errors."""
    model, sigma, draws = two_gaussians(0.01), 0.2, 40_000
    x = near_the_plane(model)[0][:1].double().requires_grad_()
    model.double()
    slope = (model.means[1] - model.means[0]) / (0.01 + sigma**2)  # of the logit at this sigma
    at = float((slope * (x.detach() - model.means.mean(0))).sum())
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    logit = torch.from_numpy(at + sigma * float(slope.norm()) * nodes)
    weight = torch.from_numpy(weights / weights.sum())
    p = torch.sigmoid(logit)
    mean, derivative = (weight * p).sum(), (weight * p * (1 - p)).sum()

    target = DefendedClassifier(model, Defence("noise", sigma), draws, seed="many")
    log_p = target(x)[:, 1]
    (gradient,) = torch.autograd.grad(log_p.sum(), x)
    error = 5 / math.sqrt(draws)
    # standard deviation <= 1/2
    assert float(log_p.detach().exp()) == pytest.approx(float(mean), abs=0.5 * error)
    expected = (derivative / mean * slope).flatten()
    found = gradient.flatten()
    # standard deviations: below 1/8 for p (1 - p) and below 1/2 for p, in the denominator
    tolerance = error * (0.125 / float(mean) + 0.5 * float(derivative) / float(mean) ** 2)
    assert torch.allclose(found, expected, rtol=0, atol=tolerance * float(slope.abs().max()))
    assert tolerance < 0.15 * float(derivative / mean)


def test_calls_draw_new_noise_and_restart_repeats_it():
    model = two_gaussians()
    target = DefendedClassifier(model, Defence("noise", 0.2), draws=2, seed="a")
    x = near_the_plane(model)[0][:3]
    first, second = target(x), target(x)
    assert not torch.equal(first, second)
    target.restart("a")
    assert torch.equal(target(x), first)
    target.restart("b")
    assert not torch.equal(target(x), first)


@pytest.mark.parametrize("norm", NORMS)
def test_attack_on_an_image_does_not_depend_on_batch(norm):
    """Two short steps, so that different random starts end in different images."""
    model = two_gaussians()
    x, labels, _ = near_the_plane(model)
    # the draws of the defence repeat as well
    target = DefendedClassifier(model, Defence("noise", 0.3), draws=1)
    for attack in (Attack(norm, steps=2, stepsize=0.1), Attack(norm, "noise")):
        whole = attack.perturbed(target, x, labels, 0.2, "s")
        some = attack.perturbed(target, x[7:9], labels[7:9], 0.2, "s")
        assert torch.allclose(whole[7:9], some, atol=1e-6)
        assert not torch.allclose(attack.perturbed(target, x, labels, 0.2, "t"), whole, atol=1e-3)
        assert not torch.allclose(whole[0] - x[0], whole[1] - x[1], atol=1e-3)
    assert torch.equal(image_noise(x, 3, "s")[7:9], image_noise(x[7:9], 3, "s"))


def test_attack_does_not_change_generator_or_model():
    """The state of torch's generator, gradients and ``requires_grad`` are unchanged."""
    model = create_model("gradresnet18", num_classes=3, in_channels=1, width=8, image_size=8).eval()
    requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    x, labels = torch.rand(3, 1, 8, 8), torch.arange(3)
    state = torch.get_rng_state()
    with torch.no_grad():
        target = DefendedClassifier(model, Defence("noise", 0.1), 2)
        Attack("l2", steps=2).minimal_epsilons(target, x, labels, [0.1], image_noise(x, 2, ""))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == requires_grad


def test_bisection_attacks_images_at_most_search_steps_times():
    """Seven strengths take three attacks; images misclassified without an attack take none."""

    class Counting(Attack):
        attacked = 0

        def succeeds(self, target, x, labels, epsilon, noise=None, seed=""):
            Counting.attacked += len(x)
            return super().succeeds(target, x, labels, epsilon, noise, seed)

    model = two_gaussians()
    x, labels, _ = near_the_plane(model, 20)
    labels[:5] = 1 - labels[:5]
    rounds = []
    found = Counting("linf", steps=3).minimal_epsilons(
        DefendedClassifier(model, Defence("direct")),
        x, labels, STRENGTHS,
        done=lambda: rounds.append(1),
    )  # fmt: skip
    assert (search_steps(len(STRENGTHS)), len(rounds)) == (3, 3)
    assert Counting.attacked == 3 * 15
    assert (found == 0).nonzero().flatten().tolist() == [0, 1, 2, 3, 4]


def test_images_outside_range_are_refused():
    model = two_gaussians()
    with pytest.raises(UserError, match=r"-0\.5 to 0\.2 cannot be attacked"):
        Attack("linf").succeeds(
            DefendedClassifier(model, Defence("direct")),
            torch.linspace(-0.5, 0.2, SIDE**2).reshape(1, 1, SIDE, SIDE),
            torch.zeros(1, dtype=torch.long),
            0.1,
        )


class NaNLogits(EnergyModel):
    num_classes = 2

    def forward(self, y, sigma=None):
        return Energies(y.flatten(1)[:, :2] * math.nan, y.flatten(1).sum(1))


def test_nan_logits_count_as_misclassified():
    x, labels = torch.rand(4, 1, SIDE, SIDE), torch.zeros(4, dtype=torch.long)
    found = Attack("l2").minimal_epsilons(
        DefendedClassifier(NaNLogits(), Defence("direct")), x, labels, [0.1]
    )
    assert found.tolist() == [0] * 4


def test_missing_autoattack_error_names_pip_extra(monkeypatch):
    monkeypatch.setattr(attacks, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'ebmkit-vision\[autoattack\]'"):
        attacks.check_autoattack()


@pytest.mark.parametrize("norm", [pytest.param("linf", marks=pytest.mark.slow), "l2"])
def test_autoattack_succeeds_beyond_distance_to_boundary(norm):
    pytest.importorskip("pyautoattack")
    model = two_gaussians()
    x, labels, distances = near_the_plane(model, 12)
    labels[0] = 1 - labels[0]  # misclassified without an attack
    epsilon = float(distances[norm].median()) * 1.001
    state = torch.get_rng_state()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package's own
        target = DefendedClassifier(model, Defence("direct"))
        found = attacks.autoattack(target, norm, x, labels, epsilon)
    expected = distances[norm] < epsilon
    expected[0] = True
    clear = (distances[norm] / epsilon).log().abs() > 0.01
    assert torch.equal(found[clear], expected[clear])
    assert torch.equal(torch.get_rng_state(), state)
