"""Fixtures for small float64 models: backbones of all kinds of layers, with their heads."""

import pytest
import torch
from ebmkit_tests.support.small_models import KINDS, small_model, small_size

from ebmkit import JointModel


@pytest.fixture(params=KINDS, ids="-".join)
def pair(request) -> tuple[str, str]:
    return request.param


@pytest.fixture
def backbone(pair) -> str:
    return pair[0]


@pytest.fixture
def head(pair) -> str:
    return pair[1]


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
