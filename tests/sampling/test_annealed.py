"""Annealed MALA and annealed importance sampling against closed forms."""

import math

import pytest
import torch
from ebmkit_tests.support import known_targets as known

from ebmkit import GaussianMixture
from ebmkit.sampling import AIS, AnnealedMALA, Chains, density_of, geometric_sigmas
from ebmkit.sampling.annealed import AnnealedMALAConfig
from ebmkit.sampling.diagnostics import importance


def two_modes(dim):
    """Modes at a distance of 30 standard deviations, of weights 0.8 and 0.2."""
    means = torch.full((2, dim), 0.5, dtype=torch.float64)
    means[:, 0] += torch.tensor([1.5, -1.5])
    return GaussianMixture(means, 0.01, weights=[0.8, 0.2])


def weighted_chains(density, dim, count, levels, seed=0, **settings):
    """Final state of AIS from sigma 20 to 0.05."""
    sampler = AIS(density, geometric_sigmas(20.0, 0.05, levels), AnnealedMALAConfig(**settings))
    start = known.gray_start(sampler, (count, dim), known.generator(seed))
    return Chains(sampler, sampler.init(start)).run(sampler.steps, known.generator(seed + 1))


def weighted_error(values, log_weights, exact):
    """Error of the weighted mean of ``values`` (N,), in standard errors (delta method)."""
    w = log_weights.softmax(0)
    mean = (w * values).sum()
    return float((mean - exact).abs() / (w * (values - mean)).square().sum().sqrt())


@pytest.mark.parametrize("dim", [2, 16])
def test_weights_give_log_z_the_mode_weights_and_the_moments(dim):
    model, count = two_modes(dim), 1500
    state = weighted_chains(known.density(model), dim, count, 150)
    found = importance(state.log_weight)
    assert abs(found.log_z) < 4 * found.standard_error < 0.15
    assert found.effective_size > count / 3
    in_first = (state.x[:, 0] > 0.5).double()
    assert weighted_error(in_first, state.log_weight, 0.8) < 4
    mean, second = known.exact_moments(model, 0.05)
    for i in (0, 1):
        assert weighted_error(state.x[:, i], state.log_weight, mean[i]) < 4
        assert weighted_error(state.x[:, i].square(), state.log_weight, second[i, i]) < 4


def test_log_z_of_unnormalised_energies_is_their_constant():
    """Each level has another constant; only that of the last one is in log Z."""
    plain = known.density(two_modes(2))

    def shifted(x, sigma):
        log_density, score = plain(x, sigma)
        return log_density + 7 + math.cos(5 * math.log(sigma)), score

    found = importance(weighted_chains(shifted, 2, 1000, 100).log_weight)
    exact = 7 + math.cos(5 * math.log(0.05))
    assert abs(found.log_z - exact) < 4 * found.standard_error < 0.2


@pytest.mark.parametrize("moves", [0, 2])
def test_weights_are_unbiased_for_a_wrong_score(moves):
    """The mean weight is Z whatever the kernel: here the score is 0.8 times the exact one."""
    model = known.overlapping()
    plain = known.density(model)

    def wrong(x, sigma):
        log_density, score = plain(x, sigma)
        return log_density, 0.8 * score

    state = weighted_chains(wrong, 2, 4000, 60, moves=moves)
    found = importance(state.log_weight)
    assert abs(found.log_z) < 4 * found.standard_error < 0.2
    mean, _ = known.exact_moments(model, 0.05)
    assert weighted_error(state.x[:, 0], state.log_weight, mean[0]) < 4


def test_the_variance_of_log_weights_is_of_first_order_in_the_distance_of_levels():
    density = known.density(two_modes(16))
    few, many = (
        importance(weighted_chains(density, 16, 1000, n + 1).log_weight).variance for n in (60, 240)
    )
    assert few / many == pytest.approx(4, rel=0.35)  # a variance has a relative error of 6 %


def test_with_a_label_log_z_is_its_log_probability():
    found = importance(weighted_chains(density_of(two_modes(2), 1), 2, 400, 120).log_weight)
    assert abs(found.log_z - math.log(0.2)) < 4 * found.standard_error < 0.3


def test_annealed_mala_ends_at_the_last_level():
    """Few levels, where the moves have to remove the bias of the steps between levels."""
    model, sigmas = known.overlapping(), geometric_sigmas(8.0, 0.2, 4)
    noise = torch.randn(2500, 2, dtype=torch.float64, generator=known.generator(7))
    errors = [
        known.worst_error(known.run(sampler, 8 * noise, sampler.steps), model, sigmas[-1])
        for sampler in (
            AnnealedMALA(known.density(model), sigmas, AnnealedMALAConfig(moves=moves, rate=0.8))
            for moves in (0, 10)
        )
    ]
    assert errors[1] < 4 < errors[0]


def test_the_effective_size_of_equal_weights_is_their_number():
    found = importance(torch.full((8,), -3.0))
    assert found.log_z == pytest.approx(-3)
    assert found.effective_size == pytest.approx(8)
    assert found.standard_error == pytest.approx(0, abs=1e-6)
    w = torch.tensor([1.0, 3.0], dtype=torch.float64)
    found = importance(w.log())
    assert found.log_z == pytest.approx(math.log(2))
    assert found.effective_size == pytest.approx(16 / 10)
    assert found.standard_error == pytest.approx(
        float(w.std()) / 2**0.5 / 2
    )  # of the mean, over it
