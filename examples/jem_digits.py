"""Train a JEM on digits, draw digits of each class, and ask another classifier what it sees.

    uv run python examples/jem_digits.py --out runs/jem-digits

Trains by the recipe ``digits-jem`` (a minute or two on two idle cores), and a plain classifier of
another architecture from other random numbers. Then chains start from noise, or from the Gaussian
of their class, and climb log p(x|c) by Langevin steps; the classifier says how many of them it
takes for the digit that was asked for.
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
    """The model of a run in ``out``, which goes on where it was; finished ones are not repeated."""
    config = resolve(changes, recipe=recipe)
    run = RunFolder.open(out) if out.exists() else RunFolder.create(out, config)
    run.check_config(config)
    trainer = assemble(config, run)
    if trainer.step < config.steps:
        trainer.fit()
    return ebmkit.load(out)


def draw(model: ebmkit.ScoreModel, start: str, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """`EACH` chains of each digit after ``steps`` Langevin steps: images, and labels asked for."""
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


def picture(shown: dict[str, Tensor], path: Path) -> None:
    """A row of samples of each digit for each way to start."""
    figure = new_figure(10.2, 1.25 * len(shown) + 0.2, layout="constrained")
    axes = figure.subplots(len(shown), 10, squeeze=False)
    for row, (name, images) in zip(axes, shown.items(), strict=True):
        for digit, one in enumerate(row):
            show_image(one, images[digit * EACH], name if digit == 0 else "", str(digit))
    save_figure(figure, path)


def main(out: Path, steps: int | None = None, chain_steps: int = 200, seed: int = 0) -> Any:
    """Train, draw, judge; returns the figures and writes them to ``out``/jem-digits.json."""
    changes = {} if steps is None else {"steps": steps}
    begun = time.perf_counter()
    jem = train(out / "jem", "digits-jem", seed=seed, **changes)
    seconds = time.perf_counter() - begun
    judge = train(
        out / "judge", "digits", objective="ce", seed=seed + 1, steps=min(300, steps or 300)
    )
    test = load_dataset("digits", split="test")
    accuracies = {
        name: evaluate(model, test, ["classify"], out / name / "own", noise_levels=(0,))[
            "classify"
        ].document
        for name, model in (("jem", jem), ("judge", judge))
    }
    checkpoint = RunFolder.open(out / "jem").load_checkpoint()
    assert checkpoint is not None
    found: dict[str, Any] = {
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
    shown = {}
    for start in ("noise", "gaussian"):
        x, labels = draw(jem, start, chain_steps, seed)
        seen = judge.logits(x.clamp(0, 1)).argmax(1)
        found["recognised"][start] = proportion(int((seen == labels).sum()), len(x)).document()
        shown[f"from {start}"] = x
    picture(shown, out / "jem-digits.png")
    write_atomically(out / "jem-digits.json", json.dumps(found, indent=1).encode())
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/jem-digits"))
    parser.add_argument("--steps", type=int, help="training steps [default: the recipe's]")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    result = main(options.out, options.steps, seed=options.seed)
    Console().print({k: v for k, v in result.items() if k != "environment"})
