r"""What of a diffusion model's path a classifier may be shown, and at which timesteps.

A diffusion model of T steps knows images :math:`u = 2x - 1` and noises them,

.. math:: u_t = \sqrt{\bar\alpha_t}\, u + \sqrt{1 - \bar\alpha_t}\, \epsilon .

A classifier that guides it may be shown the image at timestep t in four ways:

============ ===================================================== =============================
view         image                                                 deviation of its noise
============ ===================================================== =============================
``timestep`` :math:`v_t = (u_t + 1)/2`, the thesis's way           :math:`\sqrt{1 - \bar\alpha_t}/2`
``image``    :math:`y = x + \sigma_t \epsilon`, image units        :math:`\sigma_t = \frac12
                                                                   \sqrt{(1 - \bar\alpha_t) /
                                                                   \bar\alpha_t}`
``dark``     :math:`\sqrt{\bar\alpha_t}\, x`: towards black        0
``faded``    :math:`v_t` without its noise: towards gray           0
============ ===================================================== =============================

``timestep`` and ``image`` have the same :math:`\epsilon` and differ by contrast alone:
:math:`v_t = \sqrt{\bar\alpha_t}\, y + (1 - \sqrt{\bar\alpha_t})/2`. RCG section 4.4 multiplies test
images by :math:`\sqrt{\bar\alpha_t}` and does not say of which range they are: darkness is what
that does to images in [0, 1] (``dark``); in [-1, 1], as the diffusion model has them, it takes away
contrast (``faded``).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ebmkit.errors import UserError
from ebmkit.evaluation.energies import EnergySource
from ebmkit.noise import Schedule, make_schedule

__all__ = ["VIEWS", "DiffusionPathConfig", "views_at"]

VIEWS = {
    "timestep": "in the range of images, sqrt(abar) y + (1 - sqrt(abar))/2",
    "image": "in image units, y = x + sigma eps, the same noise",
    "dark": "sqrt(abar) x, images in [0, 1], no noise",
    "faded": "x_t without its noise",
}


class DiffusionPathConfig(BaseModel):
    """Settings of the suite ``diffusion-path``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schedule: Literal["linear", "cosine"] = Field("linear", description="noise schedule")
    steps: int = Field(1000, ge=2, description="timesteps T of the diffusion model")
    step: int = Field(50, ge=1, description="difference between measured timesteps")
    until: int | None = Field(None, ge=0, description="last measured timestep [default: T - 1]")
    name: str = Field("this run", description="name of the evaluated run in tables and plots")
    beside: tuple[Path, ...] = Field(
        (), description="run folders of further classifiers, shown in the same plots"
    )
    samples: Path | None = Field(
        None,
        description="HDF5 file of `ebmkit sample`, to compare its energies with those of the data",
    )
    energies: EnergySource = Field(
        "auto",
        description="definition of E(x): model (its own density), logits (-logsumexp), auto "
        "(model if its density was trained, else logits)",
    )

    def make_schedule(self) -> Schedule:
        """The noise levels of the diffusion model."""
        return make_schedule(self.schedule, self.steps)

    def timesteps(self) -> tuple[int, ...]:
        """Those measured: 0, step, ... and the last.

        Raises:
            UserError: if ``until`` is beyond the schedule.
        """
        last = self.steps - 1 if self.until is None else self.until
        if last >= self.steps:
            raise UserError(
                f"diffusion-path.until {last} is out of range: with diffusion-path.steps "
                f"{self.steps} it is 0 to {self.steps - 1}"
            )
        return tuple(sorted({*range(0, last + 1, self.step), last}))


def views_at(schedule: Schedule, t: int, x: Tensor, y: Tensor) -> dict[str, tuple[Tensor, float]]:
    """What a classifier may be shown at timestep ``t``, and the deviation of the noise in it.

    Args:
        schedule: of the diffusion model.
        t: the timestep.
        x: clean images (B, C, H, W) in [0, 1].
        y: the same with noise of deviation ``schedule.sigma(t)``, image units.

    Returns:
        Images, shape of x, and the noise level, image units, by the names of `VIEWS`.
    """
    low, high = schedule.image_range
    root, sigma = math.sqrt(schedule.abar(t)), schedule.sigma(t)

    def seen(images: Tensor) -> Tensor:
        return (schedule.from_image_units(images, t) - low) / (high - low)

    return {
        "timestep": (seen(y), root * sigma),
        "image": (y, sigma),
        "dark": (root * x, 0.0),
        "faded": (seen(x), 0.0),
    }
