"""Small models of every kind: each backbone preset under each head, in float64."""

import pytest
import torch
from ebmkit_tests.support.small_models import small_model, small_size

from ebmkit import JointModel
from ebmkit.models import BACKBONES, HEADS


@pytest.fixture(params=sorted(BACKBONES))
def backbone(request) -> str:
    return request.param


@pytest.fixture(params=sorted(HEADS))
def head(request) -> str:
    return request.param


@pytest.fixture
def size(backbone) -> int:
    return small_size(backbone)


@pytest.fixture
def model(backbone, head) -> JointModel:
    return small_model(backbone, head)


@pytest.fixture
def images(size) -> torch.Tensor:
    """Two noisy gray images, float64."""
    return torch.rand(2, 1, size, size, dtype=torch.float64)


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.tensor([0, 2])
