r"""Energies of images and labels, and their statistics by class.

.. math:: E(x) = -\log p(x), \qquad E(x, y) = -\log p(x, y) = E(x) - \log p(y \mid x),

in nats, up to one constant of the model, from the source that `ebmkit.models.joint` says: where a
head has a density of its own that no objective trained (``ce`` or ``adv`` alone), off the logits.

Noise-conditional models take noise 0 for clean images.

RCG stands for the thesis "Classifier-free Diffusion Guidance with a Robust Energy-Based Classifier"
(Sapienza, 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ebmkit.energy import EnergyModel, Noise
from ebmkit.evaluation import statistics
from ebmkit.models.joint import EnergySource, energy_source


class ImageEnergies(NamedTuple):
    """What `energies_of` reads off a batch.

    Attributes:
        energy: E(y), (B,), nats.
        log_posterior: log p(c|y), (B, K), K = 0 for a model without labels. The predicted label is
            its largest: E(y, c) is less exact, for E(y) may be large.
    """

    energy: Tensor
    log_posterior: Tensor

    def joint(self, labels: Tensor) -> Tensor:
        """E(y, c) = E(y) - log p(c|y) of the labels (B,), (B,), nats."""
        return self.energy - self.log_posterior.gather(1, labels[:, None]).squeeze(1)


def energies_of(
    model: EnergyModel, y: Tensor, sigma: Noise | None = None, reading: EnergySource = "auto"
) -> ImageEnergies:
    """E(y), and log p(c|y) for E(y, c).

    Args:
        model: in evaluation mode.
        y: images (B, C, H, W), image units.
        sigma: the noise in them, image units, for noise-conditional models; None: 0.
        reading: see the module's table.

    Raises:
        UserError: if logits are asked for and the model has none.
    """
    found = model.energies(y, 0.0 if sigma is None else sigma)
    logits = energy_source(model, reading) == "logits"
    energy = -found.logits.logsumexp(dim=1) if logits else -found.log_density
    return ImageEnergies(energy, found.log_posterior())


def class_statistics(
    energy: Tensor, joint: Tensor | None, labels: Tensor, names: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Mean and standard deviation by class of energies that are known.

    Args:
        energy: E(x), (N,), nats.
        joint: E(x, y) of each image's own label, (N,), or None.
        labels: (N,).
        names: of the classes; a class without one is called by its number.

    Returns:
        One entry per class that has an image, in order: ``label``, ``name``, ``energy`` and, with
        ``joint``, ``joint_energy``; each with ``value`` (the mean), ``low``, ``high`` (95 %
        interval of the mean), ``count`` and ``std`` over images.
    """
    found = []
    for label in sorted(set(labels.tolist())):
        own = labels == label
        entry = {
            "label": label,
            "name": names[label] if label < len(names) else str(label),
            "energy": spread(energy[own]),
        }
        if joint is not None:
            entry["joint_energy"] = spread(joint[own])
        found.append(entry)
    return found


def spread(values: Tensor) -> dict[str, Any]:
    """The mean of ``values`` (n,) with its 95 % interval, and their standard deviation ``std``."""
    std = float(values.double().std()) if len(values) > 1 else float("nan")
    return statistics.mean(values).document() | {"std": statistics.finite(std)}
