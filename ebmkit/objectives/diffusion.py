r"""Noise prediction of diffusion models.

At the noise levels of a diffusion schedule (Ho et al. 2020, eq. 14; RCG eq. 2.15),

.. math:: \text{ddpm:} \quad \frac1d \|\hat\epsilon - \epsilon\|^2, \qquad
    \hat\epsilon = -\sigma\,\nabla_y \log p_\sigma(y) :

dsm of any model under the noise law ``diffusion``, averaged over entries. With class dropout the
score is that of :math:`\log p(y \mid c)`, except for a share of images without label, so that one
network learns both scores (Ho & Salimans, arXiv 2207.12598). A hash of an image's own noise selects
these images. So the selection has the seed of the noise and does not depend on how a batch is
divided.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from ebmkit.data import Batch
from ebmkit.errors import UserError
from ebmkit.objectives.base import Objective, ObjectiveConfig, Scale, mapping_at
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
    """Mask (B,) of the images, a ``share``, that lose their label; ``eps`` (B, ...): noise."""
    low = 0xFFFFFFFF
    uniform = (bit_hash(eps).flatten(1).sum(1) & low).double() / (low + 1)  # in [0, 1)
    return uniform < share


def configure(config: DiffusionConfig) -> Objective:
    """Objective ``ddpm``; with class dropout, of the conditional score."""
    share = config.class_dropout
    if share is None:
        return DDPM

    def some_labels(batch: Batch) -> Tensor:
        labels = labels_of(batch)
        return labels.masked_fill(label_dropout(batch.eps, share), -1) if share else labels

    return replace(DDPM, score_labels=some_labels, needs_labels=True, needs_hard_labels=True)


def implied_settings(
    raw: Mapping[str, Any], given: Mapping[str, Any], stream: str
) -> dict[str, Any]:
    """Noise law of ``stream`` and settings of a UNet that follow from the objective's settings.

    The noise levels and the UNet's timesteps are those of ``objective.ddpm.schedule``;
    ``objective.ddpm.class_dropout`` makes the UNet class-conditional. Arguments are those of
    `Objective.implies`.

    Raises:
        UserError: if other values were given.
    """
    own = DiffusionConfig().model_dump() | dict(mapping_at(raw, "terms", "ddpm"))
    schedule, conditional = own["schedule"], own["class_dropout"] is not None
    law = {"kind": "diffusion", "schedule": schedule}
    for field, value in mapping_at(given, "streams", stream, "noise").items():
        if value != law.get(field, value):
            raise UserError(
                f"objective 'ddpm' trains at the noise levels of its schedule, {schedule}, and "
                f"streams.{stream}.noise.{field} is {value!r}: omit that and set "
                "objective.ddpm.schedule, or use --objective dsm-mean, which allows any noise"
            )
    found: dict[str, Any] = {"streams": {stream: {"noise": law}}}
    if mapping_at(raw, "model", "backbone").get("kind") != "unet":
        return found
    dropout = "objective.ddpm.class_dropout"
    network = {
        "schedule": (schedule, f"objective.ddpm.schedule={schedule}"),
        "class_conditional": (conditional, dropout),
        **({"null_label": (True, dropout)} if conditional else {}),
    }
    fixed = network | {
        "timesteps": (1000, "the noise law, which has 1000"),
        "image_range": ([-1, 1], "the noise law, which is of images in [-1, 1]"),
        "betas": ([1e-4, 0.02], "the noise law"),
    }
    for field, value in mapping_at(given, "model", "backbone").items():
        legal, source = fixed.get(field, (value, ""))
        if _plain(value) != _plain(legal):
            raise UserError(
                f"model.backbone.{field} = {value!r} contradicts {source}: leave it out"
            )
    found["model"] = {"backbone": {name: value for name, (value, _) in network.items()}}
    return found


def _plain(value: Any) -> Any:
    return [float(v) for v in value] if isinstance(value, list | tuple) else value


DDPM = Objective(
    description="noise prediction at the levels of a diffusion schedule; unweighted",
    stream="denoise",
    loss=denoising_score_matching,
    family="diffusion",
    needs_score=True,
    scale=Scale.MEAN,
    implies=implied_settings,
    config=DiffusionConfig,
    configure=configure,
)
