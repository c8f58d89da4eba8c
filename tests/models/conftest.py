"""Small models of every kind: each backbone preset under each head, in float64."""

import pytest
import torch

from ebmkit import JointModel, create_model
from ebmkit.models import BACKBONES, HEADS

SMALLEST = {
    "gradresnet18-imagenet": 32,
    "resnet18-imagenet": 32,
    "resnet50-imagenet": 32,
}  # total stride 16: below this the last maps are one pixel
NUM_CLASSES = 3


@pytest.fixture(params=sorted(BACKBONES))
def backbone(request) -> str:
    return request.param


@pytest.fixture(params=sorted(HEADS))
def head(request) -> str:
    return request.param


@pytest.fixture
def size(backbone) -> int:
    """A small reference size that suits the backbone."""
    return SMALLEST.get(backbone, 8)


@pytest.fixture
def model(backbone, head) -> JointModel:
    """Each preset under each head, narrow, in float64, with the plain formula at every size."""
    torch.manual_seed(0)
    made = create_model(backbone, NUM_CLASSES, in_channels=1, head=head, width=8).double().eval()
    made._warned = True  # of ReLU and BatchNorm, which some presets have: see test_ablations
    return made


@pytest.fixture
def images(size) -> torch.Tensor:
    """Two noisy gray images, float64."""
    return torch.rand(2, 1, size, size, dtype=torch.float64)


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.tensor([0, 2])
