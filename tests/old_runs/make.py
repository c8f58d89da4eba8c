"""Makes the run folders in this folder, each with the code of an earlier version.

``python tests/old_runs/make.py [NAME ...]``, from a checkout with its history. A run of the
smallest network on digits is interrupted after step 4 of 8; if the version has sampling jobs, a job
of three batches is interrupted in the second. ``expected.json`` contains the outputs of that
version for a fixed image.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

TINY = [
    "--steps=8",
    "--no-evaluate",
    "--set=model.backbone.width=2",
    "--set=model.backbone.channels_per_group=2",
    "--set=log_every=1",
    "--set=validate_every=2",
    "--set=checkpoint_every=3",
    "--set=validation_images=20",
    "--set=device=cpu",
    "--set=optimizer.ema=0.9",
    "--set=streams.classify.batch_size=8",
    "--set=streams.denoise.batch_size=8",
]
JEM = [
    "--objective=jem",
    "--backbone=gradresnet18",
    "--set=negatives.buffer_size=20",
    "--set=negatives.steps=2",
    "--set=streams.generate.batch_size=8",
]
ADV = ["--objective=adv+dsm", "--set=objective.adv.eps=0.5", "--set=objective.adv.steps=2"]

RUNS = {
    "2026-11-20-first": ("8e26f95", TINY, False),
    "2026-11-21-speed": ("6897881", TINY, False),
    "2026-11-21-tables": ("71e687e", TINY, False),
    "2026-11-25-jem": ("f0c90fa", [*TINY, *JEM], False),
    "2026-11-26-sampling": ("0f622b9", TINY, True),
    "2026-11-26-jem": ("0f622b9", [*TINY, *JEM], False),
    "2026-11-26-adv": ("b19e35e", [*TINY, *ADV], True),
    "2026-11-26-manifest": ("df13dd3", [*TINY, *JEM], True),
}
"""Name -> commit, options of `ebmkit train`, and whether there is a sampling job."""

DRIVER = """
import json, os, signal, sys
import torch
folder, samples = sys.argv[1], sys.argv[2] == "True"
from ebmkit.training.runs import RunFolder
log = RunFolder.log
def stop(self, row):
    log(self, row)
    if row["step"] == 4 and row["kind"] == "train":
        os.kill(os.getpid(), signal.SIGINT)
RunFolder.log = stop
from ebmkit.cli import main
def run(*words):
    sys.argv = ["ebmkit", *words]
    try:
        main()
    except SystemExit as ended:
        return ended.code
import platform
platform.platform = lambda: "Linux"
assert run("train", *sys.argv[3:], "--out", folder) == 130
import ebmkit
model = ebmkit.load(folder)
y = torch.linspace(0, 1, 64, dtype=torch.float32).reshape(1, 1, 8, 8)
found = {
    "log_density": model.log_density(y).tolist(),
    "logits": model.logits(y).tolist(),
    "score": model.score(y).flatten().tolist(),
}
with open(os.path.join(folder, "expected.json"), "w") as file:
    json.dump(found, file)
if samples:
    from ebmkit.sampling.jobs.job import SamplingJob
    draw = SamplingJob._generator
    def stopping(self, number, step):
        if (number, step) == (1, 2):
            os.kill(os.getpid(), signal.SIGINT)
        return draw(self, number, step)
    SamplingJob._generator = stopping
    words = ["-n", "6", "--batch-size", "2", "--sampler", "langevin", "--steps", "4"]
    assert run("sample", folder, *words, "--out", folder + "/unfinished-samples") == 130
"""


def make(name: str) -> None:
    """Make the run folder called ``name``."""
    commit, options, samples = RUNS[name]
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "source"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(source), commit], check=True)
        try:
            environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
            driver = Path(place) / "driver.py"
            driver.write_text(DRIVER)
            command = [sys.executable, str(driver), name, str(samples), *options]
            subprocess.run(command, cwd=place, env=environment, check=True)
        finally:
            subprocess.run([*git, "remove", "--force", str(source)], check=True)
        shutil.rmtree(HERE / name, ignore_errors=True)
        shutil.move(Path(place) / name, HERE / name)


if __name__ == "__main__":
    for name in sys.argv[1:] or RUNS:
        make(name)
