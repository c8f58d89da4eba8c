"""Effective sample sizes and R-hat against ArviZ and closed forms; traces of chains."""

import math

import pytest
import torch
from ebmkit_tests.support import known_targets as known

from ebmkit import Gaussian, ModelCard
from ebmkit.errors import UserError
from ebmkit.sampling import MALA, Chains, density_of
from ebmkit.sampling.diagnostics import (
    Trace,
    arrival,
    effective_size,
    energy_gap,
    random_projections,
    split_rhat,
)
from ebmkit.sampling.langevin import MALAConfig


@pytest.mark.parametrize(("of_data", "limit"), [(0.01, 0.02), (17.0, 0.4), (None, 0.2)])
def test_no_sample_above_the_trained_range_arrives(of_data, limit):
    """A model that learnt nothing estimates levels far above it, also of held-out images."""
    model = Gaussian(torch.zeros(4))
    model.card = ModelCard(sigma_range=(0.004, 0.4))
    data = None if of_data is None else torch.full((10,), of_data)
    found = arrival(model, torch.tensor([0.001, 0.5, 36.0]), data)
    assert (found["limit"], found["arrived"]) == (pytest.approx(limit), 1)


def uniform(count, seed):
    """Numbers of a linear congruential generator, which are equal in every library."""
    numbers = []
    for _ in range(count):
        seed = (1103515245 * seed + 12345) % 2**31
        numbers.append(seed / 2**31)
    return torch.tensor(numbers, dtype=torch.float64)


def autoregressive(rho, drift=0.0, power=1, steps=200):
    """Four chains x' = rho x + sqrt(1 - rho^2) z, chain k shifted by k ``drift``."""
    chains = []
    for k in range(4):
        u = uniform(2 * steps, 1000003 * (17 + k))
        z = (-2 * (u[0::2] + 1e-12).log()).sqrt() * (2 * math.pi * u[1::2]).cos()
        z, x = z**power, [(z**power)[0]]
        for step in range(1, steps):
            x.append(rho * x[-1] + math.sqrt(1 - rho**2) * z[step])
        chains.append(torch.stack(x) + drift * k)
    return torch.stack(chains, dim=1)


# computed by ArviZ 0.23.4: rhat(x), ess(x, "bulk"), ess(x, "mean"), and the sum of the draws
ARVIZ = {
    (0.0,): (1.0028265, 789.76469, 780.96929, -15.980077512377488),
    (0.9,): (1.1651061, 18.81057, 18.67437, -74.16284106020302),
    (-0.6,): (1.0031527, 2322.47199, 2322.47199, -6.99843664271642),
    (0.5, 0.5): (1.2329125, 14.54998, 14.61208, 570.1609387309144),
    (0.3, 0.0, 5): (1.014406, 244.53764, 490.06119, 896.6466191487734),
    (0.5, 0.0, 1, 151): (1.008641, 205.10789, 204.59046, -9.519967810184257),
}


@pytest.mark.parametrize("setting", ARVIZ)
def test_rhat_and_effective_size_match_arviz(setting):
    draws, (rhat, bulk, mean, total) = autoregressive(*setting), ARVIZ[setting]
    assert float(draws.sum()) == pytest.approx(total, rel=1e-9)
    assert split_rhat(draws) == pytest.approx(rhat, abs=1e-6)
    assert effective_size(draws) == pytest.approx(bulk, rel=1e-6)
    assert effective_size(draws, ranks=False) == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.8])
def test_effective_size_of_autoregression_matches_the_formula(rho):
    """N (1 - rho) / (1 + rho); estimates of this length have errors of some percent."""
    steps, count = 2000, 8
    z = torch.randn(steps, count, dtype=torch.float64, generator=known.generator())
    x = [z[0]]
    for row in z[1:]:
        x.append(rho * x[-1] + math.sqrt(1 - rho**2) * row)
    exact = steps * count * (1 - rho) / (1 + rho)
    assert effective_size(torch.stack(x)) == pytest.approx(exact, rel=0.12)
    assert split_rhat(torch.stack(x)) < 1.01


def test_rhat_detects_differences_of_location_and_scale_and_drift():
    draws = torch.randn(500, 4, dtype=torch.float64, generator=known.generator())
    assert split_rhat(draws) < 1.01
    assert split_rhat(draws + torch.tensor([0.0, 0, 0, 1])) > 1.05
    assert split_rhat(draws * torch.tensor([1.0, 1, 1, 3])) > 1.05
    assert split_rhat(draws + torch.linspace(0, 2, 500)[:, None]) > 1.05
    assert math.isnan(split_rhat(torch.ones(10, 2)))
    assert math.isnan(effective_size(torch.ones(10, 2)))


def test_trace_records_every_second_step_after_warm_up_and_mean_acceptance():
    model = Gaussian(torch.zeros(1, 2, 2, dtype=torch.float64), 1.0)
    sampler = MALA(density_of(model), MALAConfig(step_size=0.3))
    trace = Trace(random_projections((1, 2, 2), 3), every=2, warm_up=3)
    seen = []
    chains = Chains(sampler, sampler.init(torch.zeros(5, 1, 2, 2, dtype=torch.float64)))
    chains.run(9, known.generator(), lambda s, i: (seen.append((s.x, i.accepted)), trace(s, i)))
    assert trace.draws().shape == (3, 5, 3)  # after steps 4, 6, 8
    torch.testing.assert_close(trace.draws()[1], trace.summary(seen[5][0]))
    assert trace.acceptance == pytest.approx(
        float(torch.stack([a for _, a in seen]).double().mean())
    )


def test_random_projections_use_unit_directions():
    project = random_projections((1, 3, 3), 4)
    unit = torch.eye(9, dtype=torch.float64).reshape(9, 1, 3, 3)
    torch.testing.assert_close(project(unit).square().sum(0), torch.ones(4, dtype=torch.float64))


def test_energy_gap_of_equal_distributions_is_within_its_standard_error():
    model, count = Gaussian(torch.zeros(3, dtype=torch.float64), 1.0), 4000
    a, b = (model.energy(model.sample(count, known.generator(s))[0]) for s in (1, 2))
    gap = energy_gap(a, b)
    assert abs(gap.value) < 4 * gap.standard_error
    assert gap.standard_error == pytest.approx(math.sqrt(2 * 1.5 / count), rel=0.1)
    assert energy_gap(a - 1, b).value == pytest.approx(gap.value - 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: split_rhat(torch.zeros(3, 2)), "N of 4 or more, not"),
        (lambda: effective_size(torch.zeros(30)), "must be"),
        (lambda: effective_size(torch.tensor([[1.0, math.nan]] * 5)), r"chains \[1\] are NaN"),
        (lambda: energy_gap(torch.zeros(1), torch.zeros(5)), "take 2 or more"),
        (lambda: Trace(lambda x: x, every=0), "every 0 steps"),
        (lambda: Trace(lambda x: x).draws(), "no step was recorded"),
    ],
)
def test_invalid_arguments_raise_errors(make, message):
    with pytest.raises(UserError, match=message):
        make()
