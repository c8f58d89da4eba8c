"""`ebmkit.train`: the command line's training, on any data and model."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ebmkit_tests.support.command_line import ebmkit_command
from torch import nn

import ebmkit
from ebmkit.data import load_dataset
from ebmkit.errors import UserError
from ebmkit.models import create_model
from ebmkit.training import RunFolder

pytestmark = pytest.mark.usefixtures("count_cost_roughly")

BATCHES = {"classify": {"batch_size": 8}, "denoise": {"batch_size": 8}}
FAST = {"width": 8, "steps": 4, "streams": BATCHES, "log_every": 2, "validate_every": 2,
        "validation_images": 8, "device": "cpu", "progress": False}  # fmt: skip
NAME = "gradresnet10"
IMAGES = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
PAIR = IMAGES, torch.arange(60) % 3


def command(*arguments, cwd):
    ended = ebmkit_command(*arguments, cwd=cwd)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def weights(run):
    return ebmkit.load(run).state_dict()


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_same_bits_as_the_command_line_by_name_and_as_objects(tmp_path):
    options = ["--backbone", NAME, "--steps", 2, "--width", 8, "--device", "cpu", "--no-evaluate"]
    options += ["--set", "streams.classify.batch_size=8", "--set", "streams.denoise.batch_size=8"]
    options += ["--set", "validation_images=16"]
    command("train", *options, "--out", "shell", cwd=tmp_path)
    shell = weights(tmp_path / "shell")
    fast = {"steps": 2, "width": 8, "device": "cpu", "progress": False, "streams": BATCHES}
    fast |= {"validation_images": 16}
    named = ebmkit.train(NAME, dataset="digits", out=tmp_path / "named", **fast)
    assert_equal(weights(tmp_path / "named"), shell)
    held = load_dataset("digits", split="validation")
    own = ebmkit.train(
        NAME, dataset=load_dataset("digits"), validation=held, recipe="digits", **fast
    )
    assert own.history[-1].items() >= {k: v for k, v in named.history[-1].items()
                                       if k != "images_per_s"}.items()  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("held_out", ["given", "split", "none"])
def test_run_of_own_data_is_resumed_and_evaluated_by_the_command_line(tmp_path, held_out):
    options = FAST | {"validation": PAIR if held_out == "given" else None}
    options |= {"validation_images": 0} if held_out == "none" else {}
    whole = ebmkit.train(NAME, PAIR, test=PAIR, out=tmp_path / "whole", **options)
    cut = ebmkit.train(
        NAME, PAIR, out=tmp_path / "cut", **options, test=PAIR,
        on_step=lambda trainer: trainer.stop() if trainer.step == 3 else None,
    )  # fmt: skip
    assert cut.trainer.step == 3
    command("train", "--resume", "cut", "--no-evaluate", cwd=tmp_path)
    assert_equal(weights(tmp_path / "cut"), whole.model.state_dict())
    command("evaluate", "cut", "--suite", "classify", cwd=tmp_path)
    assert (tmp_path / "cut" / "evaluation" / "classify.json").is_file()
    command("verify", "cut", cwd=tmp_path)


@pytest.mark.slow
def test_resume_in_python_gives_the_same_bits(tmp_path):
    whole = ebmkit.train(NAME, PAIR, **FAST)
    stop = {"on_validation": lambda trainer, row: trainer.stop()}
    ebmkit.train(NAME, PAIR, out=tmp_path / "cut", **FAST, **stop)
    again = ebmkit.train(NAME, PAIR, out=tmp_path / "cut", resume=True, **FAST)
    assert_equal(again.model.state_dict(), whole.model.state_dict())
    assert [row["step"] for row in again.history] == [2, 2, 4, 4]
    assert len(RunFolder.open(tmp_path / "cut").metrics()) == 4
    with pytest.raises(UserError, match="exists"):
        ebmkit.train(NAME, PAIR, out=tmp_path / "cut", **FAST)


def test_without_out_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = ebmkit.train(NAME, PAIR, **FAST)
    assert result.run is None
    assert not list(tmp_path.iterdir())
    kinds = [row["kind"] for row in result.history]
    assert kinds == ["train", "validation"] * 2


@pytest.mark.parametrize(
    "backbone",
    [
        lambda: nn.Sequential(nn.Conv2d(1, 6, 3), nn.GELU()),
        lambda: nn.Sequential(nn.Conv2d(1, 6, 3), nn.GELU(), nn.Flatten()),
    ],
    ids=["maps", "features"],
)
def test_a_module_is_a_backbone(backbone):
    network = backbone()
    result = ebmkit.train(network, PAIR, **{k: v for k, v in FAST.items() if k != "width"})
    assert result.model.backbone.network is network
    assert result.model.logits(IMAGES[:2]).shape == (2, 3)


def test_a_model_is_trained_further_and_its_run_can_be_loaded(tmp_path):
    model = create_model(NAME, num_classes=3, in_channels=1, width=8, head="logit")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast = {k: v for k, v in FAST.items() if k != "width"} | {"lr": 1e-12, "steps": 1}
    result = ebmkit.train(model, PAIR, "ce", out=tmp_path / "run", **fast)
    assert result.model is model
    for name, value in weights(tmp_path / "run").items():
        torch.testing.assert_close(value, before[name], atol=1e-6, rtol=0)
    assert result.trainer.config.backbone == NAME
    model.backbone.stem = nn.Sequential(model.backbone.stem)  # no longer what its settings build
    ebmkit.train(model, PAIR, "ce", out=tmp_path / "changed", **fast)
    with pytest.raises(UserError, match="composed by hand"):
        ebmkit.load(tmp_path / "changed")


def test_callbacks_are_called_in_order():
    calls = []

    class Recorder(ebmkit.training.Callback):
        def on_start(self, trainer):
            calls.append("start")

        def report(self, row):
            calls.append(row["kind"])

        def on_end(self, trainer):
            calls.append("end")

    ebmkit.train(
        NAME, PAIR, callbacks=[Recorder()], **FAST,
        on_step=lambda trainer: calls.append(trainer.step),
        on_validation=lambda trainer, row: calls.append(sorted(row)),
    )  # fmt: skip
    row = ["accuracy", "ce", "dsm", "kind", "psnr_25", "step"]
    assert calls == ["start", 1, "train", "validation", row, 2, 3, "train", "validation", row, 4,
                     "end"]  # fmt: skip


def test_a_callback_that_cannot_start_ends_those_before_it():
    calls = []

    class Login(ebmkit.training.Callback):
        def on_start(self, trainer):
            raise ValueError("no network")

        def on_end(self, trainer):
            calls.append("end of what did not start")

    before = SimpleNamespace(on_end=lambda trainer: calls.append("end"))
    with pytest.raises(ValueError, match="no network"):
        ebmkit.train(NAME, PAIR, callbacks=[before, Login()], **FAST)
    assert calls == ["end"]


@pytest.mark.slow
def test_streaming_data_set_of_hugging_face_trains_as_its_images_do():
    datasets = pytest.importorskip("datasets")
    pixels, labels = (IMAGES[:, 0] * 255).to(torch.uint8), PAIR[1].tolist()

    def rows():
        yield from ({"image": x.numpy(), "label": c} for x, c in zip(pixels, labels, strict=True))

    stream = datasets.IterableDataset.from_generator(rows)
    streamed = ebmkit.train(NAME, stream, **FAST)
    plain = ebmkit.train(NAME, (pixels[:, None], labels), **FAST)
    assert_equal(streamed.model.state_dict(), plain.model.state_dict())


@pytest.mark.slow
def test_epochs_and_batch_size(tmp_path):
    """Two passes over 59 images (one is held out) in batches of 16 are 8 steps."""
    fast = {k: v for k, v in FAST.items() if k not in ("steps", "streams")}
    fast |= {"epochs": 2, "batch_size": 16, "out": tmp_path / "run"}
    config = ebmkit.train(NAME, PAIR, **fast).trainer.config
    assert config.steps == 8
    assert {config.stream(name).batch_size for name in ("classify", "denoise", "generate")} == {16}
    assert RunFolder.open(tmp_path / "run").config()["steps"] == 8
    assert ebmkit.train(NAME, PAIR, resume=True, **fast).trainer.step == 8
    with pytest.raises(UserError, match="steps was 8 and is now 12"):
        ebmkit.train(NAME, PAIR, resume=True, **fast | {"epochs": 3})


def test_says_what_is_trained_and_what_was_loaded(tmp_path, capsys):
    quiet = ebmkit.train(NAME, PAIR, out=tmp_path / "run", **FAST)
    assert capsys.readouterr().out == ""
    fast, init = FAST | {"progress": True}, str(tmp_path / "run")
    ebmkit.train(NAME, PAIR, init=init, **fast)
    lines, count = capsys.readouterr().out.splitlines(), len(quiet.model.state_dict())
    assert lines[0] == f"{count} of {count} tensors are loaded from {init}"
    trained = f"ce+dsm on images (59 images), {NAME} with"
    assert lines[1].startswith(trained)
    assert lines[1].endswith("parameters, 4 steps on cpu (fp32)")
    ebmkit.train(NAME, PAIR, out=tmp_path / "run", resume=True, **fast)
    assert "this run is finished: 4 of 4 steps are done" in capsys.readouterr().out
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Tanh())
    ebmkit.train(net, PAIR, objective="ce", **{k: v for k, v in fast.items() if k != "width"})
    assert "Sequential with" in capsys.readouterr().out


@pytest.mark.slow
def test_labels_are_numbered_as_in_a_model_that_is_trained_further():
    fast = {k: v for k, v in FAST.items() if k != "width"}
    model = ebmkit.train(NAME, PAIR, class_names=["fox", "dog", "cat"], **FAST).model
    again = ebmkit.train(model, (IMAGES, ["cat", "dog"] * 30), validation=(IMAGES, ["fox"] * 60),
                         **fast).trainer  # fmt: skip
    assert again.train.class_names == ("fox", "dog", "cat")
    assert again.train.labels.unique().tolist() == [1, 2]
    assert again.validation.labels.unique().tolist() == [0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"callbacks": ["wand"]}, "unknown logger 'wand': did you mean 'wandb'"),
        ({"callbacks": [7]}, "7 is no callback: give an object"),
        ({"callbacks": ["csv"]}, "no run folder for 'metrics.csv': give out"),
        ({"callbacks": [ebmkit.training.CSVLog]}, "CSVLog.* is no callback"),
        ({"epochs": 2, "steps": 3}, "epochs = 2 and steps exclude each other"),
        ({"dataset": "digits", "class_names": ["a"]}, "class_names is for data given as objects"),
        ({"dataset": IMAGES}, "objective 'ce' needs labels, and this data set has none"),
        ({"step": 3}, "unknown option 'step': did you mean steps"),
        ({"learning_rate": 0.1}, "unknown option 'learning_rate': did you mean lr"),
        ({"batchsize": 8}, "'batchsize': did you mean batch_size"),
        ({"max_epochs": 8}, "'max_epochs': did you mean epochs"),
        ({"weight_decay": 0.1}, r"write \*\*\{'optimizer.weight_decay': 0.1\}"),
        ({"optimizer": "sgd"}, r"write \*\*\{'optimizer.kind': 'sgd'\}"),
        ({"zzz": 1}, "there is no field 'zzz': fields here"),
        (
            {"model": create_model(NAME, 10, 1, width=8)},
            "10 classes, and .* has 3: build",
        ),
        ({"model": create_model(NAME, 3, 3, width=8)}, r"takes images of 3 channel\(s\)"),
        ({"model": nn.Conv2d(3, 4, 3)}, "Conv2d takes no images of 1x8x8: "),
        ({"model": nn.Flatten(0)}, "Flatten is no backbone: it must return Features"),
        ({"dataset": "digits", "validation": PAIR}, "validation is for data given as objects"),
        ({"resume": True}, "resume=True needs the run folder"),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(options, message):
    fast = {k: v for k, v in FAST.items() if k != "width"}
    with pytest.raises(UserError, match=message):
        ebmkit.train(**{"model": NAME, "dataset": PAIR} | fast | options)


def test_representations_fit_on_a_line_or_two():
    result = ebmkit.train(NAME, PAIR, **FAST)
    for thing in (result, result.model, result.trainer, result.trainer.config):
        assert len(repr(thing)) < 320
        assert "\n" not in repr(thing)
    assert "3 classes, ce+dsm on images, 4 steps" in repr(result)


README = (Path(__file__).parents[2] / "README.md").read_text()
SECTION = README.partition("## Your own data\n")[2].partition("\n## ")[0]
SNIPPETS = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)


@pytest.mark.parametrize("code", SNIPPETS, ids=["TensorDataset", "datasets", "timm"])
def test_snippets_of_the_readme_run(code, tmp_path, monkeypatch):
    if "datasets." in code:
        pytest.importorskip("datasets")
    if "timm:" in code:
        pytest.importorskip("timm")
    assert len(code.splitlines()) < 10
    monkeypatch.chdir(tmp_path)
    exec(re.sub(r"steps=\d+", "steps=1", code), {})
