"""The training loop: bit-identical resume, interrupts, checkpoints and schedules."""

import errno
import json
import os
import signal
import warnings

import pytest
import torch
import yaml
from ebmkit_tests.support.data_files import image_folder, keys

import ebmkit
from ebmkit import training
from ebmkit.data import load_dataset
from ebmkit.objectives import TrainingLoss, parse_objective
from ebmkit.storage.verify import accept_files
from ebmkit.training import Interrupted, RunFolder, resolve
from ebmkit.training.loop import assemble
from ebmkit.training.optim import learning_rate, make_optimizer
from ebmkit.training.setup import warn_if_at_chance

pytestmark = pytest.mark.usefixtures("count_cost_roughly")

SMALL = {
    "backbone": "gradresnet10",
    "model": {"backbone": {"width": 8}},
    "steps": 8,
    "log_every": 1,
    "validate_every": 4,
    "validation_images": 16,
    "checkpoint_every": 3,
    "device": "cpu",
    "streams": {"classify": {"batch_size": 8}, "denoise": {"batch_size": 8}},
}


class StopAt:
    """Sends SIGINT, as Ctrl-C does, when a step is reported."""

    def __init__(self, step: int) -> None:
        self.step = step

    def report(self, row):
        if row["kind"] == "train" and row["step"] == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def start(tmp_path, name, *layers, callbacks=()):
    config = resolve(SMALL, *layers)
    run = RunFolder.create(tmp_path / name, config)
    return assemble(config, run, callbacks)


def copied_state(trainer):
    return {k: v.clone() for k, v in trainer.model.state_dict().items()}


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param(
            {"optimizer": {"ema": 0.9, "clip_norm": 1.0, "decay_norms": False}},
            marks=pytest.mark.slow,
        ),
        {"streams": {"classify": {"augmentation": {"mix": "both", "crop_padding": 1}}}},
        pytest.param(
            {
                "optimizer": {"kind": "muon", "schedule": "linear", "ema": 0.9, "ema_warmup": True},
                "terms": {"ce": {"label_smoothing": 0.1}},
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=["plain", "averaged", "augmented", "muon"],
)
def test_resume_after_interrupt_is_bit_identical(tmp_path, layer):
    whole = start(tmp_path, "whole", layer)
    whole.fit()

    cut = start(tmp_path, "cut", layer, callbacks=[StopAt(5)])
    with pytest.raises(Interrupted, match="after step 5"):
        cut.fit()
    resumed = assemble(cut.config, RunFolder.open(tmp_path / "cut"))
    assert resumed.step == 5
    resumed.fit()

    for key, value in copied_state(whole).items():
        assert torch.equal(value, copied_state(resumed)[key]), key
    saved = [ebmkit.load(tmp_path / name).state_dict() for name in ("whole", "cut")]
    for key in saved[0]:
        assert torch.equal(saved[0][key], saved[1][key]), key
    columns = ("step", "kind", "ce", "dsm", "accuracy", "psnr_25")
    logs = [
        [{k: row.get(k) for k in columns} for row in RunFolder(tmp_path / name).metrics()]
        for name in ("whole", "cut")
    ]
    assert logs[0] == logs[1]


@pytest.mark.slow
def test_resume_after_a_crash_repeats_the_steps_since_the_last_checkpoint(tmp_path):
    class Crash:
        def report(self, row):
            if row["step"] == 5:
                raise RuntimeError("power cut")

    whole = start(tmp_path, "whole")
    whole.fit()
    crashed = start(tmp_path, "crashed", callbacks=[Crash()])
    with pytest.raises(RuntimeError, match="power cut"):
        crashed.fit()
    resumed = assemble(crashed.config, RunFolder.open(tmp_path / "crashed"))
    assert resumed.step == 3
    resumed.fit()
    assert all(torch.equal(v, copied_state(resumed)[k]) for k, v in copied_state(whole).items())
    steps = [r["step"] for r in resumed.run.metrics() if r["kind"] == "train"]
    assert steps == list(range(1, 9))


def test_runs_are_bit_identical_only_with_the_same_seed(tmp_path):
    first, again, other = (
        start(tmp_path, name, {"seed": seed, "steps": 3})
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    for trainer in (first, again, other):
        trainer.fit()
    assert all(torch.equal(v, copied_state(again)[k]) for k, v in copied_state(first).items())
    assert not all(torch.equal(v, copied_state(other)[k]) for k, v in copied_state(first).items())


def test_nan_loss_stops_before_the_update(tmp_path):
    trainer = start(tmp_path, "run")
    with torch.no_grad():
        trainer.model.head.density.weight.fill_(float("inf"))
    before = copied_state(trainer)
    with pytest.raises(ebmkit.UserError, match="'dsm' is nan at step 1: stopped before"):
        trainer.fit()
    for key, value in before.items():
        assert torch.equal(value, copied_state(trainer)[key])


def test_nan_or_inf_gradient_stops_before_the_update(tmp_path, monkeypatch):
    trainer = start(tmp_path, "run")
    weight = trainer.model.head.density.weight
    weight.register_hook(lambda gradient: gradient * float("inf"))
    before = copied_state(trainer)
    with pytest.raises(ebmkit.UserError, match=r"gradient's norm is (inf|nan) at step 1: stopped"):
        trainer.fit()
    assert all(torch.equal(v, copied_state(trainer)[k]) for k, v in before.items())


def test_reference_size_is_the_training_size(tmp_path):
    crops = {"streams": {"denoise": {"augmentation": {"crop_size": 4}}}}
    trainer = start(tmp_path, "run", crops)
    assert trainer.model.reference_size == trainer.card.image_size == (4, 4)
    assert start(tmp_path, "whole").model.reference_size == (8, 8)


def test_stream_unusable_for_its_objective_is_refused(tmp_path):
    with pytest.raises(ebmkit.UserError, match="'dsm' learns from noise, and stream 'denoise' has"):
        start(tmp_path, "a", {"streams": {"denoise": {"noise": {"kind": "none"}}}})
    with pytest.raises(ebmkit.UserError, match="crop_size 99 is larger than the images"):
        start(tmp_path, "b", {"streams": {"denoise": {"augmentation": {"crop_size": 99}}}})


def test_log_is_cleared_if_the_run_has_no_checkpoint(tmp_path):
    trainer = start(tmp_path, "run")
    trainer.run.log({"kind": "train", "step": 1})
    assemble(trainer.config, RunFolder.open(tmp_path / "run"))
    assert trainer.run.metrics() == []


def test_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    trainer = start(tmp_path, "run", callbacks=[StopAt(2)])
    with pytest.raises(Interrupted):
        trainer.fit()
    path = tmp_path / "run" / "checkpoints" / "step-00000002.pt"
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    again = assemble(trainer.config, RunFolder.open(tmp_path / "run"))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ebmkit.UserError, match="No space left on device"):
        again.fit()
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []


def test_validation_measures_losses_accuracy_and_psnr(tmp_path):
    trainer = start(tmp_path, "run")
    trainer.fit()
    rows = [row for row in trainer.run.metrics() if row["kind"] == "validation"]
    assert [row["step"] for row in rows] == [4, 8]
    assert {"accuracy", "psnr_25", "ce", "dsm"} <= rows[0].keys()


@pytest.mark.parametrize("name", ["digits", "folder"])
def test_run_without_validation_trains_on_all_images(tmp_path, name):
    data_dir, total = (None, 1437) if name == "digits" else (tmp_path, 60)
    if name == "folder":
        image_folder(tmp_path / "train", count=30)
    data = {"dataset": {"name": name, "data_dir": data_dir}}
    config = resolve(SMALL, data, {"validation_images": 0})
    trainer = assemble(config)
    assert len(trainer.train) == total
    assert trainer.validator is None
    held_out = keys(load_dataset(name, data_dir, "validation"))
    assert set(held_out) < set(keys(trainer.train))
    limited = assemble(resolve(SMALL, data, {"validation_images": 0, "dataset": {"limit": 55}}))
    assert keys(limited.train) == keys(trainer.train)[:55]


def test_best_weights_are_those_of_the_best_validation(tmp_path, monkeypatch):
    for name, values in (("first", [1.0, 2.0]), ("second", [2.0, 1.0])):
        trainer = start(tmp_path, name, {"steps": 4, "validate_every": 2})
        summaries = iter(values)
        monkeypatch.setattr(TrainingLoss, "summary", lambda *_, s=summaries: next(s))
        trainer.fit()
        best = ebmkit.load(tmp_path / name, weights="best").state_dict()
        last = ebmkit.load(tmp_path / name, weights="last").state_dict()
        assert all(torch.equal(best[k], last[k]) for k in best) == (name == "second")


def test_cosine_schedule_equals_torch():
    config = resolve({"optimizer": {"lr": 0.1}}, recipe="digits-adamw").optimizer
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    for step in range(50):
        assert learning_rate(config, step, 50) == pytest.approx(schedule.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    ("schedule", "torch_schedule"),
    [
        ("linear", lambda o, n: torch.optim.lr_scheduler.LinearLR(o, 1.0, 1e-12, n)),
        (
            "warmup-stable-decay",  # 40 steps; the rate falls in the last quarter
            lambda o, n: torch.optim.lr_scheduler.SequentialLR(
                o,
                [
                    torch.optim.lr_scheduler.LinearLR(o, 1 / 5, 1.0, 4),
                    torch.optim.lr_scheduler.LinearLR(o, 1.0, 1e-12, n // 4),
                ],
                [3 * n // 4],
            ),
        ),
    ],
)
def test_linear_and_warmup_stable_decay_schedules_equal_torch(schedule, torch_schedule):
    stable = schedule == "warmup-stable-decay"
    own = {"decay_share": 0.25, "warmup_steps": 5} if stable else {}
    chosen = {"optimizer": {"lr": 0.1, "schedule": schedule, **own}}
    config = resolve(chosen, recipe="digits-adamw").optimizer
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of SequentialLR
        reference = torch_schedule(optimizer, 40)
        for step in range(40):
            expected = pytest.approx(reference.get_last_lr()[0], rel=1e-9)
            assert learning_rate(config, step, 40) == expected, step
            optimizer.step()
            reference.step()
    assert learning_rate(config, 40, 40) == 0


@pytest.mark.slow
def test_run_that_learns_nothing_warns():
    """Nothing overflows: Muon bounds the update, and group norm rescales weights of any size."""
    layer = {
        "model": {"backbone": {"width": 4, "channels_per_group": 4}},
        "steps": 100,
        "validate_every": 50,
        "log_every": 50,
    }
    trainer = assemble(resolve(SMALL, layer, {"optimizer": {"lr": 10}}, recipe="digits"), None)
    with pytest.warns(
        UserWarning, match=r"learnt nothing: ce = .*\(log 10 = 2\.30\) and dsm ="
    ) as caught:
        trainer.fit()
    assert "optimizer.lr = 10" in str(caught[0].message)
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("means", "steps", "warns"),
    [
        ({"ce": 2.30, "dsm": 0.98}, 100, True),
        ({"ce": 2.30, "dsm": 0.98}, 99, False),
        ({"ce": 2.30, "dsm": 0.90}, 100, False),
        ({"ce": 1.50, "dsm": 1.00}, 100, False),  # denoising improves later than classification
    ],
)
def test_warning_at_chance_level_depends_on_losses_and_length(means, steps, warns):
    config = resolve({"steps": steps}, recipe="digits-adamw")
    loss = TrainingLoss(ebmkit.create_model("mlp", 10, 1), parse_objective("ce+dsm"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_if_at_chance(means, loss, 10, config)
    assert bool(caught) == warns


def test_norm_weights_can_be_excluded_from_weight_decay():
    model = ebmkit.create_model("gradresnet18", 10, 1, width=8)
    config = resolve({"optimizer": {"decay_norms": False}}, recipe="digits-adamw").optimizer
    groups = make_optimizer(model, config).param_groups
    assert [g["weight_decay"] for g in groups] == [0.05, 0.0]
    norms = [
        p for n, p in model.named_parameters() if "norm" in n or n.endswith("shortcut.1.weight")
    ]
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in norms}
    everything = make_optimizer(model, resolve(recipe="digits-adamw").optimizer).param_groups
    assert len(everything) == 1  # the paper decays all weights


def test_run_folders_are_never_overwritten(tmp_path):
    config = resolve(SMALL)
    (tmp_path / "run").mkdir()
    RunFolder.create(tmp_path / "run", config)  # an empty folder is fine
    with pytest.raises(ebmkit.UserError, match="exists: resume it by --resume"):
        RunFolder.create(tmp_path / "run", config)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ebmkit.UserError, match="exists"):
        RunFolder.create(tmp_path / "file", config)
    assert (tmp_path / "file").read_text() == "precious"
    with pytest.raises(ebmkit.UserError, match="no run folder"):
        RunFolder.open(tmp_path / "absent")


def test_run_records_its_environment(tmp_path):
    run = RunFolder.create(tmp_path / "run", resolve(SMALL))
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert {"python", "ebmkit", "git_commit", "command", "gpu"} <= environment.keys()


def test_resume_with_another_configuration_is_refused_by_field(tmp_path):
    def resolve(*layers):
        return training.resolve(*layers, recipe="digits-adamw")

    run = RunFolder.create(tmp_path / "run", resolve(SMALL))
    run.check_config(resolve(SMALL, {"log_every": 5, "device": "auto"}))
    with pytest.raises(ebmkit.UserError, match=r"optimizer\.lr was 0\.003 and is now 0\.1"):
        run.check_config(resolve(SMALL, {"optimizer": {"lr": 0.1}}))
    with pytest.raises(ebmkit.UserError, match=r"dataset\.name was 'digits'"):
        run.check_config(resolve(SMALL, {"dataset": {"name": "patches"}}))
    with pytest.raises(ebmkit.UserError, match=r"dataset\.limit was None and is now 100"):
        run.check_config(resolve(SMALL, {"dataset": {"limit": 100}}))
    run.check_config(resolve(SMALL, {"dataset": {"data_dir": "moved", "workers": 2}}))


@pytest.mark.parametrize(("subset", "counts"), [("first", None), ("balanced", [5] * 10)])
def test_limit_takes_the_first_images_or_a_balanced_subset_of_the_seed(tmp_path, subset, counts):
    def images(seed):
        limited = {"dataset": {"limit": 50, "subset": subset}, "seed": seed}
        config = resolve(SMALL, limited, recipe="digits-adamw")
        return assemble(config).train

    first, again, other = images(0), images(0), images(1)
    assert len(first) == 50
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.images, other.images) == (subset == "first")
    if counts is not None:
        assert first.labels.bincount().tolist() == counts


def test_damaged_checkpoint_is_reported(tmp_path):
    trainer = start(tmp_path, "run", {"steps": 3})
    trainer.fit()
    path = tmp_path / "run" / "checkpoints" / "step-00000003.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ebmkit.UserError, match="damaged"):
        assemble(trainer.config, RunFolder.open(tmp_path / "run"))


def test_code_in_a_checkpoint_is_not_executed(tmp_path):
    class MaliciousPickle:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "harm"),))

    trainer = start(tmp_path, "run", {"steps": 3})
    torch.save({"step": MaliciousPickle()}, tmp_path / "run" / "checkpoints" / "step-00000003.pt")
    accept_files(tmp_path / "run", ["checkpoints/step-00000003.pt"])
    for _ in range(2):  # with a manifest that lists the file, then without one
        with pytest.raises(ebmkit.UserError, match=r"damaged: .* no intact checkpoint is left"):
            trainer.run.load_checkpoint()
        (tmp_path / "run" / "manifest.json").unlink(missing_ok=True)
    assert not (tmp_path / "harm").exists()


def test_batch_norm_and_relu_cause_a_warning(tmp_path):
    layer = {"model": {"backbone": {"norm": "batch", "activation": "relu"}}, "steps": 2}
    trainer = start(tmp_path, "run", layer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit()
    messages = " ".join(str(w.message) for w in caught)
    assert "BatchNorm" in messages
    assert "ReLU" in messages
    assert "table 3" in messages
    statistics = trainer.model.backbone.stages[0][0].norm.running_mean
    assert statistics.abs().sum() > 0


@pytest.mark.slow
def test_run_of_an_earlier_version_resumes(tmp_path):
    """Its configuration lacks later fields, whose defaults change nothing."""
    cut = start(tmp_path, "cut", callbacks=[StopAt(3)])
    with pytest.raises(Interrupted):
        cut.fit()
    path = tmp_path / "cut" / "config.yaml"
    values = yaml.safe_load(path.read_text())
    del values["negatives"], values["rollback"], values["streams"]["generate"]
    del values["optimizer"]["sharpness"]
    path.write_text(yaml.safe_dump(values))
    (tmp_path / "cut" / "manifest.json").unlink()
    run = RunFolder.open(tmp_path / "cut")
    run.check_config(resolve(run.config()))
    state = run.load_checkpoint()
    del state["rollback"]
    torch.save(state, tmp_path / "cut" / "checkpoints" / "last.pt")
    (tmp_path / "cut" / "checkpoints" / "step-00000003.pt").unlink()
    resumed = assemble(resolve(run.config()), run)
    assert resumed.step == 3
    resumed.fit()


@pytest.mark.slow
def test_run_of_an_earlier_version_without_validation_keeps_its_images(tmp_path):
    """Earlier versions held images out also with validation_images 0."""
    earlier = {"validation_images": 0, "dataset": {"hold_out": True}}
    whole, cut = (start(tmp_path, name, earlier) for name in ("whole", "cut"))
    whole.fit()
    cut.callbacks = [StopAt(3)]
    with pytest.raises(Interrupted):
        cut.fit()
    path = tmp_path / "cut" / "config.yaml"
    values = yaml.safe_load(path.read_text())
    del values["dataset"]["hold_out"]
    path.write_text(yaml.safe_dump(values))
    accept_files(tmp_path / "cut", ["config.yaml"])
    run = RunFolder.open(tmp_path / "cut")
    config = resolve(run.config(), {"validation_images": 0})
    run.check_config(config)
    with pytest.raises(ebmkit.UserError, match="validation_images was 0 and is now 5"):
        run.check_config(resolve(run.config(), {"validation_images": 5}))
    with pytest.raises(ebmkit.UserError, match="hold_out was True and is now False"):
        run.check_config(resolve(run.config(), {"dataset": {"hold_out": False}}))
    resumed = assemble(config, run)
    assert len(resumed.train) == 1293
    resumed.fit()
    for name, value in copied_state(resumed).items():
        assert torch.equal(value, whole.model.state_dict()[name])


def test_run_starts_from_the_weights_of_another_and_records_it(tmp_path):
    first = start(tmp_path, "first", {"steps": 1})
    first.fit()
    weights = copied_state(first)
    second = start(tmp_path, "second", {"steps": 1, "seed": 1, "init": str(tmp_path / "first")})
    assert all(torch.equal(v, weights[name]) for name, v in copied_state(second).items())
    second.fit()
    document = json.loads((tmp_path / "second/init.json").read_text())
    assert document["source"] == str(tmp_path / "first")
    assert sorted(document["loaded"]) == sorted(weights)
    assert (document["missing"], document["unused"], document["reshaped"]) == ([], [], {})
    run = RunFolder.open(tmp_path / "second")
    assert run.config()["init"] == str(tmp_path / "first")
    os.rename(tmp_path / "first", tmp_path / "moved")  # a resumed run needs its checkpoint only
    resumed = assemble(resolve(run.config()), run)
    assert resumed.initial is None
    assert all(torch.equal(v, copied_state(second)[n]) for n, v in copied_state(resumed).items())
