"""Noise-conditional classifiers: the input of their backbone, and training."""

import math

import pytest
import torch
from ebmkit_tests.support.command_line import ebmkit_command
from torch import nn

import ebmkit
from ebmkit.data import load_dataset
from ebmkit.errors import UserError, validated
from ebmkit.evaluation import evaluate
from ebmkit.models import BACKBONES, Features, JointModel, ModelConfig
from ebmkit.models.base import LOWEST, NoiseConditioned
from ebmkit.models.heads import LogitHead
from ebmkit.noise import make_schedule
from ebmkit.training import resolve

pytestmark = [
    pytest.mark.filterwarnings("ignore:a score is differentiated through"),
    pytest.mark.usefixtures("count_cost_roughly"),
]


class RecordingBackbone(nn.Module):
    """A backbone that records its input."""

    num_features = 4

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(2, 4, 1)

    def forward(self, y):
        self.seen = y
        maps = self.layer(y)
        return Features(maps.mean((2, 3)), (maps,))


def conditioned(preset, **options):
    backbone = BACKBONES[preset].config.model_copy(update={"width": 8})
    return ModelConfig(
        backbone=backbone, in_channels=1, num_classes=3, noise_conditional=True, **options
    ).build()


def test_backbone_receives_the_input_of_a_diffusion_network():
    """Channels: u_t of the schedule, then log sigma / 4. Clean images have the lowest level."""
    network, schedule = RecordingBackbone(), make_schedule("linear")
    model = JointModel(NoiseConditioned(network), LogitHead(4, 3)).double()
    y = torch.rand(3, 1, 4, 4, dtype=torch.float64)
    sigma = torch.tensor([schedule.sigma(t) for t in (0, 300, 999)], dtype=torch.float64)
    model.logits(y, sigma)
    for k, t in enumerate((0, 300, 999)):
        expected = schedule.from_image_units(y[k], t)
        torch.testing.assert_close(network.seen[k, :1], expected)
        assert float(network.seen[k, 1, 0, 0]) == pytest.approx(math.log(schedule.sigma(t)) / 4)
        assert network.seen[k, 1].std() == 0
    assert pytest.approx(schedule.sigma(0), rel=1e-3) == LOWEST
    assert torch.equal(model.logits(y), model.logits(y, 0.0))
    assert torch.equal(model.logits(y, 0.0), model.logits(y, LOWEST))


@pytest.mark.parametrize("preset", sorted(n for n in BACKBONES if "-sigma" not in n))
def test_every_backbone_can_be_noise_conditional(preset):
    size = 32 if preset.endswith("imagenet") else 8
    model = conditioned(preset).double().eval()
    assert model.noise_conditional
    y = torch.rand(2, 1, size, size, dtype=torch.float64)
    logits = model.logits(y, 0.5)
    assert not torch.allclose(logits, model.logits(y, 5.0))
    each = model.logits(y, torch.tensor([0.5, 5.0]))
    torch.testing.assert_close(each[0], logits[0])
    torch.testing.assert_close(each[1], model.logits(y, 5.0)[1])
    y.requires_grad_()
    labels = torch.tensor([0, 2])
    chosen = model(y, 0.5).at_label(labels).sum()
    (gradient,) = torch.autograd.grad(chosen, y)
    torch.testing.assert_close(model.label_score(y.detach(), labels, 0.5), gradient)


def test_noise_conditional_models_support_size_scaling_and_recomputation():
    windows = (
        conditioned("gradresnet18", reference_size=(8, 8), size_scaling="windows").double().eval()
    )
    y = torch.rand(2, 1, 16, 16, dtype=torch.float64)
    assert windows.score(y, sigma=0.5).isfinite().all()
    tiles = conditioned("gradresnet18", reference_size=(8, 8)).double().eval()
    sigma = torch.tensor([0.1, 3.0])
    both = tiles.logits(y, sigma)
    torch.testing.assert_close(both[1:], tiles.logits(y[1:], 3.0))
    tiles.set_recompute(True)
    assert tiles.backbone.backbone.recompute is True


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backbone": {"kind": "drunet"}}, "'drunet' is a complete model"),
        ({"backbone": {"kind": "mlp", "noise_conditional": True}}, "takes sigma already"),
        ({"input_mean": 0.5}, "leave out input_mean and input_std"),
    ],
    ids=str,
)
def test_invalid_configurations_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        validated(ModelConfig, {"noise_conditional": True, **fields}, "model")


@pytest.mark.slow
def test_a_run_classifies_clean_and_noisy_images(tmp_path):
    """Recipe, training, validation and suite classify, through the command line."""
    small = ["--set", "model.backbone.width=8", "--set", "streams.classify.batch_size=16"]
    command = ["train", "--recipe", "digits-noisy-classifier", *small, "--steps", 2, "--out", "run"]
    command += ["--set", "validation_images=16", "--device", "cpu"]
    ended = ebmkit_command(*command, "--no-evaluate", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    model = ebmkit.load(tmp_path / "run")
    assert model.noise_conditional
    assert model.card.classifies
    images = load_dataset("digits", None, "test").first(20)
    found = evaluate(model, images, ["classify"], tmp_path / "evaluation", plots=False)
    noisy = found["classify"].document["against_noise"]
    assert noisy[0]["sigma"] == 0
    assert all(0 <= level["accuracy"]["value"] <= 1 for level in noisy)


def test_noise_law_diffusion_has_the_range_of_the_schedule():
    config = resolve(
        {
            "objective": "ce",
            "model": {"noise_conditional": True},
            "streams": {"classify": {"noise": {"kind": "diffusion"}}},
        }
    )
    assert config.streams.classify.noise.range == make_schedule("linear").sigma_range
