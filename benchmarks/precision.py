"""Effect of the precision on results: one run each in fp32, bf16, and bf16 without exceptions.

    uv run python benchmarks/precision.py --out benchmarks/results/precision.json
    uv run python benchmarks/precision.py --recipe cifar10-adamw --data-dir DIR --out ...

In bf16 the network runs under autocast, except that norm statistics, means over positions and the
head stay in float32. *bf16, no exceptions* leaves these to autocast as well, to measure the effect
of the exceptions. Accuracy is evaluated in fp32, and PSNR in fp32 and bf16.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console

from ebmkit.compile import Inference
from ebmkit.compute import Precision, environment
from ebmkit.data import ImageSet
from ebmkit.energy import EnergyModel
from ebmkit.evaluation.suite import noisy_batches
from ebmkit.metrics import psnr
from ebmkit.storage import write_atomically
from ebmkit.terminal import COUNT, ProgressBar
from ebmkit.training import resolve
from ebmkit.training.loop import assemble
from ebmkit.training.setup import images_of

SIGMAS = (15, 25, 50)
IMAGES = 1000


def main() -> None:
    """Train, evaluate and write; rows that are already in the file are skipped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file, added to")
    parser.add_argument("--recipe", default="digits-adamw")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--steps", type=int, help="default: the recipe's")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    rows = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name, precision, exceptions in (
        ("fp32", "fp32", True),
        ("bf16", "bf16", True),
        ("bf16, no exceptions", "bf16", False),
    ):
        key = f"{options.recipe} {name}"
        if key in rows:
            continue
        layer: dict[str, Any] = {"device": options.device, "compute": {"precision": precision}}
        if options.data_dir:
            layer["dataset"] = {"data_dir": str(options.data_dir)}
        if options.steps:
            layer["steps"] = options.steps
        with nullcontext() if exceptions else everything_under_autocast():
            rows[key] = {"recipe": options.recipe, "name": name, **measure(layer, options.recipe)}
        write_atomically(options.out, json.dumps(rows, indent=2).encode())
        shown = {k: rows[key][k] for k in ("accuracy", "psnr", "psnr_in_bf16", "step_seconds")}
        Console().print(key, shown)


def measure(layer: dict[str, Any], recipe: str) -> dict[str, Any]:
    """Train by ``recipe`` and evaluate the model on test images."""
    config = resolve(layer, recipe=recipe)
    trainer = assemble(config)
    with ProgressBar(COUNT, transient=True) as bar:
        task = bar.add_task(f"{recipe} {config.compute.precision}", total=config.steps)

        class Shown:
            def report(self, row: dict[str, Any]) -> None:
                bar.update(task, completed=row["step"])

        trainer.callbacks = [Shown()]
        model = trainer.fit()
    stats = trainer.run_stats()
    model.requires_grad_(False)
    images = images_of(config.dataset, "test").first(IMAGES)
    assert isinstance(images, ImageSet)
    return {
        "steps": config.steps,
        "seed": config.seed,
        "images": len(images),
        "accuracy": accuracy(model, images),
        "psnr": psnrs(model, images, "fp32"),
        "psnr_in_bf16": psnrs(model, images, "bf16"),
        "step_seconds": stats.step_seconds,
        "environment": environment(),
    }


@torch.no_grad()
def accuracy(model: EnergyModel, images: ImageSet) -> float:
    """Accuracy on clean images, in fp32."""
    right = [(model.logits(x).argmax(1) == labels) for x, labels in images.batches(250)]
    return float(torch.cat(right).float().mean())


@torch.no_grad()
def psnrs(model: EnergyModel, images: ImageSet, precision: Precision) -> dict[str, float]:
    """Mean PSNR in dB of the unconditional denoiser, by noise level in units of 1/255."""
    found = {}
    for level in SIGMAS:
        sigma, values = level / 255, []
        for x, y, *_ in noisy_batches(images, sigma, 0, 250):
            computed = Inference(precision).wrap(model)
            values.append(psnr(computed.denoise(y, sigma).clamp(0, 1), x))
        found[str(level)] = float(torch.cat(values).mean())
    return found


@contextmanager
def everything_under_autocast() -> Iterator[None]:
    """Context in which no part of the network is excluded from autocast."""
    places = ("norms", "gradresnet", "joint")
    patches = [mock.patch(f"ebmkit.models.{place}.upcast", new=_itself) for place in places]
    patches += [
        mock.patch(f"ebmkit.models.{place}.without_autocast", new=_no_exception) for place in places
    ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def _itself(x: torch.Tensor) -> torch.Tensor:
    return x


def _no_exception(x: torch.Tensor) -> AbstractContextManager[None]:
    return nullcontext()


if __name__ == "__main__":
    main()
