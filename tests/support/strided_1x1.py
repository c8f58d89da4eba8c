"""Trains small networks of every kind under malloc's checks: ``python strided_1x1.py NAME...``.

Each network runs forward, backward and double backward in a fork of this process. It prints JSON:
network to exit code, 0 or minus the signal. `test_onednn.py` sets the environment and reads it.
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
    """A user's backbone of strided 1x1 convolutions."""

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
    """A user's denoiser: strided 1x1 convolution, transposed convolution, skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(CHANNELS, 4, 1, stride=2)
        self.middle = nn.Conv2d(4, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, CHANNELS, 2, stride=2)

    def forward(self, y: Tensor, sigma: object = None) -> Tensor:
        return y + self.up(nn.functional.silu(self.middle(self.down(y))))


class OwnEnergy(ebmkit.EnergyModel):
    """A user's complete model, which is not built by the package."""

    num_classes = CLASSES

    def __init__(self) -> None:
        super().__init__()
        self.backbone = OwnResNet()
        self.head = nn.Linear(8, CLASSES)

    def forward(self, y: Tensor, sigma: object = None) -> ebmkit.Energies:
        logits = self.head(self.backbone(y).pooled)
        return ebmkit.Energies(logits, logits.logsumexp(1))


def narrow(name: str) -> dict[str, object]:
    """Options of the narrowest valid network of a preset."""
    config = (BACKBONES | DENOISERS)[name].config
    if config.kind in ("gradresnet", "unet-energy"):
        return {"width": 2, "channels_per_group": 1}  # side connections need an even width
    if config.kind == "unet":
        return {"width": 2, "norm_groups": 1, "dropout": 0.0}  # width 1 has no time embedding
    return {"width": 1}


def own_models() -> dict[str, ScoreModel]:
    head = models.LogitHead(8, CLASSES)
    return {
        "own backbone": models.JointModel(OwnResNet(), head),
        "own denoiser": models.DirectDenoiser(OwnUNet()),
        "own model": ebmkit.optimize(OwnEnergy()),
    }


def make(name: str) -> ScoreModel:
    """The narrowest model of a preset, or a user's model."""
    torch.manual_seed(0)
    if name in BACKBONES:
        return ebmkit.create_model(name, CLASSES, in_channels=CHANNELS, **narrow(name))
    if name in DENOISERS:
        return models.create_denoiser(name, in_channels=CHANNELS, **narrow(name))
    return own_models()[name]


def names() -> list[str]:
    return [*BACKBONES, *DENOISERS, "own backbone", "own denoiser", "own model"]


def losses(model: ScoreModel, y: Tensor):
    """A loss of the logits (one backward pass), and of the score (double backward)."""
    if isinstance(model, EnergyModel) and model.num_classes:
        yield model(y, 0.3).logits.square().sum()
    yield model.score(y, 0.3).square().sum()


def train(name: str, layout: torch.memory_format) -> None:
    """Two steps; blocks allocated and freed in between make malloc check its lists."""
    model = make(name).to(memory_format=layout).train()
    size = 32 if name.endswith("imagenet") else 16  # smaller maps have too few positions
    y = torch.rand(IMAGES, CHANNELS, size, size).to(memory_format=layout)
    for _ in range(2):
        for loss in losses(model, y):
            loss.backward()
            blocks = [torch.empty(size) for size in range(1, 200, 7)]
            del blocks


def exit_code(name: str, layout: torch.memory_format) -> int:
    """Run `train` in a fork; return its exit code."""
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
    parser.add_argument("names", nargs="*", default=names(), help="networks (default: all)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--contiguous", action="store_true", help="instead of channels last")
    parser.add_argument("--unguarded", action="store_true", help="do not change convolutions")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    if options.unguarded:
        ebmkit.compute.MIN_SAFE_CHANNELS = 0
    layout = torch.contiguous_format if options.contiguous else torch.channels_last
    print(json.dumps({name: exit_code(name, layout) for name in options.names}))


if __name__ == "__main__":
    main()
