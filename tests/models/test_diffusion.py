"""Diffusion models in image units: noise levels, labels, UNets, and diffusers as reference."""

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
    """A network that depends on image, timestep and label, and records its arguments."""

    def __init__(self, answer=None):
        super().__init__()
        self.answer, self.calls = answer, []

    def forward(self, u, t, c=None):
        self.calls.append((u, t, c))
        if self.answer is not None:
            return self.answer(u, t)
        label = 0 if c is None else c.reshape(-1, 1, 1, 1)
        return torch.tanh(u * (1 + t.reshape(-1, 1, 1, 1) / 500)) + 0.1 * label


def small_unet(**options):
    """A small UNet in float64."""
    torch.manual_seed(1)
    pytest.importorskip("diffusers")
    return create_denoiser("unet", 1, **{**SMALL, **options}).double().eval()


# --- image units and noise levels ----------------------------------------------------------------


@pytest.mark.parametrize("image_range", [(-1.0, 1.0), (0.0, 1.0)])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_network_receives_its_timestep_and_rescaled_image(name, image_range):
    """A batch with one image at each level of the schedule: t is exact, u_t up to rounding."""
    schedule = make_schedule(name, image_range=image_range)
    network, sigma = Stub(), schedule.sigmas
    y = 0.5 + sigma[:, None, None, None] * torch.randn(1000, 1, 2, 2, dtype=torch.float64)
    DiffusionModel(network, schedule).double().score(y, sigma=sigma)
    ((u, t, c),) = network.calls
    assert c is None
    assert torch.equal(t, torch.arange(1000))
    expected = torch.stack([schedule.from_image_units(y[k], k) for k in range(1000)])
    torch.testing.assert_close(u, expected)
    single = DiffusionModel(network, schedule)
    assert torch.equal(single.timestep(sigma.float()), torch.arange(1000))


def test_sigma_between_levels_selects_the_nearest_timestep():
    schedule = make_schedule("linear")
    model = DiffusionModel(Stub(), schedule)
    sigma = torch.logspace(-2, 1.5, 200, dtype=torch.float64)
    expected = [schedule.nearest(float(level)) for level in sigma]
    assert model.timestep(sigma).tolist() == expected


def test_noise_is_recovered_from_the_score():
    """The score is -eps / sigma; -sigma * score is eps up to float32 rounding, at all levels."""
    schedule = make_schedule("cosine")
    sigma = schedule.sigmas.float()
    y = 0.5 + sigma[:, None, None, None] * torch.randn(1000, 1, 2, 2)
    model = DiffusionModel(Stub(), schedule)
    noise = -sigma[:, None, None, None] * model.score(y, sigma)
    torch.testing.assert_close(noise, model(y, sigma), rtol=1e-6, atol=0)


def test_score_and_denoised_image_follow_from_the_predicted_noise():
    y, sigma = torch.rand(3, 1, 4, 4, dtype=torch.float64), torch.tensor([0.1, 0.7, 3.0]).double()
    model = DiffusionModel(Stub(), make_schedule("linear")).double()
    noise = model(y, sigma)
    wide = sigma[:, None, None, None]
    torch.testing.assert_close(model.denoise(y, sigma), y - wide * noise)
    torch.testing.assert_close(model.score(y, sigma=sigma), -noise / wide)
    one = model.denoise(y[:1], 0.1)
    torch.testing.assert_close(one, model.denoise(y, sigma)[:1], rtol=1e-6, atol=1e-8)


def test_sigma_outside_the_schedule():
    """At sigma 0 the score is that of the lowest level, and `denoise` returns the image."""
    schedule = make_schedule("linear")
    low, high = schedule.sigma_range
    network = Stub()
    model = DiffusionModel(network, schedule).double()
    y = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(model.score(y, sigma=torch.zeros(2)), model.score(y, sigma=low))
    assert torch.equal(model.denoise(y, torch.zeros(2)), y)
    noise = torch.randn(2, 1, 64, 64, dtype=torch.float64)
    model.score(0.5 + 10 * high * noise, sigma=10 * high)
    u, t, _ = network.calls[-1]
    assert t.tolist() == [999, 999]
    assert u.std() == pytest.approx(1, abs=0.05)  # 8192 normal numbers: 6 standard errors
    with pytest.raises(UserError, match="takes the noise level as an input: give sigma"):
        model.score(y)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_every_prediction_type_gives_the_noise(prediction):
    """Exact predictions of the noise, of v or of the clean image give the exact noise."""
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
    assert [call[2].tolist() for call in network.calls] == [[3, 3], [2, 0]]
    torch.testing.assert_close(model.label_score(y, labels, 0.5), conditional - plain)
    assert not torch.allclose(conditional, plain)
    expected = torch.stack([plain[0], conditional[1]])
    torch.testing.assert_close(model._score(y, 0.5, torch.tensor([-1, 0])), expected)
    with pytest.raises(UserError, match="label 3 is out of range"):
        model.score(y, 0.5, 3)


def test_network_without_null_label_requires_labels():
    model = DiffusionModel(Stub(), make_schedule("linear"), num_classes=3, null_label=False)
    assert model.score(torch.rand(1, 1, 4, 4), 0.5, 2).isfinite().all()
    with pytest.raises(UserError, match="trained with labels only"):
        model.score(torch.rand(1, 1, 4, 4), sigma=0.5)


# --- UNets ---------------------------------------------------------------------------------------


def test_cifar10_unet_has_the_published_size():
    """google/ddpm-cifar10-32 has 35,746,307 parameters; Ho et al. write 35.7 million."""
    pytest.importorskip("diffusers")
    with torch.device("meta"):
        network = DENOISERS["unet-cifar10"].config.build_network(3, 0)
    assert sum(p.numel() for p in network.parameters()) == 35_746_307


@pytest.mark.parametrize("shape", [(8, 8), (5, 7), (1, 1)], ids=str)
def test_images_of_any_size(shape):
    """Odd sizes are padded and cropped; images of a batch are independent."""
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


def test_save_and_load_round_trip(tmp_path):
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
def test_ddim_trajectories_match_diffusers(name, eta):
    """Compares each of 10 steps in float64; their scheduler uses our float64 levels."""
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
            # both networks receive float32 timesteps; the rest is float64
            assert float((ours - u).abs().max()) / scale < 1e-8


def test_ddpm_trajectories_match_diffusers():
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
def test_score_compiles_to_one_graph():
    model = small_unet().float()
    y, sigma = torch.rand(2, 1, 8, 8), torch.tensor([0.1, 2.0])
    with torch.no_grad():
        compiled = torch.compile(
            lambda y, s: model.score(y, sigma=s), backend="eager", fullgraph=True
        )
        torch.testing.assert_close(compiled(y, sigma), model.score(y, sigma=sigma))


def test_optimize_sets_the_precision_of_the_network():
    seen = []

    def answer(u, t):
        seen.append(torch.is_autocast_enabled("cpu"))
        return u

    model = DiffusionModel(Stub(answer), make_schedule("linear")).requires_grad_(False)
    assert optimize(model, "bf16").denoise(torch.rand(1, 1, 4, 4), 0.5).dtype == torch.float32
    model.denoise(torch.rand(1, 1, 4, 4), 0.5)
    assert seen == [True, False]


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
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
def test_invalid_configurations_are_refused(fields, message):
    pytest.importorskip("diffusers")
    with pytest.raises(UserError, match=message):
        create_denoiser("unet", 1, **fields)


def test_missing_diffusers_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"uv sync --extra diffusion, or pip install"):
        create_denoiser("unet", 1)


def test_wrong_number_of_channels_is_refused():
    model = DiffusionModel(Stub(), make_schedule("linear"), in_channels=3)
    with pytest.raises(UserError, match=r"3 channel\(s\), not 1"):
        model.score(torch.rand(1, 1, 4, 4), sigma=0.1)


def test_schedule_sigmas_match_their_formula():
    schedule = Schedule(torch.tensor([0.1, 0.2]))
    expected = [0.5 * math.sqrt(0.1 / 0.9), 0.5 * math.sqrt(0.28 / 0.72)]
    assert schedule.sigmas.tolist() == pytest.approx(expected)
    assert schedule.sigma_range == pytest.approx(tuple(expected))
