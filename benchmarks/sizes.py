"""Scaling of the log-density with the image size: factor, windows and tiles on CBSD68.

    uv run python benchmarks/sizes.py RUN --images DIR/CBSD68

RUN is a colour model trained on 32x32 images (`benchmarks/balance.py` makes one). Each photograph
is denoised by Tweedie's formula with each size scaling of `JointModel`, and with blended scores of
overlapping crops, as in `ebmkit denoise`. Two more columns: the PSNR with the score multiplied by
the best single factor, and that factor (1: the scale is right). Writes
``benchmarks/results/sizes.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ebmkit
from ebmkit.compute import environment
from ebmkit.data import read_image
from ebmkit.evaluation.suite import noise_generator
from ebmkit.inference import image_score
from ebmkit.metrics import psnr
from ebmkit.storage import write_atomically
from ebmkit.terminal import progress_bar

RESULTS = Path(__file__).parent / "results" / "sizes.json"
WAYS = ("plain formula", "windows", "factor", "tiles", "blended 32", "blended 64")


def score(model: ebmkit.JointModel, y: Tensor, way: str) -> Tensor:
    """Score of a whole image y (C, H, W) with method ``way``."""
    reference = model.reference_size
    assert reference is not None
    try:
        if way == "plain formula":
            model.reference_size = None
        elif way.startswith("blended"):
            return image_score(model, y, tile=int(way.split()[1]))
        else:
            model.size_scaling = way  # type: ignore[assignment]
        return model.score(y[None])[0]
    finally:
        model.reference_size = reference


def measure(model: ebmkit.JointModel, clean: Tensor, sigma: float, way: str, seed: int) -> Tensor:
    """PSNR, PSNR at the best scale, that scale, estimated / true sigma, and seconds: (5,)."""
    noise = torch.randn(clean.shape, generator=noise_generator(seed, sigma))
    y = clean + sigma * noise
    start = time.perf_counter()
    step = sigma**2 * score(model, y, way)
    seconds = time.perf_counter() - start
    scale = float(((clean - y) * step).sum() / step.square().sum())
    values = [float(psnr((y + k * step).clamp(0, 1)[None], clean[None])) for k in (1.0, scale)]
    estimated = float(sigma * clean.numel() ** 0.5 / step.norm())
    return torch.tensor([*values, scale, estimated, seconds])


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--every", type=int, default=1, help="use every n-th image")
    parser.add_argument("--sigmas", type=int, nargs="*", default=[15, 25, 50])
    options = parser.parse_args()
    model = ebmkit.load(options.run)
    assert isinstance(model, ebmkit.JointModel)
    assert model.card is not None
    paths = sorted(options.images.glob("*.png"))[:: options.every]
    pictures = [read_image(path, 3).image for path in paths]
    rows: list[dict[str, Any]] = []
    for level in options.sigmas:
        for way in WAYS:
            found = [
                measure(model, picture, level / 255, way, i)
                for i, picture in enumerate(progress_bar(pictures, f"{way} at {level}/255", True))
            ]
            mean = torch.stack(found).mean(0).tolist()
            keys = ("psnr", "psnr_best_scale", "best_scale", "sigma_ratio", "seconds")
            rows.append({"sigma": level, "way": way, **dict(zip(keys, mean, strict=True))})
            print(rows[-1], flush=True)
    document = {
        "images": len(paths),
        "of": len(list(options.images.glob("*.png"))),
        "model": model.card.model_dump(mode="json"),
        "environment": environment(),
        "rows": rows,
    }
    write_atomically(RESULTS, (json.dumps(document, indent=1) + "\n").encode())


if __name__ == "__main__":
    with torch.no_grad():
        main()
