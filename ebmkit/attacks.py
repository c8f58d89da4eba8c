r"""Adversarial attacks: projected gradient descent (PGD) and minimal adversarial epsilons.

PGD (Madry et al., arXiv 1706.06083) starts in the ball of radius :math:`\epsilon` around x and
maximises a loss L of each image,

.. math::
    y_{t+1} = \Pi\bigl(y_t + \alpha\, n(\nabla_y L(y_t))\bigr), \qquad
    n(g) = \operatorname{sign} g \;(\ell_\infty) \quad\text{or}\quad g / \|g\| \;(\ell_2),

where :math:`\Pi` projects onto the ball and onto :math:`[0, 1]^d` (`ebmkit.sampling.Ascent`). One
step of length :math:`\epsilon` from x is the fast gradient method. An untargeted attack has
:math:`L = -\log p(c \mid y)`, an attack with target c' has :math:`L = \log p(c' \mid y)`. An image
with gradient 0 does not move. So if the loss is 0 once the label is wrong, PGD stops there.

Evaluations draw starting points and noise from one generator per image, so results do not depend on
the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from ebmkit.energy import per_image, vjp
from ebmkit.sampling.ascent import Ascent

Norm = Literal["linf", "l2"]

NORMS: tuple[Norm, ...] = get_args(Norm)

Bounds = tuple[float, float] | tuple[Tensor, Tensor]
Draw = Callable[[tuple[int, ...], torch.Generator, torch.dtype], Tensor]


def projected_gradient_descent(
    gradient: Callable[[Tensor], Tensor],
    x: Tensor,
    epsilon: float | Tensor,
    norm: Norm,
    *,
    steps: int,
    step_size: float | Tensor,
    start: Tensor | None = None,
    bounds: Bounds = (0.0, 1.0),
) -> Tensor:
    """Run PGD and return the perturbed images (B, ...), detached.

    Args:
        gradient: function from images (B, ...) to the gradient of the loss, of the same shape.
        x: centres of the balls (B, ...).
        epsilon: radius of the balls, image units, a number or (B,).
        norm: norm of the balls and of the steps.
        steps: number of steps.
        step_size: length of a step, image units, a number or (B,).
        start: starting points (B, ...); None: ``x``.
        bounds: lower and upper bound of the images, numbers or (B,).
    """

    def density(y: Tensor, sigma: object = None) -> tuple[Tensor, Tensor]:
        return y, gradient(y)

    direction: Literal["sign", "l2"] = "sign" if norm == "linf" else "l2"
    sampler = Ascent(density, step_size, direction, epsilon, norm, bounds)
    state = sampler.init(x)
    state = state if start is None else state._replace(x=start)
    for _ in range(steps):
        state, _ = sampler.step(state, _UNUSED)
    return state.x.detach()


_UNUSED = torch.Generator()
"""Argument of `Ascent.step`, which draws no random numbers."""


def gradient_of(loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The gradient function, by autograd, of a loss from images (B, ...) to (B,)."""

    def gradient(y: Tensor) -> Tensor:
        value, product = vjp(loss, y, once=True)
        return product(torch.ones_like(value))

    return gradient


def unit_ball(
    norm: Norm, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype
) -> Tensor:
    """Draw points (B, ...) uniformly from the unit ball, on the generator's device."""
    if norm == "linf":
        device = generator.device
        return 2 * torch.rand(shape, generator=generator, device=device, dtype=dtype) - 1
    # d of the d + 2 coordinates of a uniform point on a sphere (Voelker et al. 2017)
    normal = _normal((shape[0], math.prod(shape[1:]) + 2), generator, dtype)
    points: Tensor = normal / torch.linalg.vector_norm(normal, dim=1, keepdim=True)
    return points[:, :-2].reshape(shape)


def random_start(
    x: Tensor,
    epsilon: float | Tensor,
    norm: Norm,
    generators: Sequence[torch.Generator],
    bounds: Bounds = (0, 1),
) -> Tensor:
    """Draw a point uniformly from the ball around each image of ``x`` (B, ...), and clip it.

    Args:
        x: centres of the balls.
        epsilon: radius, image units, a number or (B,).
        norm: norm of the balls.
        generators: one per image (`ebmkit.randomness.image_generators`).
        bounds: as in `projected_gradient_descent`.
    """
    return moved_start(x, epsilon, _drawn(x, generators, partial(unit_ball, norm)), bounds)


def moved_start(
    x: Tensor, length: float | Tensor, offset: Tensor, bounds: Bounds = (0, 1)
) -> Tensor:
    """``x`` (B, ...) plus ``length`` times ``offset``, clipped.

    ``length`` and ``bounds`` are numbers or (B,), image units.
    """
    low, high = (per_image(bound, x) for bound in bounds)
    moved = x + per_image(length, x) * offset
    return torch.clamp(moved, low, high)  # type: ignore[arg-type]  # both have the same type


def noise_of_norm(
    x: Tensor, epsilon: float, norm: Norm, generators: Sequence[torch.Generator]
) -> Tensor:
    """Add random noise of norm ``epsilon`` to images ``x`` (B, ...) in [0, 1], and clip them.

    For l_inf: uniform noise whose largest absolute entry is ``epsilon`` (image units). For l2:
    Gaussian noise, scaled so that its norm after clipping is ``epsilon`` or as close as possible.
    """
    if norm == "linf":
        noise = _drawn(x, generators, partial(unit_ball, norm))
        noise = noise / per_image(noise.flatten(1).abs().amax(dim=1), x)
        return (x + epsilon * noise).clamp(0, 1)
    noise = _drawn(x, generators, _normal)
    reach = torch.where(noise > 0, 1 - x, x) / noise.abs().clamp_min(1e-12)
    low, high = x.new_zeros(len(x)), reach.flatten(1).amax(dim=1)  # where all entries are clipped
    for _ in range(60):
        middle = (low + high) / 2
        change = (x + per_image(middle, x) * noise).clamp(0, 1) - x
        short = change.flatten(1).norm(dim=1) < epsilon
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return (x + per_image(low, x) * noise).clamp(0, 1)


def minimal_epsilons(
    succeeds: Callable[[Tensor, float], Tensor],
    wrong: Tensor,
    epsilons: Sequence[float],
    done: Callable[[], None] = lambda: None,
) -> Tensor:
    """The smallest of ``epsilons`` at which an attack on each image succeeds, (B,) float64.

    It is 0 for images that are misclassified without an attack, and inf if no attack succeeds. The
    search is a bisection: a successful perturbation is legal at every larger radius, and an attack
    that fails is assumed to fail at every smaller radius. So each image is attacked at most
    `search_steps` times.

    Args:
        succeeds: function of image indices (n,) and a radius; returns the successes, (n,) bool.
        wrong: which images are misclassified without an attack, (B,) bool.
        epsilons: radii above 0, image units.
        done: called after each step of the bisection.
    """
    grid = [0.0, *sorted(epsilons), math.inf]
    wrong = wrong.cpu()
    fails = torch.zeros(len(wrong), dtype=torch.long).masked_fill(wrong, -1)  # largest failure
    succeeded = torch.full((len(wrong),), len(grid) - 1).masked_fill(wrong, 0)  # smallest success
    for _ in range(search_steps(len(epsilons))):
        middle = ((fails + succeeded) // 2).where(succeeded - fails > 1, -1)
        for k in sorted({*middle.tolist()} - {-1}):
            rows = torch.nonzero(middle == k).squeeze(1)
            broken = succeeds(rows, grid[k]).cpu()
            succeeded[rows[broken]], fails[rows[~broken]] = k, k
        done()
    return torch.tensor(grid, dtype=torch.float64)[succeeded]


def search_steps(count: int) -> int:
    """Maximum number of attacks by `minimal_epsilons` on one image, for ``count`` radii."""
    return math.ceil(math.log2(count + 1))


def _normal(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)


def _drawn(x: Tensor, generators: Sequence[torch.Generator], draw: Draw) -> Tensor:
    """Call ``draw`` for each image of ``x`` with its generator; the result is on x's device."""
    return torch.cat([draw((1, *x.shape[1:]), g, x.dtype) for g in generators]).to(x)
