"""Settings of single objectives, where an objective has any.

On the command line and in files they stand under the objective's name, ``objective.adv.eps=0.5``; a
resolved configuration keeps them as ``terms.adv.eps``.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ebmkit.errors import UserError
from ebmkit.noise import Radius

__all__ = [
    "AdversarialConfig",
    "ClassificationConfig",
    "DiffusionConfig",
    "TermSettings",
    "TradesConfig",
]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ClassificationConfig(_Settings):
    """Cross-entropy of the labels."""

    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="share of each label that is spread over all classes, as 0.1"
    )


class AdversarialConfig(_Settings):
    """The attack inside the loss (RCG eq. 2.28-2.30)."""

    norm: Literal["l2", "linf"] = Field("l2", description="l2 or linf: in which eps is measured")
    eps: Radius = Field(
        0.5, description="radius of the ball, image units, as 0.5 or 8/255; 0: no attack"
    )
    steps: int = Field(
        7, ge=1, description="of projected gradient descent; 1, without a random start: FGSM"
    )
    step_size: Annotated[Radius, Field(gt=0)] | None = Field(
        None, description="length of a step, image units; none: 2.5 eps / steps"
    )
    random_start: bool = Field(True, description="start at a random point of the ball")
    warmup_steps: int = Field(
        0, ge=0, description="training steps over which eps grows from 0, for radii that are hard"
    )
    targeted: bool = Field(
        False, description="attack towards a random other label, not away from the true one"
    )
    early_stop: bool = Field(
        False, description="leave an image where it is once it is misclassified (Kawar et al. 2023)"
    )
    variance_preserving: bool = Field(
        False,
        description="eps and step_size are of sqrt(abar) y, abar = 1 / (1 + (2 sigma)^2), as a "
        "diffusion model sees noisy images",
    )

    @property
    def step(self) -> float:
        """Length of a step, image units."""
        return 2.5 * self.eps / self.steps if self.step_size is None else self.step_size

    def at(self, step: int) -> Self:
        """What holds at training step ``step``, the first being 0: eps and step size in warm-up."""
        share = (step + 1) / (self.warmup_steps + 1)
        if share >= 1:
            return self
        return self.model_copy(update={"eps": share * self.eps, "step_size": share * self.step})


class TradesConfig(AdversarialConfig):
    """TRADES (Zhang et al., arXiv 1901.08573): the attack maximises the divergence."""

    random_start: bool = Field(True, description="start at Gaussian noise of 0.001; always")
    beta: float = Field(6.0, gt=0, description="weight of the divergence")

    @model_validator(mode="after")
    def _check(self) -> TradesConfig:
        if self.targeted:
            raise UserError("the divergence of trades has no target: use adv, or targeted=false")
        if not self.random_start:
            raise UserError(
                "the divergence of trades has no gradient at the image itself: leave random_start "
                "out"
            )
        return self


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

    ce: ClassificationConfig = ClassificationConfig()
    adv: AdversarialConfig = AdversarialConfig()
    trades: TradesConfig = TradesConfig()
    ddpm: DiffusionConfig = DiffusionConfig()

    def attack(self, name: str) -> AdversarialConfig:
        """The attack of the objective called ``name``, one that has an attack."""
        found: AdversarialConfig = getattr(self, name)
        return found
