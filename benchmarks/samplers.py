"""Share of samples that are classified as their target label, by sampler and start.

    uv run ebmkit train --out RUN
    uv run python benchmarks/samplers.py RUN

The model itself classifies the samples, so the shares are optimistic: use them to compare samplers
and starts, not models. Writes ``benchmarks/results/samplers.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import ebmkit
from ebmkit.sampling import Chains, find_sampler
from ebmkit.storage import write_atomically
from ebmkit.training import RunFolder, resolve
from ebmkit.training.setup import images_of

RESULTS = Path(__file__).parent / "results" / "samplers.json"
ROWS: dict[str, dict[str, Any]] = {
    "ddim": {"steps": 100},
    "ddpm": {"steps": 300},
    "pc": {"steps": 60},
    "annealed-langevin": {"steps": 100},
    "kadkhodaie_simoncelli": {"steps": 200, "first_step": 0.05, "beta": 0.1},
}
STARTS = ("noise", "class_gaussian")


def main() -> None:
    """Sample with every row of `ROWS` from every start."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder of a classifier")
    parser.add_argument("--each", type=int, default=4, help="chains per label")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = ebmkit.load(options.run)
    train = images_of(resolve(RunFolder.open(options.run).config()).dataset, "train")
    images, labels = train.images.float() / 255, train.labels
    wanted = torch.arange(model.num_classes).repeat_interleave(options.each)
    found = []
    for name, settings in ROWS.items():
        for start in STARTS:
            entry = find_sampler(name)
            config = entry.config(**settings, start=start)
            sampler = entry.build(model, wanted, config)
            generator = torch.Generator().manual_seed(options.seed)
            shape, data = (len(wanted), *images.shape[1:]), (images, labels)
            x = entry.start(model, sampler, config, shape, generator, wanted, data)
            begun = time.monotonic()
            last = Chains(sampler, sampler.init(x)).run(entry.length(sampler, config), generator)
            x = entry.finish(model, sampler, last.x, wanted).clamp(0, 1)
            right = (model.logits(x).argmax(1) == wanted).double().mean()
            row = {"sampler": name, "settings": settings, "start": start, "steps": last.step}
            row |= {"recognised": float(right), "chains": len(wanted), "seed": options.seed}
            found.append(row | {"seconds": round(time.monotonic() - begun, 1)})
            print(found[-1], flush=True)
    write_atomically(RESULTS, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
