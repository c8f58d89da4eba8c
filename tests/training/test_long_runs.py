"""Runs of any length stay flat: memory, descriptors, threads and objects of the process."""

import gc
import os
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest

from ebmkit.cli.console import Reporters, TensorBoard, TrainingBar
from ebmkit.training import RunFolder, resolve
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
    "watch": {"every": 20},
    "streams": {name: {"batch_size": 4} for name in ("classify", "denoise", "generate")},
}


class Meter:
    """Notes what the process holds after some steps."""

    def __init__(self, at: tuple[int, ...]) -> None:
        self.at = at
        self.found: list[dict[str, float]] = []

    def report(self, row):
        if row["kind"] == "train" and row["step"] in self.at:
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


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["ce+dsm", "jem"])
def test_two_thousand_steps_leave_the_process_as_it_was(tmp_path, objective):
    """With all that is told of a run: a row each step, a bar, checkpoints, TensorBoard if it is
    there."""
    config = resolve(SMALL, {"objective": objective})
    meter = Meter((1000, 2000))  # what keeps the last thousand of something is full at both
    run = RunFolder.create(tmp_path / "run", config)
    there = find_spec("tensorboard") is not None
    board = [TensorBoard(tmp_path / "board")] if there else []
    with TrainingBar(2000) as bar:
        assemble(config, run, Reporters([bar, *board, meter])).fit()
    for own in board:
        own.close()
    early, late = meter.found
    assert late["objects"] - early["objects"] < 300  # one for each step would be a thousand
    assert late["megabytes"] - early["megabytes"] < 2
    assert late["descriptors"] == early["descriptors"]
    assert late["threads"] == early["threads"]


def test_a_stopwatch_keeps_few_stretches_and_still_tells_of_all_steps(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("ebmkit.training.cost.time.perf_counter", lambda: now[0])
    watch = Stopwatch()
    for number in range(20_000):
        stage = int(number >= 15_000)
        for _ in range(3):
            watch.step(data_seconds=0.25)
        now[0] += 100.0 if number == 0 else 3 * (1 + stage)  # the first stretch: compilation
        watch.stop(stage)
        assert len(watch.stretches) <= MAX_TIMED_INTERVALS
    assert sum(s.steps for s in watch.stretches) == 60_000
    assert watch.stretches[0].seconds == 100
    assert watch.seconds == pytest.approx(1.25)
    assert watch.data_share == pytest.approx(60_000 / (45_000 + 30_000) * 0.25, rel=1e-3)
