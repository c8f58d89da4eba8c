"""Effect of memory layout and allocator on a step on a CPU.

    uv run python benchmarks/layout.py --out benchmarks/results/layout.json

Times training steps and a score of GradResNet18, contiguous and channels last, with the
layout-preserving mean over positions (`ebmkit.models.base`) and with PyTorch's mean, interleaved.
Then times the training step in separate processes, with and without
`ebmkit.compute.keep_freed_memory`, also interleaved.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from torch import Tensor, nn

from ebmkit.bench import interleave
from ebmkit.compute import environment, keep_freed_memory
from ebmkit.energy import EnergyModel
from ebmkit.models import create_model
from ebmkit.storage import write_atomically

BATCH, SIGMA = 64, 0.1
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file, which must not exist")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--one-process", choices=("kept", "given back"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_process:
        print(json.dumps(steps(options.width, options.rounds, options.one_process == "kept")))
        return
    if options.out is None or options.out.exists():
        parser.error("--out must be a new file")
    allocator: dict[str, list[float]] = {"given back": [], "kept": []}
    for _ in range(3):
        for name in allocator:
            command = [sys.executable, __file__, "--one-process", name]
            command += ["--width", str(options.width), "--rounds", str(options.rounds)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            allocator[name].append(json.loads(done.stdout))
    keep_freed_memory(torch.device("cpu"))
    seconds = interleave(candidates(options.width), options.rounds)
    found = {
        "what": f"GradResNet18 width {options.width}, 32x32 colour, batch {BATCH}",
        "layout_seconds": {name: statistics.median(own) for name, own in seconds.items()},
        "allocator_seconds": {name: statistics.median(own) for name, own in allocator.items()},
        "environment": environment(),
    }
    write_atomically(options.out, json.dumps(found, indent=2).encode())
    Console().print(found["layout_seconds"], found["allocator_seconds"])


def candidates(width: int) -> dict[str, Callable[[], object]]:
    """Name -> function to time."""
    found: dict[str, Callable[[], object]] = {}
    for pooling in ("own mean", "PyTorch's mean"):
        for layout, memory_format in LAYOUTS.items():
            model = create_model("gradresnet18", 10, 3, width=width).to(memory_format=memory_format)
            y = torch.rand(BATCH, 3, 32, 32).contiguous(memory_format=memory_format)
            frozen = copy.deepcopy(model).eval().requires_grad_(False)
            calls: dict[str, Callable[[], object]] = {
                "dsm step": partial(dsm_step, model, y),
                "ce step": partial(ce_step, model, y),
                "score": partial(frozen.score, y),
            }
            for what, call in calls.items():
                own = call if pooling == "own mean" else partial(with_plain_mean, call)
                found[f"{what}, {layout}, {pooling}"] = own
    return found


def dsm_step(model: EnergyModel, y: Tensor) -> None:
    """Gradients of a score-matching loss."""
    model.zero_grad(set_to_none=True)
    (SIGMA * model.score(y) + y).square().mean().backward()  # type: ignore[no-untyped-call]


def ce_step(model: EnergyModel, y: Tensor) -> None:
    """Gradients of a cross-entropy."""
    model.zero_grad(set_to_none=True)
    labels = torch.zeros(len(y), dtype=torch.int64)
    nn.functional.cross_entropy(model(y).logits, labels).backward()  # type: ignore[no-untyped-call]


def with_plain_mean(call: Callable[[], Any]) -> None:
    """Run ``call`` with PyTorch's mean over positions."""
    with mock.patch("ebmkit.models.base.mean_over_positions", new=plain_mean):
        call()


def plain_mean(h: Tensor) -> Tensor:
    """Mean of maps (B, C, H, W) over positions, (B, C)."""
    return h.mean(dim=(2, 3))


def steps(width: int, count: int, keep: bool) -> float:
    """Median seconds of a contiguous score-matching step in this process."""
    if keep:
        keep_freed_memory(torch.device("cpu"))
    model, y = create_model("gradresnet18", 10, 3, width=width), torch.rand(BATCH, 3, 32, 32)
    seconds = []
    for _ in range(count + 1):
        begun = time.perf_counter()
        dsm_step(model, y)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
