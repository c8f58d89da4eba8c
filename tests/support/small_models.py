"""Small models of every kind in float64, and the pairs of backbone and head to test."""

import torch
from torch import Tensor

from ebmkit import JointModel, create_model
from ebmkit.energy import EnergyModel
from ebmkit.models import BACKBONES, HEADS

SMALLEST = {
    "gradresnet18-imagenet": 32,
    "resnet18-imagenet": 32,
    "resnet50-imagenet": 32,
}  # total stride 16: smaller images have last maps of one pixel
NUM_CLASSES = 3

PAIRS = [
    (backbone, head)
    for i, backbone in enumerate(sorted(BACKBONES))
    for j, head in enumerate(sorted(HEADS))
    if backbone == "gradresnet18" or i % len(HEADS) == j
]
"""Every backbone with one head, cycling through the heads; the paper's backbone with every head."""

DEEPER = {
    *("gradresnet34", "resnet18-imagenet", "resnet50-imagenet", "wideresnet28-10-jem"),
    *("gradresnet10", "resnet18"),
}
"""Presets that differ from another one, with the same kinds of layers, only in depth or stem."""
KINDS = [(backbone, head) for backbone, head in PAIRS if backbone not in DEEPER]
"""Backbones of all kinds of layers, with their heads."""


def small_size(backbone: str) -> int:
    """A small reference size for the backbone."""
    return SMALLEST.get(backbone, 8)


def small_model(backbone: str, head: str) -> JointModel:
    """A narrow preset with a head, in float64, with the plain formula at every size."""
    torch.manual_seed(0)
    made = create_model(backbone, NUM_CLASSES, in_channels=1, head=head, width=8).double().eval()
    for p in (p for p in made.parameters() if p.ndim > 1 and not p.any()):
        torch.nn.init.normal_(p, std=0.1)  # layers that begin as 0, such as those of sigma
    made._warned = True  # about ReLU and BatchNorm of some presets: see test_ablations
    return made


def gradients(loss: Tensor, model: EnergyModel) -> list[Tensor]:
    return [
        g if g is not None else torch.zeros(())
        for g in torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    ]
