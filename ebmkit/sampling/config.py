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
    "auto: seeds where images of the data set are at hand, else noise; noise: about gray, of the "
    "first or the model's highest level; uniform: in [0, 1]; data: images of the data set; seeds: "
    "draws from the Gaussian of a label's images, or of all; samplers that go down noise levels "
    "add the first one's noise to data and seeds"
)


class SamplerConfig(BaseModel):
    """What all have."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    steps: int = Field(1000, ge=1, description="steps of each chain")
    start: Start = Field("auto", description=_START)


class LevelConfig(SamplerConfig):
    """Samplers of one density."""

    sigma: Sigma | None = Field(
        None,
        description="noise level of the density, for models that take one, as 10/255; none: the "
        "model's lowest, or no noise in closed form",
    )


class LangevinConfig(LevelConfig):
    """Settings of ``langevin``."""

    step_size: float = Field(1e-4, gt=0, description="eta, image units squared")
    temperature: float = Field(1.0, ge=0, description="samples p^(1/T); 0 is ascent")


class SGLDConfig(LevelConfig):
    """Settings of ``sgld``."""

    steps: int = Field(20, ge=1, description="steps of each chain; JEM takes 20 from its buffer")
    start: Start = Field("uniform", description=_START)
    step_size: float = Field(JEM_STEP, gt=0, description="eta, image units squared; JEM's 1")
    noise: SigmaOrZero = Field(JEM_NOISE, description="deviation of the noise; JEM's 0.01")
    largest_drift: float | None = Field(
        None, gt=0, description="bound on each entry of eta * score, as in JEM++"
    )


class MALAConfig(LevelConfig):
    """Settings of ``mala``."""

    step_size: float = Field(1e-4, gt=0, description="eta; aim at an acceptance of 0.57")
    temperature: float = Field(1.0, gt=0, description="samples p^(1/T)")


class HMCConfig(LevelConfig):
    """Settings of ``hmc``."""

    steps: int = Field(200, ge=1, description="proposals of each chain")
    step_size: float = Field(0.01, gt=0, description="epsilon; aim at an acceptance of 0.65")
    leapfrogs: int = Field(10, ge=1, description="leapfrog steps of a proposal")
    jitter: float = Field(0.2, ge=0, lt=1, description="share by which step sizes vary")
    temperature: float = Field(1.0, gt=0, description="samples p^(1/T)")


class _Levels(SamplerConfig):
    high: Sigma | None = Field(None, description="first noise level; none: the model's highest")
    low: Sigma | None = Field(
        None, description="last noise level; none: 0.01, or the model's lowest if that is higher"
    )


class AnnealedConfig(_Levels):
    """Settings of ``annealed-langevin``."""

    steps: int = Field(300, ge=1, description="steps over all noise levels")
    inner: int = Field(5, ge=1, description="steps at each noise level")
    rate: float = Field(0.1, gt=0, description="step size over the level's square")
    temperature: float = Field(1.0, ge=0, description="T; 0 is ascent")

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

    steps: int = Field(200, ge=1, description="predictor steps, one to each next noise level")
    corrections: int = Field(1, ge=0, description="Langevin steps at each noise level")
    snr: float = Field(0.16, gt=0, description="ratio of drift to noise of a correction")


class DDIMConfig(SamplerConfig):
    """Settings of ``ddim``."""

    steps: int = Field(
        100, ge=1, le=1000, description="timesteps of 1000; those the model was trained for count"
    )
    eta: float = Field(0.0, ge=0, le=1, description="share of the noise drawn anew; 1: ancestral")
    schedule: Literal["linear", "cosine"] | None = Field(
        None, description="noise schedule; none: a diffusion model's own, else linear"
    )
    spacing: Spacing = Field("trailing", description="which timesteps: leading, linspace, trailing")
    clip: bool = Field(True, description="clip the predicted clean image to [0, 1]")


class DDPMConfig(DDIMConfig):
    """Settings of ``ddpm``."""

    steps: int = Field(
        1000, ge=1, le=1000, description="timesteps of 1000; those the model was trained for count"
    )
    eta: float = Field(1.0, ge=0, le=1, description="share of the noise drawn anew")


class StochasticAscentConfig(SamplerConfig):
    """Settings of ``ks``."""

    steps: int = Field(2000, ge=1, description="steps after which every chain ends")
    first_sigma: Sigma | None = Field(
        None, description="noise level of the start; none: the model's highest"
    )
    last_sigma: Sigma | None = Field(
        None, description="level at which a chain ends; none: 0.01, or the model's lowest"
    )
    first_step: float = Field(0.01, gt=0, le=1, description="h_0")
    beta: float = Field(0.01, gt=0, le=1, description="1 adds no noise, small values much")
    largest_step: float = Field(1.0, gt=0, le=1, description="bound on h_t; 1 is the paper's")


class AscentConfig(LevelConfig):
    """Settings of ``ascent``."""

    steps: int = Field(60, ge=1, description="steps of each chain")
    objective: Literal["label", "joint"] = Field(
        "label", description="what is climbed: log p(c|x) or log p(x, c)"
    )
    step_size: float = Field(
        0.1, gt=0, description="length of a step, image units; Santurkar et al. take 0.5 at 224x224"
    )
    direction: Direction = Field("l2", description="l2: normalised; plain; sign")
    radius: float | None = Field(None, gt=0, description="of a ball about the start; none: no ball")
    ball: Ball = Field("l2", description="its norm")
