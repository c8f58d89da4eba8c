"""Memory, file descriptors, threads and objects of a process stay constant in long runs."""

import gc
import json
import os
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest

from ebmkit.training import RunFolder, TensorBoard, resolve
from ebmkit.training.callbacks import TrainingBar
from ebmkit.training.cost import MAX_TIMED_INTERVALS, Stopwatch
from ebmkit.training.loop import assemble

SMALL = {
    "backbone": "mlp",
    "model": {"backbone": {"width": 8}},
    "steps": 2000,
    "log_every": 1,
    "validate_every": 100,
    "validation_images": 16,
    "checkpoint_every": 250,
    "device": "cpu",
    "optimizer": {"ema": 0.99},
    "negatives": {"buffer_size": 40, "steps": 2},
    "rollback": {"every": 20},
    "streams": {name: {"batch_size": 4} for name in ("classify", "denoise", "generate")},
}


class Meter:
    """Records the resources that the process holds after the steps ``at``.

    TensorBoard queues events for a thread that opens the file for each write; its queue is flushed
    before each record.
    """

    def __init__(self, at: tuple[int, ...], boards: list[TensorBoard]) -> None:
        self.at = at
        self.boards = boards
        self.found: list[dict[str, float]] = []

    def report(self, row):
        if row["kind"] == "train" and row["step"] in self.at:
            for board in self.boards:
                board.writer.flush()
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.found.append(
                {
                    "objects": len(gc.get_objects()),
                    "megabytes": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
                    "descriptors": len(os.listdir("/proc/self/fd")),
                    "threads": threading.active_count(),
                }
            )


def measure_long_run(folder: Path) -> None:
    """Print the resources after 1000 and 2000 steps, with all streams and all reports: a row for
    each step, a progress bar, checkpoints, and TensorBoard if it is installed."""
    run = RunFolder.create(folder / "run", config := resolve(SMALL, {"objective": "jem+dsm"}))
    installed = find_spec("tensorboard") is not None
    boards = [TensorBoard(folder / "board")] if installed else []
    meter = Meter((1000, 2000), boards)  # buffers of the last 1000 entries are full at both
    assemble(config, run, [TrainingBar(), *boards, meter]).fit()
    print(json.dumps(meter.found))


@pytest.mark.slow
def test_two_thousand_steps_do_not_grow_the_process(tmp_path):
    """In a process of its own, because what other tests leave in a process changes with time."""
    command = [sys.executable, __file__, str(tmp_path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    early, late = json.loads(printed.splitlines()[-1])
    assert late["objects"] - early["objects"] < 300  # one object per step would be 1000
    assert late["megabytes"] - early["megabytes"] < 2
    assert late["descriptors"] == early["descriptors"]
    assert late["threads"] == early["threads"]


def test_stopwatchstores_few_intervals_and_averages_over_all_steps(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("ebmkit.training.cost.time.perf_counter", lambda: now[0])
    stopwatch = Stopwatch()
    for number in range(20_000):
        stage = int(number >= 15_000)
        for _ in range(3):
            stopwatch.step(data_seconds=0.25)
        now[0] += 100.0 if number == 0 else 3 * (1 + stage)  # the first interval: compilation
        stopwatch.stop(stage)
        assert len(stopwatch.stretches) <= MAX_TIMED_INTERVALS
    assert sum(s.steps for s in stopwatch.stretches) == 60_000
    assert stopwatch.stretches[0].seconds == 100
    assert stopwatch.seconds == pytest.approx(1.25)
    assert stopwatch.data_share == pytest.approx(60_000 / (45_000 + 30_000) * 0.25, rel=1e-3)


if __name__ == "__main__":
    measure_long_run(Path(sys.argv[1]))
