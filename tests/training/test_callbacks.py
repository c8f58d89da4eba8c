"""Loggers: TensorBoard, Weights & Biases, CSV."""

import csv
import io
import json
from types import SimpleNamespace

import pytest
import torch

import ebmkit
from ebmkit.storage.verify import verify_run
from ebmkit.terminal import CleanConsole
from ebmkit.training import CSVLog, TensorBoard, WeightsAndBiases
from ebmkit.training.callbacks import TrainingBar, example_images

pytestmark = pytest.mark.usefixtures("count_cost_roughly")

FAST = {"width": 8, "steps": 2, "log_every": 1, "validate_every": 2, "validation_images": 8,
        "device": "cpu", "progress": False,
        "streams": {n: {"batch_size": 4} for n in ("classify", "denoise")}}  # fmt: skip


def train(*callbacks, **options):
    return ebmkit.train("gradresnet10", "digits", callbacks=callbacks, **FAST, **options)


def test_csv_has_all_rows(tmp_path):
    result = train(CSVLog(tmp_path / "log.csv"))
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert [{k: v for k, v in row.items() if v} for row in rows] == [
        {k: str(v) for k, v in row.items()} for row in result.history
    ]


def test_tensorboard_has_curves_and_images(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(TensorBoard(tmp_path))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert {"train/ce", "train/lr", "validation/accuracy"} <= set(events.Tags()["scalars"])
    (image,) = events.Images("clean, noisy, denoised")
    assert (image.step, image.height, image.width) == (2, 24, 64)


@pytest.mark.slow
def test_weights_and_biases_gets_curves_and_images_offline(tmp_path):
    pytest.importorskip("wandb")
    train(WeightsAndBiases("test", mode="offline", dir=str(tmp_path)))
    (run,) = tmp_path.glob("wandb/offline-run-*")
    (events,) = run.glob("*.wandb")
    assert {n for n in (b"train/ce", b"validation/accuracy") if n in events.read_bytes()} != set()
    assert len(list(run.rglob("*.png"))) == 1


def test_weights_and_biases_gets_metrics_by_kind_and_the_configuration(monkeypatch):
    calls = []
    run = SimpleNamespace(log=lambda *a, **k: calls.append((a, k)), finish=lambda: calls.append(0))
    fake = SimpleNamespace(init=lambda **k: calls.append(k) or run, Image=lambda pixels: pixels)
    monkeypatch.setitem(__import__("sys").modules, "wandb", fake)
    train(WeightsAndBiases("mine"))
    assert calls[0]["project"] == "mine"
    assert json.dumps(calls[0]["config"])
    assert calls[0]["config"]["steps"] == 2
    rows = [set(arguments[0]) for arguments, _ in calls[1:-1]]
    assert "train/dsm" in rows[0]
    assert rows[-1] == {"clean, noisy, denoised"}
    assert calls[-1] == 0


def test_loggers_by_name_write_into_the_run_folder(tmp_path):
    pytest.importorskip("tensorboard")
    train("tensorboard", "csv", out=tmp_path / "run")
    assert "validation" in (tmp_path / "run" / "metrics.csv").read_text()
    assert len(list((tmp_path / "run" / "tensorboard").glob("events*"))) == 1
    assert verify_run(tmp_path / "run")


def test_weights_and_biases_without_a_connection_logs_offline(tmp_path, monkeypatch):
    calls = []

    def init(**options):
        calls.append(options)
        if options.get("mode") != "offline":
            raise ConnectionError("No API key configured")
        folder = str(tmp_path / "offline-run-1" / "files")
        return SimpleNamespace(log=lambda *a, **k: None, finish=lambda: None, dir=folder)

    fake = SimpleNamespace(init=init, Image=lambda pixels: pixels, Error=ConnectionError)
    monkeypatch.setitem(__import__("sys").modules, "wandb", fake)
    with pytest.warns(UserWarning, match=r"offline \(No API key configured\): .*offline-run-1$"):
        train("wandb", out=tmp_path / "run")
    assert [call["name"] for call in calls] == ["run", "run"]


def test_missing_logger_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ebmkit.UserError, match=r"pip install 'ebmkit-vision\[wandb\]'"):
        WeightsAndBiases()


def test_example_images_are_repeatable_and_absent_without_a_denoising_term():
    trainer = train().trainer
    first, state = example_images(trainer, 4), torch.get_rng_state()
    assert first.shape == (1, 24, 32)
    assert torch.equal(first, example_images(trainer, 4))
    assert torch.equal(state, torch.get_rng_state())
    assert example_images(train(objective="ce").trainer) is None


def test_lines_are_printed_without_a_terminal(capsys):
    ebmkit.train("gradresnet10", "digits", **FAST | {"progress": True})
    out = capsys.readouterr().out
    assert "step 2/2" in out
    assert "held-out: ce" in out
    assert TrainingBar is not None


def test_progress_bar_shows_the_last_held_out_figures(monkeypatch):
    monkeypatch.setattr("ebmkit.training.callbacks.console", terminal := CleanConsole(
        force_terminal=True, width=80, file=io.StringIO()
    ))  # fmt: skip
    trainer = SimpleNamespace(config=SimpleNamespace(steps=10), step=0)
    bar = TrainingBar()
    bar.on_start(trainer)
    bar.report({"kind": "train", "step": 4, "lr": 1, "ce": 2.5, "images_per_s": 90})
    bar.report({"kind": "validation", "step": 4, "accuracy": 0.25})
    bar.report({"kind": "train", "step": 5, "lr": 1, "ce": 1.5, "images_per_s": 90})
    bar.on_end(trainer)
    shown = terminal.file.getvalue()
    assert "held-out: accuracy 0.25 (step 4)" in shown
    assert shown.rindex("ce 1.5") < shown.rindex("held-out: accuracy 0.25 (step 4)")
