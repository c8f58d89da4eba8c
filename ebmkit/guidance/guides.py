r"""Guides: functions of an image, with their gradients, that guidance raises.

A classifier's logits are energies (RCG eq. 2.32-2.38), :math:`E(v, c) = -\log p(v, c)` and
:math:`E(v) = -\log p(v)`, whose difference classifies,
:math:`\log p(c \mid v) = E(v) - E(v, c)`. With them a guide h of a label c is

=============== ================================================================================
guide           h(v), to be raised, in nats
=============== ================================================================================
``classifier``  :math:`\log p(c \mid v)`
``energy``      :math:`\log p(v, c) = -E(v, c)` (RCG section 4.6)
``dual``        :math:`-\bigl(E(v, c) + \lambda\, |\bar E_c - E(v)|\bigr)` (eq. 4.5-4.6), with
                :math:`\bar E_c` the mean of E over training images of the label
``pgd``         :math:`h(v_n)` with the gradient there (section 4.9)
``accumulated`` the sum of :math:`h(v_i)` and of the gradients there, i from 0 to n - 1
                (section 4.3)
=============== ================================================================================

Classifier and energy differ by :math:`\log p(v)`: the first asks for an image that no other label
explains, the second for one that the label makes likely. Energies are read as `ebmkit.models.heads`
says: of a model that was trained to classify alone, off its logits.

The last two take an inner guide h and n normalised steps up it,

.. math:: v_0 = v, \qquad v_{i+1} = v_i + \gamma \frac{\nabla h(v_i)}{\|\nabla h(v_i)\|_2} .

For ``accumulated`` RCG does not say how its intermediate images arise; these are the steps of its
PGD guidance. Neither is the gradient of its value: the way from v to :math:`v_n` is not
differentiated.

A guide is a `ebmkit.sampling.target.DensityFunction`: v (B, ...) and the noise level of v in image
units, or None, to the value (B,) and the gradient. RCG is the thesis "Classifier-free Diffusion
Guidance with a Robust Energy-Based Classifier" (Sapienza, 2024) here and in all docstrings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ebmkit.energy import Energies, EnergyModel, Noise, classifies, upcast_energies
from ebmkit.errors import UserError
from ebmkit.models.heads import LogitEnergy
from ebmkit.sampling.base import check_positive, per_chain
from ebmkit.sampling.target import DensityFunction, density_of, label_density_of

__all__ = [
    "DUAL_WEIGHT",
    "PGD_STEPS",
    "PGD_STEP_SIZE",
    "accumulated_guide",
    "classifier_guide",
    "dual_guide",
    "energy_guide",
    "pgd_guide",
]

DUAL_WEIGHT = 0.15
"""lambda of RCG section 4.8."""

PGD_STEPS, PGD_STEP_SIZE = 100, 0.01
"""n and gamma of RCG section 4.9; the length of a step is in the guide's image units here."""


def classifier_guide(model: EnergyModel, c: Tensor | int) -> DensityFunction:
    """log p(c|v): classifier guidance.

    Args:
        model: with labels.
        c: a label, or (B,).

    Raises:
        UserError: if the model has no labels that were trained, or one is out of range.
    """
    model = LogitEnergy.of(check_guide(model))
    return _at_own_level(model, label_density_of(model, c))


def energy_guide(model: EnergyModel, c: Tensor | int) -> DensityFunction:
    """log p(v, c) = -E(v, c), up to a constant: joint-energy guidance (RCG section 4.6).

    Args:
        model: with labels.
        c: a label, or (B,).

    Raises:
        UserError: if the model has no labels that were trained, or one is out of range.
    """
    model = LogitEnergy.of(check_guide(model))
    return _at_own_level(model, density_of(model, c))


def dual_guide(
    model: EnergyModel,
    c: Tensor | int,
    means: Tensor | Sequence[float],
    weight: float = DUAL_WEIGHT,
) -> DensityFunction:
    """-(E(v, c) + weight |means[c] - E(v)|): images as likely as the label's own (RCG eq. 4.6).

    Args:
        model: with labels.
        c: a label, or (B,).
        means: (C,) mean of E over training images of each label, nats
            (`ebmkit.guidance.means`).
        weight: lambda, 0 or more.

    Raises:
        UserError: if the model has no labels that were trained, one is out of range, or there is
            not one finite mean for each label.
    """
    model = LogitEnergy.of(check_guide(model))
    check_positive("lambda", weight, zero=True)
    by_label = torch.as_tensor(means, dtype=torch.float64).flatten()
    if by_label.shape != (model.num_classes,) or not bool(by_label.isfinite().all()):
        raise UserError(
            f"mean energies must be one finite number for each of {model.num_classes} labels, not "
            f"{by_label.tolist()}"
        )
    density_of(model, c)  # checks the labels

    def guide(v: Tensor, sigma: Noise | None = None) -> tuple[Tensor, Tensor]:
        labels = model.check_labels(c, v)
        target = DualTarget(labels, by_label.to(v)[labels], torch.tensor(weight).to(v))
        energies, (gradient,) = model.value_and_grads(v, sigma, target)
        return target(upcast_energies(energies)), gradient

    return _at_own_level(model, guide)


def pgd_guide(
    inner: DensityFunction, steps: int = PGD_STEPS, step_size: float = PGD_STEP_SIZE
) -> DensityFunction:
    """``inner`` and its gradient after ``steps`` normalised steps up it (RCG section 4.9).

    Args:
        inner: a guide.
        steps: n; 0 is ``inner`` itself.
        step_size: gamma, the l2 length of a step, image units.

    Raises:
        UserError: if a number is not legal.
    """
    _check_steps(steps, 0)
    check_positive("gamma", step_size, zero=True)

    def guide(v: Tensor, sigma: Noise | None = None) -> tuple[Tensor, Tensor]:
        for _ in range(steps):
            v = v + step_size * _normalised(inner(v, sigma)[1])
        return inner(v, sigma)

    return guide


def accumulated_guide(
    inner: DensityFunction, steps: int, step_size: float = PGD_STEP_SIZE
) -> DensityFunction:
    """The sums of ``inner`` and of its gradient along normalised steps up it (RCG section 4.3).

    Args:
        inner: a guide.
        steps: n, how many gradients are added; 1 is ``inner`` itself.
        step_size: gamma, the l2 length of a step between them, image units.

    Raises:
        UserError: if a number is not legal.
    """
    _check_steps(steps, 1)
    check_positive("gamma", step_size, zero=True)

    def guide(v: Tensor, sigma: Noise | None = None) -> tuple[Tensor, Tensor]:
        value, gradient = total = inner(v, sigma)
        for _ in range(steps - 1):
            v = v + step_size * _normalised(gradient)
            value, gradient = inner(v, sigma)
            total = total[0] + value, total[1] + gradient
        return total

    return guide


def check_guide(model: object) -> EnergyModel:
    """``model``, which can be a guide.

    Raises:
        UserError: if it gives no energies, or has no labels that were trained.
    """
    if not isinstance(model, EnergyModel):
        raise UserError(
            f"{type(model).__name__} gives no energies and cannot guide: take a classifier or a "
            "joint model, or wrap a network that gives logits in ebmkit.guidance.LogitModel"
        )
    if not classifies(model):
        raise UserError("a guide must know labels, and this model was trained without: take one "
                        "that was trained to classify")  # fmt: skip
    return model


class DualTarget(NamedTuple):
    """-(E(v, c) + lambda |mean - E(v)|) (RCG eq. 4.6).

    Attributes:
        labels: c (B,).
        means: (B,), mean E of training images of these labels, nats.
        weight: lambda, a scalar.
    """

    labels: Tensor
    means: Tensor
    weight: Tensor

    def __call__(self, energies: Energies) -> Tensor:
        density = energies.log_density
        away = (self.means + density).abs()  # |mean energy - E(v)|
        return density + energies.at_label(self.labels) - self.weight * away


def _at_own_level(model: EnergyModel, guide: DensityFunction) -> DensityFunction:
    """``guide`` where a model that needs the noise level is shown an image without noise.

    It is told the lowest level it was trained for.
    """
    limits = model.card.sigma_range if model.card else None
    if not model.noise_conditional or limits is None:
        return guide
    return lambda v, sigma=None: guide(v, limits[0] if sigma is None else sigma)


def _check_steps(steps: int, least: int) -> None:
    if steps < least:
        raise UserError(f"n = {steps} is not a number of steps: take {least} or more")


def _normalised(gradient: Tensor) -> Tensor:
    """Of l2 norm 1 in each image; 0 stays 0."""
    norm = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
    scaled: Tensor = gradient / per_chain(norm.clamp_min(torch.finfo(norm.dtype).tiny), gradient)
    return scaled
