"""Contract tests of every entry of `SAMPLERS`, on a mixture of images."""

import io
import math

import pytest
import torch
from ebmkit_tests.support import known_targets as known
from ebmkit_tests.support.blind import VARIANCE, BlindMixture
from pydantic import ValidationError

from ebmkit import GaussianMixture, ModelCard
from ebmkit.errors import UserError
from ebmkit.models import DirectDenoiser, create_model
from ebmkit.sampling import Chains
from ebmkit.sampling.ascent import make_restorer
from ebmkit.sampling.base import blind_denoiser_of
from ebmkit.sampling.entry import SAMPLERS, find_sampler
from ebmkit.sampling.inverse import random_pixels

SHAPE = (1, 4, 4)
KS = "kadkhodaie_simoncelli"


def mixture(kind=GaussianMixture):
    """Dark, bright and split images; labels 0, 1, 1; nearly all pixels are in [0, 1]."""
    means = torch.stack([torch.full(SHAPE, 0.3), torch.full(SHAPE, 0.7), torch.full(SHAPE, 0.3)])
    means[2, :, :2] = 0.7
    return kind(means, VARIANCE, weights=[0.5, 0.3, 0.2], labels=[0, 1, 1])


def model_for(entry):
    return mixture(BlindMixture if "blind" in entry.needs else GaussianMixture)


@pytest.fixture(params=SAMPLERS)
def entry(request):
    return SAMPLERS[request.param]


@pytest.fixture
def sampler_and_start(entry):
    """A label-conditional sampler with few steps, and the start of its chains."""
    model, labels = model_for(entry), torch.tensor([0, 1, 1, 0])
    config = entry.config(steps=10)
    sampler = entry.build(model, labels, config)
    start = entry.start(model, sampler, config, (4, *SHAPE), known.generator(), labels)
    return sampler, start


# --- the contract --------------------------------------------------------------------------------


def test_steps_are_pure_and_repeat_under_equal_generators(sampler_and_start):
    sampler, start = sampler_and_start
    state = sampler.init(start)
    before = [v.clone() if isinstance(v, torch.Tensor) else v for v in state]
    one, info = sampler.step(state, known.generator(3))
    two, again = sampler.step(state, known.generator(3))
    assert one.step == 1
    for a, b in zip([*one, *info], [*two, *again], strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    for a, b in zip(state, before, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert info.move.shape == (4,)
    assert one.x.dtype == start.dtype


def test_saved_states_resume_bit_identically(sampler_and_start):
    sampler, start = sampler_and_start
    generator = known.generator(1)
    chains = Chains(sampler, sampler.init(start))
    chains.run(3, generator)
    file = io.BytesIO()
    torch.save({**chains.state._asdict(), "random": generator.get_state()}, file)
    straight = chains.run(4, generator)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    later = known.generator().set_state(saved.pop("random"))
    resumed = Chains(sampler, type(straight)(**saved)).run(4, later)
    assert torch.equal(resumed.x, straight.x)
    assert resumed.step == straight.step == 7


def test_chains_are_independent(sampler_and_start):
    """Three chains do not depend on the start of the fourth."""
    sampler, start = sampler_and_start
    other = start.clone()
    other[3] = 0.9
    a, b = (known.run(sampler, x, 5) for x in (start, other))
    torch.testing.assert_close(a[:3], b[:3])
    assert not torch.equal(a[3], b[3])


def test_diverged_chains_are_reported_and_the_others_continue(entry, sampler_and_start):
    """Model outputs are NaN for chain 2 only."""
    sampler, start = sampler_and_start
    names = [n for n in ("score", "density", "denoiser", "noise_predictor") if hasattr(sampler, n)]
    for name in names:
        original = getattr(sampler, name)

        def broken(x, *rest, original=original):
            out = original(x, *rest)
            diverged = torch.arange(len(x)) == 2
            changed = [
                torch.where(diverged.view(-1, *[1] * (v.ndim - 1)), torch.nan, v)
                for v in _as_tuple(out)
            ]
            return tuple(changed) if isinstance(out, tuple) else changed[0]

        state = sampler.init(start)
        setattr(sampler, name, broken)
    chains = Chains(sampler, state)
    chains.run(3, known.generator())
    assert chains.diverged == {2: 1}
    assert torch.equal(chains.state.x[2], start[2])
    assert not torch.equal(chains.state.x[1], start[1])
    assert chains.state.x.isfinite().all()


def _as_tuple(out):
    return out if isinstance(out, tuple) else (out,)


def test_zero_steps_are_refused(entry, sampler_and_start):
    sampler, start = sampler_and_start
    with pytest.raises(UserError, match="0 steps are too few"):
        Chains(sampler, sampler.init(start)).run(0, known.generator())
    with pytest.raises(ValidationError):
        entry.config(steps=0)


def test_settings_have_descriptions_and_refuse_unknown_fields(entry):
    assert all(field.description for field in entry.config.model_fields.values())
    with pytest.raises(ValidationError, match="Extra inputs"):
        entry.config(speed=1)
    assert entry.description
    assert find_sampler(entry.name) is entry


# --- distribution of the samples -----------------------------------------------------------------

ACCURATE_SETTINGS = {
    # enough steps for the distribution of the mixture; the other samplers are tested below
    "langevin": {"steps": 150, "step_size": 4e-4, "temperature": 1.0},
    "mala": {"steps": 100, "step_size": 1e-3},
    "hmc": {"steps": 30, "step_size": 0.05, "leapfrogs": 5},
    "annealed-langevin": {"steps": 300, "inner": 10, "rate": 0.05},
    "annealed-mala": {"steps": 100, "moves": 2},
    "pc": {"steps": 150},
    "heun": {"steps": 40},
    "ddpm": {"steps": 300},
    "ddim": {"steps": 300, "clip": False},
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow)
        if name in ("annealed-langevin", "pc", "ddpm")
        else name
        for name in ACCURATE_SETTINGS
    ],
)
def test_conditional_samples_have_the_moments_of_their_label(name):
    """Label 0 is a Gaussian in 16 dimensions: mean and second moments within 4.5 standard errors.

    The largest of the 152 compared numbers exceeds 4.5 once in a thousand runs. `test_langevin` and
    `test_diffusion` test class proportions of mixtures, with enough steps for chains to mix.
    """
    entry, model, count = SAMPLERS[name], mixture(), 600
    config = entry.config(**ACCURATE_SETTINGS[name])
    sampler = entry.build(model, 0, config)
    start = entry.start(model, sampler, config, (count, *SHAPE), known.generator(), 0)
    x = known.run(sampler, start, entry.length(sampler, config), seed=1)
    one = GaussianMixture(model.means[:1], VARIANCE)
    levels = getattr(sampler, "sigmas", (0.0,))
    assert known.worst_error(x, one, levels[-1]) < 4.5
    assert known.worst_error(start, one) > 10


@pytest.mark.parametrize("name", ["ddim", "heun", "ais", "pc", KS, "ascent"])
def test_samples_have_the_requested_labels(name):
    entry = SAMPLERS[name]
    model, labels = model_for(entry), torch.arange(40) % 2
    config = entry.config(**({"steps": 60} if name != KS else {"beta": 0.2, "first_step": 0.1}))
    sampler = entry.build(model, labels, config)
    start = entry.start(model, sampler, config, (40, *SHAPE), known.generator(), labels)
    x = entry.finish(model, sampler, known.run(sampler, start, 300), labels)
    assert torch.equal(mixture().logits(x).argmax(1), labels)


# --- trained noise range and supported models ----------------------------------------------------


def with_card(model, sigma_range=(1 / 255, 100 / 255), classifies=True):
    model.card = ModelCard(sigma_range=sigma_range, classifies=classifies)
    return model


def test_samplers_evaluate_the_model_within_its_trained_noise_range(entry):
    model = with_card(model_for(entry))
    seen = []
    for method in ("score", "denoise", "value_and_grads"):
        original = getattr(model, method)

        def watched(*args, original=original, **kwargs):
            levels = [a for a in [*args, *kwargs.values()] if isinstance(a, float)]
            seen.extend(levels)
            return original(*args, **kwargs)

        object.__setattr__(model, method, watched)
    config = entry.config()
    sampler = entry.build(model, 1, config)
    start = entry.start(model, sampler, config, (64, *SHAPE), known.generator(), 1)
    if config.start != "uniform":
        # gray with noise of at most 100/255
        assert float(start.std()) < 100 / 255 * 1.1
    known.run(sampler, start, min(30, entry.length(sampler, config)))
    assert all(1 / 255 * 0.999 <= s <= 100 / 255 * 1.001 for s in seen)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("langevin", {"sigma": "120/255"}),
        ("hmc", {"sigma": "0.5/255"}),
        ("annealed-langevin", {"high": 1.0}),
        ("pc", {"low": "0.5/255"}),
        ("heun", {"high": 40.0}),
        ("annealed-mala", {"low": "0.5/255"}),
        ("ais", {"high": 1.0}),
        (KS, {"first_sigma": 1.0}),
        (KS, {"last_sigma": "0.5/255"}),
    ],
)
def test_noise_levels_outside_the_trained_range_are_refused(name, settings):
    entry = SAMPLERS[name]
    model = with_card(model_for(entry))
    with pytest.raises(UserError, match="this model was trained for: use 1/255 to 1"):
        entry.build(model, None, entry.config(**settings))


def test_unsupported_models_raise_errors_that_list_supported_samplers():
    plain = DirectDenoiser(torch.nn.Identity(), 1)
    plain.card = ModelCard(sigma_range=(0.1, 0.2))
    with pytest.raises(
        UserError,
        match="sampler mala does not support this model: DirectDenoiser is a plain denoiser and "
        f"has no log-density; take langevin, sgld, annealed-langevin, pc, ddpm, ddim, heun, {KS}",
    ):
        SAMPLERS["mala"].build(plain)
    with pytest.raises(
        UserError, match=r"simoncelli does not support .* takes the noise level as an input"
    ):
        SAMPLERS[KS].build(mixture())
    classifier = with_card(mixture(), sigma_range=None)
    for name in ("annealed-mala", "ais"):
        with pytest.raises(
            UserError, match=f"sampler {name} does not support .* ignores the noise level, and this"
        ):
            SAMPLERS[name].build(mixture(BlindMixture))
    for name in ("annealed-langevin", "pc", "ais", "ddpm", "ddim", "heun"):
        with pytest.raises(UserError, match=r"not trained to denoise.*; take langevin, sgld, mala"):
            SAMPLERS[name].build(classifier)
    unlabelled = with_card(mixture(), classifies=False)
    with pytest.raises(UserError, match="leave the label out"):
        SAMPLERS["ddim"].build(unlabelled, 1)
    with pytest.raises(UserError, match="ascent does not support this model: it was trained with"):
        SAMPLERS["ascent"].build(unlabelled, 1)
    with pytest.raises(UserError, match="ascent needs a label"):
        SAMPLERS["ascent"].build(mixture())
    with pytest.raises(UserError, match="label 2 is out of range"):
        SAMPLERS["ddim"].build(mixture(), 2)
    with pytest.raises(UserError, match="did you mean 'ddim'"):
        find_sampler("ddin")
    with pytest.raises(ValidationError, match="take a multiple, as 300"):
        SAMPLERS["annealed-langevin"].config(steps=301)


# --- starts and ends -----------------------------------------------------------------------------


def test_starts_from_data_and_class_gaussians():
    entry, model = SAMPLERS["ascent"], mixture()
    images, labels = model.sample(50, known.generator(5))
    requested_labels = torch.tensor([1, 1, 0])
    for kind in ("data", "class_gaussian"):
        config = entry.config(start=kind)
        sampler = entry.build(model, requested_labels, config)
        arguments = (model, sampler, config, (3, *SHAPE), known.generator(), requested_labels)
        with pytest.raises(UserError, match=f"start from {kind}: give images"):
            entry.start(*arguments)
        start = entry.start(*arguments, data=(images, labels))
        assert start.shape == (3, *SHAPE)
        found = [(start[i] == images).flatten(1).all(1).any() for i in range(3)]
        assert all(found) == (kind == "data")
    with pytest.raises(UserError, match="give their labels, too"):
        entry.start(*arguments, data=(images, None))
    # samplers over noise levels add noise of the first; without a label: the Gaussian of all images
    entry, count = SAMPLERS["pc"], 3000
    config = entry.config(start="class_gaussian", high=0.5)
    sampler = entry.build(model, None, config)
    many = (model, sampler, config, (count, *SHAPE), known.generator())
    variance = entry.start(*many, data=(images, None)).var(0).mean()
    assert float(variance) == pytest.approx(float(images.var(0).mean()) + 0.25, rel=0.03)
    # the default start is the same if there is data, and noise about gray otherwise
    automatic = (model, sampler, entry.config(high=0.5), (4, *SHAPE))
    explicit = entry.start(*many[:3], (4, *SHAPE), known.generator(), data=(images, None))
    found = entry.start(*automatic, known.generator(), data=(images, None))
    assert torch.equal(found, explicit)
    gray = 0.5 + 0.5 * torch.randn(4, *SHAPE, generator=known.generator())
    assert torch.equal(entry.start(*automatic, known.generator()), gray)


def test_estimated_sigma_is_clamped_to_the_trained_range():
    """The estimate sqrt(d) / ||score|| is unbounded where the score is small."""

    class Energy(GaussianMixture):
        noise_conditional = False

        def forward(self, y, sigma=None):
            return super().forward(y)

    model = mixture(Energy)
    y = torch.rand(5, *SHAPE, generator=known.generator())
    y[0] = model.means[0] + 1e-4
    levels = model.estimate_sigma(y)
    assert levels[0] > 10
    free, clamped = blind_denoiser_of(model, 0), blind_denoiser_of(with_card(model), 0)
    torch.testing.assert_close(clamped(y), model.denoise(y, levels.clamp(1 / 255, 100 / 255), 0))
    model.card = None
    torch.testing.assert_close(free(y), model.denoise(y, levels, 0))


def test_finish_denoises_samples_of_the_last_noise_level():
    """Annealed chains end at the last level; `finish` takes the posterior mean."""
    entry, model = SAMPLERS["pc"], mixture()
    sampler = entry.build(model, 0, entry.config(low=0.2))
    noise = torch.randn(2000, *SHAPE, generator=known.generator())
    x = 0.3 + math.sqrt(VARIANCE + 0.04) * noise
    denoised = entry.finish(model, sampler, x, 0)
    torch.testing.assert_close(denoised, 0.3 + VARIANCE / (VARIANCE + 0.04) * (x - 0.3))
    assert SAMPLERS["ddim"].finish(model, sampler, x) is x


def test_restored_images_match_their_measurements():
    model = mixture(BlindMixture)
    truth, _ = model.sample(1, known.generator(3))
    measurement = random_pixels(SHAPE, 0.5)
    measured = measurement.measure(truth)
    config = SAMPLERS[KS].config(first_step=0.1, beta=0.2, first_sigma=0.4)
    sampler = make_restorer(model, measurement, measured, config)
    start = sampler.start((8, *SHAPE), known.generator())
    x = known.run(sampler, start, 2000)
    torch.testing.assert_close(measurement.measure(x), measured.expand(8, -1))
    # and belong to the mixture component of the true image
    assert (mixture().logits(x).argmax(1) == mixture().logits(truth).argmax(1)).all()


@pytest.mark.parametrize("name", ["langevin", "mala", "hmc"])
def test_finish_does_not_denoise_with_models_without_trained_noise_range(name):
    """JEM's density is of clean images: denoising at the sigma of its score would move them far."""
    model = create_model("wideresnet10-jem", num_classes=2, in_channels=1, head="logit", width=8)
    model.eval().requires_grad_(False)
    model.card = ModelCard(classifies=True)
    entry = find_sampler(name)
    x = torch.rand(3, 1, 6, 6)
    assert entry.finish(model, entry.build(model), x) is x
    model.card = ModelCard(classifies=True, sigma_range=(1 / 255, 100 / 255))
    moved = entry.finish(model, entry.build(model), x) - x
    assert 0 < moved.flatten(1).square().mean(1).sqrt().max() <= 100 / 255 + 1e-6
