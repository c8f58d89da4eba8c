"""Scaling from one to two processes on one machine: step times, interleaved.

    uv run python benchmarks/processes.py --out benchmarks/results/processes.json

Each run is `ebmkit train` under torchrun with one thread per process (dsm on the built-in data set
patches, 32x32, so no files are needed); the step time is the median in its ``cost.json``. With the
same batch, two processes should take half the time (efficiency t1 / 2 t2); with twice the batch,
the same time (t1 / t2).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ebmkit.compute import environment
from ebmkit.storage import write_atomically
from ebmkit.terminal import progress_bar

BATCH = 64


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file, which must not exist")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--width", type=int, default=16)
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"--out {options.out} exists: give a new name")
    cases = {"one": (1, 1), "two, same batch": (2, 1), "two, double batch": (2, 2)}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in progress_bar(range(options.rounds), "rounds", True):
        order = list(cases) if turn % 2 == 0 else list(reversed(cases))
        for name in order:
            processes, scale = cases[name]
            seconds[name].append(step_seconds(processes, scale, options.steps, options.width))
    pairs = {
        "same batch": [a / (2 * b) for a, b in zip(*both(seconds, "same"), strict=True)],
        "double batch": [a / b for a, b in zip(*both(seconds, "double"), strict=True)],
    }
    document: dict[str, Any] = {
        "what": f"dsm, GradResNet18 width {options.width}, 32x32 colour, batch {BATCH}",
        "threads_per_process": 1,
        "step_seconds": {name: statistics.median(own) for name, own in seconds.items()},
        "all_step_seconds": seconds,
        "efficiency": {name: statistics.median(own) for name, own in pairs.items()},
        "all_efficiencies": pairs,
        "environment": environment(),
    }
    write_atomically(options.out, json.dumps(document, indent=2).encode())
    for name, value in document["efficiency"].items():
        print(f"two processes, {name}: {value:.1%}")


def both(seconds: dict[str, list[float]], which: str) -> tuple[list[float], list[float]]:
    """Times of one process, and of two processes with batch ``which`` ("same" or "double")."""
    return seconds["one"], seconds[f"two, {which} batch"]


def step_seconds(processes: int, scale: int, steps: int, width: int) -> float:
    """Median seconds per step of ``processes`` processes with ``scale`` times the batch."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc-per-node={processes}", "-m", "ebmkit", "train", "--no-evaluate"),
            *("--dataset=patches", "--device=cpu", f"--width={width}", f"--steps={steps}"),
            *(f"--out={folder}/run", "--set=log_every=5", "--set=validation_images=0"),
            *(f"--set=checkpoint_every={steps}", f"--set=validate_every={steps}"),
            f"--set=streams.denoise.batch_size={scale * BATCH}",
        ]
        variables = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=variables, check=True, capture_output=True)
        found: float = json.loads((Path(folder) / "run" / "cost.json").read_text())["step_seconds"]
    return found


if __name__ == "__main__":
    main()
