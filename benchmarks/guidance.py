"""All guidance methods, at larger scales than `ebmkit reproduce guidance`.

    uv run python benchmarks/guidance.py digits --out runs/guidance-digits
    uv run python benchmarks/guidance.py gpu --data-dir DIR --out runs/guidance-gpu --seconds 540

``digits``: all networks and methods on digits, trained for minutes; under an hour on two CPU cores.
``gpu``: CIFAR-10 at width 64 on one GPU, about half an hour in total, in calls of ``--seconds``:
finished parts are kept, and the training of an interrupted network resumes. ``--on-digits`` runs it
on digits. Both write guidance.md, guidance.json and plots.
"""

from __future__ import annotations

import argparse
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ebmkit.experiments import SCALES, ExperimentRuns, ExperimentScale, write
from ebmkit.experiments.guidance import AMOUNTS, StudySize, run_guidance
from ebmkit.training import Interrupted
from ebmkit.training.config import merge


def attacked(batch: int, steps: int, of_attack: int) -> dict[str, Any]:
    """Settings of adversarial training."""
    attack = {"terms": {"adv": {"steps": of_attack, "warmup_steps": steps // 2}}}
    return {**attack, "streams": {"classify": {"batch_size": batch}}, "steps": steps}


def of_width(width: int) -> dict[str, Any]:
    """Settings of a network of ``width``."""
    return {"model": {"backbone": {"width": width}}}


BATCHES: dict[str, Any] = {
    "streams": {"classify": {"batch_size": 256}, "denoise": {"batch_size": 128}},
    "checkpoint_every": 500,
}
DIGITS: dict[str, dict[str, Any]] = {
    "base": {
        **of_width(16),
        "streams": {"classify": {"batch_size": 128}, "denoise": {"batch_size": 64}},
        "steps": 400,
    },
    "robust": of_width(16) | attacked(128, 400, 4),
    "diffusion": {"streams": {"denoise": {"batch_size": 128}}, "steps": 1500},
    "jem": {"steps": 300},
    "own-diffusion": of_width(16) | {"steps": 1500},
    "cdn": {"steps": 800},
}
GPU: dict[str, dict[str, Any]] = {
    "base": {**of_width(64), **BATCHES, "steps": 4000},
    "guide": {**of_width(64), **BATCHES, "optimizer": {"lr": 1e-3}, "steps": 4000},
    "judge": {**of_width(64), **BATCHES, "steps": 4000},
    "robust": of_width(64)
    | attacked(256, 2500, 5)
    | {"optimizer": {"lr": 1e-3}, "checkpoint_every": 500},
    "diffusion": {
        "model": {"backbone": {"width": 128, "blocks": 2}},
        "streams": {"denoise": {"batch_size": 256}},
        "optimizer": {"lr": 4e-4, "ema": 0.999},
        "steps": 10_000,
        "checkpoint_every": 500,
    },
    "jem": of_width(64) | {"steps": 2000},
    "own-diffusion": of_width(64)
    | {
        "streams": {"denoise": {"batch_size": 128}},
        "optimizer": {"lr": 5e-4, "ema": 0.999},
        "steps": 6000,
    },
}


def scale(name: str, under: str) -> ExperimentScale:
    """The scale ``under`` with other networks and numbers of steps."""
    base, own = SCALES[under], DIGITS if name == "digits" else GPU
    tasks = {task: merge(base.by_task.get(task, {}), layer) for task, layer in own.items()}
    return replace(
        base,
        description=f"benchmarks/guidance.py {name}",
        layer={**base.layer, "guidance": merge(base.layer["guidance"], own["base"])},
        by_task={**base.by_task, **tasks},
        threads=None,
    )


def amount(name: str, under: str) -> StudySize:
    """Amounts for all networks and methods."""
    more = {"per_class": 30, "steps": 50} if name == "digits" else {"per_class": 50, "steps": 100}
    return replace(
        AMOUNTS[under],
        **more,
        path={"step": 50},
        grid={"images": 360 if name == "digits" else 1000},
        path_images=None if name == "digits" else 2000,
        networks=(),
        methods=(),
        class_images=None,
        options={},
    )


def main() -> None:
    """Train, sample, evaluate, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("setting", choices=("digits", "gpu"))
    parser.add_argument("--out", type=Path, required=True, help="folder of rows and reports")
    parser.add_argument("--data-dir", type=Path, help="CIFAR-10, as `ebmkit train` takes it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], help="networks to train")
    parser.add_argument("--threads", type=int, help="CPU threads [default: all]")
    parser.add_argument("--seconds", type=int, help="time limit; the same command resumes")
    parser.add_argument("--on-digits", action="store_true", help="gpu: train on digits")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.seconds:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        signal.alarm(options.seconds)
    options.out.mkdir(parents=True, exist_ok=True)
    under = "smoke" if options.on_digits or options.setting == "digits" else "cpu"
    runs = ExperimentRuns(
        options.out,
        scale(options.setting, under),
        options.data_dir,
        seeds=(options.seed,),
        log=lambda text: print(text, flush=True),
    )
    try:
        report = run_guidance(runs, options.only, amount(options.setting, under))
        for path in write("guidance", report, options.out):
            print(path)
    except Interrupted as stopped:
        print(f"{stopped}: run the same command again to resume")


if __name__ == "__main__":
    main()
