"""Restoration of test images for each task: PSNR compared with simple methods.

    uv run python benchmarks/restore.py RUN --data-dir DIR --images 20

RUN is a blind denoiser. Test images of its data set are measured, restored by stochastic ascent
(`ebmkit.sampling.jobs.restore`), and compared with the originals. Writes ``RUN-restore.json`` and a
plot to ``--out``: mean over images of the PSNR in dB, clipped to [0, 1], with Student's 95 %
intervals that cover the choice of images.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ebmkit
from ebmkit.compute import environment, pick_device
from ebmkit.evaluation.statistics import mean
from ebmkit.metrics import psnr
from ebmkit.plots import image_rows
from ebmkit.sampling.ascent import StochasticAscentConfig
from ebmkit.sampling.inverse import TaskOptions, find_task
from ebmkit.sampling.jobs.restore import restore
from ebmkit.sampling.jobs.sources import data_of
from ebmkit.storage import write_atomically
from ebmkit.terminal import COUNT, ProgressBar, console
from ebmkit.training.setup import images_of

TASKS = {
    "inpaint": TaskOptions(share=0.1),
    "random-pixels": TaskOptions(share=0.5),
    "superres": TaskOptions(factor=2),
    "deblur": TaskOptions(share=0.25),
}


def measure(
    model: ebmkit.ScoreModel,
    clean: Tensor,
    name: str,
    options: argparse.Namespace,
    bar: ProgressBar,
) -> tuple[dict[str, Any], dict[str, tuple[Tensor, str]]]:
    """Run one task on all images: row of the JSON file, and panels of the first image."""
    task = find_task(name)
    measurement = task.measurement(tuple(clean.shape[1:]), TASKS[name])
    measured = measurement.measure(clean)
    config = StochasticAscentConfig(steps=options.steps, beta=options.beta)
    line = bar.add_task(name, total=None)
    start = time.perf_counter()
    found = restore(
        model,
        measurement,
        measured,
        config,
        samples=options.samples,
        seed=options.seed,
        progress=lambda done, total: bar.update(line, completed=done, total=total),
    )
    seconds = time.perf_counter() - start
    images = {"restored": found.images[:, 0].clamp(0, 1)}
    if options.samples > 1:
        images[f"mean of {options.samples}"] = found.images.clamp(0, 1).mean(1)
    simple = [measurement.baselines(m[None]) for m in measured]
    for baseline in simple[0]:
        images[baseline] = torch.stack([one[baseline] for one in simple])
    values = {key: psnr(x, clean) for key, x in images.items()}
    row = {
        "task": name,
        "options": {k: v for k, v in TASKS[name]._asdict().items() if v is not None},
        "numbers": measurement.count,
        "of": math.prod(measurement.shape),
        "psnr": {key: _estimate(value) for key, value in values.items()},
        "lost": int((~found.finite).sum()),
        "steps": found.steps,
        "seconds": round(seconds, 2),
    }
    gray = measurement.impose(torch.full_like(clean[:1], 0.5), measured[:1])[0]
    best = max(simple[0], key=lambda key: float(values[key].mean()))
    shown = ["restored", *([f"mean of {options.samples}"] if options.samples > 1 else [])]
    panels = {"original": (clean[0], name), "measured": (gray, "")}
    panels |= {
        label: (images[key][0], f"{key} {float(values[key][0]):.2f} dB")
        for key, label in [(best, "best simple method"), *((key, key) for key in shown)]
    }
    return row, panels


def _estimate(values: Tensor) -> dict[str, Any]:
    """Mean with interval; exact images, which have infinite PSNR, are excluded and counted."""
    finite = values[values.isfinite()]
    return mean(finite).document() | {"exact": len(values) - len(finite)}


def main() -> None:
    """Restore, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--data-dir", type=Path, help="folder of the run's data set")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--steps", type=int, default=StochasticAscentConfig().steps)
    parser.add_argument("--beta", type=float, default=StochasticAscentConfig().beta)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    model = ebmkit.load(options.run, device=str(pick_device(options.device)))
    test = images_of(data_of(options.run, None, options.data_dir), "test").first(options.images)
    clean = next(iter(test.batches(options.images)))[0]
    rows, pictures = [], []
    with ProgressBar(COUNT, transient=True) as bar:
        for name in TASKS:
            row, panels = measure(model, clean, name, options, bar)
            rows.append(row)
            pictures.append(panels)
            console.print(f"{name}:", {k: round(v["value"], 2) for k, v in row["psnr"].items()})
    document = {
        "run": options.run.name,
        "model": model.card.model_dump(mode="json") if model.card else None,
        "dataset": test.name,
        "split": test.split,
        "images": len(test),
        "seed": options.seed,
        "samples": options.samples,
        "beta": options.beta,
        "rows": rows,
        "environment": {k: environment()[k] for k in ("torch", "cores", "gpu", "git_commit")},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.run.name}-restore.json"
    write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())
    title = f"Restored by {options.run.name}: {test.name} {test.split}, first image of {len(test)}"
    shown = [list(panels.values()) for panels in pictures]
    image_rows(shown, list(pictures[0]), path.with_suffix(".png"), title=title)
    console.print(f"wrote {path}")


if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")
    main()
