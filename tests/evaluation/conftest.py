"""Fixtures: an exact mixture and samples of it, a small network, random images."""

import pytest
import torch
from ebmkit_tests.support.mixture_world import Drawn, make_mixture

from ebmkit import ModelCard, create_model


@pytest.fixture
def mixture():
    """Three Gaussians on gray 4x4 images, with known density."""
    return make_mixture()


@pytest.fixture
def mixture_samples(mixture):
    """400 samples of the mixture with their labels."""
    x, c = mixture.sample(400, torch.Generator().manual_seed(2))
    assert x.min() >= 0
    assert x.max() <= 1
    return Drawn(x, c)


@pytest.fixture
def network():
    """A small untrained blind network for gray 8x8 images of three classes."""
    model = create_model("gradresnet10", num_classes=3, in_channels=1, width=8, image_size=8)
    model.card = ModelCard(
        dataset="mixture",
        objective="ce+dsm",
        channels=1,
        class_names=["left", "right", "both"],
        sigma_range=(1 / 255, 100 / 255),
        classifies=True,
    )
    return model.eval().requires_grad_(False)


@pytest.fixture
def random_images():
    """30 gray 8x8 images of uniform noise, with labels 0, 1, 2 in turn."""
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(30, 1, 8, 8, generator=generator)
    return Drawn(images, torch.arange(30) % 3)
