"""Publishing the weights of a run: figures from its JSON, float16 weights, unfinished runs."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml
from ebmkit_tests.support.command_line import ebmkit_command

import ebmkit
from ebmkit import pretrained
from ebmkit.errors import UserError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "publish_weights.py"

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("count_cost_roughly")]

TOLD = ["--task", "joint", "--recipe", "digits", "--description", "a toy", "--data", "digits"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("publish_weights", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def evaluation(folder, accuracy, psnr):
    """Documents of the suites ``classify`` and ``denoise`` with these values."""
    folder.mkdir(parents=True)
    common = {"split": "test", "dataset": "digits", "images": 9, "of": 9, "seed": 0}
    common["environment"] = {"cores": 2, "torch": "2", "git_commit": "abc"}
    own = {"accuracy": accuracy, "accuracy_interval": [accuracy - 0.1, accuracy + 0.1]}
    (folder / "classify.json").write_text(json.dumps(common | own))
    estimate = {"value": psnr, "low": psnr - 1, "high": psnr + 1, "count": 9}
    own = {"denoisers": {"blind": {"psnr": {"25": estimate}}}, "psnr_noisy": {"25": 20.0}}
    (folder / "denoise.json").write_text(json.dumps(common | own))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    done = ebmkit_command(
        "train", "--backbone", "gradresnet10", "--width", "8", "--steps", "3", "--no-evaluate",
        "--set", "streams.classify.batch_size=16", "--set", "streams.denoise.batch_size=16",
        "--set", "validation_images=16", "--out", "run", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    evaluation(folder / "run" / "evaluation", 0.5, 25.0)
    return folder / "run"


def test_a_published_model_is_that_of_the_run_in_float16(script, run, tmp_path, monkeypatch):
    evaluation(tmp_path / "stored", 0.4375, 24.5)
    given = script.parser().parse_args(
        [str(run), "toy", *TOLD, "--limit", "not trained", "--stored", str(tmp_path / "stored")]
    )
    script.publish(run, "toy", given, tmp_path / "weights")
    monkeypatch.setattr(pretrained, "WEIGHTS", tmp_path / "weights")
    card, model, own = pretrained.read_card("toy"), ebmkit.load("toy"), ebmkit.load(run)
    for mine, theirs in zip(model.parameters(), own.parameters(), strict=True):
        assert torch.equal(mine, theirs.half().float())
    assert model.card == own.card
    accuracy, psnr = card.figures
    assert (accuracy.value, accuracy.low, accuracy.float32) == (0.4375, 0.3375, 0.5)
    assert accuracy.float16_cost() == "-6.2500"  # percentage points
    assert (psnr.value, psnr.noisy, psnr.float16_cost()) == (24.5, 20.0, "-0.5000")
    assert (card.training.steps, card.training.of) == (3, 3)
    cost = json.loads((run / "cost.json").read_text())
    assert card.training.flops == 3 * sum(cost["flops"].values())
    assert yaml.safe_load((tmp_path / "weights/toy/config.yaml").read_text())["steps"] == 3


def test_an_unfinished_run_gets_what_the_end_of_training_adds(script, run, tmp_path, monkeypatch):
    monkeypatch.setattr("ebmkit.training.setup.MIN_STEPS", 0)
    config = run / "config.yaml"
    before = config.read_text()
    config.write_text(before.replace("\nsteps: 3\n", "\nsteps: 5\n"))
    given = script.parser().parse_args([str(run), "toy", *TOLD])
    try:
        folder = script.publish(run, "toy", given, tmp_path)
    finally:
        config.write_text(before)
    card = pretrained.PretrainedCard.model_validate_json((folder / "card.json").read_text())
    assert (card.training.steps, card.training.of) == (3, 5)
    assert "float32 weights of the run" in card.measured
    model = ebmkit.load(folder)
    assert model.class_gaussians is not None
    assert model.card.sigma_calibration


def test_models_that_are_too_large_are_refused(script, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").write_bytes(bytes(15_000_000))
    script.check_size("toy", 5_000_000, tmp_path)
    for size in (5_000_001, 8_000_001):
        with pytest.raises(UserError, match="the limits are 8,000,000 and 20,000,000"):
            script.check_size("toy", size, tmp_path)
