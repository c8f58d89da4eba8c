"""Guide a pipeline of diffusers by a separately trained classifier.

uv run python examples/guide_diffusers.py
uv run python examples/guide_diffusers.py --pipeline google/ddpm-cifar10-32 --guide runs/robust \
    --scale 12 --schedule sigmoid:t0=650,y0=0.1,k=0.01 --steps 100 --out guided.png

Without options both networks have random weights: the images are noise, but the guide's probability
of the label is higher with guidance.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

import ebmkit
from ebmkit.guidance.diffusers import guided


def random_pipeline(size: int = 16) -> DDIMPipeline:
    """A small DDIM pipeline with random weights, for images of ``size``."""
    unet = UNet2DModel(
        sample_size=size,
        block_out_channels=(16, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    )
    return DDIMPipeline(unet, DDIMScheduler())


def random_guide(size: int = 16, classes: int = 10) -> torch.nn.Module:
    """A linear network with random weights; any module that maps images to logits works."""
    linear = torch.nn.Linear(3 * size**2, classes)
    torch.nn.init.normal_(linear.weight, std=0.1)
    return torch.nn.Sequential(torch.nn.Flatten(), linear).eval()


def main(
    pipeline: str | None = None,
    guide: str | None = None,
    label: int = 3,
    scale: float = 20.0,
    schedule: str = "exact",
    steps: int = 20,
    count: int = 4,
    out: Path | None = None,
) -> tuple[float, float]:
    """Sample from the same noise without and with guidance; return the mean p(label|image)."""
    torch.manual_seed(0)
    pipe = DDIMPipeline.from_pretrained(pipeline) if pipeline else random_pipeline()
    model = ebmkit.load(guide) if guide else random_guide()
    pipe.set_progress_bar_config(disable=True)
    probabilities = []
    with torch.no_grad():
        for sampler in (pipe, guided(pipe, model, label, scale=scale, schedule=schedule)):
            images = sampler(
                batch_size=count,
                generator=torch.Generator().manual_seed(0),
                num_inference_steps=steps,
                output_type="np",
            ).images
            x = torch.tensor(images).permute(0, 3, 1, 2)
            logits = model.logits(x) if isinstance(model, ebmkit.EnergyModel) else model(x)
            probabilities.append(float(logits.softmax(1)[:, label].mean()))
            if out is not None:
                name = out if sampler is not pipe else out.with_stem(f"{out.stem}-unguided")
                row = torch.cat(list(x), dim=2).mul(255).round().byte().permute(1, 2, 0)
                DDIMPipeline.numpy_to_pil(row.numpy()[None] / 255)[0].save(name)
    return probabilities[0], probabilities[1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", help="a folder, or a name on the hub")
    parser.add_argument("--guide", help="a run, or a folder made by `ebmkit import`")
    parser.add_argument("--label", type=int, default=3)
    parser.add_argument("--scale", type=float, default=20.0)
    parser.add_argument("--schedule", default="exact")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--out", type=Path, help="image file of the samples, .png")
    unguided, with_guide = main(**vars(parser.parse_args()))
    print(f"p(label | image) by the guide: unguided {unguided:.3f}, guided {with_guide:.3f}")
