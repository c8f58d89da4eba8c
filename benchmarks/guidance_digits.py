"""Every way of guiding on digits, from networks trained for minutes: what smoke is too short for.

    uv run python benchmarks/guidance_digits.py --out runs/guidance-digits

All networks and ways of `ebmkit reproduce guidance`, with more steps and images; about half an hour
on two CPU cores. Gives guidance.md, guidance.json and the pictures; what is finished is kept.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ebmkit.reproduce import SCALES, Rows
from ebmkit.reproduce.guidance import run_guidance
from ebmkit.reproduce.guidance_rows import AMOUNTS, Amount
from ebmkit.reproduce.scales import Scale

ATTACK = {"terms": {"adv": {"steps": 4, "warmup_steps": 200}}}
STREAMS = {"classify": {"batch_size": 128}, "denoise": {"batch_size": 64}}


def scale() -> Scale:
    """The scale smoke with wider networks and more steps."""
    smoke = SCALES["smoke"]
    tasks = {
        "robust": {**ATTACK, "streams": STREAMS, "steps": 400},
        "diffusion": {"streams": {"denoise": {"batch_size": 128}}, "steps": 1500},
        "jem": {"steps": 300},
        "own-diffusion": {"streams": {"denoise": {"batch_size": 64}}, "steps": 1500},
        "cdn": {"steps": 800},
    }
    by_task = {name: _laid(smoke.by_task.get(name, {}), layer) for name, layer in tasks.items()}
    base = {"model": {"backbone": {"width": 16}}, "streams": STREAMS, "steps": 400}
    return replace(
        smoke,
        about="digits, wider networks and more steps than smoke",
        layer={**smoke.layer, "guidance": _laid(smoke.layer["guidance"], base)},
        by_task={**smoke.by_task, **by_task},
        threads=None,
    )


def amount() -> Amount:
    """All networks and ways."""
    return replace(
        AMOUNTS["smoke"],
        per_class=30,
        steps=50,
        etas=(0.0, 0.2, 0.5, 1.0),
        lengths=(10, 20, 50, 100),
        path={"step": 50},
        grid={"images": 360},
        path_images=None,
        networks=(),
        ways=(),
    )


def _laid(under: Any, over: Any) -> dict[str, Any]:
    """Nested mappings, the second over the first."""
    found = dict(under)
    for key, value in over.items():
        own = found.get(key)
        found[key] = _laid(own, value) if isinstance(own, dict) else value
    return found


def main() -> None:
    """Train, draw, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of rows and reports")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], help="networks to train")
    parser.add_argument("--threads", type=int, help="of the CPU [default: all]")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(options.out, scale(), seed=options.seed, tell=lambda text: print(text, flush=True))
    for path in run_guidance(rows, options.only, amount()):
        print(path)


if __name__ == "__main__":
    main()
