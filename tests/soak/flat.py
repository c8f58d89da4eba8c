"""Growth of memory, files, descriptors and threads in a long run of a tiny network."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np

from ebmkit.training import RunFolder, resolve
from ebmkit.training.loop import assemble

BOUND = 1.0
"""Limit on the growth of resident memory after the first quarter, in MB per 10,000 steps."""

CONFIG: dict[str, Any] = {
    "backbone": "mlp",
    "model": {"backbone": {"width": 8}},
    "log_every": 10,
    "validate_every": 200,
    "validation_images": 16,
    "checkpoint_every": 100,
    "device": "cpu",
    "streams": {"classify": {"batch_size": 4}, "denoise": {"batch_size": 4}},
}


class Meter:
    """Records the resources that the process holds, every 100 steps."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.rows: list[tuple[int, float, int, int, int]] = []

    def report(self, row: dict[str, Any]) -> None:
        if row["kind"] == "train" and row["step"] % 100 == 0:
            files = sum(path.is_file() for path in self.run.rglob("*"))
            descriptors = len(os.listdir("/proc/self/fd"))
            self.rows.append(
                (row["step"], resident(), files, descriptors, threading.active_count())
            )


def resident() -> float:
    """Resident memory of this process, MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure_growth(place: Path, steps: int, **layer: Any) -> dict[str, Any]:
    """Train for ``steps`` steps; return the measurements and the names of resources that grew."""
    config = resolve(CONFIG, {"steps": steps}, layer)
    run = RunFolder.create(place / "run", config)
    meter = Meter(run.path)
    assemble(config, run, [meter]).fit()
    table = np.array(meter.rows)
    settled = table[len(table) // 4 :]
    slope = float(np.polyfit(settled[:, 0], settled[:, 1], 1)[0]) * 10_000
    growing = [
        name
        for name, column in (("files", 2), ("descriptors", 3), ("threads", 4))
        if settled[-1, column] > settled[0, column]
    ]
    if slope > BOUND * max(1.0, 20_000 / steps):
        growing.append("memory")
    return {
        "steps": steps,
        "resident_mb_first": round(float(settled[0, 1]), 1),
        "resident_mb_last": round(float(settled[-1, 1]), 1),
        "mb_per_10000_steps": round(slope, 3),
        "bound_mb_per_10000_steps": BOUND,
        "files": int(settled[-1, 2]),
        "descriptors": int(settled[-1, 3]),
        "growing": growing,
    }
