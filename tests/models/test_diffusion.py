"""Diffusion models in image units: coordinates, levels, labels, and diffusers' own samplers."""

import math
import sys

import pytest
import torch
from torch import nn

import ebmkit
from ebmkit import optimize
from ebmkit.errors import UserError
from ebmkit.models import DENOISERS, DiffusionModel, ModelConfig, UNetConfig, create_denoiser
from ebmkit.models.saving import save_model
from ebmkit.noise import Schedule, make_schedule
from ebmkit.sampling import DDIM, denoiser_of, noise_predictor_of

SMALL = {"width": 8, "multipliers": (1, 2), "blocks": 1, "norm_groups": 4}


class Stub(nn.Module):
    """A network that depends on image, timestep and label, and remembers what it was told."""

    def __init__(self, answer=None):
        super().__init__()
        self.answer, self.told = answer, []

    def forward(self, u, t, c=None):
        self.told.append((u, t, c))
        if self.answer is not None:
            return self.answer(u, t)
        label = 0 if c is None else c.reshape(-1, 1, 1, 1)
        return torch.tanh(u * (1 + t.reshape(-1, 1, 1, 1) / 500)) + 0.1 * label


def small_unet(**options):
    """A UNet in float64 whose every layer is felt in the output."""
    torch.manual_seed(1)
    pytest.importorskip("diffusers")
    return create_denoiser("unet", 1, **{**SMALL, **options}).double().eval()


# --- coordinates and levels ----------------------------------------------------------------------


@pytest.mark.parametrize("image_range", [(-1.0, 1.0), (0.0, 1.0)])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_network_is_told_its_own_timestep_and_image(name, image_range):
    """At every level of the schedule, each image of a batch with its own: u_t and t exactly."""
    schedule = make_schedule(name, image_range=image_range)
    network, sigma = Stub(), schedule.sigmas
    y = 0.5 + sigma[:, None, None, None] * torch.randn(1000, 1, 2, 2, dtype=torch.float64)
    DiffusionModel(network, schedule).double().score(y, sigma=sigma)
    ((u, t, c),) = network.told
    assert c is None
    assert torch.equal(t, torch.arange(1000))
    expected = torch.stack([schedule.from_image_units(y[k], k) for k in range(1000)])
    torch.testing.assert_close(u, expected)
    single = DiffusionModel(network, schedule)
    assert torch.equal(single.timestep(sigma.float()), torch.arange(1000))


def test_levels_between_two_steps_go_to_the_nearer_by_ratio():
    schedule = make_schedule("linear")
    model = DiffusionModel(Stub(), schedule)
    sigma = torch.logspace(-2, 1.5, 200, dtype=torch.float64)
    expected = [schedule.nearest(float(level)) for level in sigma]
    assert model.timestep(sigma).tolist() == expected


def test_the_noise_comes_back_from_the_score():
    """-eps / sigma times sigma is eps to the last bits of float32, over all levels."""
    schedule = make_schedule("cosine")
    sigma = schedule.sigmas.float()
    y = 0.5 + sigma[:, None, None, None] * torch.randn(1000, 1, 2, 2)
    model = DiffusionModel(Stub(), schedule)
    noise = -sigma[:, None, None, None] * model.score(y, sigma)
    torch.testing.assert_close(noise, model(y, sigma), rtol=1e-6, atol=0)


def test_score_and_denoised_image_are_of_the_noise():
    y, sigma = torch.rand(3, 1, 4, 4, dtype=torch.float64), torch.tensor([0.1, 0.7, 3.0]).double()
    model = DiffusionModel(Stub(), make_schedule("linear")).double()
    noise = model(y, sigma)
    wide = sigma[:, None, None, None]
    torch.testing.assert_close(model.denoise(y, sigma), y - wide * noise)
    torch.testing.assert_close(model.score(y, sigma=sigma), -noise / wide)
    one = model.denoise(y[:1], 0.1)
    torch.testing.assert_close(one, model.denoise(y, sigma)[:1], rtol=1e-6, atol=1e-8)


def test_levels_outside_the_schedule():
    """Clean images have the score of the lowest level and stay as they are."""
    schedule = make_schedule("linear")
    low, high = schedule.sigma_range
    network = Stub()
    model = DiffusionModel(network, schedule).double()
    y = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(model.score(y, sigma=torch.zeros(2)), model.score(y, sigma=low))
    assert torch.equal(model.denoise(y, torch.zeros(2)), y)
    noise = torch.randn(2, 1, 64, 64, dtype=torch.float64)
    model.score(0.5 + 10 * high * noise, sigma=10 * high)
    u, t, _ = network.told[-1]
    assert t.tolist() == [999, 999]
    assert u.std() == pytest.approx(1, abs=0.05)  # 8192 normal numbers: 6 standard errors
    with pytest.raises(UserError, match="takes the noise level as an input: give sigma"):
        model.score(y)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_what_a_network_predicts_gives_the_noise(prediction):
    """A network that is right about v, or about the clean image, is right about the noise."""
    schedule = make_schedule("linear")
    x = 2 * torch.rand(2, 1, 4, 4, dtype=torch.float64) - 1
    eps = torch.randn_like(x)

    def answer(u, t):
        abar = torch.tensor([schedule.abar(int(k)) for k in t]).double().reshape(-1, 1, 1, 1)
        v = abar.sqrt() * eps - (1 - abar).sqrt() * x
        return {"epsilon": eps, "v_prediction": v, "sample": x}[prediction]

    model = DiffusionModel(Stub(answer), schedule, prediction=prediction).double()
    sigma = torch.tensor([schedule.sigma(200), schedule.sigma(800)], dtype=torch.float64)
    wide = sigma[:, None, None, None]
    y = (x + 1) / 2 + wide * eps
    torch.testing.assert_close(model(y, sigma), eps)
    torch.testing.assert_close(model.denoise(y, sigma), (x + 1) / 2)
    with pytest.raises(UserError, match="unknown prediction 'velocity'"):
        DiffusionModel(Stub(), schedule, prediction="velocity")


# --- labels --------------------------------------------------------------------------------------


def test_label_minus_one_is_the_null_label():
    network = Stub()
    model = DiffusionModel(network, make_schedule("linear"), num_classes=3).double()
    y, labels = torch.rand(2, 1, 4, 4, dtype=torch.float64), torch.tensor([2, 0])
    plain, conditional = model.score(y, 0.5), model.score(y, 0.5, labels)
    assert [told[2].tolist() for told in network.told] == [[3, 3], [2, 0]]
    torch.testing.assert_close(model.label_score(y, labels, 0.5), conditional - plain)
    assert not torch.allclose(conditional, plain)
    expected = torch.stack([plain[0], conditional[1]])
    torch.testing.assert_close(model._score(y, 0.5, torch.tensor([-1, 0])), expected)
    with pytest.raises(UserError, match="label 3 is out of range"):
        model.score(y, 0.5, 3)


def test_a_network_that_knows_labels_only_is_not_asked_without():
    model = DiffusionModel(Stub(), make_schedule("linear"), num_classes=3, null_label=False)
    assert model.score(torch.rand(1, 1, 4, 4), 0.5, 2).isfinite().all()
    with pytest.raises(UserError, match="trained with labels only"):
        model.score(torch.rand(1, 1, 4, 4), sigma=0.5)


# --- UNets ---------------------------------------------------------------------------------------


def test_the_published_network_has_its_size():
    """google/ddpm-cifar10-32 has 35,746,307 parameters; Ho et al. write 35.7 million."""
    pytest.importorskip("diffusers")
    with torch.device("meta"):
        network = DENOISERS["unet-cifar10"].config.build_network(3, 0)
    assert sum(p.numel() for p in network.parameters()) == 35_746_307


@pytest.mark.parametrize("shape", [(8, 8), (5, 7), (1, 1)], ids=str)
def test_images_of_any_size(shape):
    """Odd ones are continued and cut, and no image sees another."""
    model = small_unet(multipliers=(1, 1, 2))
    y, sigma = torch.rand(2, 1, *shape, dtype=torch.float64), torch.tensor([0.1, 2.0])
    clean = model.denoise(y, sigma)
    assert clean.shape == y.shape
    alone = model.denoise(y[1:], 2.0)
    torch.testing.assert_close(clean[1:], alone)


def test_every_parameter_gets_a_gradient():
    model = labelled().train()
    y = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    score = model.score(y, 0.3, torch.tensor([0, 1, 2])) + model.score(y, 0.3)
    score.square().sum().backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def labelled():
    """A class-conditional UNet of three labels, in float64."""
    pytest.importorskip("diffusers")
    torch.manual_seed(1)
    backbone = UNetConfig(class_conditional=True, **SMALL)
    return ModelConfig(backbone=backbone, in_channels=1, num_classes=3).build().double().eval()


def test_saved_and_loaded(tmp_path):
    backbone = UNetConfig(class_conditional=True, schedule="cosine", **SMALL)
    config = ModelConfig(backbone=backbone, in_channels=1, num_classes=3)
    pytest.importorskip("diffusers")
    model = config.build().eval()
    card = ebmkit.ModelCard(sigma_range=model.schedule.sigma_range, channels=1)
    save_model(tmp_path, model, config, card)
    again = ebmkit.load(tmp_path)
    y, labels = torch.rand(2, 1, 8, 8), torch.tensor([0, 2])
    assert torch.equal(again.score(y, 0.5, labels), model.score(y, 0.5, labels))
    assert torch.equal(again.score(y, sigma=0.5), model.score(y, sigma=0.5))
    assert torch.equal(again.schedule.betas, make_schedule("cosine").betas)
    assert not ebmkit.energy.classifies(again)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_trajectories_equal_those_of_diffusers_on_the_same_network(name, eta):
    """float64, their schedulers with our float64 levels; every step of 10, and DDPM at the end."""
    diffusers = pytest.importorskip("diffusers")
    model = small_unet(schedule=name)
    schedule, unet = model.schedule, model.network
    theirs = {"linear": "linear", "cosine": "squaredcos_cap_v2"}[name]
    settings = {"beta_schedule": theirs, "clip_sample": False, "timestep_spacing": "trailing"}
    scheduler = diffusers.DDIMScheduler(**settings)
    scheduler.alphas_cumprod = (1 - schedule.betas).cumprod(0)
    scheduler.set_timesteps(10)
    sampler = DDIM(
        noise_predictor_of(denoiser_of(model), schedule), schedule, schedule.timesteps(10), eta
    )
    u = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    state = sampler.init(schedule.to_image_units(u, sampler.timesteps[0]))
    one, other = (torch.Generator().manual_seed(2) for _ in range(2))
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps.tolist()):
            u = scheduler.step(unet(u, t).sample, t, u, eta=eta, generator=one).prev_sample
            state, _ = sampler.step(state, other)
            after = sampler.timesteps[i + 1] if i + 1 < sampler.steps else -1
            ours = schedule.from_image_units(state.x, after)
            scale = max(1.0, float(u.abs().max()))
            # the network sees timesteps in float32, alike; the rest is float64
            assert float((ours - u).abs().max()) / scale < 1e-8


def test_ddpm_trajectories_equal_those_of_diffusers_on_the_same_network():
    diffusers = pytest.importorskip("diffusers")
    model = small_unet()
    schedule = model.schedule
    scheduler = diffusers.DDPMScheduler(clip_sample=False, timestep_spacing="trailing")
    scheduler.alphas_cumprod = (1 - schedule.betas).cumprod(0)
    scheduler.set_timesteps(20)
    predictor = noise_predictor_of(denoiser_of(model), schedule)
    sampler = DDIM(predictor, schedule, schedule.timesteps(20), eta=1.0)
    u = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    state = sampler.init(schedule.to_image_units(u, sampler.timesteps[0]))
    one, other = (torch.Generator().manual_seed(2) for _ in range(2))
    with torch.no_grad():
        for t in scheduler.timesteps.tolist():
            u = scheduler.step(model.network(u, t).sample, t, u, generator=one).prev_sample
            state, _ = sampler.step(state, other)
    scale = max(1.0, float(u.abs().max()))
    assert float((2 * state.x - 1 - u).abs().max()) / scale < 1e-8


@pytest.mark.slow
def test_a_compiler_sees_one_graph():
    model = small_unet().float()
    y, sigma = torch.rand(2, 1, 8, 8), torch.tensor([0.1, 2.0])
    with torch.no_grad():
        compiled = torch.compile(
            lambda y, s: model.score(y, sigma=s), backend="eager", fullgraph=True
        )
        torch.testing.assert_close(compiled(y, sigma), model.score(y, sigma=sigma))


def test_the_network_computes_in_the_precision_of_the_wrapper():
    seen = []

    def answer(u, t):
        seen.append(torch.is_autocast_enabled("cpu"))
        return u

    model = DiffusionModel(Stub(answer), make_schedule("linear")).requires_grad_(False)
    assert optimize(model, "bf16").denoise(torch.rand(1, 1, 4, 4), 0.5).dtype == torch.float32
    model.denoise(torch.rand(1, 1, 4, 4), 0.5)
    assert seen == [True, False]


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"attention": (3,)}, r"attention at level 3 of 3: levels are 0 to 2"),
        ({"width": 20}, "norm_groups 8 must divide width 20: take a multiple as width, as 16"),
        ({"options": {"act_function": "silu"}}, "diffusers cannot build this UNet: .*act_function"),
        ({"image_range": (1, -1)}, "image range 1 to -1 must go up"),
        ({"betas": (0.0, 0.02)}, "variances of a schedule must lie between 0 and 1"),
        ({"class_conditional": True}, "needs labels, and there are none"),
        ({"schedule": "sigmoid"}, "'sigmoid' is not legal"),
    ],
    ids=str,
)
def test_illegal_networks_are_refused(fields, words):
    pytest.importorskip("diffusers")
    with pytest.raises(UserError, match=words):
        create_denoiser("unet", 1, **fields)


def test_without_diffusers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"uv sync --extra diffusion, or pip install"):
        create_denoiser("unet", 1)


def test_channels_are_checked():
    model = DiffusionModel(Stub(), make_schedule("linear"), in_channels=3)
    with pytest.raises(UserError, match=r"3 channel\(s\), not 1"):
        model.score(torch.rand(1, 1, 4, 4), sigma=0.1)


def test_a_schedule_says_its_levels():
    schedule = Schedule(torch.tensor([0.1, 0.2]))
    expected = [0.5 * math.sqrt(0.1 / 0.9), 0.5 * math.sqrt(0.28 / 0.72)]
    assert schedule.sigmas.tolist() == pytest.approx(expected)
    assert schedule.sigma_range == pytest.approx(tuple(expected))
