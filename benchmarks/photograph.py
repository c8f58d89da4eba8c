"""A photograph with noise, and denoised by a pretrained model, for the documentation.

    uv run python benchmarks/photograph.py

The photograph is scikit-image's ``astronaut`` (NASA, public domain), with Gaussian noise of 25/255,
rounded to 8 bits. ``ebmkit denoise`` removes it without knowing the level. Writes the pictures,
left noisy and right denoised, to ``docs/images/photograph.jpg``, and
``benchmarks/results/photograph.json``.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from skimage.data import astronaut

from ebmkit.compute import environment
from ebmkit.data import read_image, write_image
from ebmkit.metrics import psnr
from ebmkit.pretrained import DEFAULTS
from ebmkit.randomness import keyed_generator
from ebmkit.storage import write_atomically

ROOT = Path(__file__).parents[1]
SIGMA = 25 / 255


def main() -> None:
    """Denoise and draw."""
    x = torch.from_numpy(astronaut()).movedim(2, 0)[None].float() / 255
    y = x + SIGMA * torch.randn(x.shape, generator=keyed_generator("cpu", "photograph"))
    with tempfile.TemporaryDirectory() as folder:
        noisy, rows = Path(folder) / "noisy.png", Path(folder) / "rows.json"
        write_image(y[0].clamp(0, 1), noisy)
        command = [sys.executable, "-m", "ebmkit", "denoise", noisy, "--out", folder + "/out"]
        subprocess.run([*command, "--json", rows], check=True)
        before, after = (
            read_image(path).image[None] for path in (noisy, Path(folder) / "out/noisy.png")
        )
        level = json.loads(rows.read_text())[0]["sigma"]
    document = {
        "what": "scikit-image's astronaut with Gaussian noise; ebmkit denoise without --sigma",
        "model": DEFAULTS["denoise"],
        "sigma": SIGMA,
        "sigma_estimated": level,
        "psnr_noisy": float(psnr(before, x)),
        "psnr": float(psnr(after, x)),
        "environment": environment() | {"command": "benchmarks/photograph.py"},
    }
    path = ROOT / "docs/images/photograph.jpg"
    write_image(torch.cat([before, after], 3)[0], path, overwrite=True)
    text = json.dumps(document, indent=1) + "\n"
    write_atomically(ROOT / "benchmarks/results/photograph.json", text.encode())


if __name__ == "__main__":
    main()
