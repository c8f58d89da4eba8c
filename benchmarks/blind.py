"""Blind denoising of a run's test images with and without its calibration (`ebmkit.blind`).

    python benchmarks/blind.py RUN --out benchmarks/results/blind-digits.json

Mean PSNR (dB, clipped output) by noise level of the clipped input, of the denoiser that is given
sigma, and of the blind one with the raw and with the calibrated estimate, on the same noise. The
run is that of the quick start: ``ebmkit train --backbone gradresnet18 --objective ce+dsm``.
"""

import argparse
import json
import tempfile
import warnings
from pathlib import Path

import ebmkit
from ebmkit.data import load_dataset
from ebmkit.evaluation import evaluate

LEVELS = (1, 2, 5, 10, 15, 25, 50, 75)
"""Noise levels, in 255ths."""


def main(run: Path, dataset: str) -> dict[str, object]:
    """Measure the run; return the JSON document."""
    model, images = ebmkit.load(run), load_dataset(dataset, split="test")
    assert model.card is not None
    found = {}
    for name in ("calibrated", "raw"):
        if name == "raw":
            model.card.sigma_calibration = []
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sigmas = [level / 255 for level in LEVELS]
            results = evaluate(model, images, ["denoise"], Path(folder), plots=False, sigmas=sigmas)
        found[name] = results["denoise"].document
    rows = (
        ("clipped input", "calibrated", "clipped"),
        ("sigma given", "calibrated", "unconditional"),
        ("blind, raw estimate", "raw", "blind"),
        ("blind, calibrated", "calibrated", "blind"),
    )
    psnr = {
        name: {k: own["value"] for k, own in found[source]["denoisers"][denoiser]["psnr"].items()}
        for name, source, denoiser in rows
    }
    trained = json.loads((run / "environment.json").read_text())
    return {
        "dataset": dataset,
        "images": len(images),
        "psnr": psnr,
        "trained": {name: trained[name] for name in ("git_commit", "torch", "threads", "cores")},
        "measured": {name: found["raw"]["environment"][name] for name in ("git_commit", "threads")},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    document = main(arguments.run, arguments.dataset)
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document["psnr"], indent=1))
