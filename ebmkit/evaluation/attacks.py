r"""Attacks on a joint model by foolbox, through whatever defends it.

An attack of strength :math:`\epsilon` looks for an image :math:`x'` near x, in :math:`[0, 1]^d`,
that is given another label than the true one c. Projected gradient descent (PGD, Madry et al. 2018)
climbs the loss,

.. math::
    x_{t+1} = \Pi\bigl(x_t + \alpha\, n(\nabla_x L(x_t, c))\bigr), \qquad
    L(x, c) = -\log p(c \mid x),

from a random point of the ball :math:`\|x' - x\| \le \epsilon`; the projection goes onto the ball
and onto :math:`[0, 1]^d`, and n is the sign for :math:`\ell_\infty` and the direction for
:math:`\ell_2`.

Every defence (`ebmkit.evaluation.defences`) is attacked through. The gradient of a denoiser
contains second derivatives of the model, :math:`\nabla D = I + \sigma^2 \nabla^2 \log p` (CDN eq.
14). Where noise is added, each gradient is that of an average over new draws (expectation over
transformation, Athalye et al. 2018): the attacker knows the defence, but not the draws on which it
is judged.

Random starts are drawn for each image from its content and a seed, so nothing depends on the batch
in which an image is attacked.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ebmkit.errors import UserError
from ebmkit.evaluation.defences import DefendedClassifier, frozen, image_numbers, labels_given

__all__ = ["NORMS", "Attack", "Norm", "minimal_epsilons", "rounds"]

Norm = Literal["linf", "l2"]

NORMS: tuple[Norm, ...] = get_args(Norm)

STEPSIZE = 0.2
"""Of PGD, relative to the strength. Steps of 0.03 or 0.06 in 40, as usual, left images unbroken on
digits that this one broke, and AutoAttack."""


@dataclass(frozen=True)
class Attack:
    """An attack by foolbox on a classifier of images in [0, 1].

    Args:
        norm: in which strength is measured.
        kind: ``pgd``; ``one-step``, the fast gradient method from the image itself; or ``noise``,
            which asks for no gradient: uniform noise for l_inf, Gaussian for l_2, of full strength.
        steps: of PGD.
        restarts: how often PGD starts, or noise is drawn; an image that is broken is left alone.
        stepsize: of PGD, relative to the strength; None: `STEPSIZE`, or what crosses the ball in
            few steps, 2.5 / steps.
    """

    norm: Norm
    kind: Literal["pgd", "one-step", "noise"] = "pgd"
    steps: int = 40
    restarts: int = 1
    stepsize: float | None = None

    def breaks(
        self,
        target: DefendedClassifier,
        x: Tensor,
        labels: Tensor,
        epsilon: float,
        noise: Tensor | None = None,
        seed: str = "",
    ) -> Tensor:
        """Which images (B,) bool are given a wrong label after the attack.

        Args:
            target: the classifier.
            x: images (B, C, H, W) in [0, 1].
            labels: the true ones (B,).
            epsilon: strength, image units.
            noise: of the evaluation of each image, as `DefendedClassifier.judged` takes it.
            seed: of random starts and of the attacker's draws, any text.

        Raises:
            UserError: if an image leaves [0, 1].
        """
        _check_range(x)
        broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for number in range(self.restarts):
            left = torch.nonzero(~broken).squeeze(1)
            if len(left) == 0:
                break
            key = f"{seed} {self.norm} {self.kind} {epsilon:.9g} {number}"
            found = self.perturbed(target, x[left], labels[left], epsilon, key)
            own = None if noise is None else noise[left]
            broken[left] = labels_given(target, found, own) != labels[left]
        return broken

    def perturbed(
        self, target: DefendedClassifier, x: Tensor, labels: Tensor, epsilon: float, seed: str = ""
    ) -> Tensor:
        """The images (B, C, H, W) that one start of the attack ends with, in [0, 1]."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # foolbox's imports from scipy
            from foolbox.models.pytorch import PyTorchModel

        attack = self._foolbox(image_numbers(x, seed))
        target.restart(seed)
        with torch.random.fork_rng([x.device] if x.is_cuda else []), frozen(target):
            classifier = PyTorchModel(target, bounds=(0, 1), device=x.device)
            _, found, _ = attack(classifier, x, labels, epsilons=epsilon)
        image: Tensor = found.detach().clamp(0, 1)
        return image

    def _foolbox(self, numbers: Sequence[int]) -> Any:
        """foolbox's attack, whose random numbers come from ``numbers``, one per image."""
        from foolbox.attacks import additive_noise, fast_gradient_method
        from foolbox.attacks import projected_gradient_descent as pgd

        linf = self.norm == "linf"
        if self.kind == "one-step":
            single = fast_gradient_method
            return single.LinfFastGradientAttack() if linf else single.L2FastGradientAttack()
        attack: Any
        if self.kind == "noise":
            attack = (
                additive_noise.LinfAdditiveUniformNoiseAttack()
                if linf
                else additive_noise.L2ClippingAwareAdditiveGaussianNoiseAttack()
            )
            attack.sample_noise = _one_by_one(attack.sample_noise, numbers)
            return attack
        kind = (
            pgd.LinfProjectedGradientDescentAttack if linf else pgd.L2ProjectedGradientDescentAttack
        )
        attack = kind(
            rel_stepsize=self.stepsize or max(STEPSIZE, 2.5 / self.steps), steps=self.steps
        )
        attack.get_random_start = _one_by_one(attack.get_random_start, numbers)
        return attack


def minimal_epsilons(
    attack: Attack,
    target: DefendedClassifier,
    x: Tensor,
    labels: Tensor,
    epsilons: Sequence[float],
    noise: Tensor | None = None,
    seed: str = "",
    done: Callable[[], None] = lambda: None,
) -> Tensor:
    """The smallest of ``epsilons`` that breaks each image, (B,): 0 if it is wrong unattacked.

    inf where none does. Found by bisection: an image that is broken stays broken at every larger
    strength, where the same perturbation is allowed, and an attack that fails is taken to fail at
    every smaller one. So each image is attacked `rounds` times at most, not at every strength.

    Args:
        attack: the attack.
        target: the classifier.
        x: images (B, C, H, W) in [0, 1].
        labels: the true ones (B,).
        epsilons: strengths above 0, image units.
        noise: of the evaluation of each image, as `DefendedClassifier.judged` takes it.
        seed: any text.
        done: called after each of the `rounds` of bisection.

    Raises:
        UserError: if an image leaves [0, 1].
    """
    grid = [0.0, *sorted(epsilons), math.inf]
    fails = torch.zeros(len(x), dtype=torch.long)  # the largest that is known to fail
    breaks = torch.full((len(x),), len(grid) - 1)  # the smallest that is known to break
    wrong = (labels_given(target, x, noise) != labels).cpu()
    fails[wrong], breaks[wrong] = -1, 0
    for _ in range(rounds(len(epsilons))):
        middle = ((fails + breaks) // 2).where(breaks - fails > 1, -1)
        for k in sorted({*middle.tolist()} - {-1}):
            rows = torch.nonzero(middle == k).squeeze(1)
            own = None if noise is None else noise[rows]
            broken = attack.breaks(target, x[rows], labels[rows], grid[k], own, seed).cpu()
            breaks[rows[broken]], fails[rows[~broken]] = k, k
        done()
    return torch.tensor(grid, dtype=torch.float64)[breaks]


def rounds(count: int) -> int:
    """How many attacks on an image `minimal_epsilons` makes at most, of ``count`` strengths."""
    return math.ceil(math.log2(count + 1))


def _one_by_one(draw: Callable[..., Any], numbers: Sequence[int]) -> Callable[..., Any]:
    """``draw`` of foolbox, image by image, each from its own number, by torch's global generator.

    So an image gets the same whatever batch it is in.
    """
    import eagerpy

    def drawn(x: Any, *arguments: Any) -> Any:
        rows = []
        for i, number in enumerate(numbers):
            torch.manual_seed(number)
            rows.append(draw(x[i : i + 1], *arguments))
        return eagerpy.concatenate(rows)

    return drawn


def _check_range(x: Tensor) -> None:
    low, high = float(x.min()), float(x.max())
    if low < 0 or high > 1:
        raise UserError(
            f"images with values from {low:.4g} to {high:.4g} cannot be attacked: they must be "
            "within [0, 1]"
        )
