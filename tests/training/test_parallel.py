"""Several processes train as one: gradients, continuation with another number, mistakes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import ebmkit
from ebmkit import parallel
from ebmkit.data import StreamConfig, load_dataset
from ebmkit.data.streams import Stream
from ebmkit.training import RunFolder, resolve
from ebmkit.training.assemble import assemble

SETTINGS = [
    "--width=8",
    "--device=cpu",
    "--set=log_every=1",
    "--set=validate_every=4",
    "--set=validation_images=16",
    "--set=streams.classify.batch_size=8",
    "--set=streams.denoise.batch_size=8",
    "--set=streams.classify.augmentation.mix=both",
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
def two_processes(tmp_path_factory) -> Path:
    """A run of four steps by two processes; checkpoints after each second."""
    folder = tmp_path_factory.mktemp("parallel")
    arguments = ["train", "--steps=4", "--out=two", "--set=checkpoint_every=2", *SETTINGS]
    done = run(launch(2, *arguments), folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("run folder: two") == 1  # one process writes
    return folder / "two"


def alone(path: Path, steps: int) -> RunFolder:
    """The same run by one process."""
    arguments = dict(RunFolder.open(path).config())
    folder = RunFolder.create(path.parent / f"one-{steps}", resolve(arguments, {"steps": steps}))
    assemble(resolve(arguments, {"steps": steps}), folder).fit()
    return folder


def test_two_processes_train_as_one_with_the_double_batch(two_processes):
    """Losses and gradient norms of every step, float32 sums in another order."""
    one = alone(two_processes, 4)
    rows = zip(RunFolder(two_processes).metrics(), one.metrics(), strict=True)
    for both, single in rows:
        keys = both.keys() - {"images_per_s"}
        assert keys == single.keys() - {"images_per_s"}
        for key in keys - {"kind"}:
            assert both[key] == pytest.approx(single[key], rel=1e-4), (both["step"], key)
    a, b = weights(two_processes), weights(one.path)
    assert float((a - b).norm() / b.norm()) < 1e-4


def test_a_run_goes_on_with_another_number_of_processes(two_processes):
    config = RunFolder.open(two_processes).config()
    whole = alone(two_processes, 6)
    cut = RunFolder.create(two_processes.parent / "cut", resolve(config, {"steps": 6}))
    state = RunFolder(two_processes).load_checkpoint()
    cut.save_checkpoint(state)
    resumed = assemble(resolve(config, {"steps": 6}), cut)
    assert resumed.step == 4
    # the cosine of six steps differs from that of four, so only the next step's losses compare
    losses = {}
    for path in (whole.path, two_processes):
        row = next(r for r in RunFolder(path).metrics() if r["step"] == 1)
        losses[path] = row["ce"]
    assert losses[whole.path] == pytest.approx(losses[two_processes], rel=1e-5)
    resumed.fit()
    assert [r["step"] for r in cut.metrics() if r["kind"] == "train"] == [5, 6]


def test_a_batch_that_does_not_divide_is_said():
    digits = load_dataset("digits", None, "train")
    with pytest.raises(
        ebmkit.UserError, match=r"batch of 9 does not divide among 2 process.*batch_size to a mult"
    ):
        Stream(digits, StreamConfig(batch_size=9), "denoise", 0, "cpu", rank=0, world_size=2)
    with pytest.raises(ebmkit.UserError, match=r"of 3 parts each \(compute\.accumulate\).*of 6"):
        Stream(digits, StreamConfig(batch_size=8), "denoise", 0, "cpu", world_size=2, parts=3)


def test_a_port_in_use_is_said(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        found = run(
            [sys.executable, "-m", "ebmkit", "train", *SETTINGS, "--steps=1"],
            tmp_path,
            RANK="0",
            WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
    assert found.returncode == 2
    assert f"port {port} is in use on this machine: choose another" in found.stderr
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "runs").exists()


def test_mistakes_of_the_launcher_are_said(monkeypatch):
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(ebmkit.UserError, match=r"RANK 2 must be .* below WORLD_SIZE 2"):
        parallel.join().__enter__()
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(ebmkit.UserError, match="RANK='one' must be a whole number"):
        parallel.join().__enter__()
    monkeypatch.setenv("LOCAL_RANK", "4")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ebmkit.UserError, match=r"has no GPU of its own.*--nproc-per-node 2"):
        parallel.device_of_rank(torch.device("cuda"))


def test_without_a_launcher_there_is_one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with parallel.join() as world:
        assert world == parallel.World(0, 1, 0)
        assert world.gather("x") == ["x"]
        assert world.from_first("y") == "y"
        assert torch.equal(world.mean_(torch.ones(2)), torch.ones(2))


@pytest.mark.slow
def test_a_process_that_dies_is_started_again_and_the_run_goes_on(tmp_path):
    """Kill one of two processes; torchrun starts both again, which go on from the checkpoint."""
    arguments = ["train", "--steps=400", "--set=checkpoint_every=10", *SETTINGS, "--no-evaluate"]
    command = launch(2, *arguments, options=("--max-restarts=1",))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE)
    folder = tmp_path / "runs" / "digits-gradresnet18-ce+dsm"
    checkpoint = folder / "checkpoints" / "last.pt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists():
        assert process.poll() is None, process.stderr.read()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(_children(process.pid)[-1], signal.SIGKILL)
    _, told = process.communicate(timeout=240)
    assert process.returncode == 0, told[-3000:]
    rows = [r for r in RunFolder(folder).metrics() if r["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, 401))  # none lost, none twice
    assert len(list((tmp_path / "runs").iterdir())) == 1
    document = json.loads((folder / "environment.json").read_text())
    assert document["processes"] == 2


def _children(parent: int) -> list[int]:
    """Processes that ``parent`` started, by number."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[1]) == parent:
            found.append(int(stat.parent.name))
    return sorted(found)
