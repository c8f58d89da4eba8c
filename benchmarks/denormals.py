"""Time of a training step with and without denormal numbers, resumed from a checkpoint of a run.

    uv run python benchmarks/denormals.py RUN --out FILE

Denormal numbers (between 0 and 1.2e-38 in float32) become frequent as training proceeds, so the
step is timed where RUN's newest checkpoint is. Each measurement is a process of its own, because a
thread takes the setting from the one that starts it. Processes with and without take turns.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ebmkit.compute import environment, flush_denormals
from ebmkit.storage import write_atomically
from ebmkit.training import RunFolder, step
from ebmkit.training.config import resolve
from ebmkit.training.loop import assemble

WARMUP = 3


def main() -> None:
    """Time both in turns, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--recipe", default="unknown", help="the recipe of RUN, for the file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--time", choices=["flushed", "kept"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.time:
        print(seconds_per_step(options.run, options.steps, options.time == "flushed"))
        return
    seconds: dict[str, list[float]] = {"kept": [], "flushed": []}
    for _ in range(options.rounds):
        for name, times in seconds.items():
            with tempfile.TemporaryDirectory() as folder:  # resuming writes into the run's folder
                copy = shutil.copytree(options.run, Path(folder) / "run")
                command = [sys.executable, __file__, str(copy), "--time", name]
                command += ["--steps", str(options.steps)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            times.append(float(done.stdout.split()[-1]))
            print(f"{name}: {times[-1]:.3f} s a step", flush=True)
    found = {
        "recipe": options.recipe,
        "step": RunFolder.open(options.run).load_checkpoint()["step"],
        "seconds_per_step": seconds,
        "ratio": statistics.median(seconds["kept"]) / statistics.median(seconds["flushed"]),
        "environment": environment(),
    }
    print(f"{found['ratio']:.2f} times as fast without denormal numbers")
    if options.out:
        write_atomically(options.out, json.dumps(found, indent=1).encode())


def seconds_per_step(path: Path, steps: int, flushed: bool) -> float:
    """Median over ``steps`` steps from the newest checkpoint in ``path``, after `WARMUP`."""
    if flushed:
        flush_denormals()
    else:
        step.flush_denormals = lambda device: None
    run = RunFolder.open(path)
    trainer = assemble(resolve(run.config()), run)
    trainer.model.train()
    count = WARMUP + steps
    last = max(0, trainer.config.steps - count)
    start = min(trainer.step, last)  # of a finished run, the last batches
    batches = trainer.batches(start, start + count)
    times = []
    for _ in range(count):
        begun = time.perf_counter()
        trainer.update(next(batches), rate=trainer.rate_at(start))
        trainer.update.read()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[WARMUP:])


if __name__ == "__main__":
    main()
