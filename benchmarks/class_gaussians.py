"""Samples of digits from class Gaussians: how many an independent classifier recognises.

    for seed in 0 1 2; do uv run ebmkit train --seed $seed --out runs/$seed; done
    uv run python benchmarks/class_gaussians.py runs/0 runs/1 runs/2

The classifier is a support vector machine, trained on the same split of the digits. Rows without
the model show what the starting points alone explain. Writes
``benchmarks/results/class-gaussians.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.svm import SVC
from torch import Tensor

import ebmkit
from ebmkit.compute import environment
from ebmkit.data import load_dataset
from ebmkit.sampling import Chains, ClassGaussians, find_sampler
from ebmkit.sampling.jobs.settings import TIMESTEPS
from ebmkit.storage import write_atomically
from ebmkit.terminal import counting

RESULTS = Path(__file__).parent / "results" / "class-gaussians.json"
SEEDS, COUNT = (0, 1, 2), 200
ROWS = (
    "class Gaussian, no model",
    "ddim from the class Gaussian",
    "ddim from the class Gaussian, level of the schedule",
    "ddim from the class mean",
    "ddim from the mean image",
    "ddim from gray",
    "ddim from test images",
)


def split(name: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 8, 8) in [0, 1] and labels (N,) of the digits."""
    found = load_dataset("digits", None, name)
    return found.images.float() / 255, found.labels


def begin(row: str, gaussians: ClassGaussians, c: Tensor, generator: torch.Generator) -> Tensor:
    """Starting points of ``row`` without the noise."""
    if "class Gaussian" in row:
        return gaussians.sample(len(c), generator, c)
    means = torch.stack(gaussians.means)
    if row == "ddim from the class mean":
        return means[c]
    if row == "ddim from the mean image":
        return means.mean(0).expand(len(c), -1, -1, -1)
    if row == "ddim from gray":
        return torch.full((len(c), *gaussians.shape), 0.5)
    images, labels = split("test")
    rows = [torch.nonzero(labels == k).flatten() for k in c]
    at = [int(torch.randint(len(own), (1,), generator=generator)) for own in rows]
    return images[[int(own[k]) for own, k in zip(rows, at, strict=True)]]


def sample(model: Any, row: str, c: Tensor, seed: int) -> Tensor:
    """Samples (B, 1, 8, 8) of labels ``c``, clipped."""
    generator, gaussians = torch.Generator().manual_seed(seed), model.class_gaussians
    x = begin(row, gaussians, c, generator)
    if "no model" in row:
        return x.clamp(0, 1)
    model.class_gaussians = None if "schedule" in row else gaussians
    entry = find_sampler("ddim")
    sampler = entry.build(model, c, entry.config(steps=TIMESTEPS))
    model.class_gaussians = gaussians
    y = x + sampler.sigmas[0] * torch.randn(x.shape, generator=generator)
    return Chains(sampler, sampler.init(y)).run(sampler.steps, generator).x.clamp(0, 1)


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to the pixels of two sets."""
    (ma, ca), (mb, cb) = ((v.mean(0), np.cov(v.T)) for v in (x.flatten(1).numpy() for x in (a, b)))
    root = np.sqrt(np.linalg.eigvals(ca @ cb).real.clip(0)).sum()  # trace of the square root
    return float(((ma - mb) ** 2).sum() + np.trace(ca + cb) - 2 * root)


def main() -> None:
    """Sample by every row, run and seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="run folders of digits")
    models = [ebmkit.load(run) for run in parser.parse_args().runs]
    (x, labels), (test, test_labels) = split("train"), split("test")
    classifier = SVC(gamma=0.06, C=10).fit(x.flatten(1), labels)
    c, found = torch.arange(COUNT) % 10, []

    def spread(images: Tensor, own: Tensor) -> float:
        return float(np.mean([torch.pdist(images[own == k].flatten(1)).mean() for k in range(10)]))

    def nearest(images: Tensor) -> float:
        return float(torch.cdist(images.flatten(1), x.flatten(1)).amin(1).median())

    with counting("rows") as progress:
        for at, row in enumerate(ROWS):
            values = []
            for model in models:
                for seed in SEEDS:
                    begun = time.monotonic()
                    made = sample(model, row, c, seed)
                    values.append(
                        {
                            "seconds": time.monotonic() - begun,
                            "recognised": float(classifier.score(made.flatten(1), c)),
                            "nearest": nearest(made),
                            "diversity": spread(made, c) / spread(x, labels),
                            "frechet": frechet(made, test),
                        }
                    )
            means = {k: float(np.mean([v[k] for v in values])) for k in values[0]}
            least = min(v["recognised"] for v in values)
            found.append({"row": row, "least_recognised": least} | means)
            progress(at + 1, len(ROWS))
    real = {
        "recognised": float(classifier.score(test.flatten(1), test_labels)),
        "nearest": nearest(test),
    }
    document = {
        "runs": len(models),
        "seeds": SEEDS,
        "samples": COUNT,
        "test_images": real,
        "rows": found,
        "environment": {k: v for k, v in environment().items() if k != "command"},
    }
    write_atomically(RESULTS, json.dumps(document, indent=2).encode())
    for own in found:
        print(
            f"| {own['row']} | {own['recognised']:.1%} | {own['least_recognised']:.1%} | "
            f"{own['nearest']:.2f} | {own['diversity']:.2f} | {own['frechet']:.2f} | "
            f"{own['seconds']:.1f} |"
        )
    print(f"test images: {real}")


if __name__ == "__main__":
    main()
