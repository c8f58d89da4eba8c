r"""Attacks: projected gradient descent on any loss, and the smallest radius at which one succeeds.

From a start in the ball of radius :math:`\epsilon` about x, PGD (Madry et al., arXiv 1706.06083)
climbs a loss L of each image,

.. math::
    y_{t+1} = \Pi\bigl(y_t + \alpha\, n(\nabla_y L(y_t))\bigr), \qquad
    n(g) = \operatorname{sign} g \;(\ell_\infty) \quad\text{or}\quad g / \|g\| \;(\ell_2),

with :math:`\Pi` the projection on the ball and on :math:`[0, 1]^d`: the steps of
`ebmkit.sampling.Ascent`. One step of length :math:`\epsilon` from x itself is the fast gradient
method. Away from a label L is :math:`-\log p(c \mid y)`, towards another it is
:math:`\log p(c' \mid y)`. An image whose gradient is 0 stays where it is, so that a loss which is 0
once the label is wrong stops early.

Starts and noise of evaluations come from a generator for each image, so that nothing depends on the
batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from ebmkit.sampling.ascent import Ascent
from ebmkit.sampling.base import per_chain

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
    """The images (B, ...) that the steps lead to; they carry no gradient.

    Args:
        gradient: images (B, ...) to the gradient of the loss that is raised, of the same shape.
        x: the centres of the balls (B, ...).
        epsilon: their radius, image units, a number or (B,).
        norm: of the balls and of the steps.
        steps: how many.
        step_size: image units, a number or (B,).
        start: where the steps start (B, ...); None: at x.
        bounds: images are clipped to them, numbers or (B,).
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
"""An ascent draws nothing."""


def gradient_of(loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The gradient, by autograd, of a loss that takes images (B, ...) to one number each (B,)."""

    def gradient(y: Tensor) -> Tensor:
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            (found,) = torch.autograd.grad(loss(y).sum(), y)
        return found

    return gradient


def unit_ball(
    norm: Norm, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype
) -> Tensor:
    """Points (B, ...) spread uniformly over the ball of radius 1, on the generator's device."""
    if norm == "linf":
        device = generator.device
        return 2 * torch.rand(shape, generator=generator, device=device, dtype=dtype) - 1
    # d of the d + 2 entries of a point on a sphere (Voelker et al. 2017)
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
    """A point of the ball about each image of ``x`` (B, ...), uniform but for the clipping.

    Args:
        x: the centres.
        epsilon: the radius, image units, a number or (B,).
        norm: of the ball.
        generators: one for each image (`ebmkit.randomness.image_generators`).
        bounds: as in `projected_gradient_descent`.
    """
    low, high = (per_chain(bound, x) for bound in bounds)
    moved = x + per_chain(epsilon, x) * _drawn(x, generators, partial(unit_ball, norm))
    return torch.clamp(moved, low, high)  # type: ignore[arg-type]  # both are of one kind


def noise_of_size(
    x: Tensor, epsilon: float, norm: Norm, generators: Sequence[torch.Generator]
) -> Tensor:
    """Images ``x`` (B, ...) in [0, 1] with noise of full strength, clipped: no use of a gradient.

    Uniform noise whose largest entry is ``epsilon`` (image units) for l_inf. Gaussian noise for l2,
    scaled to have that length after clipping, or as near as any scale brings it.
    """
    if norm == "linf":
        noise = _drawn(x, generators, partial(unit_ball, norm))
        noise = noise / per_chain(noise.flatten(1).abs().amax(dim=1), x)
        return (x + epsilon * noise).clamp(0, 1)
    noise = _drawn(x, generators, _normal)
    reach = torch.where(noise > 0, 1 - x, x) / noise.abs().clamp_min(1e-12)
    low, high = x.new_zeros(len(x)), reach.flatten(1).amax(dim=1)  # where all entries are clipped
    for _ in range(60):
        middle = (low + high) / 2
        change = (x + per_chain(middle, x) * noise).clamp(0, 1) - x
        short = change.flatten(1).norm(dim=1) < epsilon
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return (x + per_chain(low, x) * noise).clamp(0, 1)


def minimal_epsilons(
    succeeds: Callable[[Tensor, float], Tensor],
    wrong: Tensor,
    epsilons: Sequence[float],
    done: Callable[[], None] = lambda: None,
) -> Tensor:
    """The smallest of ``epsilons`` at which an attack on each image succeeds, (B,) float64.

    0 where the label is wrong without an attack, inf where none succeeds. Found by bisection: an
    image that is broken stays broken at every larger radius, where the same perturbation is
    allowed, and an attack that fails is taken to fail at every smaller one. So each image is
    attacked `search_steps` times at most, not at every radius.

    Args:
        succeeds: indices of images (n,) and a radius, to whether the attack on each succeeds, (n,).
        wrong: which labels are wrong without an attack, (B,) bool.
        epsilons: radii above 0, image units.
        done: called after each step of the bisection.
    """
    grid = [0.0, *sorted(epsilons), math.inf]
    wrong = wrong.cpu()
    fails = torch.zeros(len(wrong), dtype=torch.long).masked_fill(wrong, -1)  # largest known
    succeeded = torch.full((len(wrong),), len(grid) - 1).masked_fill(wrong, 0)  # smallest known
    for _ in range(search_steps(len(epsilons))):
        middle = ((fails + succeeded) // 2).where(succeeded - fails > 1, -1)
        for k in sorted({*middle.tolist()} - {-1}):
            rows = torch.nonzero(middle == k).squeeze(1)
            broken = succeeds(rows, grid[k]).cpu()
            succeeded[rows[broken]], fails[rows[~broken]] = k, k
        done()
    return torch.tensor(grid, dtype=torch.float64)[succeeded]


def search_steps(count: int) -> int:
    """How often `minimal_epsilons` attacks an image at most, given ``count`` radii."""
    return math.ceil(math.log2(count + 1))


def _normal(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)


def _drawn(x: Tensor, generators: Sequence[torch.Generator], draw: Draw) -> Tensor:
    """What ``draw`` gives for each image of ``x`` by its own generator, on the device of x."""
    return torch.cat([draw((1, *x.shape[1:]), g, x.dtype) for g in generators]).to(x)
