"""Train a custom backbone with ebmkit's head, objective and trainer.

uv run python examples/compose.py --steps 300 --out runs/own
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import ebmkit
from ebmkit.data import load_dataset
from ebmkit.models import Features, LinearQuadraticHead
from ebmkit.training import RunFolder, Trainer, resolve


class SmallConvNet(nn.Module):
    """A minimal backbone: three convolutions and global average pooling."""

    def __init__(self, channels: int, num_features: int = 64) -> None:
        super().__init__()
        self.num_features = num_features
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1, bias=False),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2, bias=False),
            nn.GELU(),
            nn.Conv2d(64, num_features, 3, padding=1, stride=2, bias=False),
            nn.GELU(),
        )

    def forward(self, y: Tensor) -> Features:
        return Features(self.layers(y).mean(dim=(2, 3)))


def build() -> ebmkit.JointModel:
    """The backbone with the paper's head, for 8x8 gray images of 10 classes."""
    return ebmkit.JointModel(
        SmallConvNet(channels=1),
        LinearQuadraticHead(num_features=64, num_classes=10),
        in_channels=1,
        reference_size=(8, 8),
    )


def main(steps: int, out: Path) -> float:
    """Train on digits; return the test accuracy."""
    torch.manual_seed(0)
    config = resolve({"objective": "ce+dsm", "steps": steps})  # the rest: recipe for digits
    run = RunFolder.create(out, config)
    train, held_out = (
        load_dataset("digits", None, "train"),
        load_dataset("digits", None, "validation"),
    )
    model = Trainer(build(), config, train, held_out, run).fit()
    test = load_dataset("digits", None, "test")
    with torch.no_grad():
        accuracy = (model.logits(test.floats()).argmax(1) == test.labels).float().mean()

    loaded = ebmkit.load(out, model=build())  # a custom model is not rebuilt from model.json
    y = test.floats()[:1]
    with torch.no_grad():
        assert torch.allclose(loaded.score(y), model.score(y), rtol=1e-3, atol=1e-4)
    return float(accuracy)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("runs/own"))
    options = parser.parse_args()
    print(f"test accuracy {main(options.steps, options.out):.2%}")
