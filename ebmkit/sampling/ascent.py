r"""Ascent on one classifier: images that a label's density climbs to (RCG sections 3.1-3.2).

With a log-density :math:`\ell(x)`, :math:`\log p(c \mid x)` (`label_density_of`) or
:math:`\log p(x, c)` (`density_of`), and its gradient g, a step is

.. math:: x' = \Pi\bigl(x + \eta\, n(g)\bigr), \qquad
    n(g) = g,\quad g / \|g\|_2 \quad\text{or}\quad \operatorname{sign} g ,

with :math:`\Pi` the projection on a ball about the start and on the range of images, each left out
where not asked for. On a robust classifier the images take on the look of the label, which is what
"perceptually aligned gradients" means; on a plain one they hardly change. On the loss, in a small
ball, it is projected gradient descent, the attack of Madry et al. (arXiv 1706.06083).

Santurkar et al. (2019) take 60 steps of 0.5 in l2 with projection on a ball of radius 40, from
draws of the Gaussian that has the mean and covariance of the label's training images:
`ebmkit.sampling.starts.ClassGaussians`. With plain steps it is Langevin dynamics at temperature 0.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from pydantic import Field
from torch import Tensor

from ebmkit.energy import ScoreModel
from ebmkit.errors import UserError
from ebmkit.sampling.base import Info, check_positive, per_chain, root_mean_square
from ebmkit.sampling.entry import LevelConfig, SamplerEntry
from ebmkit.sampling.langevin import langevin_move
from ebmkit.sampling.target import DensityFunction, Labels, density_of, label_density_of

Direction = Literal["l2", "plain", "sign"]
Ball = Literal["l2", "linf"]


class AscentChain(NamedTuple):
    """Where the chains are, and where they started."""

    x: Tensor
    step: int
    start: Tensor


class Ascent:
    """Gradient ascent on a log-density, with normalised or plain steps.

    Args:
        density: what is climbed, with its gradient.
        step_size: length of a step in image units (``l2``), of each entry (``sign``), or eta in
            image units squared (``plain``); a number or (B,).
        direction: ``l2``, ``plain`` or ``sign``.
        radius: of a ball about the start that chains do not leave, image units, a number or (B,);
            None: no ball.
        ball: its norm.
        bounds: x is clipped to them after each step, numbers or (B,); None: not at all.
        sigma: noise level handed to the density, for models that take one.

    Raises:
        UserError: if a number or a name is not legal.
    """

    steps = None

    def __init__(
        self,
        density: DensityFunction,
        step_size: float | Tensor = 0.5,
        direction: Direction = "l2",
        radius: float | Tensor | None = None,
        ball: Ball = "l2",
        bounds: tuple[float, float] | tuple[Tensor, Tensor] | None = (0.0, 1.0),
        sigma: float | None = None,
    ) -> None:
        if direction not in get_args(Direction):
            known = ", ".join(get_args(Direction))
            raise UserError(f"unknown direction {direction!r}: known: {known}")
        if ball not in get_args(Ball):
            raise UserError(f"unknown ball {ball!r}: known: {', '.join(get_args(Ball))}")
        self.density, self.sigma = density, sigma
        for name, value in (("step size", step_size), ("radius", radius)):
            if isinstance(value, (int, float)):  # numbers of each chain are not looked at
                check_positive(name, value)
        self.step_size, self.radius = step_size, radius
        self.direction, self.ball, self.bounds = direction, ball, bounds

    def init(self, x: Tensor) -> AscentChain:
        """Chains that start at ``x`` (B, ...)."""
        return AscentChain(x, 0, x)

    def step(self, state: AscentChain, generator: torch.Generator) -> tuple[AscentChain, Info]:
        """One step up; nothing is drawn."""
        x = state.x
        _, gradient = self.density(x, self.sigma)
        moved = langevin_move(x, _directed(gradient, self.direction), self.step_size, 0.0, x)
        if self.radius is not None:
            moved = state.start + _within(moved - state.start, self.radius, self.ball)
        if self.bounds is not None:
            low, high = (per_chain(bound, moved) for bound in self.bounds)
            moved = torch.clamp(moved, low, high)  # type: ignore[arg-type]  # both are of one kind
        return AscentChain(moved, state.step + 1, state.start), Info(root_mean_square(moved - x))


def _directed(gradient: Tensor, direction: Direction) -> Tensor:
    if direction == "plain":
        return gradient
    if direction == "sign":
        return gradient.sign()
    norm = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
    return gradient / per_chain(norm.clamp_min(torch.finfo(gradient.dtype).tiny), gradient)


def _within(offset: Tensor, radius: float | Tensor, ball: Ball) -> Tensor:
    """The nearest offset (B, ...) in the ball."""
    if ball == "linf":
        bound = per_chain(radius, offset)
        return torch.clamp(offset, -bound, bound)  # type: ignore[arg-type]  # both are of one kind
    norm = torch.linalg.vector_norm(offset.flatten(1), dim=1)
    return offset * per_chain(radius / norm.clamp_min(radius), offset)


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


def _make(model: ScoreModel, c: Labels, config: AscentConfig) -> Ascent:
    assert c is not None
    return Ascent(
        (label_density_of if config.objective == "label" else density_of)(model, c),
        config.step_size,
        config.direction,
        config.radius,
        config.ball,
        sigma=config.sigma,
    )


ASCENT_ENTRY = SamplerEntry(
    name="ascent",
    description="gradient ascent to a label (Santurkar et al. 2019)",
    config=AscentConfig,
    needs=("density", "labels"),
    make=_make,
    no_law="climbs",
)
