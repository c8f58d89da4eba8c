"""What safe saving costs: checksums, writing beside and moving, bringing to the disk.

``python benchmarks/saving.py [--out benchmarks/results/promises-saving.json]``, some three minutes
on a CPU. For several runs the state is saved as the trainer does it, and plainly: `torch.save` and
safetensors over the old files, no digest, no fsync, nothing kept. The difference, as a share of the
sixty seconds between saves, is the cost; all of a save is told too.
"""

from __future__ import annotations

import argparse
import json
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

from ebmkit.models.saving import digest
from ebmkit.training import RunFolder, Trainer, resolve
from ebmkit.training.assemble import assemble
from ebmkit.training.environment import environment

EVERY = 60.0
"""Seconds between saves."""

CIFAR = {
    "backbone": "gradresnet18",
    "model": {"backbone": {"width": 64}},
    "optimizer": {"ema": 0.999},
    "device": "cpu",
    "validation_images": 0,
    "streams": {
        "classify": {"batch_size": 2, "augmentation": {"mix": "none", "crop_padding": 0}},
        "denoise": {"batch_size": 2, "augmentation": {"crop_padding": 0}},
        "generate": {"batch_size": 2},
    },
}

RUNS: dict[str, dict[str, Any]] = {
    "the main job: digits, width 16": {"device": "cpu", "validation_images": 0},
    "the paper's network, width 64, averaged": CIFAR,
    "ml, the same network, 10,000 chains of 32x32": {
        **CIFAR,
        "objective": "ml",
        "negatives": {"buffer_size": 10_000, "steps": 1},
        "watch": {"every": 1, "gap": 1e6, "gradient": 1e9},
        "dataset": {"name": "patches"},
        "head": "linear-quadratic",
    },
}


def main() -> None:
    """Measure, show and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    console, rows = Console(), []
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as place:
        for number, (name, layer) in enumerate(RUNS.items()):
            with console.status(name):
                found = measure(layer, Path(place) / str(number), asked.rounds)
                rows.append({"run": name, **found})
    table = Table(title=f"seconds of a save, medians of {asked.rounds}", show_edge=False)
    for title in ("run", "MB", "plain", "safe", "added, of 60 s", "all, of 60 s"):
        table.add_column(title)
    for row in rows:
        shares = (f"{row['added_share']:.2%}", f"{row['whole_share']:.2%}")
        numbers = (f"{row['megabytes']:.1f}", f"{row['plain']:.3f}", f"{row['safe']:.3f}")
        table.add_row(row["run"], *numbers, *shares)
    console.print(table)
    if asked.out:
        told = ("ebmkit", "python", "torch", "cores", "git_commit")
        about = {k: v for k, v in environment().items() if k in told}
        command = " ".join(["python benchmarks/saving.py", *sys.argv[1:]])
        document = {"command": command, "environment": about, "every": EVERY, "runs": rows}
        asked.out.write_text(json.dumps(document, indent=1) + "\n")


def measure(layer: dict[str, Any], place: Path, rounds: int) -> dict[str, float]:
    """Save both ways, in turn."""
    config = resolve({**layer, "steps": 2 * rounds + 2})
    run = RunFolder.create(place, config)
    trainer = assemble(config, run)
    batches = trainer.batches(0, config.steps)
    plain, safe = [], []
    with run.held():
        for _ in range(rounds + 1):
            trainer._advance(batches, False)  # another state each time
            if trainer.recovery is not None:  # which keeps three to go back to
                trainer.recovery.look(trainer.update.read())
            begun = time.perf_counter()
            save_plainly(trainer, place / "plain")
            plain.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            trainer.save()
            safe.append(time.perf_counter() - begun)
    size = sum(p.stat().st_size for p in (place / "plain").iterdir()) / 1e6
    a, b = statistics.median(plain[1:]), statistics.median(safe[1:])
    return {
        "megabytes": size,
        "plain": a,
        "safe": b,
        "added_share": (b - a) / EVERY,
        "whole_share": b / EVERY,
        "slowest": max(safe[1:]),
    }


def save_plainly(trainer: Trainer, folder: Path) -> None:
    """The same files without any care."""
    folder.mkdir(exist_ok=True)
    torch.save(trainer.state(), folder / "last.pt")
    state = {k: v.contiguous() for k, v in trainer.trained.state_dict().items()}
    safetensors.torch.save_file(state, folder / "model.safetensors", {"sha256": digest(state)})
    if trainer.recovery is not None:
        (folder / "buffer.h5").write_bytes(trainer.recovery.buffer())


if __name__ == "__main__":
    main()
