r"""Laws of the noise level.

Training draws one :math:`\sigma` per image, in image units. The paper's law (CDN sec. 3.3) is the
square of a uniform variable, :math:`\sqrt\sigma \sim U[\sqrt{\min}, \sqrt{\max}]`, whose density
falls as :math:`1/\sqrt\sigma`: between a uniform one and a log-uniform one (:math:`1/\sigma`).

Diffusion models draw a timestep t uniformly of the T = 1000 levels of a schedule (Ho et al. 2020,
algorithm 1). Their images live in [-1, 1], so in image units it is
:math:`\sigma_t = \tfrac12\sqrt{(1 - \bar\alpha_t)/\bar\alpha_t}` (`ebmkit.schedules`).
"""

from __future__ import annotations

import math
from functools import cache
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from ebmkit.errors import UserError
from ebmkit.schedules import make_schedule
from ebmkit.units import SigmaOrZero

__all__ = ["NoiseKind", "NoiseLaw"]

NoiseKind = Literal["squared-uniform", "log-uniform", "uniform", "fixed", "diffusion", "none"]


class NoiseLaw(BaseModel):
    """How noise levels are drawn. Levels are in image units and may be written ``25/255``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: NoiseKind = Field(
        "none",
        description="squared-uniform (the paper's), log-uniform, uniform, fixed (max), diffusion "
        "(the levels of a schedule), none",
    )
    min: SigmaOrZero = Field(
        0.0, description="smallest noise level, image units; diffusion has its schedule's"
    )
    max: SigmaOrZero = Field(
        0.0, description="largest noise level, image units; diffusion has its schedule's"
    )
    schedule: Literal["linear", "cosine"] = Field(
        "linear", description="of diffusion, whose 1000 levels are drawn alike"
    )

    @model_validator(mode="after")
    def _check(self) -> NoiseLaw:
        if self.kind in ("none", "diffusion"):
            return self
        if self.max <= 0:
            raise UserError(f"a {self.kind} noise law needs max above 0, as in 100/255")
        if self.min > self.max:
            raise UserError(f"noise level min {self.min:g} is above max {self.max:g}: swap them")
        if self.kind == "log-uniform" and self.min == 0:
            raise UserError("a log-uniform noise law needs min above 0, as in 1/255")
        return self

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest level that can be drawn, image units."""
        if self.kind == "none":
            return 0.0, 0.0
        if self.kind == "diffusion":
            return make_schedule(self.schedule).sigma_range
        return (self.max, self.max) if self.kind == "fixed" else (self.min, self.max)

    def sample(self, count: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
        """Draw ``count`` independent levels, (count,) float32 on ``device``, image units.

        Args:
            count: how many.
            generator: on the same device.
            device: where.
        """
        if self.kind == "diffusion":
            levels = _levels(self.schedule, str(device))
            chosen = torch.randint(len(levels), (count,), generator=generator, device=device)
            return levels[chosen]
        low, high = self.range
        if low == high:
            return torch.full((count,), high, device=device)
        u = torch.rand(count, generator=generator, device=device)
        if self.kind == "squared-uniform":
            first, last = math.sqrt(low), math.sqrt(high)
            return (first + (last - first) * u).square()
        if self.kind == "log-uniform":
            return low * torch.pow(high / low, u)
        return low + (high - low) * u


@cache
def _levels(schedule: str, device: str) -> Tensor:
    """The noise levels of the schedule, (T,) float32, kept on the device."""
    return make_schedule(schedule).sigmas.float().to(device)
