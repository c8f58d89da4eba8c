"""Measure a run of the recipe ``digits-density``: accuracy, samples, bits per dimension.

    ebmkit train --recipe digits-density --out RUN
    python benchmarks/digits_density.py RUN benchmarks/results/digits-density.json

Samples: ``ebmkit sample RUN --label all -n 200 --steps 20``; a support vector machine trained on
the same split recognises them. Bits per dimension at sigma 0.02 (a third of the distance of the
levels), by energy and by denoising errors, beside Gaussian mixtures by EM that see the same
dequantised images.
"""

import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from sklearn.mixture import GaussianMixture
from sklearn.svm import SVC

import ebmkit
from ebmkit.data import load_dataset
from ebmkit.likelihood import (
    denoising_likelihood,
    dequantize,
    energy_likelihood,
    fit_gaussian,
    image_levels,
)

KEPT = ("git_commit", "torch", "cores", "threads")
LEVELS, SIGMA, FEW = (0.001, 0.1, 0.3, 0.6, 1.0, 2.0), 0.02, 100


def images_of(*splits: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels of splits of the digits."""
    sets = [load_dataset("digits", split=split) for split in splits]
    batches = [batch for own in sets for batch in own.batches(500)]
    labels = [c for _, c in batches if c is not None]
    return torch.cat([x for x, _ in batches]), torch.cat(labels)


def measure(run: Path) -> dict[str, Any]:
    """All figures of the run."""
    model = ebmkit.load(run).eval()
    environment = json.loads((run / "environment.json").read_text())
    train, train_labels = images_of("train", "validation")
    test, labels = images_of("test")
    noise = torch.randn(test.shape, generator=torch.Generator().manual_seed(0))
    accuracy = {}
    for sigma in LEVELS:
        y = test if sigma == LEVELS[0] else test + sigma * noise
        accuracy[str(sigma)] = float((model.logits(y, sigma).argmax(1) == labels).float().mean())
    classifier = SVC(gamma=0.001, C=10).fit(16 * train.flatten(1).numpy(), train_labels.numpy())
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "samples"
        command = ["ebmkit", "sample", str(run), "--label", "all", "-n", "200", "--steps", "20"]
        subprocess.run([sys.executable, "-m", *command, "--out", str(out)], check=True)
        with h5py.File(out / "samples.h5") as file:
            x, wanted = file["samples"][()], file["labels"][()]
    found = classifier.predict(16 * x.clip(0, 1).reshape(len(x), -1))
    bits: dict[str, dict[str, float]] = {}
    levels = image_levels(train)
    for how in ("uniform", "gaussian"):
        seen, unseen = (
            dequantize(x, levels, how, SIGMA, seed=k) for k, x in ((1, train), (0, test))
        )
        few = dequantize(test[:FEW], levels, how, SIGMA)
        y = unseen.images.to(test)
        energy = energy_likelihood(model, y, sigma=SIGMA).log_density
        reference = fit_gaussian(train, 1 / 16)
        denoised = denoising_likelihood(model, y[:FEW], sigma=SIGMA, reference=reference, draws=32)
        row = {
            "energy": float(unseen.bits_per_dimension(energy).mean()),
            "energy, first 100": float(few.bits_per_dimension(energy[:FEW]).mean()),
            "denoising errors, first 100": float(
                few.bits_per_dimension(denoised.log_density).mean()
            ),
        }
        a, b = (one.images.flatten(1).double().numpy() for one in (seen, unseen))
        for count in (1, 5, 10):
            scores = []
            for floor in (1e-4, 1e-3):
                mixture = GaussianMixture(count, reg_covar=floor, random_state=0).fit(a)
                density = torch.from_numpy(mixture.score_samples(b))
                scores.append(float(unseen.bits_per_dimension(density).mean()))
            row[f"mixture of {count}"] = min(scores)
        bits[how] = {name: round(value, 3) for name, value in row.items()}
    return {
        "environment": {k: v for k, v in environment.items() if k in KEPT},
        "log_density_error": model.card.log_density_error if model.card else None,
        "test_images": len(test),
        "accuracy": accuracy,
        "samples": len(x),
        "recognised": float(np.mean(found == wanted)),
        "classifier_accuracy": classifier.score(16 * test.flatten(1).numpy(), labels.numpy()),
        "sigma": SIGMA,
        "bits_per_dimension": bits,
    }


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    warnings.simplefilter("ignore")
    document = measure(Path(sys.argv[1]))
    Path(sys.argv[2]).write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))
