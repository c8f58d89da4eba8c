"""Langevin, MALA and HMC against closed forms."""

import math

import numpy as np
import pytest
import torch
from ebmkit_tests.support import known_targets as known
from pydantic import ValidationError

from ebmkit import Gaussian
from ebmkit.sampling import (
    HMC,
    MALA,
    AnnealedLangevin,
    Chains,
    Langevin,
    PredictorCorrector,
    density_of,
    geometric_sigmas,
    langevin,
    score_of,
)
from ebmkit.sampling.langevin import (
    JEM_NOISE,
    JEM_STEP,
    AnnealedConfig,
    HMCConfig,
    MALAConfig,
    PCConfig,
)

WIDE = 1.5


def random_start(count, seed=1):
    return WIDE * torch.randn(count, 2, dtype=torch.float64, generator=known.generator(seed))


def mala(density, step_size, temperature=1.0):
    return MALA(density, MALAConfig(step_size=step_size, temperature=temperature))


def hmc(density, step_size, leapfrogs, jitter=0.0, temperature=1.0):
    settings = {"leapfrogs": leapfrogs, "jitter": jitter, "temperature": temperature}
    return HMC(density, HMCConfig(step_size=step_size, **settings))


def test_closed_form_targets_match_the_library():
    model, x = known.overlapping(), random_start(30)
    for sigma in (None, 0.7):
        log_density, score = known.density(model)(x, sigma)
        torch.testing.assert_close(log_density, model.log_density(x, sigma))
        torch.testing.assert_close(score, model.score(x, sigma=sigma))


# --- the stationary density ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "steps"),
    [
        (lambda model: Langevin(known.score(model), 0.004), 700),
        (lambda model: mala(known.density(model), 0.1), 150),
        (lambda model: hmc(known.density(model), 0.25, leapfrogs=5, jitter=0.3), 40),
    ],
    ids=["langevin", "mala", "hmc"],
)
def test_moments_and_class_proportions_match_the_mixture(make, steps):
    """Independent chains from a wrong start; Langevin's bias is below 0.2 standard errors."""
    model = known.overlapping()
    start = random_start(2500)
    assert known.worst_error(start, model) > 20
    assert known.worst_error(known.run(make(model), start, steps), model) < 4


def test_a_label_conditions_the_chain():
    model = known.overlapping()
    x = known.run(mala(density_of(model, 0), 0.1), random_start(2500), 100)
    one = Gaussian(model.means[0], 0.25)
    assert known.worst_error(x, one) < 4


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_langevin_has_its_known_bias_at_a_step_where_mala_and_hmc_have_none(share):
    """At equal step size Langevin has variance v / (1 - eta / 2v) on a Gaussian, the others v."""
    v, count = 0.3, 20_000
    eta = share * v
    model = Gaussian(torch.full((1,), 0.5, dtype=torch.float64), v)
    x = torch.full((count, 1), 0.5, dtype=torch.float64)

    def deviation(sampler, expected, steps):
        """Deviation of the variance from ``expected``, in standard errors."""
        squares = (known.run(sampler, x, steps) - 0.5).square()
        return float((squares.mean() - expected) / expected * (count / 2) ** 0.5)

    hamiltonian = hmc(known.density(model), math.sqrt(2 * eta), leapfrogs=3, jitter=0.3)
    biased = v / (1 - eta / (2 * v))
    assert abs(deviation(Langevin(known.score(model), eta), biased, 40)) < 4
    assert deviation(Langevin(known.score(model), eta), v, 40) > 10
    assert abs(deviation(mala(known.density(model), eta), v, 40)) < 4
    assert abs(deviation(hamiltonian, v, 40)) < 4


def test_langevin_with_separate_noise_std_has_the_variance_of_its_recursion():
    """SGLD: x' - m = (1 - eta / v)(x - m) + noise * xi, whose variance is a geometric sum."""
    v, eta, noise, count = 0.3, 0.06, 0.1, 20_000
    model = Gaussian(torch.zeros(1, dtype=torch.float64), v)
    sampler = Langevin(known.score(model), eta, noise_std=noise)
    x = known.run(sampler, torch.zeros(count, 1, dtype=torch.float64), 60)
    exact = noise**2 / (1 - (1 - eta / v) ** 2)
    assert float(x.square().mean()) / exact == pytest.approx(1, abs=4 * (2 / count) ** 0.5)
    assert exact < 0.1 * v


def test_jem_settings_match_its_steps_on_images_in_minus_one_to_one():
    """JEM's step in its coordinates u = 2x - 1 is u' = u + grad_u + 0.01 xi."""
    model = Gaussian(torch.full((3,), 0.4, dtype=torch.float64), 0.2)
    x = torch.rand(5, 3, dtype=torch.float64)
    sampler = Langevin(known.score(model), JEM_STEP, noise_std=JEM_NOISE)
    moved, _ = sampler.step(sampler.init(x), known.generator())
    xi = torch.randn(5, 3, dtype=torch.float64, generator=known.generator())
    u = (2 * x - 1).requires_grad_()
    (gradient,) = torch.autograd.grad(model.log_density((u + 1) / 2).sum(), u)
    torch.testing.assert_close(2 * moved.x - 1, u.detach() + gradient + 0.01 * xi)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_scales_the_variance_of_a_gaussian(temperature):
    """The density to the power 1/T has variance T v."""
    v, count = 0.3, 10_000
    model = Gaussian(torch.zeros(1, dtype=torch.float64), v)
    x = torch.zeros(count, 1, dtype=torch.float64)
    for sampler in (
        mala(known.density(model), 0.3, temperature),
        hmc(known.density(model), 0.4, 4, 0.2, temperature),
    ):
        ratio = known.run(sampler, x, 40).square().mean() / (temperature * v)
        assert float(ratio) == pytest.approx(1, abs=4 * (2 / count) ** 0.5)


# --- single steps --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda density: mala(density, 0.4),
        lambda density: hmc(density, 0.6, leapfrogs=4, jitter=0.5),
    ],
    ids=["mala", "hmc"],
)
def test_adjusted_steps_are_reversible(make):
    """In equilibrium (x, x') and (x', x) have one distribution: E[f(x) g(x')] = E[g(x) f(x')]."""
    model = known.overlapping()
    x, _ = model.sample(20_000, known.generator(2))
    sampler = make(known.density(model))
    new, info = sampler.step(sampler.init(x), known.generator(3))
    assert 0.2 < info.accepted.double().mean() < 0.95
    a, b = x, new.x
    pairs = [(a[:, 0] * b[:, 0] ** 3, b[:, 0] * a[:, 0] ** 3)]
    pairs += [(a[:, 0].sin() * b[:, 1] ** 2, b[:, 0].sin() * a[:, 1] ** 2)]
    pairs += [(a.square().sum(1), b.square().sum(1))]
    for one, other in pairs:
        difference = one - other
        assert abs(difference.mean()) < 4 * difference.std() / len(x) ** 0.5


def test_hmc_with_one_leapfrog_step_is_mala():
    model, x = known.overlapping(), random_start(200)
    temperature, epsilon = 1.7, 0.9
    one = hmc(known.density(model), epsilon, leapfrogs=1, temperature=temperature)
    other = mala(known.density(model), epsilon**2 / (2 * temperature), temperature)
    a, b = known.run(one, x, 20), known.run(other, x, 20)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_the_energy_error_of_leapfrog_steps_is_of_second_order(monkeypatch):
    """Over a fixed time, log error against log number of steps has slope -2."""
    model, x = known.overlapping(), random_start(50)
    seen = []
    plain = langevin.metropolis_step
    monkeypatch.setattr(
        langevin,
        "metropolis_step",
        lambda *a: (seen.append(a[2].abs().mean().item()), plain(*a))[1],
    )
    counts = [8, 16, 32, 64]
    for count in counts:
        sampler = hmc(known.density(model), 1.0 / count, leapfrogs=count)
        sampler.step(sampler.init(x), known.generator())
    slope = np.polyfit(np.log(counts), np.log(seen), 1)[0]
    assert slope == pytest.approx(-2, abs=0.05)


def test_temperature_zero_is_gradient_ascent_exactly():
    model, x = known.overlapping(), random_start(20)
    climbed = x
    for _ in range(10):
        climbed = climbed + 0.05 * model.score(climbed)
    assert torch.equal(known.run(Langevin(score_of(model), 0.05, temperature=0.0), x, 10), climbed)
    # also with another seed, by the annealed sampler at one level
    config = AnnealedConfig(inner=10, rate=0.2, temperature=0.0)
    annealed = AnnealedLangevin(score_of(model), (0.5,), config)
    climbed = x
    for _ in range(10):
        climbed = climbed + 0.05 * model.score(climbed, sigma=0.5)
    assert torch.equal(known.run(annealed, x, 10, seed=5), climbed)


# --- annealing -----------------------------------------------------------------------------------


def test_annealed_langevin_ends_at_the_last_level():
    """Samples are from the mixture with noise of the last level; the bias is 1 %."""
    model = known.overlapping()
    sigmas = geometric_sigmas(3.0, 0.3, 8)
    sampler = AnnealedLangevin(known.score(model), sigmas, AnnealedConfig(inner=60, rate=0.05))
    x = known.run(sampler, 3 * random_start(2500), sampler.steps)
    assert known.worst_error(x, model, sigmas[-1]) < 4
    assert known.worst_error(x, model, sigmas[0]) > 20


@pytest.mark.parametrize("corrections", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_predictor_corrector_ends_at_the_last_level(corrections):
    model = known.overlapping()
    sigmas = geometric_sigmas(8.0, 0.2, 250)
    config = PCConfig(corrections=corrections, snr=0.1)
    sampler = PredictorCorrector(known.score(model), sigmas, config)
    noise = torch.randn(2500, 2, dtype=torch.float64, generator=known.generator(7))
    x = known.run(sampler, 8 * noise, sampler.steps)
    assert known.worst_error(x, model, sigmas[-1]) < 4


# --- diverged chains and errors ------------------------------------------------------------------


def test_diverged_chains_are_reported_and_do_not_affect_the_others():
    model = known.overlapping()

    def broken(x, sigma=None):
        score = model.score(x)
        return torch.where(x[:, :1] > 4, torch.nan, score)

    x = random_start(6).clamp(-1, 1)
    sampler = Langevin(broken, 0.02)
    alone = known.run(sampler, x, 5)
    x[2] = 5.0
    chains = Chains(sampler, sampler.init(x))
    last = chains.run(5, known.generator())
    assert chains.diverged == {2: 1}
    assert torch.equal(last.x[2], x[2])
    rest = [0, 1, 3, 4, 5]
    assert torch.equal(last.x[rest], alone[rest])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step_size": 0.0}, "step_size"),
        ({"step_size": math.nan}, "step_size"),
        ({"leapfrogs": 0}, "leapfrogs"),
        ({"jitter": 1.0}, "jitter"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_illegal_settings_of_hmc_are_refused(arguments, message):
    with pytest.raises(ValidationError, match=message):
        HMCConfig(**{"step_size": 0.1, **arguments})
