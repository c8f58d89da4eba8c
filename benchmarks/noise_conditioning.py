"""Cost of sigma as an input, of a preconditioned model, and of tsm, in a training step.

    uv run python benchmarks/noise_conditioning.py --out benchmarks/results/noise-conditioning.json

Times steps on one batch of the quick start's network and batch sizes (recipe ``digits``), forward
and backward, interleaved, on one thread, by its processor time: blind and noise-conditional with
``ce+dsm``, preconditioned with ``ce+dsm`` and with ``ce+dsm+tsm``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ebmkit.bench import interleave, ratio_to
from ebmkit.compute import environment
from ebmkit.data import Batch
from ebmkit.models import ModelConfig
from ebmkit.objectives import TrainingLoss, parse_objective
from ebmkit.storage import write_atomically
from ebmkit.training import resolve

BLIND: dict[str, Any] = {}
SIGMA: dict[str, Any] = {"backbone": {"noise_embedding": 64}}
PRECONDITIONED = SIGMA | {"head": {"kind": "linear"}, "preconditioned": True}
CASES = {
    "blind, ce+dsm": (BLIND, "ce+dsm"),
    "noise-conditional, ce+dsm": (SIGMA, "ce+dsm"),
    "preconditioned, ce+dsm": (PRECONDITIONED, "ce+dsm"),
    "preconditioned, ce+dsm+tsm": (PRECONDITIONED, "ce+dsm+tsm"),
}


def main() -> None:
    """Time the cases and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)  # whose time is that of the process
    steps = {name: partial(step, *make(*case)) for name, case in CASES.items()}
    seconds = interleave(steps, options.rounds, warmup=3, clock=time.process_time)
    blind, _, plain, tsm = seconds.values()
    found = {
        "seconds_per_step": {name: statistics.median(own) for name, own in seconds.items()},
        "cost": {
            "noise-conditional": 1 / ratio_to(blind, list(seconds.values())[1])[0] - 1,
            "preconditioned": 1 / ratio_to(blind, plain)[0] - 1,
            "tsm": 1 / ratio_to(plain, tsm)[0] - 1,
        },
        "rounds": options.rounds,
        "environment": environment(),
    }
    print(json.dumps({name: found[name] for name in ("seconds_per_step", "cost")}, indent=1))
    if options.out:
        write_atomically(options.out, json.dumps(found, indent=1).encode())


def make(model: dict[str, Any], objective: str) -> tuple[TrainingLoss, dict[str, Batch]]:
    """The loss of recipe ``digits`` with other model settings, and one batch per stream."""
    config = resolve({"model": model, "objective": objective}, recipe="digits")
    torch.manual_seed(0)
    facts = {"in_channels": 1, "num_classes": 10, "reference_size": (8, 8)}
    network = ModelConfig.model_validate(config.model.model_dump() | facts).build().train()
    loss = TrainingLoss(network, parse_objective(objective), config.balance)
    return loss, {name: batch(config.stream(name).batch_size) for name in loss.streams}


def batch(size: int) -> Batch:
    """Noise of one batch in place of digits: the time of a step does not depend on the images."""
    x, eps, sigma = torch.rand(size, 1, 8, 8), torch.randn(size, 1, 8, 8), 0.1 * torch.rand(size)
    y, labels = x + sigma.reshape(-1, 1, 1, 1) * eps, torch.randint(10, (size,))
    return Batch(x, y, sigma, eps, labels, torch.nn.functional.one_hot(labels, 10).float())


def step(loss: TrainingLoss, batches: dict[str, Batch]) -> None:
    """Forward and backward pass."""
    for p in loss.parameters():
        p.grad = None
    loss(batches).total.backward()


if __name__ == "__main__":
    main()
