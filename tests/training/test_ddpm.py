"""Training diffusion models: one schedule for objective, noise law, network and sampler."""

import json

import pytest
import torch
import yaml
from ebmkit_tests.support.command_line import ebmkit_command

import ebmkit
from ebmkit.errors import UserError
from ebmkit.models import DiffusionModel
from ebmkit.noise import make_schedule
from ebmkit.sampling import DDIM, SAMPLERS
from ebmkit.training import RECIPES, parse_assignments, resolve
from ebmkit.training.config import recipe_for
from ebmkit.training.loop import assemble

SMALL = [
    *("--set", "model.backbone.width=8", "--set", "model.backbone.multipliers=[1, 2]"),
    *("--set", "model.backbone.blocks=1", "--steps", 3, "--device", "cpu"),
    *("--set", "streams.denoise.batch_size=8", "--set", "validation_images=16"),
]


def resolved(*assignments, **named):
    return resolve(named, parse_assignments(assignments))


def test_schedule_of_the_objective_sets_noise_law_and_network():
    config = resolved("objective.ddpm.schedule=cosine", backbone="unet", objective="ddpm")
    law, network = config.streams.denoise.noise, config.model.backbone
    assert (law.kind, law.schedule) == ("diffusion", "cosine")
    assert law.range == make_schedule("cosine").sigma_range
    assert (network.schedule, network.class_conditional) == ("cosine", False)
    conditional = resolved("objective.ddpm.class_dropout=0.1", backbone="unet", objective="ddpm")
    assert conditional.model.backbone.class_conditional
    assert conditional.model.backbone.schedule == "linear"


def test_a_resolved_configuration_resolves_to_itself():
    config = resolved("objective.ddpm.class_dropout=0.1", backbone="unet", objective="ddpm")
    again = resolve(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))))
    assert again == config


def test_joint_model_can_be_the_denoiser():
    config = resolved(backbone="gradresnet18", objective="ce+ddpm")
    assert config.streams.denoise.noise.kind == "diffusion"
    assert config.streams.classify.noise.kind == "squared-uniform"
    alone = resolved(backbone="gradresnet18", objective="ddpm")
    assert alone.model.backbone.kind == "gradresnet"


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["streams.denoise.noise.kind=uniform"], "streams.denoise.noise.kind is 'uniform'"),
        (["streams.denoise.noise.schedule=cosine"], "noise.schedule is 'cosine': omit that"),
        (["model.backbone.schedule=cosine"], "schedule = 'cosine' contradicts objective.ddpm.sch"),
        (["model.backbone.class_conditional=true"], "contradicts objective.ddpm.class_dropout"),
        (["model.backbone.timesteps=100"], "timesteps = 100 contradicts the noise law"),
        (["objective.ddpm.schedule=sigmoid"], "'sigmoid' is not legal"),
    ],
    ids=str,
)
def test_contradictory_settings_are_refused(assignments, message):
    with pytest.raises(UserError, match=message):
        resolved(*assignments, backbone="unet", objective="ddpm")


def test_recipes_of_diffusion_models():
    assert recipe_for("digits", "ddpm") == RECIPES["digits-ddpm"].config
    assert recipe_for("cifar10", "ddpm") == RECIPES["cifar10-ddpm"].config
    assert recipe_for("folder", "ddpm")["backbone"] == "unet"
    assert recipe_for("digits", "ce+ddpm") == RECIPES["digits"].config
    config = resolve({"objective": "ddpm"})
    assert (config.backbone, config.dataset.name) == ("unet", "digits")
    # Ho et al. 2020, appendix B
    published = resolve(recipe="cifar10-ddpm")
    assert (published.steps, published.optimizer.lr, published.optimizer.ema) == (
        800_000,
        2e-4,
        0.9999,
    )
    assert published.streams.denoise.batch_size == 128
    assert published.streams.denoise.augmentation.flip
    assert published.model.backbone.dropout == 0.1
    assert published.backbone == "unet-cifar10"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a class-conditional UNet, trained and evaluated from the command line."""
    pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("ddpm")
    arguments = [
        "train",
        "--dataset",
        "digits",
        "--backbone",
        "unet",
        "--objective",
        "ddpm",
        *SMALL,
    ]
    arguments += ["--set", "objective.ddpm.class_dropout=0.2", "--out", "run"]
    ended = ebmkit_command(*arguments, cwd=folder)
    assert ended.returncode == 0, ended.stderr
    assert "PSNR dB" in ended.stdout
    return folder / "run"


@pytest.mark.slow
def test_run_writes_a_model_and_its_evaluation(run):
    model = ebmkit.load(run)
    assert isinstance(model, DiffusionModel)
    assert (model.num_classes, model.null_label) == (10, True)
    assert model.card.sigma_range == pytest.approx(make_schedule("linear").sigma_range)
    assert not model.card.classifies
    found = [path.stem for path in (run / "evaluation").rglob("*.json")]
    assert found == ["denoise"]


@pytest.mark.slow
def test_sample_command_uses_ddim_with_and_without_a_label(run):
    for label in ([], ["--label", "3"]):
        out = run.parent / f"samples{len(label)}"
        arguments = ["sample", run, "-n", 2, "--steps", 3, *label, "--out", out, "--device", "cpu"]
        ended = ebmkit_command(*arguments, cwd=run.parent)
        assert ended.returncode == 0, ended.stderr
        document = json.loads((out / "sampling.json").read_text())
        assert document["settings"]["sampler"] == "ddim"
        assert document["settings"]["start"] == "noise"
    ended = ebmkit_command("sample", run, "--label", "eleven", "--out", "x", cwd=run.parent)
    assert ended.returncode == 2
    assert "label 'eleven' is unknown" in ended.stderr


def test_ddim_uses_the_schedule_of_the_model_and_refuses_another():
    pytest.importorskip("diffusers")
    config = resolved("objective.ddpm.schedule=cosine", backbone="unet", objective="ddpm")
    small = {**config.model.backbone.model_dump(), "width": 8, "blocks": 1}
    model = ebmkit.models.create_denoiser("unet", 1, **small)
    sampler = SAMPLERS["ddim"].build(model)
    assert isinstance(sampler, DDIM)
    assert sampler.schedule is model.schedule
    settings = SAMPLERS["ddim"].config
    assert SAMPLERS["ddim"].build(model, None, settings(schedule="cosine")).steps == 100
    with pytest.raises(UserError, match="schedule 'linear' is not the one"):
        SAMPLERS["ddim"].build(model, None, settings(schedule="linear"))
    with pytest.raises(UserError, match="this model does not take labels"):
        SAMPLERS["ddim"].build(model, 3)
    with pytest.raises(UserError, match="has no log-density"):
        SAMPLERS["mala"].build(model)


@pytest.mark.slow
@pytest.mark.usefixtures("count_cost_roughly")
def test_resume_with_dropout_is_bit_identical(tmp_path):
    """Dropout is keyed by the step and independent of other random draws."""
    pytest.importorskip("diffusers")
    from ebmkit.training import RunFolder

    layer = parse_assignments(
        [f"{v}" for v in SMALL if "=" in str(v)]
        + ["model.backbone.dropout=0.5", "checkpoint_every=2", "optimizer.ema=0.9", "device=cpu"]
    )
    config = resolve({"backbone": "unet", "objective": "ddpm", "steps": 4}, layer)
    whole = assemble(config, RunFolder.create(tmp_path / "whole", config))
    whole.fit()
    cut = assemble(config, RunFolder.create(tmp_path / "cut", config))
    cut.model.train()
    batches = cut.batches(0, 4)
    for _ in range(2):
        cut._advance(batches, False)
        cut._read()
    cut.save()
    torch.rand(7)
    resumed = assemble(config, RunFolder.open(tmp_path / "cut"))
    assert resumed.step == 2
    resumed.fit()
    ends = [ebmkit.load(tmp_path / name).state_dict() for name in ("whole", "cut")]
    averaged = whole.trained.state_dict()
    for key, value in ends[0].items():
        assert torch.equal(value, ends[1][key]), key
        assert torch.equal(value, averaged[key])
