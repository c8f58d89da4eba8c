"""Training by several processes: equality with one process, resuming, and errors.

Runs that are compared use the derivatives of our layers (`convolution.SMALL` and `layers.SMALL` are
0); at the default thresholds these small networks would use PyTorch's.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from ebmkit_tests.support.command_line import ebmkit_command

import ebmkit
from ebmkit import distributed
from ebmkit.cli.train import _interrupted_run
from ebmkit.data import StreamConfig, load_dataset
from ebmkit.data.streams import Stream
from ebmkit.models import convolution, layers
from ebmkit.training import RunFolder, resolve
from ebmkit.training.loop import assemble

pytestmark = pytest.mark.usefixtures("count_cost_roughly", "zero_thresholds")

CHILD = "import ebmkit_tests.support.zero_thresholds; from ebmkit.cli import main; main()"
"""`ebmkit` with the derivatives of our layers for tensors of any size."""

ROOT = Path(__file__).resolve().parents[1]

SETTINGS = [
    "--width=8",
    "--device=cpu",
    "--set=log_every=1",
    "--set=validate_every=4",
    "--set=validation_images=16",
    "--set=streams.classify.batch_size=8",
    "--set=streams.denoise.batch_size=8",
    "--set=streams.classify.augmentation.mix=both",
    "--set=optimizer.schedule=constant",
]


def launch(processes: int, *arguments: str, options: tuple[str, ...] = ()) -> list[str]:
    """The command of torchrun for `ebmkit train` with ``arguments``."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, f"--nproc-per-node={processes}", *options, "-m", "ebmkit", *arguments]


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300
    )


def weights(path: Path) -> torch.Tensor:
    return torch.cat([v.flatten() for v in ebmkit.load(path).state_dict().values()])


@pytest.fixture(scope="module")
def zero_thresholds():
    """The same in this process as in `CHILD`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "SMALL", 0)
        patch.setattr(layers, "SMALL", 0)
        yield


@pytest.fixture(scope="module", params=["adamw", "muon"])
def two_processes(request, tmp_path_factory, zero_thresholds) -> Path:
    """A run of four steps by two processes."""
    own = ["--recipe=digits-adamw", f"--set=optimizer.kind={request.param}"]
    own += ["--set=optimizer.lr=3e-3"]  # the recipe's value, also for Muon: rounding grows with it
    own += ["--no-evaluate"]
    return train_by_two(tmp_path_factory.mktemp("parallel"), "--steps=4", *own)


def train_by_two(folder: Path, *own: str) -> Path:
    """A run by this process and another one, with torchrun's environment variables."""
    arguments = ["train", "--out=two", *own, *SETTINGS]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    found = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with (
        pytest.MonkeyPatch.context() as patch,
        torch._dynamo.config.patch(optimize_ddp=True),  # the run disables it
        warnings.catch_warnings(),
        subprocess.Popen(
            [sys.executable, "-c", CHILD, *arguments],
            cwd=folder, env={**os.environ, **variables, "RANK": "1", "PYTHONPATH": found},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as other,
    ):  # fmt: skip
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # from PyTorch
        patch.setattr(distributed, "TIMEOUT", timedelta(minutes=2))
        try:
            first = ebmkit_command(*arguments, cwd=folder, RANK="0", **variables)
            printed, stderr = other.communicate(timeout=120)
        finally:
            other.kill()
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    assert first.returncode == other.returncode == 0, first.stderr + stderr
    assert first.stdout.count("run folder: two") == 1
    assert "run folder" not in printed  # only rank 0 prints
    return folder / "two"


@pytest.fixture(scope="module")
def one_process(two_processes) -> RunFolder:
    """The same run by one process, with six steps."""
    config = resolve(RunFolder.open(two_processes).config(), {"steps": 6})
    folder = RunFolder.create(two_processes.parent / "one", config)
    assemble(config, folder).fit()
    return folder


def compare(rows: list[dict], other_rows: list[dict]) -> None:
    """Losses, gradient norms and validations are equal up to the order of float32 sums."""
    for one, other in zip(rows, other_rows, strict=True):
        keys = one.keys() - {"images_per_s", "kind"}
        assert keys == other.keys() - {"images_per_s", "kind"}
        for key in keys:
            assert one[key] == pytest.approx(other[key], rel=1e-4), (one["step"], key)


@pytest.mark.slow
def test_two_processes_train_like_one_process(two_processes, one_process):
    rows = RunFolder(two_processes).metrics()
    compare(rows, [row for row in one_process.metrics() if row["step"] <= 4])
    assert {row["kind"] for row in rows} == {"train", "validation"}


@pytest.mark.slow
def test_first_recipe_step_is_equal_with_one_and_two_processes(tmp_path):
    """Muon at 1e-2, averaged weights, alternating flips; tolerance 1/1000 of the weight update."""
    two = train_by_two(
        tmp_path,
        "--recipe=digits",
        "--steps=1",
        "--set=streams.classify.augmentation.flip=alternating",
    )
    documents = list((two / "evaluation").glob("*.json"))
    assert all(json.loads(path.read_text())["processes"] == 2 for path in documents)
    assert documents
    config = resolve(RunFolder.open(two).config())
    own = config.optimizer
    assert (own.kind, own.lr, own.momentum, own.ema_warmup) == ("muon", 1e-2, 0.9, True)
    trainer = assemble(config, None)
    states = [{k: v.clone() for k, v in trainer.trained.state_dict().items()}]
    states += [trainer.fit().state_dict(), ebmkit.load(two).state_dict()]
    start, one, other = (torch.cat([v.flatten() for v in s.values()]) for s in states)
    moved = float((one - start).norm())
    assert moved > 0.001 * float(start.norm())
    assert float((other - one).norm()) < 1e-3 * moved  # 1.3e-4


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_processes(two_processes, one_process):
    config = resolve(RunFolder.open(two_processes).config(), {"steps": 6})
    folder = RunFolder.create(two_processes.parent / "cut", config)
    folder.save_checkpoint(RunFolder(two_processes).load_checkpoint())
    resumed = assemble(config, folder)
    assert resumed.step == 4
    resumed.fit()
    later = [row for row in one_process.metrics() if row["step"] > 4]
    compare(folder.metrics(), later)
    a, b = weights(folder.path), weights(one_process.path)
    assert float((a - b).norm() / b.norm()) < 1e-4


def test_a_batch_that_does_not_divide_is_refused():
    digits = load_dataset("digits", None, "train")
    with pytest.raises(
        ebmkit.UserError, match=r"batch of 9 does not divide among 2 process.*batch_size to a mult"
    ):
        Stream(digits, StreamConfig(batch_size=9), "denoise", 0, "cpu", rank=0, world_size=2)
    with pytest.raises(ebmkit.UserError, match=r"of 3 parts each \(compute\.accumulate\).*of 6"):
        Stream(digits, StreamConfig(batch_size=8), "denoise", 0, "cpu", world_size=2, parts=3)


def test_a_port_in_use_is_reported(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        found = ebmkit_command("train", *SETTINGS, "--steps=1", cwd=tmp_path, RANK="0", **variables)
    assert found.returncode == 2
    assert f"port {port} is in use on this machine: choose another" in found.stderr
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "runs").exists()


def test_invalid_launcher_variables_are_reported(monkeypatch):
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(ebmkit.UserError, match=r"RANK 2 must be .* below WORLD_SIZE 2"):
        distributed.join().__enter__()
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(ebmkit.UserError, match="RANK='one' must be a whole number"):
        distributed.join().__enter__()
    monkeypatch.setenv("LOCAL_RANK", "4")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ebmkit.UserError, match=r"has no GPU of its own.*--nproc-per-node 2"):
        distributed.device_of_rank(torch.device("cuda"))


def test_restart_resumes_only_the_run_of_the_same_launch(tmp_path, monkeypatch):
    """A restarted command resumes its own run, never an older one."""
    config = resolve({"steps": 1})
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    RunFolder.create(tmp_path / "run", config)
    assert _interrupted_run(tmp_path / "run", config) == tmp_path / "run"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "second")
    assert _interrupted_run(tmp_path / "run", config) is None
    monkeypatch.chdir(tmp_path)
    assert _interrupted_run(None, config) is None
    RunFolder.create(tmp_path / "runs" / "digits-gradresnet18-ce+dsm-2", config)
    assert _interrupted_run(None, config) == Path("runs/digits-gradresnet18-ce+dsm-2")


@pytest.mark.slow
def test_error_under_torchrun_is_one_sentence(tmp_path):
    """The error occurs in both processes; rank 0 reports it, and the other is stopped."""
    found = run(launch(2, "train", "--steps=1", "--precision=fp8", *SETTINGS), tmp_path)
    assert found.returncode != 0
    assert found.stderr.count("ebmkit: configuration: compute.precision = 'fp8' is not legal") == 1
    # only torchrun's report of the failure follows
    assert "[rank" not in found.stderr
    assert not (tmp_path / "runs").exists()


def test_without_a_launcher_there_is_one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with distributed.join() as world:
        assert world == distributed.DistributedContext(0, 1, 0)
        assert world.gather("x") == ["x"]
        assert world.broadcast("y") == "y"
        assert torch.equal(world.mean_(torch.ones(2)), torch.ones(2))


@pytest.mark.slow
def test_a_process_that_dies_is_restarted_and_the_run_resumes(tmp_path):
    """Kill one of two processes; torchrun restarts both, and they resume from the checkpoint."""
    arguments = ["train", "--steps=40", "--set=checkpoint_every=5", *SETTINGS, "--no-evaluate"]
    command = launch(2, *arguments, options=("--max-restarts=1",))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE)
    folder = tmp_path / "runs" / "digits-gradresnet18-ce+dsm"
    deadline = time.monotonic() + 120
    while not any(folder.glob("checkpoints/step-*.pt")):
        assert process.poll() is None, process.stderr.read()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(_children(process.pid)[-1], signal.SIGKILL)
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr[-3000:]
    rows = [r for r in RunFolder(folder).metrics() if r["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, 41))  # no step is missing or repeated
    assert len(list((tmp_path / "runs").iterdir())) == 1
    document = json.loads((folder / "environment.json").read_text())
    assert document["processes"] == 2


def _children(parent: int) -> list[int]:
    """Sorted ids of the child processes of ``parent``."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:  # the process ended
            continue
        if int(fields[1]) == parent:
            found.append(int(stat.parent.name))
    return sorted(found)
