"""Perceptually aligned gradients: ascent of classifiers to each label, from noise and from data.

    uv run python benchmarks/aligned.py plain=RUN joint=RUN jem=RUN --judge RUN --out aligned

For each run, log p(c|x) is maximised by 60 l2-normalised steps of 0.1 (RCG sections 3.1-3.2) from
the same uniform noise and from the same test image. A separately trained classifier counts the
results that it classifies as the target label; the guiding classifier itself accepts nearly all.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

import ebmkit
from ebmkit.compute import environment
from ebmkit.data import AnyImages
from ebmkit.evaluation.statistics import proportion
from ebmkit.plots import new_figure, save_figure, show_image
from ebmkit.sampling import Ascent, Chains, label_density_of
from ebmkit.storage import write_atomically
from ebmkit.training import RunFolder, resolve
from ebmkit.training.setup import images_of

EACH, STEPS, STEP = 20, 60, 0.1


def climbed(model: ebmkit.EnergyModel, x: Tensor, labels: Tensor) -> Tensor:
    """Images at the end of the ascent of log p(c|x) from ``x``."""
    sampler = Ascent(label_density_of(model, labels), STEP)
    return Chains(sampler, sampler.init(x)).run(STEPS, torch.Generator()).x


def starts(images: AnyImages, labels: Tensor, seed: int) -> dict[str, Tensor]:
    """Start images: uniform noise, and test images; the same for every label."""
    first, _ = next(iter(images.batches(EACH)))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand((EACH, *first.shape[1:]), generator=generator)
    count = len(labels) // EACH
    return {"noise": noise.repeat(count, 1, 1, 1), "data": first.repeat(count, 1, 1, 1)}


def main() -> None:
    """Run the ascents, evaluate the results, and plot them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    parser.add_argument("--judge", type=Path, required=True, help="run of another classifier")
    parser.add_argument("--out", type=Path, required=True, help="NAME of NAME.json and NAME.png")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    runs = dict(text.split("=", 1) for text in options.runs)
    judge = ebmkit.load(options.judge)
    images = images_of(resolve(RunFolder.open(options.judge).config()).dataset, "test")
    labels = torch.arange(images.num_classes).repeat_interleave(EACH)
    begun = starts(images, labels, options.seed)
    rows = [(name, start) for start in begun for name in runs]
    figure = new_figure(1.0 * (images.num_classes + 1), 1.12 * len(rows), layout="constrained")
    axes = figure.subplots(len(rows), images.num_classes + 1, squeeze=False)
    found = {}
    for row, (name, start) in enumerate(rows):
        model = ebmkit.load(runs[name])
        assert isinstance(model, ebmkit.EnergyModel)
        ends = climbed(model, begun[start], labels)
        kinds = {"judge": judge, "itself": model}
        seen = {
            who: int((one.logits(ends).argmax(1) == labels).sum()) for who, one in kinds.items()
        }
        found[f"{name}, from {start}"] = {
            who: proportion(count, len(labels)).document() for who, count in seen.items()
        }
        show_image(axes[row, 0], begun[start][0], name, f"from {start}")
        for c in range(images.num_classes):
            show_image(axes[row, c + 1], ends[c * EACH], "", images.class_names[c])
    save_figure(figure, options.out.with_suffix(".png"))
    description = {"each": EACH, "steps": STEPS, "step": STEP, "seed": options.seed}
    kept = {k: environment()[k] for k in ("torch", "cores", "gpu", "git_commit")}
    document = {"rows": found, **description, "dataset": images.name, "environment": kept}
    write_atomically(options.out.with_suffix(".json"), json.dumps(document, indent=1).encode())
    for name, own in found.items():
        print(f"{name:24}", *(f"{who} {100 * one['value']:.0f} %" for who, one in own.items()))


if __name__ == "__main__":
    main()
