"""Six methods of the sheet of all guidance methods, as ``docs/images/guidance-cifar10.png``.

    uv run python benchmarks/guidance_sheet.py

The drawn images themselves are not stored. This script reads them back from the committed sheet
``docs/images/guidance-cifar10-all.png``, whose cells show the 32x32 pixels without interpolation,
and descriptions and results from ``docs/results/guidance-cifar10.json``. The command
``ebmkit reproduce guidance`` writes both plots from the images.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ebmkit.experiments.guidance_report import SUMMARY, samples_of_methods

DOCS = Path(__file__).parents[1] / "docs"
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse"]
NAMES += ["ship", "truck"]
DPI, LEFT, CELL, HEAD, SHARE = 130, 4.0, 0.42, 0.3, 0.94  # of the sheet, in inches
SIDE = 32


def cell(sheet: np.ndarray, row: int, column: int) -> Tensor:
    """The image uint8 (3, 32, 32) of method ``row`` and class ``column``."""
    left, bottom = DPI * (LEFT + CELL * column), DPI * (HEAD + CELL * (row + 1))
    centres = (np.arange(SIDE) + 0.5) / SIDE * DPI * CELL * SHARE
    x, y = (left + centres).astype(int), (bottom - centres[::-1]).astype(int)
    return torch.from_numpy(sheet[np.ix_(y, x)].transpose(2, 0, 1).copy())


def main() -> None:
    """Write the plot."""
    with Image.open(DOCS / "images/guidance-cifar10-all.png") as image:
        sheet = np.asarray(image.convert("RGB"))
    found = json.loads((DOCS / "results/guidance-cifar10.json").read_text())
    methods = []
    for row, way in enumerate(found["ways"]):
        if way["name"] in SUMMARY:
            images = torch.stack([cell(sheet, row, column) for column in range(len(NAMES))])
            shares = (100 * way["accuracy"][key] for key in ("value", "low", "high"))
            label = "{} ({:.0f} % recognised, {:.0f} to {:.0f})".format(way["about"], *shares)
            methods.append((way["name"], label, images))
    note = f"CIFAR-10, scale cpu, seed 0, clipped; `{found['command']}`. Recognised: 95 % interval."
    samples_of_methods(methods, DOCS / "images/guidance-cifar10.png", NAMES, note)


if __name__ == "__main__":
    main()
