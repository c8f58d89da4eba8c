"""Trains small networks of every kind under malloc's checks: ``python strided_1x1.py NAME...``.

Each network runs forward, backward and twice backward in a process of its own, forked from one that
has imported everything. `test_onednn.py` sets the environment and reads the JSON that is printed:
network to how its process ended, 0 or minus the signal.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings

import torch
from torch import Tensor, nn

import ebmkit
import ebmkit.compute
from ebmkit import models
from ebmkit.energy import EnergyModel, ScoreModel
from ebmkit.models import BACKBONES, DENOISERS, Features

CLASSES, CHANNELS, IMAGES = 3, 3, 2


class OwnResNet(nn.Module):
    """A user's backbone of plain convolutions, with strided 1x1 convolutions everywhere."""

    num_features = 8

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(CHANNELS, 4, 1, stride=2),
            nn.Softplus(),
            nn.Conv2d(4, 6, 1, stride=(2, 1), bias=False),
            nn.Softplus(),
            nn.Conv2d(6, 8, 1, stride=(1, 2), padding="valid"),
        )

    def forward(self, y: Tensor) -> Features:
        h = self.layers(y)
        return Features(h.mean(dim=(2, 3)), (h,))


class OwnUNet(nn.Module):
    """A user's denoiser: down by a strided 1x1 convolution, up again, and a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(CHANNELS, 4, 1, stride=2)
        self.middle = nn.Conv2d(4, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, CHANNELS, 2, stride=2)

    def forward(self, y: Tensor, sigma: object = None) -> Tensor:
        return y + self.up(nn.functional.silu(self.middle(self.down(y))))


class OwnEnergy(ebmkit.EnergyModel):
    """A user's whole model, which no constructor of ours sees."""

    num_classes = CLASSES

    def __init__(self) -> None:
        super().__init__()
        self.backbone = OwnResNet()
        self.head = nn.Linear(8, CLASSES)

    def forward(self, y: Tensor, sigma: object = None) -> ebmkit.Energies:
        logits = self.head(self.backbone(y).pooled)
        return ebmkit.Energies(logits, logits.logsumexp(1))


def narrow(name: str) -> dict[str, object]:
    """Options of the smallest legal network of a preset, with as few layers as it can have."""
    config = (BACKBONES | DENOISERS)[name].config
    if config.kind == "gradresnet":
        return {"width": 2, "channels_per_group": 1}  # side connections need an even width
    if config.kind == "unet":
        return {"width": 2, "norm_groups": 1, "dropout": 0.0}  # width 1: no embedding of the time
    return {"width": 1}


def own_models() -> dict[str, ScoreModel]:
    head = models.LogitHead(8, CLASSES)
    return {
        "own backbone": models.JointModel(OwnResNet(), head),
        "own denoiser": models.DirectDenoiser(OwnUNet()),
        "own model": ebmkit.optimize(OwnEnergy()),
    }


def make(name: str) -> ScoreModel:
    """A preset's smallest model, or one of a user."""
    torch.manual_seed(0)
    if name in BACKBONES:
        return ebmkit.create_model(name, CLASSES, in_channels=CHANNELS, **narrow(name))
    if name in DENOISERS:
        return models.create_denoiser(name, in_channels=CHANNELS, **narrow(name))
    return own_models()[name]


def names() -> list[str]:
    return [*BACKBONES, *DENOISERS, "own backbone", "own denoiser", "own model"]


def losses(model: ScoreModel, y: Tensor):
    """One that needs a backward pass, and one that needs two."""
    if isinstance(model, EnergyModel) and model.num_classes:
        yield model(y, 0.3).logits.square().sum()
    yield model.score(y, 0.3).square().sum()


def train(name: str, layout: torch.memory_format) -> None:
    """Two steps, with blocks taken and freed in between, at which malloc looks at its lists."""
    model = make(name).to(memory_format=layout).train()
    size = 32 if name.endswith("imagenet") else 16  # else too few positions reach the kernel
    y = torch.rand(IMAGES, CHANNELS, size, size).to(memory_format=layout)
    for _ in range(2):
        for loss in losses(model, y):
            loss.backward()
            blocks = [torch.empty(size) for size in range(1, 200, 7)]
            del blocks


def ended(name: str, layout: torch.memory_format) -> int:
    """Run `train` in a process of its own; how it ended."""
    pid = os.fork()
    if pid == 0:
        try:
            train(name, layout)
        except BaseException as error:
            print(name, layout, repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=names(), help="networks; none: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--contiguous", action="store_true", help="not channels last")
    parser.add_argument("--unguarded", action="store_true", help="leave convolutions as they are")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(asked.threads)
    if asked.unguarded:
        ebmkit.compute.MIN_SAFE_CHANNELS = 0
    layout = torch.contiguous_format if asked.contiguous else torch.channels_last
    print(json.dumps({name: ended(name, layout) for name in asked.names}))


if __name__ == "__main__":
    main()
