r"""Scores of how well an image x of d values fits the distribution that a model was trained on.

Higher means "in". JEM's three (arXiv 1912.03263, section 5.2):

- ``log-density``: :math:`\log p(x)`, up to one constant, nats;
- ``confidence``: :math:`\max_c p(c \mid x)`;
- ``gradient``: :math:`-\|\nabla \log p(x)\|`, which is low where a density has its mass.

A joint model is trained on noisy images, :math:`y = x + \sigma\epsilon`, and has more to say there.
With the score s(y) and fixed noise :math:`\epsilon_1, \dots, \epsilon_n` for each image, at each
level sigma,

- ``residual``: :math:`-\frac1n \sum_i \|\sigma s(y_i) + \epsilon_i\|^2 / d`, minus the loss that
  denoising score matching was trained by, at this one image: its denoising error over
  :math:`\sigma^2 d`. Integrated over :math:`\log\sigma` these errors are the negative
  log-likelihood up to a constant (Kong et al., arXiv 2302.03792), so each level is a share of it;
- ``noise-level``: :math:`-\bigl|\log\bigl(\frac1n \sum_i \|\sigma s(y_i)\|^2 / d\bigr)\bigr|`.
  A model that knows such images reads off the noise level that is there, and
  :math:`\|\sigma s\|^2` is near d; too much and too little are both odd, which is a test of
  typicality and not of likelihood;
- ``noisy-density``: :math:`\frac1n \sum_i \log p(y_i)`. At sigma the density is one that training
  saw, unlike at 0.

What a model lacks it is not asked for: without labels no ``confidence``, without a density (a plain
denoiser) only ``residual`` and ``noise-level``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ebmkit.energy import EnergyModel, LogDensity, ScoreModel, classifies
from ebmkit.evaluation.defences import image_noise
from ebmkit.noise import format_sigma

__all__ = ["known_scores", "scores_of"]

CLEAN = {
    "log-density": "log p(x)",
    "confidence": "largest class probability",
    "gradient": "minus the norm of the gradient of log p(x)",
}
NOISY = {
    "residual": "minus the mean square of sigma s(y) + eps",
    "noise-level": "minus |log of the mean square of sigma s(y)|",
    "noisy-density": "mean log p(x + sigma eps)",
}


def known_scores(model: ScoreModel, sigmas: Sequence[float]) -> dict[str, str]:
    """The scores that ``model`` has, each with what it is in words."""
    density = isinstance(model, EnergyModel)
    clean = {
        name: description
        for name, description in CLEAN.items()
        if (classifies(model) if name == "confidence" else density)
    }
    noisy = {
        _at(name, sigma): f"{description}, sigma {format_sigma(sigma)}"
        for sigma in sigmas
        for name, description in NOISY.items()
        if density or name != "noisy-density"
    }
    return clean | noisy


def scores_of(
    model: ScoreModel, x: Tensor, sigmas: Sequence[float], draws: int, seed: int = 0
) -> dict[str, Tensor]:
    """`known_scores` of images ``x`` (B, C, H, W), each (B,).

    Args:
        model: in evaluation mode.
        x: in [0, 1].
        sigmas: noise levels, image units.
        draws: noise images for each image and level, from its content and ``seed``.
        seed: of the noise.
    """
    found: dict[str, Tensor] = {}
    if isinstance(model, EnergyModel):
        told = 0.0 if model.noise_conditional else None
        energies, (score,) = model.value_and_grads(x, told, LogDensity())
        found["log-density"] = energies.log_density
        if classifies(model):
            found["confidence"] = energies.log_posterior().exp().amax(dim=1)
        found["gradient"] = -score.flatten(1).norm(dim=1)
    for sigma in sigmas:
        eps = image_noise(x, draws, f"ood {seed} {sigma:.9g}").movedim(1, 0)
        columns: dict[str, list[Tensor]] = {name: [] for name in NOISY}
        for own in eps:
            y = x + sigma * own
            if isinstance(model, EnergyModel):
                density, score = model.density_and_score(y, sigma)
                columns["noisy-density"].append(density)
            else:
                score = model.score(y, sigma)
            scaled = sigma * score
            columns["residual"].append((scaled + own).flatten(1).square().mean(dim=1))
            columns["noise-level"].append(scaled.flatten(1).square().mean(dim=1))
        means = {n: torch.stack(parts).mean(dim=0) for n, parts in columns.items() if parts}
        found[_at("residual", sigma)] = -means["residual"]
        found[_at("noise-level", sigma)] = -means["noise-level"].log().abs()
        if isinstance(model, EnergyModel):
            found[_at("noisy-density", sigma)] = means["noisy-density"]
    return found


def _at(name: str, sigma: float) -> str:
    return f"{name}-{sigma * 255:.4g}"
