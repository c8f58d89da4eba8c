"""Settings of single objectives, where an objective has any.

On the command line and in files they stand under the objective's name, ``objective.adv.eps=0.5``; a
resolved configuration keeps them as ``terms.adv.eps``.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["AdversarialConfig", "DiffusionConfig", "TermSettings", "TradesConfig"]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class AdversarialConfig(_Settings):
    """The attack inside the loss (RCG eq. 2.28-2.30)."""

    norm: Literal["l2", "linf"] = Field("l2", description="l2 or linf: in which eps is measured")
    eps: float = Field(0.5, ge=0, description="radius of the ball, image units; 0: no attack")
    steps: int = Field(7, ge=1, description="of projected gradient descent; 1: FGSM")
    step_size: float | None = Field(
        None, gt=0, description="length of a step, image units; none: 2.5 eps / steps"
    )
    random_start: bool = Field(True, description="start at a random point of the ball")


class TradesConfig(AdversarialConfig):
    """TRADES (Zhang et al., arXiv 1901.08573): the attack maximises the divergence."""

    beta: float = Field(6.0, gt=0, description="weight of the divergence")


class DiffusionConfig(_Settings):
    """Noise prediction at the timesteps of a schedule (RCG eq. 2.9-2.16)."""

    schedule: Literal["linear", "cosine"] = Field("linear", description="noise schedule")
    class_dropout: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of labels hidden in training, as 0.1 for classifier-free guidance; "
        "none: the network knows no labels",
    )


class TermSettings(_Settings):
    """Settings by the name of the objective."""

    adv: AdversarialConfig = AdversarialConfig()
    trades: TradesConfig = TradesConfig()
    ddpm: DiffusionConfig = DiffusionConfig()
