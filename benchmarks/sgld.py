"""SGLD steps per second: our chains and a plain version of JEM's loop, on any device.

    uv run python benchmarks/sgld.py --out benchmarks/results/sgld-cpu.json
    uv run python benchmarks/sgld.py --device cuda --backbone wideresnet28-10-jem --out ...

Candidates are interleaved (`ebmkit.bench.interleave`) on one network and one batch:

- plain: the loop of JEM's authors: sum of the logsumexp of the logits, gradient by autograd to an
  image that requires a gradient, float32, in-place update;
- ours: the steps of `ebmkit.objectives.likelihood`, eager, and on CUDA also compiled, in float32
  and bf16.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ebmkit.bench import interleave, ratio_to
from ebmkit.compile import make_inference
from ebmkit.compute import describe, environment, keep_freed_memory, pick_device
from ebmkit.energy import EnergyModel
from ebmkit.models import create_model
from ebmkit.sampling import Langevin
from ebmkit.sampling.langevin import JEM_NOISE, JEM_STEP
from ebmkit.storage import write_atomically

STEPS = 5


def plain(model: EnergyModel, x: Tensor) -> Callable[[], Tensor]:
    """Function that runs `STEPS` steps of JEM's loop: images in [-1, 1], step 1, noise 0.01."""

    def run() -> Tensor:
        u = (2 * x - 1).requires_grad_()
        for _ in range(STEPS):
            energy = model((u + 1) / 2).logits.logsumexp(1).sum()
            (gradient,) = torch.autograd.grad(energy, [u])
            u.data += gradient + 0.01 * torch.randn_like(u)
        return (u.detach() + 1) / 2

    return run


def ours(model: EnergyModel, x: Tensor, precision: str, compile: str) -> Callable[[], Tensor]:
    """Function that runs the same steps as in our training."""
    computed = make_inference(x.device, precision, compile).wrap(model)
    generator = torch.Generator(x.device).manual_seed(0)

    def score(y: Tensor, sigma: Any = None) -> Tensor:
        return computed.score(y)

    langevin = Langevin(score, JEM_STEP, noise_std=JEM_NOISE)

    def run() -> Tensor:
        state = langevin.init(x)
        with torch.no_grad():
            for _ in range(STEPS):
                state, _ = langevin.step(state, generator)
        return state.x

    return run


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file, which must not exist")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--backbone", default="wideresnet10-jem")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if options.out is not None and options.out.exists():
        parser.error("--out must be a new file")
    device = pick_device(options.device)
    cuda = device.type == "cuda"
    torch.manual_seed(0)
    model = create_model(options.backbone, num_classes=10, in_channels=3, head="logit")
    model.to(device).eval()
    keep_freed_memory(device)
    x = torch.rand(options.batch, 3, 32, 32, device=device)
    candidates = {"plain": plain(model, x), "ours": ours(model, x, "fp32", "off")}
    if cuda:
        candidates["ours, compiled"] = ours(model, x, "fp32", "on")
        candidates["ours, bf16, compiled"] = ours(model, x, "bf16", "on")
    seconds = interleave(candidates, options.rounds, warmup=3)
    rows = []
    table = Table("who", "Langevin steps/s", "images/s", "times plain (quartiles)")
    for name, own in seconds.items():
        ratio = ratio_to(seconds["plain"], own)
        rate = STEPS / statistics.median(own)
        rows.append({"name": name, "steps_per_s": rate, "seconds": own, "ratio": list(ratio)})
        spread = f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
        table.add_row(name, f"{rate:.1f}", f"{rate * options.batch:,.0f}", spread)
    Console().print(table)
    if options.out is not None:
        description = {
            "backbone": options.backbone,
            "batch": options.batch,
            "device": describe(device),
        }
        document = {**description, "rows": rows, "environment": environment()}
        write_atomically(options.out, (json.dumps(document, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
