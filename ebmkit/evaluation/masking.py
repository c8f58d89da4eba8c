r"""Signs that an attack failed because gradients are masked, and not because a model is robust.

A weaker attack may break an image that a stronger one does not, by luck; not many more of them.
With b the number of images that only the weaker breaks, and c the number that only the stronger
does, luck gives :math:`b \sim \text{Binomial}(b + c, 1/2)` at worst; a one-sided sign test at 1 %
decides. In the ball that holds the gray image there is no luck: all images can be turned into it,
it gets one label, and no classifier is right more often there than that label is true. (Where noise
is added this holds up to the draws, which differ between images.)

After A. Athalye, N. Carlini, D. Wagner, arXiv 1802.00420, and N. Carlini et al., arXiv 1902.06705.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ebmkit.evaluation import statistics
from ebmkit.noise import in_255ths

__all__ = ["MaskingChecks", "norm_name", "share", "strength", "telling_strength"]

SIGNIFICANT = 0.01
"""The level of the sign test."""

TOLERATED_GAP = 0.05
"""By how much PGD's accuracy may exceed AutoAttack's before that is told."""

WEAKER = {
    "few_steps": "PGD of a quarter of the steps",
    "one_step": "a single step",
    "random_noise": "random noise of the same size",
}


class MaskingChecks:
    """What speaks against an attack on one defence.

    Args:
        norm: of the attack, ``linf`` or ``l2``.
        smallest: the smallest strength that breaks each image, (N,); 0 if it is wrong anyway.

    Attributes:
        document: as in ``robustness.json``.
        doubts: what is wrong, in words; empty if nothing is.
    """

    def __init__(self, norm: str, smallest: Tensor) -> None:
        self.norm = norm
        self.document: dict[str, Any] = {"epsilon": None}
        self.doubts: list[str] = []
        self._smallest = smallest

    def compare(self, epsilon: float, broken: Mapping[str, Tensor]) -> None:
        """Set PGD at strength ``epsilon`` against other attacks.

        Args:
            epsilon: image units.
            broken: by attack, which images (N,) bool it breaks; ``pgd`` is among them.
        """
        right, pgd = self._smallest > 0, broken["pgd"]
        self.document["epsilon"] = epsilon
        self.document.update({name: share(right & ~other) for name, other in broken.items()})
        at = strength(self.norm, epsilon)
        for name, other in broken.items():
            only = int((right & other & ~pgd).sum())
            rest = int((right & pgd & ~other).sum())
            if name in WEAKER and _more(only, rest):
                self.doubts.append(
                    f"{WEAKER[name]} at {at} breaks {only} images that PGD does not, and PGD "
                    f"{rest} others: gradients are masked, and the accuracies are too high"
                )
            if name == "autoattack":
                gap = self.document["gap"] = (only - rest) / len(right)
                if gap > TOLERATED_GAP:
                    left, leaves = (self.document[key]["value"] for key in ("autoattack", "pgd"))
                    self.doubts.append(
                        f"AutoAttack at {at} leaves {left:.1%} right and PGD {leaves:.1%}: PGD is "
                        "too weak, and the accuracies are too high"
                    )

    def gray(self, radius: float, labels: Tensor) -> None:
        """Look at the ball of ``radius`` (image units), which holds the gray image; ``labels`` (N,)
        are the true ones."""
        left, bound = share(self._smallest > radius), int(labels.bincount().max()) / len(labels)
        self.document["gray"] = {"epsilon": radius, "accuracy": left, "bound": bound}
        if left["value"] > bound:
            self.doubts.append(
                f"at {strength(self.norm, radius)} every image can be turned gray, so that at most "
                f"{bound:.1%} can be right, and PGD leaves {left['value']:.1%}: gradients are "
                "masked, and the accuracies are too high"
            )


def telling_strength(smallest: Tensor, grid: Sequence[float]) -> float | None:
    """The strength of ``grid`` at which about half of the images that were right are still so.

    There attacks differ most. The largest if several are as near; None if there is nothing to
    attack.

    Args:
        smallest: the smallest strength that breaks each image, (N,); 0 if it is wrong anyway.
        grid: strengths, image units; 0 is left out.
    """
    right = int((smallest > 0).sum())
    strengths = [epsilon for epsilon in grid if epsilon > 0]
    if right == 0 or not strengths:
        return None
    return min(
        sorted(strengths, reverse=True),
        key=lambda epsilon: abs(int((smallest > epsilon).sum()) - right / 2),
    )


def share(right: Tensor) -> dict[str, Any]:
    """The share of images (N,) that are ``right``, with its interval, as JSON has it."""
    return statistics.proportion(int(right.sum()), len(right)).document()


def norm_name(norm: str) -> str:
    """How tables name a norm."""
    return "l_inf" if norm == "linf" else norm


def strength(norm: str, epsilon: float) -> str:
    """How tables name a strength: l_inf in 255ths, l2 in image units."""
    return f"{in_255ths(epsilon)}/255" if norm == "linf" else f"{epsilon:.4g}"


def _more(only: int, rest: int) -> bool:
    """Whether ``only`` exceeds ``rest`` beyond chance, by a one-sided sign test."""
    from scipy.stats import binomtest

    if only <= rest:
        return False
    return bool(binomtest(only, only + rest, alternative="greater").pvalue < SIGNIFICANT)
