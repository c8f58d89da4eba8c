"""Guided pipelines of diffusers: agreement with our sampler, schedulers and errors."""

import copy
import types

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UNet2DModel,
)
from torch import nn

from ebmkit import UserError, create_model
from ebmkit.card import ModelCard
from ebmkit.guidance import Guidance, LogitModel, classifier_guide, energy_guide, guided_noise
from ebmkit.guidance.diffusers import GuidedUNet, guided, schedule_of
from ebmkit.noise import make_schedule
from ebmkit.sampling.diffusion import DDIM

SIZE, CHANNELS, CLASSES, BATCH, STEPS = 8, 3, 4, 3, 6


def unet(**changes):
    """A small UNet with random weights, in evaluation mode, float64."""
    torch.manual_seed(1)
    config = {
        "sample_size": SIZE,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "block_out_channels": (8, 8),
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        **changes,
    }
    return UNet2DModel(**config).double().eval().requires_grad_(False)


class Smooth(nn.Module):
    """A classifier with smooth logits, nonlinear in the image."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(CHANNELS * SIZE**2, 16), nn.Tanh(), nn.Linear(16, CLASSES)
        )

    def forward(self, x):
        return 3 * self.layers(x)


@pytest.fixture
def classifier():
    return LogitModel(Smooth().double().eval(), CLASSES, in_channels=CHANNELS)


@pytest.fixture
def pipeline():
    pipe = quiet(DDIMPipeline(unet(), DDIMScheduler(clip_sample=False)))
    pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod.double()
    pipe.scheduler.final_alpha_cumprod = pipe.scheduler.alphas_cumprod.new_ones(())
    return pipe


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def record_states(pipe):
    """List that collects the images (B, C, H, W) after each step of the scheduler of ``pipe``."""
    states, step = [], pipe.scheduler.step

    def recording(*args, **kwargs):
        out = step(*args, **kwargs)
        states.append(out.prev_sample)
        return out

    pipe.scheduler.step = recording
    return states


@pytest.mark.parametrize(
    ("eta", "clip"),
    [(0.0, False), pytest.param(0.7, False, marks=pytest.mark.slow), (0.7, True)],
)
@pytest.mark.parametrize(
    "settings",
    [
        {"view": "noisy"},
        {"view": "x_t", "schedule": "sigmoid:t0=500,y0=0.05,k=0.02", "start": 0.2},
        {"view": "x0_hat"},
        {"view": "x0_hat", "backpropagate": True, "schedule": "power:k=2"},
    ],
    ids=str,
)
def test_ddim_pipeline_trajectory_matches_our_sampler(pipeline, classifier, eta, clip, settings):
    """Both compute one update in float64, in different coordinates.

    They differ by rounding, which the division by sqrt(abar), 1/150 at the start, amplifies.
    """
    if clip:
        # without start: guided at all levels
        settings = {key: value for key, value in settings.items() if key != "start"}
        pipeline.scheduler.register_to_config(clip_sample=True)
    labels = torch.tensor([0, 3, 1])
    made = guided(pipeline, classifier, labels, "energy", scale=4.0, **settings)
    states = record_states(made)
    made(batch_size=BATCH, generator=generator(), num_inference_steps=STEPS, eta=eta,
         output_type="pt")  # fmt: skip

    schedule = schedule_of(pipeline.scheduler)
    network = pipeline.unet

    def predictor(u, t):
        return network(u, t).sample

    guidance = Guidance(energy_guide(classifier, labels), 4.0, **settings)
    timesteps = [int(t) for t in made.scheduler.timesteps]
    ours = DDIM(guided_noise(predictor, schedule, guidance), schedule, timesteps, eta, clip)
    draws = generator()
    u = torch.randn(BATCH, CHANNELS, SIZE, SIZE, generator=draws, dtype=torch.float64)
    state = ours.init(schedule.to_image_units(u, timesteps[0]))
    with torch.no_grad():
        for t, expected in zip([*timesteps[1:], -1], states, strict=True):
            state, _ = ours.step(state, draws)
            found = schedule.from_image_units(state.x, t)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert len(states) == STEPS
    middle = timesteps[STEPS // 2]
    assert (made.unet(u, middle).sample - predictor(u, middle)).abs().max() > 1e-4


@pytest.mark.slow
def test_strong_guidance_with_clipping_raises_the_label_probability(pipeline, classifier):
    """With ``clip=False`` the unclipped noise acts against the guidance."""
    pipeline.scheduler.register_to_config(clip_sample=True)
    guide = classifier_guide(classifier, 2)

    def value(pipe):
        images = torch.tensor(images_of(pipe, 2, 20)).permute(0, 3, 1, 2).double()
        return float(guide(images)[0].detach().mean())

    plain, strong = value(pipeline), value(guided(pipeline, classifier, 2, scale=200.0))
    against = value(guided(pipeline, classifier, 2, scale=200.0, clip=False))
    assert strong > plain + 0.5
    assert against < strong - 0.5


def test_scale_0_gives_the_images_of_the_unguided_pipeline(pipeline, classifier):
    options = {"batch_size": 2, "num_inference_steps": 3, "output_type": "pt"}
    expected = pipeline(generator=generator(), **options).images
    made = guided(pipeline, classifier, 1, scale=0.0)
    assert torch.equal(made(generator=generator(), **options).images, expected)


def images_of(pipe, label, steps, seed=0):
    return pipe(batch_size=4, generator=generator(seed), num_inference_steps=steps,
                output_type="np").images  # fmt: skip


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
    ("scheduler", "steps", "guidance"),
    [
        (DDPMScheduler, 12, "classifier"),
        (DPMSolverMultistepScheduler, 12, "energy"),
        (EulerDiscreteScheduler, 12, "classifier"),
    ],
)
def test_guidance_raises_the_objective_with_other_schedulers(
    classifier, scheduler, steps, guidance
):
    """From the same noise, each guided image has a higher value of the guide."""
    pipe = quiet(DDPMPipeline(unet(), scheduler()))
    plain = images_of(pipe, 2, steps)
    made = guided(pipe, classifier, 2, guidance, scale=10.0)
    moved = images_of(made, 2, steps)
    guide = {"classifier": classifier_guide, "energy": energy_guide}[guidance](classifier, 2)
    before, after = (guide(torch.tensor(x).permute(0, 3, 1, 2).double())[0] for x in (plain, moved))
    assert (after > before + 0.1).all()


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_prediction_types_v_and_sample_give_the_same_images(pipeline, classifier, prediction):
    """A UNet with another parametrisation of the same prediction."""
    base, abar = pipeline.unet, pipeline.scheduler.alphas_cumprod.double()

    class Other(nn.Module):
        config, dtype, device = base.config, base.dtype, base.device

        def forward(self, u, t):
            a, noise = abar[int(t)], base(u, t).sample
            clean = (u - (1 - a).sqrt() * noise) / a.sqrt()
            v = a.sqrt() * noise - (1 - a).sqrt() * clean
            return types.SimpleNamespace(sample=v if prediction == "v_prediction" else clean)

    scheduler = DDIMScheduler(clip_sample=False, prediction_type=prediction)
    pipe = copy.copy(pipeline)
    pipe.scheduler, pipe.unet = scheduler, Other()
    options = {"num_inference_steps": STEPS, "output_type": "pt", "batch_size": 2}
    found, expected = (
        guided(p, classifier, 1, scale=6.0, view="x0_hat")(generator=generator(), **options).images
        for p in (pipe, pipeline)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_learned_variances_are_not_changed(classifier):
    network = unet(out_channels=2 * CHANNELS)
    scheduler = DDPMScheduler(variance_type="learned_range")
    made = GuidedUNet(network, scheduler, classifier, 1)
    u = torch.randn(2, CHANNELS, SIZE, SIZE, dtype=torch.float64)
    out, own = made(u, 500).sample, network(u, 500).sample
    assert out.shape == own.shape
    assert torch.equal(out[:, CHANNELS:], own[:, CHANNELS:])
    assert not torch.equal(out[:, :CHANNELS], own[:, :CHANNELS])
    pipe = guided(quiet(DDPMPipeline(network, scheduler)), classifier, 1)
    assert pipe(num_inference_steps=2, output_type="np").images.shape == (1, SIZE, SIZE, CHANNELS)


def test_timesteps_are_numbers_or_tensors_common_or_per_image(pipeline, classifier):
    made = GuidedUNet(pipeline.unet, pipeline.scheduler, classifier, 1)
    u = torch.randn(BATCH, CHANNELS, SIZE, SIZE, dtype=torch.float64)
    expected = made(u, 300).sample
    for t in (300.0, torch.tensor(300), torch.tensor([300]), torch.full((BATCH,), 300)):
        assert torch.equal(made(u, t).sample, expected)
    assert torch.equal(made(u, 300, return_dict=False)[0], expected)
    each = torch.tensor([300, 700, 20])
    mixed = made(u, each).sample
    for i in range(BATCH):
        torch.testing.assert_close(mixed[i : i + 1], made(u[i : i + 1], each[i]).sample)
    between = made(u, 300.5).sample - pipeline.unet(u, 300.5).sample
    low, high = (made(u, t).sample - pipeline.unet(u, t).sample for t in (300, 301))
    torch.testing.assert_close(between, (low + high) / 2, rtol=1e-3, atol=1e-6)
    with pytest.raises(UserError, match="timestep 1000 is out of range"):
        made(u, 1000)
    with pytest.raises(UserError, match="3 images need 1 timestep or 3, not 2"):
        made(u, torch.tensor([1, 2]))


def test_labels_are_repeated_for_batches_of_twice_the_size(pipeline, classifier):
    """Some pipelines double the batch, to evaluate it with and without a prompt at once."""
    labels = [0, 3, 1]
    made = GuidedUNet(pipeline.unet, pipeline.scheduler, classifier, labels)
    u = torch.randn(BATCH, CHANNELS, SIZE, SIZE, dtype=torch.float64)
    out = made(torch.cat([u, u]), 300).sample
    torch.testing.assert_close(out[:BATCH], out[BATCH:])
    for i, label in enumerate(labels):
        one = GuidedUNet(pipeline.unet, pipeline.scheduler, classifier, label)
        torch.testing.assert_close(out[i : i + 1], one(u[i : i + 1], 300).sample)
    with pytest.raises(UserError, match="3 labels and 4 images"):
        made(torch.cat([u, u[:1]]), 300)


def test_class_conditional_unets_and_classifier_free_guidance(classifier):
    network, scheduler = unet(num_class_embeds=CLASSES + 1), DDIMScheduler(clip_sample=False)
    u = torch.randn(2, CHANNELS, SIZE, SIZE, dtype=torch.float64)

    def plain(label):
        return network(u, 300, class_labels=torch.full((2,), label)).sample

    def change(**options):
        return GuidedUNet(network, scheduler, classifier, 1, **options)(u, 300).sample

    push = change() - plain(1)
    assert push.norm() > 1e-3
    mixed = plain(4) + 2.5 * (plain(1) - plain(4))
    torch.testing.assert_close(change(classifier_free=2.5), mixed + push)
    pipe = quiet(DDIMPipeline(network, scheduler))
    free = guided(pipe, None, 1, "classifier-free", scale=2.5).unet
    torch.testing.assert_close(free(u, 300).sample, mixed)
    off = guided(pipe, None, 1, "classifier-free", scale=0.0, null_label=2).unet
    torch.testing.assert_close(off(u, 300).sample, plain(2))
    own = GuidedUNet(network, scheduler, classifier, 1)(u, 300, class_labels=torch.tensor([2, 2]))
    torch.testing.assert_close(own.sample, plain(2) + push)
    with pytest.raises(UserError, match="label 3 or null label 9 is out of range"):
        guided(pipe, classifier, 3, null_label=9)


def test_original_pipeline_is_unchanged_and_shares_its_weights(pipeline, classifier):
    before = dict(vars(pipeline))
    config, timesteps = dict(pipeline.config), pipeline.scheduler.timesteps.clone()
    made = guided(pipeline, classifier, 1)
    made(num_inference_steps=2, output_type="np")
    assert vars(pipeline) == before
    assert dict(pipeline.config) == config
    assert torch.equal(pipeline.scheduler.timesteps, timesteps)
    assert type(made) is DDIMPipeline
    assert made.unet.unet is pipeline.unet
    assert made.unet.config is pipeline.unet.config
    assert made.unet.dtype == torch.float64
    assert not any(p.grad is not None for p in made.unet.parameters())
    with pytest.raises(AttributeError, match="absent"):
        made.unet.absent  # noqa: B018


def test_guidance_of_an_already_guided_pipeline_adds_up(pipeline, classifier):
    u = torch.randn(2, CHANNELS, SIZE, SIZE, dtype=torch.float64)
    first, second = guided(pipeline, classifier, 1), guided(pipeline, classifier, 2, "classifier")
    both = guided(first, classifier, 2, "classifier").unet(u, 300).sample
    own = pipeline.unet(u, 300).sample
    parts = first.unet(u, 300).sample + second.unet(u, 300).sample
    torch.testing.assert_close(both, parts - own)


def test_logit_networks_and_our_models_guide_in_their_own_precision(pipeline):
    u = torch.randn(2, CHANNELS, SIZE, SIZE, dtype=torch.float64)
    for model in (Smooth().eval(), create_model("gradresnet18", CLASSES, CHANNELS, width=8).eval()):
        pipe = guided(pipeline, model, 1)
        out = pipe.unet(u, torch.tensor(300)).sample
        assert out.dtype == torch.float64
        assert not torch.equal(out, pipeline.unet(u, 300).sample)
        with torch.no_grad():
            torch.testing.assert_close(pipe.unet(u, 300).sample, out, rtol=1e-5, atol=1e-6)
    half = copy.deepcopy(pipeline.unet).bfloat16()
    made = GuidedUNet(half, pipeline.scheduler, Smooth().eval(), 1)
    assert made(u.bfloat16(), 300).sample.dtype == torch.bfloat16


def test_noise_levels_match_the_scheduler(pipeline):
    schedule = schedule_of(pipeline.scheduler)
    for t in (0, 500, 999):
        assert schedule.abar(t) == pytest.approx(float(pipeline.scheduler.alphas_cumprod[t]), 1e-12)
    assert schedule.sigma(500) == pytest.approx(make_schedule("linear").sigma(500), rel=0.5)


def test_pure_noise_timestep_is_not_guided(classifier):
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    network = unet()
    made = GuidedUNet(network, scheduler, classifier, 1)
    u = torch.randn(2, CHANNELS, SIZE, SIZE, dtype=torch.float64)
    assert torch.equal(made(u, 999).sample, network(u, 999).sample)
    assert not torch.equal(made(u, 990).sample, network(u, 990).sample)


def with_card(**facts):
    model = create_model("gradresnet18", CLASSES, CHANNELS, width=8).eval()
    model.card = ModelCard(classifies=True, **facts)
    return model


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda: with_card(image_size=(32, 32)), {}, "makes images of 8x8, and this guide was "
         "trained on 32x32"),
        (lambda: create_model("gradresnet18", CLASSES, 1, width=8).eval(), {}, "3 chan.* takes 1"),
        (lambda: with_card(), {"label": 7}, "label 7 is out of range"),
        (lambda: with_card(), {"label": 0.5}, "label 0.5 must be a whole number"),
        (lambda: with_card(), {"guidance": "energies"}, "did you mean 'energy'"),
        (lambda: with_card(), {"schedule": "sigmoid:t=5"}, "'t' is unknown"),
        (lambda: with_card(), {"scale": -1}, "scale"),
        (lambda: with_card(), {"view": "dark"}, "view"),
        (lambda: with_card(), {"n": 5}, "there is no field 'n'"),
        (lambda: with_card(), {"guidance": "dual"}, "needs the mean energy"),
        (lambda: with_card(), {"guidance": "classifier-free"}, "takes no guide"),
        (lambda: with_card(), {"classifier_free": 2.0}, "needs a class-conditional UNet"),
        (lambda: None, {}, "needs a guide"),
        (lambda: create_model("gradresnet18", 0, CHANNELS, width=8).eval(), {}, "trained without"),
        (lambda: create_model("resnet18", CLASSES, CHANNELS, width=4), {}, "call model.eval()"),
        (lambda: nn.Linear(3, 4).eval(), {}, "does not take an image|must return only logits"),
        (lambda: print, {}, "is no network"),
    ],
)  # fmt: skip
def test_incompatible_guides_and_options_are_refused(pipeline, model, options, message):
    with pytest.raises(UserError, match=message) as caught:
        guided(pipeline, model(), **{"label": 1, **options})
    assert "\n" not in str(caught.value)


def test_unsupported_pipelines_are_refused(pipeline, classifier):
    latent = copy.copy(pipeline)
    latent.vae = nn.Identity()
    with pytest.raises(UserError, match="works on latents"):
        guided(latent, classifier, 1)
    with pytest.raises(UserError, match="has no unet"):
        guided(types.SimpleNamespace(scheduler=pipeline.scheduler), classifier, 1)
    with pytest.raises(UserError, match="takes 4 channels and gives 3"):
        GuidedUNet(unet(in_channels=4), pipeline.scheduler, classifier, 1)
    for kind in ("flow", "score"):
        scheduler = types.SimpleNamespace(
            alphas_cumprod=pipeline.scheduler.alphas_cumprod,
            config=types.SimpleNamespace(prediction_type=kind),
        )
        with pytest.raises(UserError, match=f"prediction_type '{kind}' is not known"):
            GuidedUNet(pipeline.unet, scheduler, classifier, 1)
    with pytest.raises(UserError, match="has no alphas_cumprod"):
        schedule_of(types.SimpleNamespace())
