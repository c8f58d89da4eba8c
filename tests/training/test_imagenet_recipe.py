"""The two recipes of the paper field by field, and the phases of the ImageNet recipe."""

import functools
import math
import os
import signal
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import ebmkit
from ebmkit.cli import main
from ebmkit.models.base import Features
from ebmkit.models.heads import LinearQuadraticHead
from ebmkit.objectives import TrainingLoss
from ebmkit.terminal import console
from ebmkit.training import Interrupted, RunFolder, Trainer, parse_assignments, resolve
from ebmkit.training.config import differences
from ebmkit.training.cost import Budget, Stopwatch, step_flops, step_memory
from ebmkit.training.loop import assemble
from ebmkit.training.metrics import Validation
from ebmkit.training.setup import images_of
from ebmkit.training.step import TrainingStep

SHARED_FIELDS = {  # CDN section 3, appendix A: fields that both recipes share
    "objective": "ce+dsm-mean",  # equation 13, "mean-squared"
    "backbone": "gradresnet18",
    "head": "linear-quadratic",
    "model.head.bias": False,
    "model.backbone.norm": "group",
    "model.backbone.norm_everywhere": False,
    "model.backbone.shortcut_norm": False,  # "a single group-normalization layer"
    "validation_images": 0,
    "dataset.hold_out": False,  # all training images
    "compute.precision": "fp32",
    "optimizer.kind": "adamw",
    "optimizer.betas": (0.9, 0.999),
    "optimizer.schedule": "cosine",
    "optimizer.warmup_steps": 0,
    "optimizer.decay_norms": True,
    "optimizer.clip_norm": None,
    "optimizer.ema": None,
    "model.backbone.depth": 18,
    "model.backbone.width": 64,
    "model.backbone.activation": "gelu",
    "model.backbone.bias": False,
    "model.backbone.side_connections": True,
    "model.backbone.channels_per_group": 8,
    "streams.classify.augmentation.flip": True,
    "streams.classify.augmentation.mix": "both",
    "streams.classify.noise.kind": "squared-uniform",
    "streams.classify.phases": (),
    "streams.denoise.augmentation.flip": True,
    "streams.denoise.augmentation.mix": "none",
    "streams.denoise.augmentation.crop_padding": 0,
    "streams.denoise.augmentation.crop_scale": None,
    "streams.denoise.noise.kind": "squared-uniform",
}
RECIPE_FIELDS = {
    "cdn-cifar10": {
        "dataset.name": "cifar10",
        "model.backbone.stem_kernel": 3,
        "model.backbone.strides": (1, 1, 2, 2, 2),
        "optimizer.lr": 3e-4,
        "optimizer.weight_decay": 0.05,
        "steps": 78_000,
        "streams.classify.batch_size": 128,
        "streams.classify.augmentation.crop_padding": 4,
        "streams.classify.augmentation.crop_size": None,
        "streams.classify.augmentation.crop_scale": None,
        "streams.classify.noise.min": 0.0,
        "streams.classify.noise.max": 20 / 255,
        "streams.denoise.batch_size": 64,
        "streams.denoise.augmentation.crop_size": None,
        "streams.denoise.noise.min": 1 / 255,
        "streams.denoise.noise.max": 100 / 255,
        "streams.denoise.phases": (),
    },
    "cdn-imagenet": {
        "dataset.name": "imagenet",
        "dataset.image_size": 224,
        "backbone": "gradresnet18-imagenet",
        "model.backbone.stem_kernel": 7,
        "model.backbone.strides": (2, 1, 2, 2, 2),
        "optimizer.lr": 2e-4,
        "optimizer.weight_decay": 1e-4,
        "steps": 1_000_912,
        "streams.classify.batch_size": 512,
        "streams.classify.augmentation.crop_padding": 0,
        "streams.classify.augmentation.crop_size": 224,
        "streams.classify.augmentation.crop_scale": (0.08, 1.0),
        "streams.classify.augmentation.crop_ratio": (3 / 4, 4 / 3),
        "streams.classify.noise.min": 1 / 255,
        "streams.classify.noise.max": 70 / 255,
        "streams.denoise.batch_size": 64,
        "streams.denoise.augmentation.crop_size": 128,
        "streams.denoise.noise.min": 1 / 255,
        "streams.denoise.noise.max": 70 / 255,
    },
}
# first epoch, batch size, image size
EPOCHS = [(0, 64, 128), (150, 40, 160), (260, 32, 192), (340, 16, 224)]


@pytest.mark.parametrize("name", RECIPE_FIELDS)
def test_recipe_matches_the_paper(name):
    config = resolve(recipe=name)
    for path, value in {**SHARED_FIELDS, **RECIPE_FIELDS[name]}.items():
        found = functools.reduce(getattr, path.split("."), config)
        assert found == (pytest.approx(value) if isinstance(value, float) else value), path


def test_the_two_readings_of_the_loss_differ_in_nothing_else():
    own, other = (resolve(recipe=name) for name in ("cdn-cifar10", "cdn-cifar10-sum"))
    assert own == other.model_copy(update={"objective": "ce+dsm-mean"})
    assert other.objective == "ce+dsm-sum"


def test_our_recipe_of_imagenet_is_the_default_and_names_its_differences():
    own, paper = resolve({"dataset": {"name": "imagenet"}}), resolve(recipe="cdn-imagenet")
    assert own == resolve(recipe="imagenet")
    found = differences(paper.model_dump(mode="json"), own.model_dump(mode="json"))
    assert {key: value for key, (_, value) in found.items()} == {
        "objective": "ce+dsm",
        "model.backbone.shortcut_norm": True,
        "validation_images": 1000,
        "dataset.hold_out": True,
    }


JEM = {  # arXiv 1912.03263 and its released code, in units of images in [0, 1]
    "backbone": "wideresnet28-10-jem",
    "model.backbone.norm": "none",
    "head": "logit",
    "model.head.bias": True,
    "objective": "jem",
    "optimizer.kind": "adamw",
    "optimizer.lr": 1e-4,
    "optimizer.weight_decay": 0.0,
    "optimizer.warmup_steps": 1000,
    "optimizer.milestones": (160 / 200, 180 / 200),
    "optimizer.milestone_factor": 0.3,
    "streams.classify.batch_size": 64,
    "streams.classify.noise.max": 0.03 / 2,
    "streams.classify.augmentation.mix": "none",
    "streams.generate.batch_size": 64,
    "negatives.steps": 20,
    "negatives.step_size": 1 / 4,
    "negatives.noise": 0.01 / 2,
    "negatives.buffer_size": 10_000,
    "negatives.restart": 0.05,
    "negatives.start": "uniform",
    "steps": 200 * 50_000 // 64,
}
ROBUST = {  # the package `robustness` (its defaults for CIFAR-10), RCG section 4.2
    "backbone": "resnet50",
    "model.backbone.width": 64,
    "head": "logit",
    "model.head.bias": True,
    "objective": "adv",
    "terms.adv.norm": "l2",
    "terms.adv.eps": 0.5,
    "terms.adv.steps": 7,
    "terms.adv.random_start": False,
    "optimizer.kind": "sgd",
    "optimizer.lr": 0.1,
    "optimizer.momentum": 0.9,
    "optimizer.weight_decay": 5e-4,
    "optimizer.milestones": (50 / 150, 100 / 150),
    "optimizer.milestone_factor": 0.1,
    "streams.classify.batch_size": 128,
    "streams.classify.noise.kind": "none",
    "streams.classify.augmentation.mix": "none",
    "streams.classify.augmentation.crop_padding": 4,
    "streams.classify.augmentation.flip": True,
    "steps": math.ceil(150 * 50_000 / 128),
    "validation_images": 0,
}
DDPM = {  # Ho et al. 2020, appendix B
    "backbone": "unet-cifar10",
    "objective": "ddpm",
    "optimizer.kind": "adamw",
    "optimizer.weight_decay": 0.0,
    "optimizer.lr": 2e-4,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 5000,
    "optimizer.clip_norm": 1.0,
    "optimizer.ema": 0.9999,
    "streams.denoise.batch_size": 128,
    "streams.denoise.augmentation.flip": True,
    "steps": 800_000,
    "validation_images": 0,
}


@pytest.mark.parametrize(
    ("name", "published"), [("jem", JEM), ("cifar10-robust", ROBUST), ("cifar10-ddpm", DDPM)]
)
def test_recipes_of_others_have_the_published_values(name, published):
    config = resolve(recipe=name)
    for path, value in published.items():
        found = functools.reduce(getattr, path.split("."), config)
        assert found == (pytest.approx(value) if isinstance(value, float) else value), path


def test_steps_match_the_epochs_of_the_paper():
    assert resolve(recipe="cdn-cifar10").steps == pytest.approx(200 * 50_000 / 128, rel=0.002)
    assert resolve(recipe="cdn-imagenet").steps == round(400 * 1_281_167 / 512)


def test_imagenet_phases_begin_at_the_epochs_of_the_paper():
    config = resolve(recipe="imagenet")
    per_epoch = Fraction(1_281_167, 512)
    spans = config.streams.denoise.spans(config.steps)
    found = [(float(s.start / per_epoch), s.batch_size, s.crop_size) for s in spans]
    for (epoch, *sizes), (expected, *expected_sizes) in zip(found, EPOCHS, strict=True):
        assert epoch == pytest.approx(expected, abs=1e-3)
        assert sizes == expected_sizes
    short = config.streams.denoise.spans(400)  # a run of another length has the same proportions
    assert [span.start for span in short] == [0, 150, 260, 340]


# One eighth of the image sizes (28 pixels for 224, 32 for 256) and small batches.
PHASES = "[{after: 3/8, batch_size: 6, crop_size: 20}, {after: 5/8, batch_size: 4, crop_size: 24}"
SMALL = [
    "dataset.image_size=28", "dataset.workers=0", "model.backbone.width=8", "device=cpu",
    "streams.classify.batch_size=8", "streams.classify.augmentation.crop_size=28",
    "streams.denoise.batch_size=8", "streams.denoise.augmentation.crop_size=16",
    f"streams.denoise.phases={PHASES}, {{after: 7/8, batch_size: 2, crop_size: 28}}]",
    "steps=8", "log_every=1", "validate_every=3", "checkpoint_every=100",
]  # fmt: skip
# The phases are steps 1-3, 4-5, 6-7 and 8.


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 2)):
        for name in ("n01", "n02", "n03"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3)).astype(np.uint8))
                width, height = rng.integers(40, 65, 2).tolist()
                coarse.resize((width, height)).save(root / part / name / f"{i}.JPEG")
    return root


def small(image_folder, *assignments):
    own = parse_assignments([*SMALL, *assignments])
    return resolve({"dataset": {"data_dir": image_folder}}, own, recipe="imagenet")


def trainer_of(image_folder, *assignments, run=None, callbacks=()):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Budget, "check", lambda self: None)  # for speed; it has its own tests
        return assemble(small(image_folder, *assignments), run, callbacks)


class Tiny(nn.Module):
    """One convolution, which is fast to trace."""

    num_features = 8

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)

    def forward(self, y):
        return Features(nn.functional.gelu(self.conv(y)).mean((2, 3)))


def tiny_trainer(image_folder, *assignments):
    """A trainer of a network that is fast to trace."""
    torch.manual_seed(0)
    config = small(image_folder, "validation_images=0", *assignments)
    model = ebmkit.JointModel(Tiny(), LinearQuadraticHead(8, 3))
    return Trainer(model, config, images_of(config.dataset, "train"), callbacks=[RowReporter()])


class RowReporter:
    """Stores the reported rows, and sends SIGINT when step ``stop_at`` is reported."""

    def __init__(self, stop_at=None):
        self.rows, self.stop_at = [], stop_at

    def report(self, row):
        self.rows.append(row)
        if row["kind"] == "train" and row["step"] == self.stop_at:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
def test_resume_within_a_phase_is_bit_identical(image_folder, tmp_path):
    config = small(image_folder)
    # step 5 is the second of its phase
    reports = RowReporter(), RowReporter(stop_at=4), RowReporter()
    whole = trainer_of(image_folder, callbacks=reports[:1])
    whole.fit()
    cut = trainer_of(
        image_folder, run=RunFolder.create(tmp_path / "cut", config), callbacks=reports[1:2]
    )
    with pytest.raises(Interrupted, match="after step 4"):
        cut.fit()
    resumed = trainer_of(image_folder, run=RunFolder.open(tmp_path / "cut"), callbacks=reports[2:])
    assert resumed.step == 4
    resumed.fit()
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key
    columns = ("kind", "step", "ce", "dsm", "accuracy", "psnr_25")
    expected, first, second = (
        [{k: row.get(k) for k in columns} for row in report.rows] for report in reports
    )
    assert expected == [*first, *second]


@pytest.mark.slow
def test_each_phase_is_logged_at_its_end_with_its_own_speed(image_folder, monkeypatch):
    trainer = trainer_of(
        image_folder, "log_every=100", "validation_images=0", callbacks=[RowReporter()]
    )
    monkeypatch.setattr(trainer.stopwatch, "stop", lambda stage: 1.0)  # a second for every step
    trainer.fit()
    speeds = {row["step"]: row["images_per_s"] for row in trainer.callbacks[0].rows}
    assert speeds == {3: 16, 5: 14, 7: 12, 8: 10}


def test_step_time_weights_the_phases_by_their_steps(monkeypatch):
    clock = iter([0, 9, 9, 10, 10, 12, 12, 42, 42, 46, 46])  # first intervals: compilation
    monkeypatch.setattr("ebmkit.training.cost.time.perf_counter", lambda: next(clock))
    stopwatch = Stopwatch()
    for stage in (0, 0, 0, 1, 1):
        stopwatch.step(data_seconds=0.5)
        stopwatch.stop(stage)
    assert stopwatch.seconds == pytest.approx((3 * 1.5 + 2 * 4) / 5)  # weighted by the timed steps
    stopwatch.lengths = {0: 100, 1: 300}
    assert stopwatch.seconds == pytest.approx((100 * 1.5 + 300 * 4) / 400)
    assert stopwatch.data_share == pytest.approx(3 * 0.5 / (1 + 2 + 4))


def test_validation_uses_the_crop_size_of_the_phase(image_folder, monkeypatch):
    seen = []
    measure = Validation._measure

    def spy(self, batches):
        seen.append({name: tuple(batch.x.shape[-2:]) for name, batch in batches.items()})
        return measure(self, batches)

    monkeypatch.setattr(Validation, "_measure", spy)
    trainer_of(image_folder, "validate_every=4").fit()
    assert seen == [
        {"classify": (28, 28), "denoise": (20, 20)},
        {"classify": (28, 28), "denoise": (28, 28)},
    ]


@pytest.mark.slow
def test_best_validation_loss_is_reset_in_each_phase(image_folder, monkeypatch):
    values = iter([3, 2, 1, 6, 7, 9, 8, 10])  # the loss rises from phase to phase
    monkeypatch.setattr(TrainingLoss, "summary", lambda *_: next(values))
    trainer = trainer_of(image_folder, "validate_every=1")
    best, state = [], trainer.state
    log = trainer.report
    monkeypatch.setattr(trainer, "report", lambda row: (best.append(state.best.loss), log(row)))
    trainer.fit()
    before_each_validation = best[1::2]
    assert [*before_each_validation, trainer.state.best.loss] == [math.inf, 3, 2, 1, 6, 6, 9, 8, 10]


def test_reference_size_is_the_largest_crop_unless_set(image_folder):
    trainer = trainer_of(image_folder)
    assert trainer.model.reference_size == trainer.card.image_size == (28, 28)
    own = ("model.reference_size=[16, 16]", "model.size_scaling=factor")
    trainer = trainer_of(image_folder, *own)
    assert trainer.model.reference_size == (16, 16)
    assert trainer.card.image_size == (28, 28)


@pytest.mark.slow
def test_cost_is_summed_over_the_phases_and_memory_is_their_maximum(image_folder, monkeypatch):
    monkeypatch.setattr("ebmkit.training.cost.matrix_rate", lambda *_: 1e9)
    trainer = tiny_trainer(image_folder)
    plan = trainer.budget.plan
    assert [shapes["denoise"] for _, shapes in plan] == [
        (8, 3, 16, 16), (6, 3, 20, 20), (4, 3, 24, 24), (2, 3, 28, 28),
    ]  # fmt: skip
    cost = trainer.budget.cost(8)
    counts = [sum(step_flops(trainer.loss, shapes).values()) for _, shapes in plan]
    assert list(cost.stages.values()) == counts
    assert cost.run_flops == pytest.approx(np.dot([3, 2, 2, 1], counts), rel=1e-6)
    totals = [step_memory(trainer.loss, shapes).total for _, shapes in plan]
    assert cost.memory.total == max(totals)
    assert "steps 4 to 5: classify 8x28x28, denoise 6x20x20" in dict(cost.rows())
    later = trainer.budget.cost(8, first=6)  # of a resumed run
    assert later.run_flops == pytest.approx(counts[2] + counts[3], rel=1e-6)


def test_phase_that_exceeds_memory_is_named(image_folder, monkeypatch):
    trainer = tiny_trainer(image_folder, "objective=dsm")
    needs = [step_memory(trainer.loss, shapes) for _, shapes in trainer.budget.plan]
    assert max(range(4), key=lambda k: needs[k].total) == 1  # 6 images of 20 pixels
    free = needs[1].total - needs[1].parameters - 1
    monkeypatch.setattr("ebmkit.training.cost.available_memory", lambda device: free)
    with pytest.raises(ebmkit.UserError, match=r"set streams\.denoise\.phases\[0\]\.batch_size=5"):
        trainer.budget.check()


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("compute.accumulate=4", r"phases\[0\]\.batch_size to a multiple of 4"),
        ("streams.denoise.augmentation.crop_size=33", "crop_size 33 is larger than the shorter"),
    ],
)
def test_invalid_phases_are_refused_before_the_first_step(image_folder, assignment, message):
    with pytest.raises(ebmkit.UserError, match=message):
        trainer_of(image_folder, assignment)


@pytest.mark.slow
def test_compiled_step_trains_through_the_phases(image_folder, monkeypatch):
    def fit(compile):
        trainer = tiny_trainer(image_folder, f"compute.compile='{compile}'")
        trainer.fit()
        return trainer

    with_backend = functools.partialmethod(TrainingStep.__init__, backend="eager")
    monkeypatch.setattr(TrainingStep, "__init__", with_backend)
    compiled, eager = fit("on"), fit("off")
    assert compiled.update.compiled
    for a, b in zip(compiled.callbacks[0].rows, eager.callbacks[0].rows, strict=True):
        assert a["dsm"] == pytest.approx(b["dsm"], rel=1e-5)
    for a, b in zip(compiled.model.parameters(), eager.model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    few = torch._dynamo.config.patch(recompile_limit=3)
    with few, pytest.raises(ebmkit.UserError, match=r"change 3 times .* at most 3 shapes"):
        fit("on")


def command(*arguments):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["ebmkit", *map(str, arguments)])
        main()
    return int(ended.value.code or 0)


@pytest.mark.slow
def test_imagenet_end_to_end_through_the_command_line(image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(console, "_width", 150)
    options = [part for assignment in SMALL for part in ("--set", assignment)]
    start = ["train", "--recipe", "imagenet", "--data-dir", image_folder, *options]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert command(*start, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "steps 4 to 5: classify 8x28x28, denoise 6x20x20" in printed
    assert "steps 8 to 8: classify 8x28x28, denoise 2x28x28" in printed
    monkeypatch.setattr(Budget, "check", lambda self: None)  # for speed
    assert command(*start, "--out", whole, "--no-evaluate") == 0

    log = RunFolder.log

    def interrupted(self, row):
        log(self, row)
        if (row["kind"], row["step"]) == ("train", 4):
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "log", interrupted)
        assert command(*start, "--out", cut, "--no-evaluate") == 130
    assert command("train", "--resume", cut, "--no-evaluate") == 0
    weights = [ebmkit.load(run).state_dict() for run in (whole, cut)]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())

    capsys.readouterr()
    assert command("evaluate", cut, "--suite", "classify,denoise") == 0
    printed = capsys.readouterr().out
    assert "classify: imagenet test, 6 images" in printed
    assert "denoise: imagenet test, 6 images" in printed
    test = images_of(small(image_folder).dataset, "test")
    assert test.image_size == ebmkit.load(cut).card.image_size == (28, 28)
