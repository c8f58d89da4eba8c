"""Cost of crash-safe saving: checksums, atomic writes, fsync.

    uv run python benchmarks/saving.py --out benchmarks/results/reliability-saving.json

Takes about six minutes on a CPU. The state of several runs is saved by the trainer, and plainly:
`torch.save` and safetensors over the old files, without digest, fsync or old versions. The cost is
the difference, as a share of the sixty seconds between saves; the share of the whole save is also
reported. The disk is idle before each save, so data that a plain save leaves to the kernel is
counted for neither save. New best weights are saved every time, which is the worst case.

Then one run trains for some minutes and saves every minute; the time spent in saving is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from rich.console import Console
from rich.table import Table

from ebmkit.compute import environment
from ebmkit.models.saving import weights_file
from ebmkit.storage import write_atomically
from ebmkit.training import RunFolder, Trainer, resolve
from ebmkit.training.loop import assemble
from ebmkit.training.run_folder import BEST

EVERY = 60.0
"""Seconds between saves."""

LIMIT = 0.03
"""Maximum share that checksums and atomic writes add to training with a save per minute."""

MAIN = {"device": "cpu", "validation_images": 0}

CIFAR = {
    "backbone": "gradresnet18",
    "model": {"backbone": {"width": 64}},
    "optimizer": {"ema": 0.999},
    "device": "cpu",
    "validation_images": 0,
    "dataset": {"name": "patches"},
    "streams": {
        "classify": {"batch_size": 2, "augmentation": {"mix": "none", "crop_padding": 0}},
        "denoise": {"batch_size": 2, "augmentation": {"crop_padding": 0}},
        "generate": {"batch_size": 2},
    },
}

RUNS: dict[str, dict[str, Any]] = {
    "ce+dsm, digits, width 16": MAIN,
    "dsm, 32x32 colour, width 64, averaged": {**CIFAR, "objective": "dsm"},
    "ml, the same network, 10,000 chains": {
        **CIFAR,
        "objective": "ml",
        "negatives": {"buffer_size": 10_000, "steps": 1},
        "rollback": {"every": 1, "gap": 1e6, "gradient": 1e9},
        "head": "linear-quadratic",
    },
}
"""A small network; the paper's network for CIFAR-10; the same with a replay buffer. The last one
also saves its buffer and three rollback snapshots with their chains, 1.4 GB per save. That costs
2.9 % on two cores at a load of 3.8, but 6 % at 5.5 and 17 % (three rounds) at 7.4."""


def main() -> None:
    """Measure, and print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--minutes", type=float, default=4.0, help="minutes of training; 0: none")
    asked = parser.parse_args()
    console, rows = Console(), []
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".saving-") as place:
        rate = disk_rate(Path(place) / "rate")
        for number, (name, layer) in enumerate(RUNS.items()):
            with console.status(name):
                found = measure(layer, Path(place) / str(number), asked.rounds)
                rows.append({"run": name, **found})
        with console.status(f"{asked.minutes:g} minutes of training"):
            training = trained(MAIN, Path(place) / "trained", asked.minutes, rows[0]["plain"])
    console.print(as_table(rows))
    if training:
        console.print(
            f"training for {training['seconds']:.0f} s with {training['saves']} saves: "
            f"{training['whole_share']:.2%} in saving, {training['added_share']:.2%} added"
        )
    if asked.out:
        told = ("ebmkit", "python", "torch", "platform", "threads", "cores", "git_commit")
        description = {k: v for k, v in environment().items() if k in told}
        document = {
            "command": " ".join(["python benchmarks/saving.py", *sys.argv[1:]]),
            "environment": description
            | {"processor": processor(), "disk_mb_per_second": rate, "load": os.getloadavg()},
            "seed": 0,
            "rounds": asked.rounds,
            "every": EVERY,
            "limit": LIMIT,
            "runs": rows,
            "training": training,
        }
        write_atomically(asked.out, (json.dumps(document, indent=1) + "\n").encode())
    if max(row["added_share"] for row in rows) > LIMIT:
        sys.exit(f"saving adds more than {LIMIT:.0%}")


def as_table(rows: list[dict[str, Any]]) -> Table:
    """Table of the results."""
    table = Table(title="seconds of a save, medians", show_edge=False)
    for title in ("run", "MB", "plain", "safe", "added, of 60 s", "all, of 60 s"):
        table.add_column(title)
    for row in rows:
        shares = (f"{row['added_share']:.2%}", f"{row['whole_share']:.2%}")
        numbers = (f"{row['megabytes']:.1f}", f"{row['plain']:.3f}", f"{row['safe']:.3f}")
        table.add_row(row["run"], *numbers, *shares)
    return table


def measure(layer: dict[str, Any], place: Path, rounds: int) -> dict[str, Any]:
    """Time both kinds of saving, alternating; the first of each is discarded."""
    config = resolve({**layer, "seed": 0, "steps": 2 * rounds + 2})
    run = RunFolder.create(place, config)
    trainer = assemble(config, run)
    batches = trainer.batches(0, config.steps)
    plain, safe = [], []
    ways = [(plain, lambda: save_plainly(trainer, place / "plain")), (safe, trainer.save)]
    with run.held():
        for turn in range(rounds + 1):
            trainer._advance(batches, False)  # a new state for each save
            if trainer.rollback is not None:  # adds rollback snapshots
                trainer.rollback.check(trainer.update.read())
            trainer.state.best.weights = weights_file(trainer.trained)
            for seconds, save in ways if turn % 2 else reversed(ways):
                os.sync()
                begun = time.perf_counter()
                save()
                seconds.append(time.perf_counter() - begun)
    size = sum(p.stat().st_size for p in (place / "plain").iterdir()) / 1e6
    a, b = statistics.median(plain[1:]), statistics.median(safe[1:])
    return {
        "megabytes": size,
        "plain": a,
        "safe": b,
        "added_share": (b - a) / EVERY,
        "whole_share": b / EVERY,
        "slowest": max(safe[1:]),
        "all_plain": plain[1:],
        "all_safe": safe[1:],
    }


def save_plainly(trainer: Trainer, folder: Path) -> None:
    """Write the same files without checksums, atomic writes and fsync."""
    folder.mkdir(exist_ok=True)
    torch.save(trainer.state_dict(), folder / "last.pt")
    state = {k: v.contiguous() for k, v in trainer.trained.state_dict().items()}
    safetensors.torch.save_file(state, folder / "model.safetensors")
    assert trainer.state.best.weights is not None
    (folder / Path(BEST).name).write_bytes(trainer.state.best.weights)
    if trainer.rollback is not None:
        (folder / "buffer.h5").write_bytes(trainer.rollback.negatives.buffer.to_bytes())


def trained(layer: dict[str, Any], place: Path, minutes: float, plain: float) -> dict[str, Any]:
    """Share of the time spent in saving, in a training run that saves about every minute.

    Args:
        layer: settings of the run.
        place: run folder.
        minutes: duration of the training.
        plain: seconds of a plain save, which is subtracted from the added share.
    """
    if not minutes:
        return {}
    step = step_seconds(layer)
    every = max(1, round(EVERY / step))
    steps = max(every, round(minutes * 60 / step / every) * every)
    rhythm = {"log_every": 50, "validate_every": steps, "checkpoint_every": every}
    config = resolve({**layer, "seed": 0, "steps": steps, **rhythm})
    trainer, spent = assemble(config, RunFolder.create(place, config)), []
    save = trainer.save

    def timed(*args: Any, **named: Any) -> None:
        begun = time.perf_counter()
        save(*args, **named)
        spent.append(time.perf_counter() - begun)

    trainer.save = timed  # type: ignore[method-assign]
    begun = time.perf_counter()
    trainer.fit()
    seconds = time.perf_counter() - begun
    return {
        "steps": steps,
        "seconds": seconds,
        "saves": len(spent),
        "all_safe": spent,
        "whole_share": sum(spent) / seconds,
        "added_share": (sum(spent) - len(spent) * plain) / seconds,
    }


def step_seconds(layer: dict[str, Any], steps: int = 40) -> float:
    """Mean seconds per step, without the first quarter of the steps."""
    trainer = assemble(resolve({**layer, "seed": 0, "steps": steps}), None)
    batches = trainer.batches(0, steps)
    for number in range(steps):
        if number == steps // 4:
            begun = time.perf_counter()
        trainer._advance(batches, False)
        trainer._read()
    return (time.perf_counter() - begun) / (steps - steps // 4)


def disk_rate(path: Path, megabytes: int = 256) -> float:
    """Write rate of the disk with fsync, MB/s."""
    content = os.urandom(2**20) * megabytes
    os.sync()
    begun = time.perf_counter()
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - begun
    path.unlink()
    return len(content) / 1e6 / seconds


def processor() -> str:
    """Name of the processor."""
    description = Path("/proc/cpuinfo")
    lines = description.read_text().splitlines() if description.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
