r"""What samplers use of a model: functions of images, never the network.

A target at fixed labels c is one of

.. math::
    \text{score:}   & \quad (x, \sigma) \mapsto \nabla_x \log p_\sigma(x \mid c) \\
    \text{density:} & \quad (x, \sigma) \mapsto
                            \log p_\sigma(x \mid c),\ \nabla_x \log p_\sigma(x \mid c) \\
    \text{denoiser:}& \quad (y, \sigma) \mapsto E[x \mid y, c]

of images (B, ...), with sigma a float or (B,), in image units, or None for a blind model. Any
function will do; the functions here make them of a model and labels c, a number or (B,). The
log-density holds up to one constant for each label, which no sampler needs. All of them raise
`UserError` if labels are given and the model has none, or one is out of range.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ebmkit.energy import EnergyModel, LabelLogProbability, Noise, ScoreModel, upcast_energies
from ebmkit.errors import UserError
from ebmkit.noise import check_trained

Labels = Tensor | int | None

HIGHEST, LOWEST = 1.0, 0.01
"""Ends of the noise levels where the model sets none, image units."""


class ScoreFunction(Protocol):
    """(x, sigma) to the score, shape of x, per image unit."""

    def __call__(self, x: Tensor, sigma: Noise | None = None, /) -> Tensor: ...


class DensityFunction(Protocol):
    """(x, sigma) to the log-density (B,) in nats and its gradient, shape of x."""

    def __call__(self, x: Tensor, sigma: Noise | None = None, /) -> tuple[Tensor, Tensor]: ...


class DenoiserFunction(Protocol):
    """(y, sigma) to an estimate of the clean image, shape of y; no sigma: blind."""

    def __call__(self, y: Tensor, sigma: Noise | None = None, /) -> Tensor: ...


def score_of(model: ScoreModel, c: Labels = None) -> ScoreFunction:
    """The score of ``model``, or of p(x|c)."""
    _check_labels(model, c)
    return lambda x, sigma=None: model.score(x, sigma, c)


def density_of(model: ScoreModel, c: Labels = None) -> DensityFunction:
    """log p(x), or log p(x|c) up to a constant, with its gradient, from one forward pass.

    Raises:
        UserError: if the model has no density.
    """
    energy_model = _energy_model(model)
    _check_labels(model, c)
    return lambda x, sigma=None: energy_model.density_and_score(x, sigma, c)


def label_density_of(model: ScoreModel, c: Tensor | int) -> DensityFunction:
    """log p(c|x) of labels ``c`` and its gradient: what ascent on a classifier climbs.

    Raises:
        UserError: if the model has no density.
    """
    energy_model = _energy_model(model)
    _check_labels(model, c)

    def density(x: Tensor, sigma: Noise | None = None) -> tuple[Tensor, Tensor]:
        target = LabelLogProbability(energy_model.check_labels(c, x))
        energies, (gradient,) = energy_model.value_and_grads(x, sigma, target)
        return target(upcast_energies(energies)), gradient

    return density


def denoiser_of(model: ScoreModel, c: Labels = None) -> DenoiserFunction:
    """The denoiser of ``model``, conditional on labels if they are given."""
    _check_labels(model, c)
    return lambda y, sigma=None: model.denoise(y, sigma, c)


def blind_denoiser_of(model: ScoreModel, c: Labels = None) -> DenoiserFunction:
    """The denoiser of a blind ``model`` at the noise level that it estimates.

    The estimate sqrt(d) / ||score|| is unbounded where the score is small, and so is the change
    made of it; so it is clamped to the levels that the model was trained for.
    """
    _check_labels(model, c)
    limits = trained_range(model)
    return lambda y, sigma=None: model.denoise_blind(y, c, limits)[0]


# --- noise levels of a model ---------------------------------------------------------------------


def trained_range(model: ScoreModel) -> tuple[float, float] | None:
    """The lowest and the highest noise level of training, image units; None: no limit is known."""
    return model.card.sigma_range if model.card else None


def clean_level(model: ScoreModel) -> float | None:
    """The noise level at which ``model`` takes clean images: its lowest, if it takes a level."""
    limits = trained_range(model)
    return limits[0] if limits and model.noise_conditional else None


def highest_level(model: ScoreModel, asked: float | None = None) -> float:
    """The level at which chains begin: ``asked``, or the model's highest.

    Raises:
        UserError: if the model was not trained there.
    """
    limits = trained_range(model)
    if asked is not None:
        return check_trained(asked, limits)
    return limits[1] if limits else HIGHEST


def lowest_level(model: ScoreModel, asked: float | None = None) -> float:
    """The level at which chains end: ``asked``, or 0.01, or the model's lowest if that is higher.

    Raises:
        UserError: if the model was not trained there.
    """
    limits = trained_range(model)
    if asked is not None:
        return check_trained(asked, limits)
    return min(max(LOWEST, limits[0]), limits[1]) if limits else LOWEST


def _energy_model(model: ScoreModel) -> EnergyModel:
    if not isinstance(model, EnergyModel):
        raise UserError(
            f"{type(model).__name__} is a plain denoiser and has no log-density: take a sampler "
            "that needs the score alone"
        )
    return model


def _check_labels(model: ScoreModel, c: Labels) -> None:
    if c is not None:
        labels = torch.as_tensor(c)
        model.check_labels(c, torch.zeros(labels.numel(), device=labels.device))
