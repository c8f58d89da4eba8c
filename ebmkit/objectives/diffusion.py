r"""Noise prediction of diffusion models.

At the levels of a diffusion schedule (Ho et al. 2020, eq. 14; RCG eq. 2.15),

.. math:: \text{ddpm:} \quad \frac1d \|\hat\epsilon - \epsilon\|^2, \qquad
    \hat\epsilon = -\sigma\,\nabla_y \log p_\sigma(y) :

dsm of any model under the noise law ``diffusion``, averaged over entries. With class dropout it is
of :math:`\log p(y \mid c)`, but for a share of images whose label is hidden, so that one network
learns both scores (Ho & Salimans, arXiv 2207.12598). A hash of an image's own noise decides whether
its label is hidden, so that is keyed as the noise is, and the same however a batch is divided.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field
from torch import Tensor

from ebmkit.data import Batch
from ebmkit.objectives.base import Objective, ObjectiveConfig, Scale
from ebmkit.objectives.score_matching import denoising_score_matching, labels_of
from ebmkit.randomness import bit_hash

__all__ = ["DDPM", "DiffusionConfig", "label_dropout"]


class DiffusionConfig(ObjectiveConfig):
    """Noise prediction at the timesteps of a schedule (RCG eq. 2.9-2.16)."""

    schedule: Literal["linear", "cosine"] = Field("linear", description="noise schedule")
    class_dropout: float | None = Field(
        None,
        ge=0,
        le=1,
        description="label dropout: share of images trained without label, for example 0.1 "
        "for classifier-free guidance; null: an unconditional network",
    )


def label_dropout(eps: Tensor, share: float) -> Tensor:
    """Which images of noise ``eps`` (B, ...) hide their label, (B,) bool: a ``share`` of them."""
    low = 0xFFFFFFFF
    uniform = (bit_hash(eps).flatten(1).sum(1) & low).double() / (low + 1)  # in [0, 1)
    return uniform < share


def configure(config: DiffusionConfig) -> Objective:
    """``ddpm``, of the conditional score where there is class dropout."""
    share = config.class_dropout
    if share is None:
        return DDPM

    def some_labels(batch: Batch) -> Tensor:
        labels = labels_of(batch)
        return labels.masked_fill(label_dropout(batch.eps, share), -1) if share else labels

    return replace(DDPM, score_labels=some_labels, needs_labels=True, needs_hard_labels=True)


DDPM = Objective(
    description="noise prediction at the levels of a diffusion schedule; unweighted",
    stream="denoise",
    loss=denoising_score_matching,
    family="diffusion",
    needs_score=True,
    scale=Scale.MEAN,
    config=DiffusionConfig,
    configure=configure,
)
