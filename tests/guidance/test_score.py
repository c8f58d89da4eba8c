"""Signs and scales of guidance, against closed forms."""

import itertools
import math

import pytest
import torch
from ebmkit_tests.support.blind import BlindMixture as Blind
from ebmkit_tests.support.guidance_world import (
    draw,
    generator,
    image_mixture,
    numerical_gradient,
    plane,
    run,
)
from ebmkit_tests.support.known_targets import gray_start

from ebmkit import UserError
from ebmkit.guidance import (
    GUIDANCE_SCHEDULES,
    Guidance,
    classifier_free,
    classifier_guide,
    energy_guide,
    guided_denoiser,
    guided_density,
    guided_noise,
    guided_score,
    parse_schedule,
)
from ebmkit.noise import make_schedule
from ebmkit.sampling import (
    DDIM,
    AnnealedLangevin,
    denoiser_of,
    density_of,
    geometric_sigmas,
    noise_predictor_of,
    score_of,
)
from ebmkit.sampling.langevin import AnnealedConfig

LINEAR = make_schedule()


def predictor(model, c=None, schedule=LINEAR):
    return noise_predictor_of(denoiser_of(model, c), schedule)


def uncalled_guide(v, sigma=None):
    raise AssertionError("the guide is called")


# --- the exact posterior gives the exact conditional model ---------------------------------------


@pytest.mark.parametrize("image_range", [(-1.0, 1.0), (0.0, 1.0), (-3.0, 2.0)])
@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("shape", ["exact", "constant", "power:k=0.5"])
def test_guided_noise_is_that_of_the_conditional_model(name, image_range, shape):
    model, schedule = plane(), make_schedule(name, image_range=image_range)
    c = torch.arange(8) % 2
    guided = guided_noise(
        predictor(model, schedule=schedule),
        schedule,
        Guidance(classifier_guide(model, c), schedule=shape),
    )
    for t in (0, 1, 300, 700, 999):
        u, exact = draw(8, 2, seed=t), predictor(model, c, schedule)
        torch.testing.assert_close(guided(u, t), exact(u, t), rtol=1e-6, atol=1e-9)
        assert not torch.allclose(predictor(model, schedule=schedule)(u, t), exact(u, t)) or t > 900


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_guided_ddim_trajectory_is_that_of_the_conditional_model(eta):
    model, timesteps = plane(), LINEAR.timesteps(50)
    guided = guided_noise(predictor(model), LINEAR, Guidance(classifier_guide(model, 1)))
    a, b = (DDIM(p, LINEAR, timesteps, eta) for p in (guided, predictor(model, 1)))
    one, two = (sampler.init(gray_start(a, (20, 2), generator())) for sampler in (a, b))
    noise = generator(1), generator(1)
    for _ in timesteps:
        (one, _), (two, _) = a.step(one, noise[0]), b.step(two, noise[1])
        torch.testing.assert_close(one.x, two.x, rtol=1e-6, atol=1e-6)
    plain = run(DDIM(predictor(model), LINEAR, timesteps), gray_start(a, (20, 2), generator()))
    assert not torch.allclose(plain, one.x, atol=0.01)


def test_guided_ddim_converges_at_first_order_to_the_conditional_distribution():
    """Label 0 is one Gaussian, whose probability flow is linear: x goes to mu + (x - mu) r.

    Starts are quadrature nodes, so mean and variance at the end have no sampling error; halving
    the step about halves the error of the variance.
    """
    mu, v, schedule = torch.tensor([0.2, 0.5], dtype=torch.float64), 0.02, make_schedule("cosine")
    model = plane()
    guidance = Guidance(classifier_guide(model, 0))
    noise = guided_noise(predictor(model, schedule=schedule), schedule, guidance)
    first, last = 960, 0
    sigma, end = schedule.sigma(first), schedule.sigma(last)
    nodes = torch.tensor([-1.0, 1.0], dtype=torch.float64)  # variance 1
    start = mu + math.sqrt(v + sigma**2) * torch.cartesian_prod(nodes, nodes)
    errors = []
    for count in (20, 40, 80, 160):
        timesteps = [round(first * i / count) for i in range(count, -1, -1)]
        sampler = DDIM(noise, schedule, timesteps)
        state = sampler.init(start)
        for _ in range(count):  # to the last level, without the step to the clean image
            state, _ = sampler.step(state, generator())
        torch.testing.assert_close(state.x.mean(0), mu)
        errors.append(abs(float(state.x.var(0, correction=0)[0]) - (v + end**2)))
    ratios = [a / b for a, b in itertools.pairwise(errors)]
    assert all(1.6 < r < 2.4 for r in ratios), (errors, ratios)


@pytest.mark.slow
def test_guided_annealed_langevin_has_the_moments_of_the_label():
    """Label 0 is one Gaussian: mean and variance within 4.5 standard errors of 2,000 chains.

    The variance has 2 % more for the step of 5e-4: its bias is 5e-4 / (2 * 0.03), below 1 %.
    """
    model, count = plane(), 2000
    levels = geometric_sigmas(1.0, 0.1, 12)
    score = guided_score(score_of(model), Guidance(classifier_guide(model, 0)))
    sampler = AnnealedLangevin(score, levels, AnnealedConfig(inner=25, rate=0.05))
    start = 0.5 + math.sqrt(1.0) * torch.randn(count, 2, dtype=torch.float64, generator=generator())
    x = run(sampler, start, seed=1, steps=300)
    variance = 0.02 + levels[-1] ** 2
    for i, mu in enumerate((0.2, 0.5)):
        assert abs(float(x[:, i].mean()) - mu) < 4.5 * math.sqrt(variance / count)
        spread = float(x[:, i].var())
        assert abs(spread - variance) < (4.5 * math.sqrt(2 / count) + 0.02) * variance


# --- noise, score, denoiser and density ----------------------------------------------------------

VIEWS = [
    ("noisy", False),
    ("x_t", False),
    ("x0_hat", False),
    ("x0_hat", True),
]


@pytest.mark.parametrize("shape", ["exact", "step", "linear", "power:k=2", "sigmoid"])
@pytest.mark.parametrize(("view", "backpropagate"), VIEWS)
def test_guided_noise_score_denoiser_and_density_agree(view, backpropagate, shape):
    model = plane()
    guidance = Guidance(energy_guide(model, 1), 3.0, shape, view, backpropagate, start=0.2)
    for t in (0, 400, 799, 800):
        u = draw(6, 2)
        y, sigma = LINEAR.to_image_units(u, t), LINEAR.sigma(t)
        noise = guided_noise(predictor(model), LINEAR, guidance)(u, t)
        close = {"rtol": 1e-6, "atol": 1e-8}
        level = torch.full((6,), sigma, dtype=torch.float64)
        for s in (sigma, level):
            clean = guided_denoiser(denoiser_of(model), guidance)(y, s)
            torch.testing.assert_close((y - clean) / sigma, noise, **close)
            score = guided_score(score_of(model), guidance)(y, s)
            torch.testing.assert_close(-sigma * score, noise, **close)
            score = guided_density(density_of(model), guidance)(y, s)[1]
            torch.testing.assert_close(-sigma * score, noise, **close)


@pytest.mark.parametrize(("view", "backpropagate"), VIEWS)
@pytest.mark.parametrize("image_range", [(-1.0, 1.0), (-3.0, 2.0)])
def test_guidance_gradient_of_each_view_matches_finite_differences(
    view, backpropagate, image_range
):
    """Of the composed function of y; without backpropagation D(y) moves by the change of x_t."""
    model, schedule = plane(), make_schedule(image_range=image_range)
    guide = energy_guide(model, 1)
    guidance = Guidance(guide, 1.0, "exact", view, backpropagate, diffusion=schedule)
    low, high = image_range
    for t in (50, 500):
        y, sigma, abar = 0.5 + 0.3 * draw(5, 2), schedule.sigma(t), schedule.abar(t)
        clean = model.denoise(y, sigma)

        def composed(y, origin=y, sigma=sigma, t=t, clean=clean, abar=abar):
            x_t = (schedule.from_image_units(y, t) - low) / (high - low)
            if view == "noisy":
                return guide(y, sigma)[0]
            if view == "x_t":
                return guide(x_t, math.sqrt(abar) * sigma)[0]
            if backpropagate:
                return guide(model.denoise(y, sigma), None)[0]
            x_t_of_origin = (schedule.from_image_units(origin, t) - low) / (high - low)
            return guide(clean + x_t - x_t_of_origin, None)[0]

        push = guided_score(score_of(model), guidance)(y, sigma) - model.score(y, sigma=sigma)
        torch.testing.assert_close(push, numerical_gradient(composed, y), rtol=1e-5, atol=1e-7)
        if view != "x0_hat" or backpropagate:
            value = guided_density(density_of(model), guidance)(y, sigma)[0]
            torch.testing.assert_close(value - model.log_density(y, sigma), composed(y))


def test_several_guidances_add_up():
    model = plane()
    one, two = (
        Guidance(classifier_guide(model, 0), 2.0),
        Guidance(energy_guide(model, 1), view="x0_hat"),
    )
    u, t = draw(4, 2), 300
    base = predictor(model)
    both = guided_noise(base, LINEAR, [one, two])(u, t)
    parts = [guided_noise(base, LINEAR, g)(u, t) - base(u, t) for g in (one, two)]
    torch.testing.assert_close(both, base(u, t) + parts[0] + parts[1])


def test_backpropagation_through_the_denoiser_in_inference_mode():
    model = plane()
    guidance = Guidance(energy_guide(model, 1), view="x0_hat", backpropagate=True)
    guided = guided_noise(predictor(model), LINEAR, guidance)
    u = draw(4, 2)
    with torch.inference_mode():
        found = guided(u.clone(), 300)
    torch.testing.assert_close(found.clone(), guided(u, 300))
    known = guided_denoiser(lambda y, sigma: y * sigma[:, None], guidance)
    blind = guided_denoiser(lambda y, sigma=None: y / 2, guidance)
    for denoise, level in ((known, 0.3), (blind, None)):
        expected = denoise(u, None if level is None else torch.full_like(u[:, 0], level))
        with torch.inference_mode():
            found = denoise(u.clone(), None if level is None else torch.full_like(u[:, 0], level))
        torch.testing.assert_close(found.clone(), expected)


# --- disabled guidance ---------------------------------------------------------------------------


@pytest.mark.parametrize("off", [{"scale": 0.0}, {"start": 1.0}])
def test_disabled_guidance_is_bit_identical_and_does_not_call_the_guide(off):
    model, guidance = plane(), Guidance(uncalled_guide, **off)
    u, t = draw(4, 2), 300
    y, sigma = LINEAR.to_image_units(u, t), LINEAR.sigma(t)
    base = predictor(model)
    assert torch.equal(guided_noise(base, LINEAR, guidance)(u, t), base(u, t))
    assert torch.equal(guided_score(score_of(model), guidance)(y, sigma), model.score(y, sigma))
    denoise = guided_denoiser(denoiser_of(model), guidance)
    assert torch.equal(denoise(y, sigma), model.denoise(y, sigma))
    for a, b in zip(guided_density(density_of(model), guidance)(y, sigma),
                    density_of(model)(y, sigma), strict=True):  # fmt: skip
        assert torch.equal(a, b)


def test_start_skips_the_noisiest_share_of_the_levels():
    calls = []

    def guide(v, sigma=None):
        calls.append(1)
        return v.new_zeros(len(v)), torch.zeros_like(v)

    model = plane()
    guided = guided_noise(predictor(model), LINEAR, Guidance(guide, start=0.3))
    timesteps = LINEAR.timesteps(100)
    for t in timesteps:
        guided(draw(1, 2), t)
    assert len(calls) == 70
    # also by the noise level of each image
    weight = Guidance(guide, start=0.3).weight
    levels = torch.tensor([LINEAR.sigma(t) for t in (699, 700)])
    assert weight(levels).tolist() == [1.0, 0.0]
    assert [weight(float(level)) for level in levels] == [1.0, 0.0]


# --- schedules -----------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0, 250, 499, 500, 999])
def test_schedules_match_their_formulas(t):
    abar = LINEAR.abar(t)
    root = math.sqrt(1 - abar)
    exact = torch.tensor(t, dtype=torch.float64), torch.tensor(abar, dtype=torch.float64)
    formulas = {
        "exact": root,
        "constant": root,
        "step:at=500,low=0.37": root * (1 if t >= 500 else 0.37),
        "linear": t / 1000,
        "power:k=8": (1 - abar) ** 8,
        "sigmoid:t0=650,y0=0.1,k=0.01": 0.9 / (1 + math.exp(-0.01 * (t - 650))) + 0.1,
    }
    for text, value in formulas.items():
        schedule = parse_schedule(text)
        assert float(schedule.factor(*exact, 1000)) == pytest.approx(value, rel=1e-12), text
        guidance = Guidance(uncalled_guide, 3.0, text)
        assert guidance.weight_at(t) == pytest.approx(3 * value / root, rel=1e-12)
        assert guidance.weight(LINEAR.sigma(t)) == pytest.approx(3 * value / root, rel=1e-6)
        single = torch.tensor([LINEAR.sigma(t)], dtype=torch.float32)
        assert float(guidance.weight(single)) == pytest.approx(3 * value / root, rel=1e-4)
    assert Guidance(uncalled_guide, 3.0, "linear").weight(None) == 3.0


def test_strings_of_all_schedules_round_trip():
    for name, kind in GUIDANCE_SCHEDULES.items():
        written = parse_schedule(kind.form)
        assert type(written) is kind
        assert parse_schedule(str(written)) == written
        assert parse_schedule(name) == kind()
        assert kind.description
    assert str(parse_schedule("sigmoid:k=0.02, t0=500")) == "sigmoid:t0=500,y0=0.05,k=0.02"
    assert parse_schedule("step:low=11/30").low == 11 / 30


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sigmoids", "'sigmoids' is none of those known"),
        ("", "none of those known"),
        ("sigmoid:t1=3", "parameter 't1' is unknown; those of sigmoid are: t0, y0, k"),
        ("linear:k=2", "parameter 'k' is unknown; those of linear are: none"),
        ("power:2", "'2' is unknown; those of power are: k"),
        ("power:k=two", "k = 'two' is no number"),
        ("power:k=nan", "k = 'nan' is no number"),
        ("power:k=1,k=2", "given twice"),
    ],
)
def test_errors_of_invalid_schedules_list_the_valid_forms(text, message):
    with pytest.raises(UserError) as error:
        parse_schedule(text)
    assert message in str(error.value)
    for kind in GUIDANCE_SCHEDULES.values():
        assert kind.form in str(error.value)


def test_values_out_of_range_are_refused():
    with pytest.raises(UserError, match="y0 = 2"):
        parse_schedule("sigmoid:y0=2")
    for bad in ({"scale": -1.0}, {"scale": math.nan}, {"start": 1.5}, {"view": "dark"},
                {"backpropagate": True}, {"schedule": "cubic"}):  # fmt: skip
        with pytest.raises(UserError):
            Guidance(uncalled_guide, **bad)


# --- classifier-free -----------------------------------------------------------------------------


@pytest.mark.parametrize("w", [0.0, 0.4, 1.0, 3.0])
def test_classifier_free_guidance_is_guidance_by_the_implied_classifier(w):
    model, c = plane(), 1
    u, t = draw(5, 2), 200
    free = classifier_free(predictor(model, c), predictor(model), w)
    classified = guided_noise(predictor(model), LINEAR, Guidance(classifier_guide(model, c), w))
    torch.testing.assert_close(free(u, t), classified(u, t), rtol=1e-6, atol=1e-9)
    if w in (0.0, 1.0):
        assert torch.equal(free(u, t), predictor(model, c if w else None)(u, t))


def test_classifier_free_scales_of_thesis_and_diffusers():
    """The thesis mixes (s + 1) eps_c - s eps_u, diffusers eps_u + scale (eps_c - eps_u)."""
    c, u = draw(3, 2), draw(3, 2, seed=1)
    for number in (0.0, 0.5, 2.0):
        mixed = classifier_free(lambda: c, lambda: u, 1 + number)()
        torch.testing.assert_close(mixed, (number + 1) * c - number * u)
        mixed = classifier_free(lambda: c, lambda: u, number)()
        torch.testing.assert_close(mixed, u + number * (c - u))
    with pytest.raises(UserError, match="scale -1"):
        classifier_free(lambda: c, lambda: u, -1)


# --- without sigma -------------------------------------------------------------------------------


def test_blind_denoiser_is_guided_at_the_noise_level_of_its_residual():
    model = image_mixture(Blind, torch.float64)
    x, labels = model.sample(6, generator())
    y = x + 0.3 * draw(*x.shape)
    guidance = Guidance(classifier_guide(model, labels), 2.0, "power:k=2")
    found = guided_denoiser(denoiser_of(model), guidance)(y)
    clean = model.denoise(y)
    level = (clean - y).flatten(1).square().mean(1).sqrt()
    for i, c in enumerate(labels):
        known = Guidance(classifier_guide(model, c), 2.0, "power:k=2")
        one = guided_denoiser(lambda y, s, i=i: clean[i : i + 1], known)
        torch.testing.assert_close(found[i : i + 1], one(y[i : i + 1], float(level[i])))


def test_blind_denoiser_that_changes_nothing_is_not_guided():
    y = draw(4, 2)
    for backpropagate in (False, True):
        guidance = Guidance(energy_guide(plane(), 1), 2.0, "exact", "x0_hat", backpropagate)
        found = guided_denoiser(lambda y, sigma=None: 1 * y, guidance)(y)
        torch.testing.assert_close(found, y)


def test_score_without_sigma_is_guided_at_full_weight():
    model, y = plane(), draw(4, 2)
    guidance = Guidance(classifier_guide(model, 1), 2.0, "power:k=8", "x_t", start=0.5)
    push = guided_score(score_of(model), guidance)(y) - model.score(y)
    torch.testing.assert_close(push, 2 * classifier_guide(model, 1)(y)[1])


def test_schedule_of_final_weight_0_guides_a_blind_denoiser_at_high_noise():
    model = image_mixture(Blind, torch.float64)
    y = model.sample(4, generator())[0] + 0.3 * draw(4, 1, 4, 4)
    guidance = Guidance(classifier_guide(model, 1), 2.0, "step:at=1,low=0")
    found = guided_denoiser(denoiser_of(model), guidance)(y)
    assert (found - model.denoise(y)).abs().amax() > 1e-4
