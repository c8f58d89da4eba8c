r"""AutoAttack, a stronger attack than PGD, as a check that PGD is not too weak.

AutoAttack (Croce and Hein, arXiv 2003.01690) is an ensemble without parameters: PGD whose step size
adapts, on the cross-entropy and, targeted, on the ratio of logit differences; FAB, which looks for
the nearest boundary; and Square, which asks for no gradient. The last tells masked gradients from
true robustness. On defences that add noise, its version for randomised ones: adaptive PGD on both
losses, each gradient averaged over 20 calls.

It is the package pyautoattack, an extra: ``pip install 'ebmkit-vision[autoattack]'``.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ebmkit.errors import UserError
from ebmkit.evaluation.attacks import Norm
from ebmkit.evaluation.defences import DefendedClassifier, frozen, labels_given

__all__ = ["breaks", "check_installed"]

TARGETS = 9
"""How many other labels are aimed at, at most."""


def check_installed() -> None:
    """Whether pyautoattack is there.

    Raises:
        UserError: if it is not.
    """
    if find_spec("pyautoattack") is None:
        raise UserError(
            "AutoAttack needs the package pyautoattack, which is not installed: "
            "pip install 'ebmkit-vision[autoattack]', or leave autoattack out"
        )


def breaks(
    target: DefendedClassifier,
    norm: Norm,
    x: Tensor,
    labels: Tensor,
    epsilon: float,
    noise: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Which images (B,) bool are given a wrong label after AutoAttack.

    Those that are wrong without it are not attacked. Random numbers come from torch's global
    generator, which is left as it was, and so depend on the batch.

    Args:
        target: the classifier.
        norm: in which strength is measured.
        x: images (B, C, H, W) in [0, 1].
        labels: the true ones (B,).
        epsilon: strength, image units.
        noise: on which images are judged, as `DefendedClassifier.judged` takes it for each image.
        seed: of the attack.

    Raises:
        UserError: if pyautoattack is not installed.
    """
    check_installed()
    broken = labels_given(target, x, noise) != labels
    left = torch.nonzero(~broken).squeeze(1)
    if len(left) == 0:
        return broken
    target.restart(f"autoattack {seed}")
    with torch.random.fork_rng([x.device] if x.is_cuda else []), frozen(target):
        adversary = _adversary(target, norm, epsilon, x, seed)
        found = adversary.run_standard_evaluation(x[left], labels[left], batch_size=len(left))[0]
    own = None if noise is None else noise[left]
    broken[left] = labels_given(target, found.detach().clamp(0, 1), own) != labels[left]
    return broken


def _adversary(target: DefendedClassifier, norm: Norm, epsilon: float, x: Tensor, seed: int) -> Any:
    """AutoAttack: its standard version or, where noise is added, that for randomised defences.

    Its margin losses need three classes, four where they are targeted, and Square in l2 needs
    images of five pixels a side: without these it does without them.
    """
    from pyautoattack import AutoAttack

    logging.getLogger("auto-attack").addHandler(logging.NullHandler())  # it tells its steps
    classes, random = target.model.num_classes, target.defence.random
    adversary = AutoAttack(
        target,
        device=x.device,
        eps=epsilon,
        norm={"linf": "Linf", "l2": "L2"}[norm],
        seed=seed,
        version="rand" if random else "standard",
    )
    needed = {"apgd-dlr": 3, "apgd-t": 4}
    tiny = norm == "l2" and min(x.shape[-2:]) < 5
    adversary.attacks_to_run = [
        name
        for name in adversary.attacks_to_run
        if classes >= needed.get(name, 2) and not (tiny and name == "square")
    ]
    adversary.apgd_targeted.n_target_classes = min(TARGETS, classes - 1)
    adversary.fab.n_target_classes = min(TARGETS, classes - 1)
    return adversary
