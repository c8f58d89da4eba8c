"""``ebmkit reproduce --slurm``, with programs that stand for SLURM's ``sbatch`` and ``srun``."""

import os
import sys
import time

import pytest
from ebmkit_tests.support.command_line import ebmkit_command

from ebmkit.cli.slurm import parse_options
from ebmkit.errors import UserError

SBATCH = """#!/bin/sh
cp "$1" script.txt
case "$PWD" in */runs-jobs) for task in 0 1; do
  SLURM_JOB_ID=472$task SLURM_ARRAY_JOB_ID=4711 SLURM_ARRAY_TASK_ID=$task SLURM_JOB_NUM_NODES=1 \\
  SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 sh script.txt > job-$task.txt 2>&1 &
done;; esac
echo Submitted batch job 4711
"""
SRUN = """#!/bin/sh
until [ -f "$1" ] && [ -x "$1" ]; do shift; done
exec "$@"
"""

COMMAND = ("reproduce", "table1", "--scale", "smoke", "--only", "resnet18", "--out", "out")
"""A row without scores, which take longer."""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Put ``sbatch`` and ``srun`` on the path."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_options_of_sbatch_are_parsed():
    given = ["partition=gpu", "time=720", "gpus-per-node=1", "exclusive=true", "mem=32G"]
    lists = ["setup=module load cuda", "setup=A=1"]
    assert parse_options(given + lists) == {
        "slurm_partition": "gpu",
        "slurm_time": 720,
        "slurm_gpus_per_node": 1,
        "slurm_exclusive": True,
        "slurm_mem": "32G",
        "slurm_setup": ["module load cuda", "A=1"],
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["partition"], "'partition' is not KEY=VALUE"),
        ([], "time limit of a job is None: give it in minutes"),
        (["time=12:00:00"], "is '12:00:00': give it in minutes"),
    ],
)
def test_illegal_options_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        parse_options(given)


@pytest.mark.slow
def test_jobs_are_submitted_with_their_options(tmp_path, slurm):
    given = ("--slurm", 3, "--slurm-option", "time=90", "--slurm-option", "partition=gpu")
    done = ebmkit_command(*COMMAND, *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    script = (tmp_path / "script.txt").read_text()
    for line in ("--array=0-2%3", "--time=90", "--partition=gpu", "--job-name=ebmkit-table1"):
        assert f"#SBATCH {line}\n" in script
    assert "squeue -j 4711" in done.stdout
    assert "scancel 4711" in done.stdout
    assert not (tmp_path / "out/rows").exists()
    wrong = ebmkit_command(*COMMAND, *given, "--slurm-option", "partitoin=gpu", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "partitoin" in wrong.stderr
    assert "nodelist" in wrong.stderr  # a legal one
    assert "Traceback" not in wrong.stderr


@pytest.mark.slow
def test_jobs_share_the_rows_and_write_the_report(tmp_path, slurm):
    home = tmp_path / "runs-jobs"
    home.mkdir()
    given = ("--slurm", 2, "--slurm-option", "time=90")
    done = ebmkit_command(*COMMAND, *given, cwd=home)
    assert done.returncode == 0, done.stderr
    until = time.monotonic() + 600
    outputs = [home / f"job-{task}.txt" for task in (0, 1)]
    while time.monotonic() < until and not all(
        "written: out/table1.md" in p.read_text() for p in outputs
    ):
        time.sleep(0.5)
    texts = [path.read_text() for path in outputs]
    assert all("written: out/table1.md" in text for text in texts), texts
    assert sum("resnet18: training, 60 steps" in text for text in texts) == 1


@pytest.mark.slow
def test_without_slurm_or_submitit_the_error_names_the_fix(tmp_path):
    given = ("--slurm", 2, "--slurm-option", "time=90")
    done = ebmkit_command(*COMMAND, *given, cwd=tmp_path)
    assert done.returncode == 2
    assert 'Could not detect "srun"' in done.stderr
    lonely = ebmkit_command(*COMMAND, "--slurm-option", "time=90", cwd=tmp_path)
    assert "give their number with --slurm" in lonely.stderr


def test_without_the_extra_the_error_names_it(monkeypatch, tmp_path):
    from ebmkit.cli.slurm import submit

    monkeypatch.setitem(sys.modules, "submitit", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "ebmkit-vision\[slurm\]"'):
        submit(2, ["time=90"], "ebmkit-table1", tmp_path)
