"""Small models for the tests of generation: untrained networks, and a mixture known exactly."""

import torch
from ebmkit_tests.support.blind import ReadsSigma

from ebmkit import GaussianMixture, ModelCard
from ebmkit.models import ModelConfig, load, save_model

SHAPE = (1, 4, 4)


def save_run(folder, num_classes=3, **card):
    """A run folder with an untrained network for 8x8 gray images that says it was trained."""
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
    """Dark and bright 4x4 images with labels; no number where an image is brighter than `edge`."""

    edge = float("inf")

    def forward(self, y, sigma=None):
        energies = super().forward(y, sigma)
        beyond = y.flatten(1).mean(1) > self.edge
        factor = torch.where(beyond, torch.nan, 1.0)  # the score is no number either
        return energies._replace(log_density=energies.log_density * factor)


class BlindMixture(ReadsSigma, Mixture):
    """The same as a blind network, that reads the noise level off the image."""


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
