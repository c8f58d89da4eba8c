"""The strip of images at the top of README and documentation: noisy, denoised, classified.

    uv run python benchmarks/strip.py RUN --data-dir DIR

The images are the first test image of each class of the run's data set, not chosen by their result.
Each is classified, gets noise of 50/255 and is denoised; the model estimates the noise
level. Writes ``docs/images/strip.png`` and ``benchmarks/results/strip.json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import ebmkit
from ebmkit.compute import environment
from ebmkit.data import load_dataset
from ebmkit.metrics import psnr
from ebmkit.plots import image_rows
from ebmkit.randomness import keyed_generator
from ebmkit.storage import write_atomically

ROOT = Path(__file__).parents[1]
SIGMA = 50 / 255


def main() -> None:
    """Draw the strip."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--data-dir", type=Path)
    options = parser.parse_args()
    model = ebmkit.load(options.run)
    found = load_dataset(model.card.dataset, options.data_dir, "test")
    names, first = found.class_names, []
    for label in range(len(names)):
        first.append(int((found.labels == label).nonzero()[0]))
    x, c = found.images[first].float() / 255, found.labels[first]
    y = x + SIGMA * torch.randn(x.shape, generator=keyed_generator("cpu", "strip"))
    denoised = model.denoise(y).clamp(0, 1)
    p, gains = model.logits(x).softmax(1), psnr(denoised, x)
    before = psnr(y.clamp(0, 1), x)
    model_of = {key: getattr(model.card, key) for key in ("dataset", "objective", "steps")}
    document = {
        "what": "first test image of each class: classified; with noise, denoised blindly",
        "sigma": SIGMA,
        "model": model_of | {"parameters": sum(w.numel() for w in model.parameters())},
        "labels": c.tolist(),
        "predicted": p.argmax(1).tolist(),
        "probability": p.amax(1).tolist(),
        "sigma_estimated": model.estimate_sigma(y).flatten().tolist(),
        "psnr_noisy": before.tolist(),
        "psnr": gains.tolist(),
        "environment": environment() | {"command": "benchmarks/strip.py RUN --data-dir DIR"},
    }
    guesses = [f"{names[int(q.argmax())]} {float(q.max()):.0%}" for q in p]
    rows = [
        list(zip(x, guesses, strict=True)),
        [(image, f"{float(value):.1f} dB") for image, value in zip(y, before, strict=True)],
        [(image, f"{float(value):.1f} dB") for image, value in zip(denoised, gains, strict=True)],
    ]
    image_rows(
        rows,
        names,
        ROOT / "docs/images/strip.png",
        names=("image, predicted class", f"noise {SIGMA * 255:.0f}/255", "denoised"),
        title="One network classifies and denoises",
        note=f"{model.card.objective}, {model.card.steps} steps on {model.card.dataset}; first "
        "test image of each class. The first row is classified, the second denoised, without the "
        "noise level.",
    )
    text = json.dumps(document, indent=1) + "\n"
    write_atomically(ROOT / "benchmarks/results/strip.json", text.encode())


if __name__ == "__main__":
    main()
