"""Settings of the samplers that have a name."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ebmkit.noise import Sigma, SigmaOrZero, Spacing
from ebmkit.sampling.ascent import Ball, Direction
from ebmkit.sampling.langevin import JEM_NOISE, JEM_STEP

__all__ = [
    "AnnealedConfig",
    "AscentConfig",
    "DDIMConfig",
    "DDPMConfig",
    "HMCConfig",
    "LangevinConfig",
    "LevelConfig",
    "MALAConfig",
    "PCConfig",
    "SGLDConfig",
    "SamplerConfig",
    "Start",
    "StochasticAscentConfig",
]

Start = Literal["auto", "noise", "uniform", "data", "seeds"]

_START = (
    "starting points. auto: seeds if images of the data set are available, "
    "else noise; noise: Gaussian noise around gray, of the first level or "
    "the model's highest; uniform: uniform in [0, 1]; data: images of the "
    "data set; seeds: draws from the Gaussian of a label's images, or of "
    "all. Samplers over noise levels add the first level's noise to data "
    "and seeds"
)


class SamplerConfig(BaseModel):
    """What all have."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    steps: int = Field(1000, ge=1, description="number of steps per chain")
    start: Start = Field("auto", description=_START)


class LevelConfig(SamplerConfig):
    """Samplers of one density."""

    sigma: Sigma | None = Field(
        None,
        description="noise level of the density, for models with noise level input, for "
        "example 10/255; null: the model's lowest, or 0 for closed forms",
    )


class LangevinConfig(LevelConfig):
    """Settings of ``langevin``."""

    step_size: float = Field(1e-4, gt=0, description="step size eta, image units squared")
    temperature: float = Field(
        1.0, ge=0, description="temperature T: samples p^(1/T); 0: gradient ascent"
    )


class SGLDConfig(LevelConfig):
    """Settings of ``sgld``."""

    steps: int = Field(
        20, ge=1, description="number of steps per chain; JEM takes 20, starting from its buffer"
    )
    start: Start = Field("uniform", description=_START)
    step_size: float = Field(
        JEM_STEP,
        gt=0,
        description="step size eta, image units squared; default: JEM's 1 in [-1, 1]",
    )
    noise: SigmaOrZero = Field(
        JEM_NOISE, description="standard deviation of the noise; default: JEM's 0.01 in [-1, 1]"
    )
    largest_drift: float | None = Field(
        None, gt=0, description="bound on each entry of eta * score, as in JEM++"
    )


class MALAConfig(LevelConfig):
    """Settings of ``mala``."""

    step_size: float = Field(
        1e-4, gt=0, description="step size eta; tune for an acceptance of 0.57"
    )
    temperature: float = Field(1.0, gt=0, description="temperature T: samples p^(1/T)")


class HMCConfig(LevelConfig):
    """Settings of ``hmc``."""

    steps: int = Field(200, ge=1, description="number of proposals per chain")
    step_size: float = Field(
        0.01, gt=0, description="step size epsilon; tune for an acceptance of 0.65"
    )
    leapfrogs: int = Field(10, ge=1, description="leapfrog steps per proposal")
    jitter: float = Field(
        0.2, ge=0, lt=1, description="relative range of random variation of the step size"
    )
    temperature: float = Field(1.0, gt=0, description="temperature T: samples p^(1/T)")


class _Levels(SamplerConfig):
    high: Sigma | None = Field(None, description="first noise level; null: the model's highest")
    low: Sigma | None = Field(
        None, description="last noise level; null: 0.01, or the model's lowest if that is higher"
    )


class AnnealedConfig(_Levels):
    """Settings of ``annealed-langevin``."""

    steps: int = Field(300, ge=1, description="number of steps over all noise levels")
    inner: int = Field(5, ge=1, description="number of steps at each noise level")
    rate: float = Field(0.1, gt=0, description="step size divided by the squared noise level")
    temperature: float = Field(1.0, ge=0, description="temperature T; 0: gradient ascent")

    @model_validator(mode="after")
    def _whole_levels(self) -> Self:
        if self.steps % self.inner or self.steps == self.inner:
            raise ValueError(
                f"{self.steps} steps do not make two or more noise levels of {self.inner}: take a "
                f"multiple, as {max(2, round(self.steps / self.inner)) * self.inner}"
            )
        return self


class PCConfig(_Levels):
    """Settings of ``pc``."""

    steps: int = Field(200, ge=1, description="number of predictor steps, one per noise level")
    corrections: int = Field(
        1, ge=0, description="number of corrector (Langevin) steps at each noise level"
    )
    snr: float = Field(0.16, gt=0, description="signal-to-noise ratio of a corrector step")


class DDIMConfig(SamplerConfig):
    """Settings of ``ddim``."""

    steps: int = Field(
        100,
        ge=1,
        le=1000,
        description="number of timesteps out of 1000; levels outside the model's range are skipped",
    )
    eta: float = Field(
        0.0, ge=0, le=1, description="eta, the share of fresh noise; 0: deterministic, 1: ancestral"
    )
    schedule: Literal["linear", "cosine"] | None = Field(
        None, description="noise schedule; null: that of the diffusion model, else linear"
    )
    spacing: Spacing = Field(
        "trailing", description="timestep spacing: leading, linspace, trailing"
    )
    clip: bool = Field(True, description="clip the predicted clean image to [0, 1]")


class DDPMConfig(DDIMConfig):
    """Settings of ``ddpm``."""

    steps: int = Field(
        1000,
        ge=1,
        le=1000,
        description="number of timesteps out of 1000; levels outside the model's range are skipped",
    )
    eta: float = Field(1.0, ge=0, le=1, description="eta, the share of fresh noise")


class StochasticAscentConfig(SamplerConfig):
    """Settings of ``ks``."""

    steps: int = Field(2000, ge=1, description="maximum number of steps per chain")
    first_sigma: Sigma | None = Field(
        None, description="noise level of the starting points; null: the model's highest"
    )
    last_sigma: Sigma | None = Field(
        None, description="noise level at which a chain ends; null: 0.01, or the model's lowest"
    )
    first_step: float = Field(0.01, gt=0, le=1, description="first step size h_0")
    beta: float = Field(
        0.01, gt=0, le=1, description="beta: 1 adds no noise, smaller values add more"
    )
    largest_step: float = Field(
        1.0, gt=0, le=1, description="bound on the step size h_t; 1 in the paper"
    )


class AscentConfig(LevelConfig):
    """Settings of ``ascent``."""

    steps: int = Field(60, ge=1, description="number of steps per chain")
    objective: Literal["label", "joint"] = Field(
        "label", description="function to increase: label (log p(c|x)) or joint (log p(x, c))"
    )
    step_size: float = Field(
        0.1, gt=0, description="length of a step, image units; Santurkar et al. use 0.5 at 224x224"
    )
    direction: Direction = Field(
        "l2",
        description="direction of a step: l2 (normalised gradient), plain (gradient), sign "
        "(sign of the gradient)",
    )
    radius: float | None = Field(
        None, gt=0, description="radius of a ball around the starting point; null: no ball"
    )
    ball: Ball = Field("l2", description="norm of the ball")
