"""Heun's method and Karras' noise levels: against diffusers, an exact flow and the mixture."""

import math

import numpy as np
import pytest
import torch
from ebmkit_tests.support import known_targets as known

from ebmkit.errors import UserError
from ebmkit.sampling import Heun, karras_sigmas


def stub(y, sigma):
    """A denoiser that is nonlinear in the image, mixes its columns and depends on sigma."""
    return torch.tanh(y / (1 + sigma)) + 0.1 * y.flip(-1) / (1 + sigma**2)


def test_levels_and_trajectories_match_diffusers():
    """Its noise levels are of images in [-1, 1], twice ours; it takes one step per denoising."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.HeunDiscreteScheduler(use_karras_sigmas=True)
    scheduler.set_timesteps(12)
    theirs = [*scheduler.sigmas[:1].tolist(), *scheduler.sigmas[1:-1:2].tolist()]
    levels = karras_sigmas(theirs[0] / 2, theirs[-1] / 2, 12)
    assert levels == pytest.approx([s / 2 for s in theirs], rel=1e-5)
    scheduler.sigmas = scheduler.sigmas.double()
    exact = scheduler.sigmas / 2
    sampler = Heun(stub, (*exact[:1].tolist(), *exact[1:-1:2].tolist()))
    u = exact[0] * torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=known.generator(1))
    state = sampler.init((u + 1) / 2)
    for i, t in enumerate(scheduler.timesteps):
        y, level = (u + 1) / 2, float(exact[i])
        u = scheduler.step((y - stub(y, level)) / level, t, u).prev_sample
        if i % 2 == 1 or i == len(scheduler.timesteps) - 1:
            state, _ = sampler.step(state, known.generator())
            torch.testing.assert_close(2 * state.x - 1, u, rtol=1e-10, atol=1e-10)
    assert state.step == sampler.steps == 12


def test_heun_converges_at_second_order_to_the_probability_flow():
    """The flow of a Gaussian scales y - m by sqrt(v + sigma^2); the slope of log errors is -2.

    The error includes the final step from sigma_min to 0, which adds at most
    sigma_min^2 / 2 v = 1e-6, relatively.
    """
    v, high, low, errors, counts = 0.04, 5.0, 3e-4, [], (20, 40, 80, 160)
    for count in counts:
        sampler = Heun(
            lambda y, s: 0.5 + v / (v + s**2) * (y - 0.5), karras_sigmas(high, low, count)
        )
        start = torch.full((1, 1), 0.5 + high, dtype=torch.float64)
        exact = 0.5 + high * math.sqrt(v / (v + high**2))
        errors.append(abs(float(known.run(sampler, start, count)) - exact))
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(-2, abs=0.15)
    assert errors[1] < 0.01 * math.sqrt(v)


def test_moments_and_class_proportions_match_the_mixture():
    model = known.overlapping()
    sampler = Heun(known.denoiser(model), karras_sigmas(40.0, 0.001, 40))
    start = known.gray_start(sampler, (2500, 2), known.generator(4))
    assert known.worst_error(known.run(sampler, start, sampler.steps), model) < 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, 0.1, 1), "1 noise levels cannot go from 1 to 0.1: take 2 or more"),
        ((0.1, 1.0, 5), "must go down: 0.1 is not above 1"),
        ((1.0, 0.0, 5), "lowest noise level"),
    ],
)
def test_illegal_levels_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        karras_sigmas(*arguments)
