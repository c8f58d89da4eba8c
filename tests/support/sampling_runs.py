"""Small models for tests of generation: untrained networks, and a mixture with known density."""

import torch
from ebmkit_tests.support.blind import BlindMixin

from ebmkit import GaussianMixture, ModelCard
from ebmkit.models import ModelConfig, load, save_model

SHAPE = (1, 4, 4)


def save_run(folder, num_classes=3, **card):
    """Write a run folder: untrained network for 8x8 gray images, card of a trained network."""
    config = ModelConfig(
        backbone={"kind": "gradresnet", "width": 8},
        in_channels=1,
        num_classes=num_classes,
        reference_size=(8, 8),
    )
    facts = {
        "dataset": "digits",
        "objective": "ce+dsm",
        "image_size": (8, 8),
        "channels": 1,
        "class_names": ["cat", "dog", "owl"][:num_classes],
        "sigma_range": (1 / 255, 100 / 255),
        "classifies": num_classes > 0,
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    save_model(folder, config.build(), config, ModelCard(**(facts | card)))
    return folder


def small_network(folder, **facts):
    return load(save_run(folder, **facts))


class Mixture(GaussianMixture):
    """Dark and bright 4x4 images with labels; log p is NaN for images brighter than `edge`."""

    edge = float("inf")

    def forward(self, y, sigma=None):
        energies = super().forward(y, sigma)
        beyond = y.flatten(1).mean(1) > self.edge
        factor = torch.where(beyond, torch.nan, 1.0)  # the score is NaN, too
        return energies._replace(log_density=energies.log_density * factor)


class BlindMixture(BlindMixin, Mixture):
    """`Mixture` as a blind denoiser."""


def mixture(kind=Mixture, edge=float("inf")):
    means = torch.stack([torch.full(SHAPE, 0.3), torch.full(SHAPE, 0.7)])
    model = kind(means, 0.01).eval().requires_grad_(False)
    model.edge = edge
    model.card = ModelCard(
        objective="ce+dsm",
        image_size=SHAPE[1:],
        channels=1,
        class_names=["dark", "bright"],
        sigma_range=(0.001, 1.0),
        classifies=True,
    )
    return model
