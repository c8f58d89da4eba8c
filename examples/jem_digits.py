"""Train a JEM on digits, sample digits of each class, and classify them with another network.

    uv run python examples/jem_digits.py --out runs/jem-digits

Trains a JEM with the recipe ``digits-jem`` (one to two minutes on two idle cores), and an
evaluation classifier with another architecture and seed. Langevin chains of p(x|c) then start from
noise or from the Gaussian of their class. The result is the share of samples that the classifier
assigns to the requested digit.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import ebmkit
from ebmkit.compute import environment
from ebmkit.data import load_dataset
from ebmkit.evaluation import evaluate
from ebmkit.evaluation.statistics import proportion
from ebmkit.plots import new_figure, save_figure, show_image
from ebmkit.sampling import Chains, ClassGaussians, Langevin, score_of
from ebmkit.sampling.langevin import JEM_NOISE, JEM_STEP
from ebmkit.storage import write_atomically
from ebmkit.training import RunFolder, resolve
from ebmkit.training.loop import assemble

EACH = 20
"""Samples of each digit."""


def train(out: Path, recipe: str, **changes: Any) -> ebmkit.ScoreModel:
    """Train a run in ``out``, or resume it; return its model. A finished run is only loaded."""
    config = resolve(changes, recipe=recipe)
    run = RunFolder.open(out) if out.exists() else RunFolder.create(out, config)
    run.check_config(config)
    trainer = assemble(config, run)
    if trainer.step < config.steps:
        trainer.fit()
    return ebmkit.load(out)


def draw(model: ebmkit.ScoreModel, start: str, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """Run `EACH` chains per digit for ``steps`` Langevin steps; return images and their labels."""
    labels = torch.arange(10).repeat_interleave(EACH)
    generator = torch.Generator().manual_seed(seed)
    if start == "noise":
        x = torch.rand(len(labels), 1, 8, 8, generator=generator)
    else:
        train_set = load_dataset("digits", split="train")
        gaussians = ClassGaussians(train_set.floats(), train_set.labels)
        x = gaussians.sample(len(labels), generator, labels)
    sampler = Langevin(score_of(model, labels), JEM_STEP, noise_std=JEM_NOISE)
    chains = Chains(sampler, sampler.init(x))
    return chains.run(steps, generator).x, labels


def plot_samples(samples: dict[str, Tensor], path: Path) -> None:
    """Plot one row per start of the chains, with a sample of each digit."""
    figure = new_figure(10.2, 1.25 * len(samples) + 0.2, layout="constrained")
    axes = figure.subplots(len(samples), 10, squeeze=False)
    for row, (name, images) in zip(axes, samples.items(), strict=True):
        for digit, panel in enumerate(row):
            show_image(panel, images[digit * EACH], name if digit == 0 else "", str(digit))
    save_figure(figure, path)


def main(out: Path, steps: int | None = None, chain_steps: int = 200, seed: int = 0) -> Any:
    """Train, sample and classify; write the results to ``out``/jem-digits.json and return them."""
    changes = {} if steps is None else {"steps": steps}
    start_time = time.perf_counter()
    jem = train(out / "jem", "digits-jem", seed=seed, **changes)
    seconds = time.perf_counter() - start_time
    classifier = train(
        out / "judge", "digits", objective="ce", seed=seed + 1, steps=min(300, steps or 300)
    )
    test = load_dataset("digits", split="test")
    accuracies = {
        name: evaluate(model, test, ["classify"], out / name / "own", noise_levels=(0,))[
            "classify"
        ].document
        for name, model in (("jem", jem), ("judge", classifier))
    }
    checkpoint = RunFolder.open(out / "jem").load_checkpoint()
    assert checkpoint is not None
    results: dict[str, Any] = {
        "seed": seed,
        "steps": checkpoint["step"],
        "seconds": checkpoint["seconds"],
        "wall_seconds": seconds,
        "breaches": len(checkpoint["rollback"]["history"]),
        "accuracy": accuracies["jem"]["accuracy"],
        "accuracy_interval": accuracies["jem"]["accuracy_interval"],
        "judge_accuracy": accuracies["judge"]["accuracy"],
        "images": accuracies["jem"]["images"],
        "chain_steps": chain_steps,
        "samples": 10 * EACH,
        "recognised": {},
        "environment": {k: environment()[k] for k in ("torch", "cores", "gpu", "git_commit")},
    }
    samples = {}
    for start in ("noise", "gaussian"):
        x, labels = draw(jem, start, chain_steps, seed)
        predicted = classifier.logits(x.clamp(0, 1)).argmax(1)
        correct = int((predicted == labels).sum())
        results["recognised"][start] = proportion(correct, len(x)).document()
        samples[f"from {start}"] = x
    plot_samples(samples, out / "jem-digits.png")
    write_atomically(out / "jem-digits.json", json.dumps(results, indent=1).encode())
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/jem-digits"))
    parser.add_argument("--steps", type=int, help="training steps [default: the recipe's]")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    result = main(options.out, options.steps, seed=options.seed)
    Console().print({k: v for k, v in result.items() if k != "environment"})
