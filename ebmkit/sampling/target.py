r"""What samplers see of a model: functions of images, never the network.

A target at fixed labels c is one of

.. math::
    \text{score:}   & \quad (x, \sigma) \mapsto \nabla_x \log p_\sigma(x \mid c) \\
    \text{density:} & \quad (x, \sigma) \mapsto
                            \log p_\sigma(x \mid c),\ \nabla_x \log p_\sigma(x \mid c) \\
    \text{denoiser:}& \quad (y, \sigma) \mapsto E[x \mid y, c]

of images (B, ...), with sigma a float or (B,), in image units, or None for a blind model. Any
function will do; `score_of`, `density_of`, `label_density_of` and `denoiser_of` make them of our
models. The log-density holds up to one constant for each label, which no sampler needs.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ebmkit.energy import EnergyModel, LabelLogProbability, Noise, ScoreModel, upcast_energies
from ebmkit.errors import UserError

__all__ = [
    "DenoiserFunction",
    "DensityFunction",
    "ScoreFunction",
    "blind_denoiser_of",
    "denoiser_of",
    "density_of",
    "label_density_of",
    "score_of",
]


class ScoreFunction(Protocol):
    """(x, sigma) to the score, shape of x, per image unit."""

    def __call__(self, x: Tensor, sigma: Noise | None = None, /) -> Tensor: ...


class DensityFunction(Protocol):
    """(x, sigma) to the log-density (B,) in nats and its gradient, shape of x."""

    def __call__(self, x: Tensor, sigma: Noise | None = None, /) -> tuple[Tensor, Tensor]: ...


class DenoiserFunction(Protocol):
    """(y, sigma) to an estimate of the clean image, shape of y; no sigma: blind."""

    def __call__(self, y: Tensor, sigma: Noise | None = None, /) -> Tensor: ...


def score_of(model: ScoreModel, c: Tensor | int | None = None) -> ScoreFunction:
    """The score of ``model``, or of p(x|c) with labels ``c``, a number or (B,).

    Raises:
        UserError: if the model has no labels, or one is out of range.
    """

    def score(x: Tensor, sigma: Noise | None = None) -> Tensor:
        return model.score(x, sigma, c)

    _check(model, c)
    return score


def density_of(model: EnergyModel, c: Tensor | int | None = None) -> DensityFunction:
    """log p(x), or log p(x|c) up to a constant, with its gradient, from one forward pass.

    Raises:
        UserError: if the model has no density, no labels, or a label is out of range.
    """
    if not isinstance(model, EnergyModel):
        raise UserError(
            f"{type(model).__name__} is a plain denoiser and has no log-density: take a sampler "
            "that needs the score alone"
        )

    def density(x: Tensor, sigma: Noise | None = None) -> tuple[Tensor, Tensor]:
        return model.density_and_score(x, sigma, c)

    _check(model, c)
    return density


def label_density_of(model: EnergyModel, c: Tensor | int) -> DensityFunction:
    """log p(c|x) of labels ``c`` and its gradient: what ascent on a classifier climbs.

    Raises:
        UserError: if the model has no labels, or one is out of range.
    """

    def density(x: Tensor, sigma: Noise | None = None) -> tuple[Tensor, Tensor]:
        target = LabelLogProbability(model.check_labels(c, x))
        energies, (gradient,) = model.value_and_grads(x, sigma, target)
        return target(upcast_energies(energies)), gradient

    _check(model, c)
    return density


def denoiser_of(model: ScoreModel, c: Tensor | int | None = None) -> DenoiserFunction:
    """The denoiser of ``model``, conditional on labels ``c``, a number or (B,), if given.

    Raises:
        UserError: if the model has no labels, or one is out of range.
    """

    def denoise(y: Tensor, sigma: Noise | None = None) -> Tensor:
        return model.denoise(y, sigma, c)

    _check(model, c)
    return denoise


def blind_denoiser_of(model: ScoreModel, c: Tensor | int | None = None) -> DenoiserFunction:
    """The denoiser of a blind ``model`` at the noise level it finds, within those it was taught.

    The level sqrt(d) / ||score|| is unbounded where the score is small, and so is the change that
    is made of it. Beyond its range a model has no say of how much noise there is, so the level is
    held to the range.

    Raises:
        UserError: if the model has no labels, or one is out of range.
    """
    _check(model, c)
    sigma_range = model.card.sigma_range if model.card else None

    def denoise(y: Tensor, sigma: Noise | None = None) -> Tensor:
        return model.denoise_blind(y, c, sigma_range)[0]

    return denoise


def _check(model: ScoreModel, c: Tensor | int | None) -> None:
    if c is not None:
        count = len(c) if isinstance(c, Tensor) and c.ndim else 1
        model.check_labels(
            c, torch.zeros(count, device=c.device if isinstance(c, Tensor) else None)
        )
