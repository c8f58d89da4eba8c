"""Small models of every kind, in float64, and the pairs of a backbone and a head to try."""

import torch
from torch import Tensor

from ebmkit import JointModel, create_model
from ebmkit.energy import EnergyModel
from ebmkit.models import BACKBONES, HEADS

SMALLEST = {
    "gradresnet18-imagenet": 32,
    "resnet18-imagenet": 32,
    "resnet50-imagenet": 32,
}  # total stride 16: below this the last maps are one pixel
NUM_CLASSES = 3

PAIRS = [
    (backbone, head)
    for i, backbone in enumerate(sorted(BACKBONES))
    for j, head in enumerate(sorted(HEADS))
    if backbone == "gradresnet18" or i % len(HEADS) == j
]
"""Every backbone under one head, the heads in turn; the paper's backbone under every head."""


def small_size(backbone: str) -> int:
    """A small reference size that suits the backbone."""
    return SMALLEST.get(backbone, 8)


def small_model(backbone: str, head: str) -> JointModel:
    """A preset under a head, narrow, in float64, with the plain formula at every size."""
    torch.manual_seed(0)
    made = create_model(backbone, NUM_CLASSES, in_channels=1, head=head, width=8).double().eval()
    made._warned = True  # of ReLU and BatchNorm, which some presets have: see test_ablations
    return made


def gradients(loss: Tensor, model: EnergyModel) -> list[Tensor]:
    return [
        g if g is not None else torch.zeros(())
        for g in torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    ]
