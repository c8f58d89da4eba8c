r"""How the strength of guidance depends on the timestep: g(t) of `ebmkit.guidance.score`.

.. math:: \hat\epsilon = \epsilon(u_t, t) - s\, g(t)\, \nabla_{u_t} h .

Where h is the exact log-posterior of the noisy image and s = 1, :math:`g = \sqrt{1 - \bar\alpha_t}`
gives the exact conditional noise. ``constant`` and ``step`` multiply that factor (RCG section 4.5:
s = 30, then 11 from the middle of the chain, ``low`` = 11/30); the others replace it (section 4.7),
``sigmoid`` by :math:`(1 - y_0) / (1 + e^{-k (t - t_0)}) + y_0` (eq. 4.4).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ebmkit.errors import UserError, validated
from ebmkit.noise import parse_fraction


class GuidanceSchedule(BaseModel, ABC):
    """g(t). A subclass has a ``name``, a ``description``, an example ``form``, and `factor`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ClassVar[str]
    description: ClassVar[str]
    form: ClassVar[str]

    @abstractmethod
    def factor(self, t: Tensor, abar: Tensor, total: int) -> Tensor:
        """g(t), shape of ``t``.

        Args:
            t: timesteps from 0 to total - 1, whole or between two, float64.
            abar: share of the image in the variance there, of the same shape.
            total: number of timesteps T.
        """

    def weight(self, t: Tensor, abar: Tensor, total: int) -> Tensor:
        """w(t) = g(t) / sqrt(1 - abar), shape of ``t``; 1 where there is no noise."""
        exact = (1 - abar).sqrt()
        found = self.factor(t, abar, total) / exact
        return torch.where(exact > 0, found, torch.ones_like(found))

    def __str__(self) -> str:
        """The written form, that `parse_schedule` reads."""
        values = ",".join(f"{k}={v:g}" if float(f"{v:g}") == v else f"{k}={v!r}"
                          for k, v in self.model_dump().items())  # fmt: skip
        return f"{self.name}:{values}" if values else self.name


class Exact(GuidanceSchedule):
    name = form = "exact"
    description = "sqrt(1 - abar), exact for the posterior of noisy images at scale 1 (the default)"

    def factor(self, t: Tensor, abar: Tensor, total: int) -> Tensor:
        return (1 - abar).sqrt()


class Constant(Exact):
    name = form = "constant"
    description = "the exact factor at every timestep: the scale does not change"


class Step(GuidanceSchedule):
    name = "step"
    form = "step:at=500,low=0.37"
    description = "the exact factor, times low below timestep at (RCG section 4.5)"

    at: float = Field(500.0, ge=0, description="timestep at which the scale changes")
    low: float = Field(11 / 30, ge=0, description="factor of the scale below this timestep")

    def factor(self, t: Tensor, abar: Tensor, total: int) -> Tensor:
        return self.weight(t, abar, total) * (1 - abar).sqrt()

    def weight(self, t: Tensor, abar: Tensor, total: int) -> Tensor:
        return torch.where(t >= self.at, torch.ones_like(t), torch.full_like(t, self.low))


class Linear(GuidanceSchedule):
    name = form = "linear"
    description = "t / T in place of the exact factor (RCG figure 4.17)"

    def factor(self, t: Tensor, abar: Tensor, total: int) -> Tensor:
        return t / total


class Power(GuidanceSchedule):
    name = "power"
    form = "power:k=2"
    description = "(1 - abar)^k in place of the exact factor, which has k = 0.5 (RCG section 4.7)"

    k: float = Field(0.5, ge=0, description="exponent; RCG shows 0.5, 2 and 8")

    def factor(self, t: Tensor, abar: Tensor, total: int) -> Tensor:
        return (1 - abar) ** self.k


class Sigmoid(GuidanceSchedule):
    name = "sigmoid"
    form = "sigmoid:t0=500,y0=0.05,k=0.02"
    description = "from y0 up to 1 about timestep t0, in place of the exact factor (RCG eq. 4.4)"

    t0: float = Field(500.0, description="timestep of the midpoint")
    y0: float = Field(0.05, ge=0, le=1, description="value at the clean end")
    k: float = Field(0.02, description="steepness, per timestep")

    def factor(self, t: Tensor, abar: Tensor, total: int) -> Tensor:
        return (1 - self.y0) * torch.sigmoid(self.k * (t - self.t0)) + self.y0


GUIDANCE_SCHEDULES: dict[str, type[GuidanceSchedule]] = {
    kind.name: kind for kind in (Exact, Constant, Step, Linear, Power, Sigmoid)
}
"""All schedules of guidance, by name."""


def parse_schedule(text: str) -> GuidanceSchedule:
    """The schedule that ``text`` names, as ``sigmoid:t0=500,y0=0.05,k=0.02``.

    Parameters that are left out have the values of RCG; a number may be a fraction, 11/30.

    Raises:
        UserError: if it does not parse; it shows the form of each schedule.

    >>> str(parse_schedule("power:k=1/4"))
    'power:k=0.25'
    """
    name, colon, rest = text.strip().partition(":")
    forms = "write " + " or ".join(kind.form for kind in GUIDANCE_SCHEDULES.values())
    if name not in GUIDANCE_SCHEDULES:
        raise UserError(f"schedule {text!r} is none of those known: {forms}")
    kind = GUIDANCE_SCHEDULES[name]
    values: dict[str, float] = {}
    for part in rest.split(",") if colon else ():
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or key not in kind.model_fields:
            what = f"parameter {key!r}" if equals else repr(part)
            legal = ", ".join(kind.model_fields) or "none"
            raise UserError(
                f"schedule {text!r}: {what} is unknown; those of {name} are: {legal}; {forms}"
            )
        number = parse_fraction(value)
        if number is None or not math.isfinite(number) or key in values:
            wrong = "given twice" if key in values else "no number"
            raise UserError(f"schedule {text!r}: {key} = {value!r} is {wrong}; {forms}")
        values[key] = number
    return validated(kind, values, f"schedule {text!r}")
