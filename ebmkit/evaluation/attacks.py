r"""Attacks on a classifier through whatever defends it: PGD (`ebmkit.attacks`) and AutoAttack.

An attack of strength :math:`\epsilon` looks for an image :math:`x'` with
:math:`\|x' - x\| \le \epsilon`, in :math:`[0, 1]^d`, that is given another label than the true one
c, by the gradient of :math:`-\log p(c \mid x')`.

Every defence (`ebmkit.evaluation.defences`) is attacked through. The gradient of a denoiser
contains second derivatives of the model, :math:`\nabla D = I + \sigma^2 \nabla^2 \log p` (CDN eq.
14). Where noise is added, each gradient is that of an average over new draws (expectation over
transformation, Athalye et al. 2018): the attacker knows the defence, but not the draws on which it
is judged. Random starts are drawn for each image from its content and a seed.

AutoAttack (Croce and Hein, arXiv 2003.01690) is an ensemble without parameters: PGD whose step size
adapts, on the cross-entropy and, targeted, on the ratio of logit differences; FAB, which looks for
the nearest boundary; and Square, which asks for no gradient. The last tells masked gradients from
true robustness. On defences that add noise, its version for randomised ones: adaptive PGD on both
losses, each gradient averaged over 20 calls. It is the package pyautoattack, an extra: ``pip
install 'ebmkit-vision[autoattack]'``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from ebmkit.attacks import (
    Norm,
    gradient_of,
    minimal_epsilons,
    noise_of_size,
    projected_gradient_descent,
    random_start,
)
from ebmkit.errors import UserError
from ebmkit.evaluation.defences import DefendedClassifier, frozen, predicted_labels
from ebmkit.randomness import image_generators

STEPSIZE = 0.2
"""Of PGD, relative to the strength. Steps of 0.03 or 0.06 in 40, as usual, left images unbroken on
digits that this one broke, and AutoAttack."""

AUTOATTACK_TARGETS = 9
"""How many other labels AutoAttack aims at, at most."""


@dataclass(frozen=True)
class Attack:
    """An attack on a classifier of images in [0, 1].

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
            noise: on which each image is judged, as `DefendedClassifier.log_posterior` takes it.
            seed: of random starts and of the attacker's draws, any text.

        Raises:
            UserError: if an image leaves [0, 1].
        """
        low, high = float(x.min()), float(x.max())
        if low < 0 or high > 1:
            raise UserError(
                f"images with values from {low:.4g} to {high:.4g} cannot be attacked: they must be "
                "within [0, 1]"
            )
        broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for number in range(self.restarts):
            left = torch.nonzero(~broken).squeeze(1)
            if len(left) == 0:
                break
            key = f"{seed} {self.norm} {self.kind} {epsilon:.9g} {number}"
            found = self.perturbed(target, x[left], labels[left], epsilon, key)
            own = None if noise is None else noise[left]
            broken[left] = predicted_labels(target, found, own) != labels[left]
        return broken

    def perturbed(
        self, target: DefendedClassifier, x: Tensor, labels: Tensor, epsilon: float, seed: str = ""
    ) -> Tensor:
        """The images (B, C, H, W) that one start of the attack ends with, in [0, 1]."""
        generators = image_generators(x, seed)
        if self.kind == "noise":
            return noise_of_size(x, epsilon, self.norm, generators)

        def loss(y: Tensor) -> Tensor:
            return torch.nn.functional.cross_entropy(target(y), labels, reduction="none")

        start, steps, stepsize = None, 1, 1.0
        if self.kind == "pgd":
            start = random_start(x, epsilon, self.norm, generators)
            steps, stepsize = self.steps, self.stepsize or max(STEPSIZE, 2.5 / self.steps)
        target.restart(seed)
        with frozen(target):
            return projected_gradient_descent(
                gradient_of(loss),
                x,
                epsilon,
                self.norm,
                steps=steps,
                step_size=stepsize * epsilon,
                start=start,
            )

    def minimal_epsilons(
        self,
        target: DefendedClassifier,
        x: Tensor,
        labels: Tensor,
        epsilons: Sequence[float],
        noise: Tensor | None = None,
        seed: str = "",
        done: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """`ebmkit.attacks.minimal_epsilons` of each image, (B,) float64, by `breaks`."""

        def succeeds(rows: Tensor, epsilon: float) -> Tensor:
            own = None if noise is None else noise[rows]
            return self.breaks(target, x[rows], labels[rows], epsilon, own, seed)

        wrong = predicted_labels(target, x, noise) != labels
        return minimal_epsilons(succeeds, wrong, epsilons, done)


def check_autoattack() -> None:
    """Whether pyautoattack is there.

    Raises:
        UserError: if it is not.
    """
    if find_spec("pyautoattack") is None:
        raise UserError(
            "AutoAttack needs the package pyautoattack, which is not installed: "
            "pip install 'ebmkit-vision[autoattack]', or leave autoattack out"
        )


def autoattack(
    target: DefendedClassifier,
    norm: Norm,
    x: Tensor,
    labels: Tensor,
    epsilon: float,
    noise: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Which images (B,) bool are given a wrong label after AutoAttack, as `Attack.breaks` says it.

    Those that are wrong without it are not attacked. Its margin losses need three classes, four
    where they are targeted, and Square in l2 needs images of five pixels a side: without these it
    does without them. Random numbers come from torch's global generator, which is left as it was,
    and so depend on the batch.

    Raises:
        UserError: if pyautoattack is not installed.
    """
    check_autoattack()
    from pyautoattack import AutoAttack

    broken = predicted_labels(target, x, noise) != labels
    left = torch.nonzero(~broken).squeeze(1)
    if len(left) == 0:
        return broken
    logging.getLogger("auto-attack").addHandler(logging.NullHandler())  # it logs its steps
    classes, least = target.model.num_classes, {"apgd-dlr": 3, "apgd-t": 4}
    tiny = norm == "l2" and min(x.shape[-2:]) < 5
    target.restart(f"autoattack {seed}")
    with torch.random.fork_rng([x.device] if x.is_cuda else []), frozen(target):
        adversary = AutoAttack(
            target,
            device=x.device,
            eps=epsilon,
            norm={"linf": "Linf", "l2": "L2"}[norm],
            seed=seed,
            version="rand" if target.defence.random else "standard",
        )
        adversary.attacks_to_run = [
            name
            for name in adversary.attacks_to_run
            if classes >= least.get(name, 2) and not (tiny and name == "square")
        ]
        for part in (adversary.apgd_targeted, adversary.fab):
            part.n_target_classes = min(AUTOATTACK_TARGETS, classes - 1)
        found = adversary.run_standard_evaluation(x[left], labels[left], batch_size=len(left))[0]
    own = None if noise is None else noise[left]
    broken[left] = predicted_labels(target, found.detach().clamp(0, 1), own) != labels[left]
    return broken
