"""Schedules, DDPM and DDIM: against diffusers, exact flows and the other samplers."""

import math

import numpy as np
import pytest
import torch
from ebmkit_tests.support import known_targets as known

from ebmkit import Gaussian
from ebmkit.errors import UserError
from ebmkit.noise import Schedule, linear_betas, make_schedule
from ebmkit.sampling import DDIM, PredictorCorrector, noise_predictor_of
from ebmkit.sampling.langevin import PCConfig


def stub(u, t):
    """A noise predictor that is nonlinear in the image, mixes its columns and depends on t."""
    return 0.8 * torch.tanh(u * (1 + t / 500)) + 0.1 * u.flip(-1) - 0.05 * t / 1000


# --- diffusers -----------------------------------------------------------------------------------

NAMES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


def diffusers_scheduler(kind, name, count, spacing, double, **settings):
    """A scheduler of diffusers; ``double`` replaces its noise levels by ours in float64."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, kind)(
        beta_schedule=NAMES[name], timestep_spacing=spacing, clip_sample=False, **settings
    )
    if double:
        scheduler.alphas_cumprod = (1 - make_schedule(name).betas).cumprod(0)
    scheduler.set_timesteps(count)
    return scheduler


def both_trajectories(scheduler, sampler, dtype, **arguments):
    """Trajectories of diffusers and of ours: same start, noise predictor and random numbers."""
    u = torch.randn(2, 3, 4, 4, dtype=dtype, generator=known.generator(1))
    t = sampler.timesteps[0]
    state = sampler.init(sampler.schedule.to_image_units(u, t))
    one, other = known.generator(2), known.generator(2)
    their_path, our_path = [], []
    for i, t in enumerate(scheduler.timesteps.tolist()):
        u = scheduler.step(stub(u, t), t, u, generator=one, **arguments).prev_sample
        their_path.append(u)
        state, _ = sampler.step(state, other)
        after = sampler.timesteps[i + 1] if i + 1 < sampler.steps else -1
        our_path.append(sampler.schedule.from_image_units(state.x, after))
    return torch.stack(their_path), torch.stack(our_path)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_schedules_match_diffusers(name):
    schedule = make_schedule(name)
    scheduler = diffusers_scheduler("DDPMScheduler", name, 10, "leading", double=False)
    ours = torch.tensor([schedule.abar(t) for t in range(1000)])
    torch.testing.assert_close(ours, scheduler.alphas_cumprod, rtol=2e-4, atol=1e-6)
    for spacing in ("leading", "linspace", "trailing"):
        for count in (1, 3, 7, 50, 333, 1000):
            scheduler = diffusers_scheduler("DDIMScheduler", name, count, spacing, double=False)
            expected = scheduler.timesteps.tolist()[:count]
            assert list(schedule.timesteps(count, spacing)) == expected


@pytest.mark.parametrize(("eta", "double"), [(0.0, True), (0.5, True), (0.5, False), (1.0, True)])
@pytest.mark.parametrize(("count", "spacing"), [(20, "leading"), (50, "trailing")])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_ddim_trajectories_match_diffusers(name, count, spacing, eta, double):
    """Without spacing linspace: there diffusers' DDIM steps to t - T // n, not to its next t."""
    scheduler = diffusers_scheduler("DDIMScheduler", name, count, spacing, double)
    schedule = make_schedule(name)
    sampler = DDIM(stub, schedule, schedule.timesteps(count, spacing), eta)
    dtype, limit = (torch.float64, 1e-10) if double else (torch.float32, 1e-5)
    their_path, our_path = both_trajectories(scheduler, sampler, dtype, eta=eta)
    scale = their_path.abs().amax((1, 2, 3, 4), keepdim=True).clamp_min(1)
    assert ((our_path - their_path) / scale).abs().max() < limit


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize(
    ("count", "spacing"),
    [pytest.param(1000, "leading", marks=pytest.mark.slow), (100, "leading"), (25, "linspace")],
)
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_ddpm_trajectories_match_diffusers(name, count, spacing, variance):
    scheduler = diffusers_scheduler(
        "DDPMScheduler", name, count, spacing, True, variance_type=variance
    )
    schedule = make_schedule(name)
    timesteps = schedule.timesteps(count, spacing)
    sampler = DDIM(stub, schedule, timesteps, eta=1.0, variance=variance)
    their_path, our_path = both_trajectories(scheduler, sampler, torch.float64)
    scale = their_path.abs().amax((1, 2, 3, 4), keepdim=True).clamp_min(1)
    assert ((our_path - their_path) / scale).abs().max() < 1e-10


@pytest.mark.parametrize("rederive", [True, False])
def test_clipping_matches_diffusers(rederive):
    pytest.importorskip("diffusers")
    schedule = make_schedule("linear")
    sampler = DDIM(stub, schedule, schedule.timesteps(20), 0.5, clip=True, rederive=rederive)
    scheduler = diffusers_scheduler("DDIMScheduler", "linear", 20, "trailing", True)
    scheduler.register_to_config(clip_sample=True)
    arguments = {"eta": 0.5, "use_clipped_model_output": rederive}
    their_path, our_path = both_trajectories(scheduler, sampler, torch.float64, **arguments)
    torch.testing.assert_close(our_path, their_path, rtol=1e-10, atol=1e-10)


# --- the mathematics -----------------------------------------------------------------------------


def test_image_units_are_half_the_units_of_images_in_minus_one_to_one():
    """Noise of level sigma_t gives the same noisy image in both coordinates."""
    schedule, t = make_schedule("linear"), 300
    abar = float((1 - linear_betas()).cumprod(0)[t])
    x, noise = torch.rand(2, 1, 4, 4, dtype=torch.float64), torch.randn(2, 1, 4, 4).double()
    u = math.sqrt(abar) * (2 * x - 1) + math.sqrt(1 - abar) * noise
    y = schedule.to_image_units(u, t)
    torch.testing.assert_close(y, x + schedule.sigma(t) * noise)
    torch.testing.assert_close(schedule.from_image_units(y, t), u)
    assert schedule.sigma(t) == pytest.approx(0.5 * math.sqrt((1 - abar) / abar))
    assert make_schedule("linear", image_range=(0, 1)).sigma(t) == 2 * schedule.sigma(t)
    assert schedule.sigma(-1) == 0
    assert [schedule.nearest(schedule.sigma(k)) for k in (0, 17, 999)] == [0, 17, 999]


def test_noise_prediction_of_a_gaussian_denoiser_is_linear_regression():
    """The regression of the noise on u_t, in the coordinates of the diffusion model."""
    schedule, t = make_schedule("linear"), 250
    v, mean = 0.05, 0.6
    model = Gaussian(torch.full((1, 2, 2), mean, dtype=torch.float64), v)
    u = torch.randn(3, 1, 2, 2, dtype=torch.float64)
    got = noise_predictor_of(lambda y, s: model.denoise(y, s), schedule)(u, t)
    abar = schedule.abar(t)
    variance = abar * 4 * v + 1 - abar  # of u_t, with u in [-1, 1]
    expected = math.sqrt(1 - abar) / variance * (u - math.sqrt(abar) * (2 * mean - 1))
    torch.testing.assert_close(got, expected)


def gaussian_predictor(schedule, v):
    return noise_predictor_of(lambda y, s: 0.5 + v / (v + s**2) * (y - 0.5), schedule)


def test_ddim_converges_at_first_order_to_the_probability_flow():
    """The flow of a Gaussian is known; log error against log number of steps has slope -1."""
    v, errors, counts = 0.04, [], (50, 100, 200, 400)
    schedule = Schedule(linear_betas(4000, 2.5e-5, 5e-3))
    for count in counts:
        sampler = DDIM(gaussian_predictor(schedule, v), schedule, schedule.timesteps(count))
        start = torch.tensor([[0.5 + sampler.sigmas[0]]], dtype=torch.float64)
        exact = 0.5 + sampler.sigmas[0] * math.sqrt(v / (v + sampler.sigmas[0] ** 2))
        errors.append(abs(float(known.run(sampler, start, count)) - exact))
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(-1, abs=0.1)
    assert errors[-1] < 0.01 * math.sqrt(v)


def test_eta_one_is_ancestral_sampling():
    """Equal to the predictor of Song et al. without corrections, between the same levels."""
    model, schedule = known.overlapping(), make_schedule("linear")
    timesteps = schedule.timesteps(30, "leading")
    denoise = known.denoiser(model)
    ddim = DDIM(noise_predictor_of(denoise, schedule), schedule, timesteps, eta=1.0)
    other = PredictorCorrector(known.score(model), ddim.sigmas[:-1], PCConfig(corrections=0))
    start = known.gray_start(ddim, (5, 2), known.generator())
    torch.testing.assert_close(
        known.run(ddim, start, ddim.steps - 1), known.run(other, start, other.steps)
    )


@pytest.mark.parametrize(
    ("eta", "count"), [(0.0, 300), pytest.param(0.5, 300, marks=pytest.mark.slow), (1.0, 500)]
)
def test_moments_and_class_proportions_match_the_mixture(eta, count):
    model, schedule = known.overlapping(), make_schedule("linear")
    predictor = noise_predictor_of(known.denoiser(model), schedule)
    sampler = DDIM(predictor, schedule, schedule.timesteps(count), eta)
    start = known.gray_start(sampler, (2500, 2), known.generator(4))
    assert known.worst_error(known.run(sampler, start, count), model) < 4


def test_ddim_with_few_steps_loses_variance():
    """5 steps without noise (eta 0) give a Gaussian that is too narrow."""
    v, schedule = 0.04, make_schedule("linear")
    sampler = DDIM(gaussian_predictor(schedule, v), schedule, schedule.timesteps(5))
    start = known.gray_start(sampler, (4000, 1), known.generator(4))
    assert known.run(sampler, start, 5).var() < 0.7 * v


# --- trained noise range -------------------------------------------------------------------------


def test_chains_start_at_the_highest_trained_noise_level():
    """From gray with noise of that level, a Gaussian still gets its variance."""
    v, schedule = 0.003, make_schedule("linear")
    timesteps = schedule.within(schedule.timesteps(1000), (1 / 255, 100 / 255))
    assert schedule.sigma(timesteps[0]) < 100 / 255 < schedule.sigma(timesteps[0] + 1)
    sampler = DDIM(gaussian_predictor(schedule, v), schedule, timesteps, eta=1.0)
    start = known.gray_start(sampler, (4000, 1), known.generator(4))
    squares = (known.run(sampler, start, sampler.steps) - 0.5).square()
    assert float(squares.mean()) / v == pytest.approx(1, abs=4 * (2 / 4000) ** 0.5)


def test_timesteps_without_a_trained_noise_level_are_refused():
    schedule = make_schedule("linear")
    with pytest.raises(UserError, match="the model was trained for, 1/255 to 100/255: take"):
        schedule.within(schedule.timesteps(2), (1 / 255, 100 / 255))
    assert schedule.within((5, 3), None) == (5, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: DDIM(stub, s, (10, 5), eta=1.5), "eta 1.5 is above 1"),
        (lambda s: DDIM(stub, s, (10, 5), eta=-1), "eta -1 must be"),
        (lambda s: DDIM(stub, s, ()), "no timesteps"),
        (lambda s: DDIM(stub, s, (5, 10)), "timesteps must go down"),
        (lambda s: DDIM(stub, s, (10, 5), variance="fixed_large"), "belongs to eta 1, not to 0"),
        (lambda s: DDIM(stub, s, (10, 5), variance="learned"), "unknown variance 'learned'"),
        (lambda s: s.timesteps(0), "cannot select 0 of 1000 timesteps"),
        (lambda s: s.timesteps(1001), "cannot select 1001 of 1000"),
        (lambda s: s.timesteps(5, "even"), "unknown spacing 'even'"),
        (lambda s: s.sigma(1000), "timestep 1000 is out of range"),
        (lambda s: make_schedule("linnear"), "did you mean 'linear'"),
        (lambda s: Schedule(torch.tensor([0.5, 1.5])), "between 0 and 1"),
        (lambda s: Schedule(torch.tensor([0.5]), (1, 0)), "must go up"),
    ],
)
def test_illegal_settings_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make(make_schedule("linear"))
