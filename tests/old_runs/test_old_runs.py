"""Runs that earlier versions wrote still load, go on, are evaluated and sampled from.

`make.py` beside it says by which commit and command each was made. What is promised across
versions is the meaning of a run, not its last bits: outputs agree to rounding, and so do the losses
of the steps that follow.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from ebmkit_tests.support.command_line import ebmkit_command

import ebmkit
from ebmkit.storage.verify import verify_run
from ebmkit.training import RunFolder, resolve
from ebmkit.training.loop import assemble

HERE = Path(__file__).resolve().parent
RUNS = sorted(path.name for path in HERE.iterdir() if (path / "config.yaml").is_file())
SAMPLED = [name for name in RUNS if (HERE / name / "unfinished-samples").is_dir()]

pytestmark = pytest.mark.usefixtures("counted_once")


@pytest.fixture
def run(request, tmp_path):
    return shutil.copytree(HERE / request.param, tmp_path / "run")


def on_every(names):
    return pytest.mark.parametrize("run", names, indirect=True)


def test_there_is_a_run_of_each_stage():
    assert len(RUNS) >= 7


@on_every(RUNS)
def test_an_old_run_computes_what_it_computed(run):
    """Log-density, logits and score of a fixed image, as the version's own code gave them."""
    model = ebmkit.load(run)
    y = torch.linspace(0, 1, 64, dtype=torch.float32).reshape(1, 1, 8, 8)
    found = {
        "log_density": model.log_density(y),
        "logits": model.logits(y),
        "score": model.score(y).flatten(),
    }
    expected = json.loads((run / "expected.json").read_text())
    for name, value in found.items():  # one float32 rounding in a thousand operations or so
        torch.testing.assert_close(value, torch.tensor(expected[name]), rtol=1e-4, atol=1e-5)
    ebmkit.load(run, weights="best")


@on_every(
    [name if name == RUNS[-1] else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_an_old_run_goes_on_to_its_end(run):
    """From step 4, with the losses of a run that today's code begins and ends."""
    went_on = ebmkit_command("train", "--resume", run, "--no-evaluate", cwd=run.parent)
    assert went_on.returncode == 0, went_on.stderr
    assert "resuming after step 4" in went_on.stdout
    assert "warning" not in went_on.stderr
    folder = RunFolder.open(run)
    assert [r["step"] for r in folder.metrics() if r["kind"] == "train"] == list(range(1, 9))
    assert all(f.state in ("whole", "unknown") for f in verify_run(run))
    assert not (run / "checkpoints" / "last.pt").exists()
    config = resolve(folder.config())
    fresh = assemble(config, RunFolder.create(run.parent / "fresh", config))
    fresh.fit()
    term = fresh.loss.terms[0].name
    losses = [
        [r[term] for r in f.metrics() if r["kind"] == "train" and r["step"] > 4]
        for f in (folder, fresh.run)
    ]
    # the first of these steps sees what was saved; attacks then amplify a rounding step by step:
    # 2e-2 after four where two versions of PyTorch meet
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-2)
    assert losses[0] == pytest.approx(losses[1], rel=5e-2 if term == "adv" else 1e-2)


@on_every(RUNS[:1] + RUNS[-1:])
def test_an_old_run_is_evaluated(run):
    ended = ebmkit_command("evaluate", run, "--limit", 20, "--suite", "classify", cwd=run.parent)
    assert ended.returncode == 0, ended.stderr
    assert list(run.rglob("classify.json"))


@on_every(SAMPLED)
def test_an_old_sampling_job_goes_on(run):
    """In the second of its three batches; the first is kept as it is."""
    kept = run / "unfinished-samples" / "unfinished" / "batch-00000.safetensors"
    before = kept.read_bytes()
    words = ("-n", 6, "--batch-size", 2, "--sampler", "langevin", "--steps", 4)
    out = run / "unfinished-samples"
    ended = ebmkit_command("sample", run, *words, "--out", out, cwd=run.parent)
    assert ended.returncode == 0, ended.stderr
    assert json.loads((out / "sampling.json").read_text())["samples"] == 6
    assert before
