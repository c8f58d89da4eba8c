"""Train a blind denoiser on patches of two photographs, and denoise a full photograph.

    uv run python examples/denoise_photo.py --steps 400 --out runs/photo

Sigma is estimated, not given. Plots the clean, noisy and denoised photograph side by side.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_image
from torch import Tensor

from ebmkit.inference import denoise_image
from ebmkit.metrics import psnr
from ebmkit.noise import format_sigma
from ebmkit.training import RunFolder, resolve
from ebmkit.training.loop import assemble

SIGMA = 25 / 255


def photograph(size: int | None) -> Tensor:
    """scikit-learn's flower, (3, H, W) in [0, 1]; the central square of side ``size``, if given."""
    image = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1) / 255
    if size is None:
        return image
    top, left = (image.shape[1] - size) // 2, (image.shape[2] - size) // 2
    return image[:, top : top + size, left : left + size]


def main(steps: int, out: Path, size: int | None = None) -> tuple[float, float, float]:
    """Train, denoise and plot; return PSNR of the noisy and denoised image, and estimated sigma."""
    config = resolve({"dataset": {"name": "patches"}, "steps": steps})
    trainer = assemble(config, RunFolder.create(out, config))
    model = trainer.fit().requires_grad_(False)

    clean = photograph(size)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    noisy = clean + SIGMA * noise
    denoised = denoise_image(model, noisy)  # blind: no sigma is given
    result = denoised.image.clamp(0, 1)

    values = [float(psnr(image[None], clean[None])) for image in (noisy, result)]
    titles = [
        "clean",
        f"noisy, {format_sigma(SIGMA)}: {values[0]:.2f} dB",
        f"denoised, sigma estimated as {format_sigma(denoised.sigma)}: {values[1]:.2f} dB",
    ]
    figure = Figure(figsize=(15, 4), layout="constrained")
    for axes, image, title in zip(
        figure.subplots(1, 3), (clean, noisy, result), titles, strict=True
    ):
        axes.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy())
        axes.set_title(title)
        axes.axis("off")
    figure.savefig(out / "photograph.png", dpi=110)
    return values[0], values[1], denoised.sigma


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("runs/photo"))
    options = parser.parse_args()
    before, after, sigma = main(options.steps, options.out)
    print(f"noisy {before:.2f} dB, denoised {after:.2f} dB, estimated sigma {format_sigma(sigma)}")
    print(f"wrote {options.out / 'photograph.png'}")
