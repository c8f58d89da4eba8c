r"""Laws of the noise level.

Training draws one :math:`\sigma` per image, in image units. The paper's law (CDN sec. 3.3) is the
square of a uniform variable, :math:`\sqrt\sigma \sim U[\sqrt{\min}, \sqrt{\max}]`, whose density
falls as :math:`1/\sqrt\sigma`: between a uniform one and a log-uniform one (:math:`1/\sigma`).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from ebmkit.errors import UserError
from ebmkit.units import SigmaOrZero

__all__ = ["NoiseKind", "NoiseLaw"]

NoiseKind = Literal["squared-uniform", "log-uniform", "uniform", "fixed", "none"]


class NoiseLaw(BaseModel):
    """How noise levels are drawn. Levels are in image units and may be written ``25/255``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: NoiseKind = Field(
        "none", description="squared-uniform (the paper's), log-uniform, uniform, fixed (max), none"
    )
    min: SigmaOrZero = Field(0.0, description="smallest noise level, image units")
    max: SigmaOrZero = Field(0.0, description="largest noise level, image units")

    @model_validator(mode="after")
    def _check(self) -> NoiseLaw:
        if self.kind == "none":
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
        return (self.max, self.max) if self.kind == "fixed" else (self.min, self.max)

    def sample(self, count: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
        """Draw ``count`` independent levels, (count,) float32 on ``device``, image units.

        Args:
            count: how many.
            generator: on the same device.
            device: where.
        """
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
