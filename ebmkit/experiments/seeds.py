r"""Several training seeds: their notation, and paired tests of the difference of two rows.

Two rows a and b, each trained with seeds 1..S and measured on the same images 1..N (with the same
noise), have paired differences :math:`d_{si} = a_{si} - b_{si}`, of images classified correctly or
of PSNRs. A result for other training runs and other images has to account for the chance of both:

.. math:: d_{si} = \mu + \alpha_s + \beta_i + \epsilon_{si}, \qquad
    \operatorname{Var}\bar d = \frac{\sigma_\alpha^2}{S} + \frac{\sigma_\beta^2}{N}
    + \frac{\sigma_\epsilon^2}{SN} .

With the sample variances :math:`s_\alpha^2` of the S means over images and :math:`s_\beta^2` of the
N means over seeds, let :math:`A = s_\alpha^2 / S` and :math:`B = s_\beta^2 / N`. There are three
two-sided t tests of :math:`\mu = 0`:

- over seeds: :math:`\bar d / \sqrt A` with S - 1 degrees of freedom (for these images);
- over images: :math:`\bar d / \sqrt B` with N - 1 (for these training runs);
- over both: :math:`\bar d / \sqrt{A + B}` with
  :math:`(A + B)^2 / (A^2 / (S - 1) + B^2 / (N - 1))` (Welch 1947, Satterthwaite 1946).
  :math:`\operatorname E[A + B] = \operatorname{Var}\bar d + \sigma_\epsilon^2 / (SN)`, so the
  variance is never underestimated on average.

The *p value of a comparison is the largest of the three*, and the difference is resolved if it is
below 5 %. Each of the three alone is too liberal somewhere: if A and B are equal, both tests over
one of them reject a true null in 5.1, 8.4 and 11.5 % of comparisons of 3, 5 and 10 seeds (N =
1,000), since either ignores half of the variance; and the degrees of freedom of the third are
overestimated for few seeds, up to 13 % with two. The largest p value rejects in at most 5.7 %, for
any ratio of A and B and 2, 3, 5 or 10 seeds (simulated with normal differences; for A much below B
and two seeds only 2.3 %: few seeds have little power). Verdicts of a table are not corrected for
their number.

With one seed, only the test over images exists, and the spread over training runs is unknown: the
comparison stays open.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ebmkit.errors import UserError

LEVEL = 0.05
"""Level of significance."""


class PairedComparison(NamedTuple):
    """A mean difference and its p values; None where a test does not exist."""

    difference: float
    p_seeds: float | None  # None: one seed
    p_images: float | None  # None: no values by image
    p: float | None  # the largest, None unless both exist

    @property
    def verdict(self) -> str:
        """``holds`` (above 0), ``reversed`` or ``open``, with the reason if a test is missing."""
        known = [p for p in (self.p, self.p_seeds, self.p_images) if p is not None]
        if not known or max(known) >= LEVEL:
            return "open"
        if self.p_seeds is None:
            return "open (one seed)"
        if self.p_images is None:
            return "open (no values by image)"
        return "holds" if self.difference > 0 else "reversed"

    def document(self) -> dict[str, Any]:
        """The p values and the verdict, as JSON types."""
        p = {"p_seeds": self.p_seeds, "p_images": self.p_images, "p": self.p}
        return p | {"verdict": self.verdict}


def compare(differences: NDArray[np.float64]) -> PairedComparison:
    """Test whether paired ``differences`` (S, N), by seed and image, have mean 0.

    Without values by image, ``differences`` are the means (S, 1).
    """
    seeds, images = differences.shape
    mean = float(differences.mean())
    a, b = (_variance_of_mean(differences.mean(axis)) for axis in (1, 0))
    p_seeds = None if a is None else _p_value(mean, a, seeds - 1)
    p_images = None if b is None else _p_value(mean, b, images - 1)
    if a is None or b is None or p_seeds is None or p_images is None:
        return PairedComparison(mean, p_seeds, p_images, None)
    spread = a**2 / (seeds - 1) + b**2 / (images - 1)
    both = _p_value(mean, a + b, (a + b) ** 2 / spread if spread else math.inf)
    return PairedComparison(mean, p_seeds, p_images, max(p_seeds, p_images, both))


def compare_rows(
    a: Mapping[int, NDArray[np.float64]], b: Mapping[int, NDArray[np.float64]]
) -> dict[str, Any] | None:
    """Test the mean difference a - b of two rows; None if no seed has both.

    Args:
        a: by seed, values by image (N,), or one mean (1,) if there are none.
        b: of the other row, of the same images in the same order.

    Returns:
        ``ours``, the mean difference over the ``seeds`` that both have; the number of ``images``
        (None: a row has no values by image); and the fields of `PairedComparison.document`.
    """
    seeds = [seed for seed in a if seed in b]
    if not seeds:
        return None
    counts = {len(row[seed]) for row in (a, b) for seed in seeds}
    paired = len(counts) == 1 and counts != {1}
    gaps = np.stack([a[s] - b[s] if paired else [a[s].mean() - b[s].mean()] for s in seeds])
    found = compare(gaps)
    images = gaps.shape[1] if paired else None
    return {"ours": found.difference, "seeds": seeds, "images": images, **found.document()}


def _variance_of_mean(values: NDArray[np.float64]) -> float | None:
    return float(values.var(ddof=1)) / len(values) if len(values) > 1 else None


def _p_value(mean: float, variance: float, degrees_of_freedom: float) -> float:
    """Two-sided p value of ``mean`` under Student's t distribution."""
    from scipy.stats import t

    if variance == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * t.sf(abs(mean) / math.sqrt(variance), degrees_of_freedom))


def p_value(comparison: Mapping[str, Any]) -> str:
    """Format the p value of a `PairedComparison.document`: the largest that exists."""
    known = [comparison[key] for key in ("p", "p_seeds", "p_images")]
    p = max((value for value in known if value is not None), default=None)
    return "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def rule(comparisons: Sequence[Mapping[str, Any]], images: str = "test images") -> str:
    """How the verdicts of ``comparisons``, paired by ``images``, were reached."""
    level, several = f"{LEVEL:g}", any(len(one["seeds"]) > 1 for one in comparisons)
    if not several:
        return (
            f"One seed: *p* is of paired differences over {images} (t test), and the spread over "
            f"training runs is unknown. *open*: p is not below {level}; *open (one seed)*: it is, "
            "but other training runs may differ."
        )
    return (
        f"*p*: the largest p value of paired t tests over seeds, over {images}, and over both. "
        f"*open*: it is not below {level}, or a test is missing, as over seeds for *one seed*. "
        "Verdicts are not corrected for their number."
    )


# --- notation --------------------------------------------------------------------------------

LARGEST_SEED, MOST_SEEDS = 2**63 - 1, 1000


def parse_seeds(text: str) -> tuple[int, ...]:
    """Parse the seeds of ``--seeds``: numbers and ranges, as in ``0``, ``0-4`` or ``0,2,5-7``.

    Raises:
        UserError: if there are none, they do not parse, or one is repeated.
    """
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,19})\s*(?:-\s*([0-9]{1,19})\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last <= LARGEST_SEED or last - first >= MOST_SEEDS:
            raise UserError(
                f"--seeds {text!r}: {part!r} is no seed or range of up to {MOST_SEEDS} seeds: "
                f"write numbers from 0 to {LARGEST_SEED}, as 0, 0-4 or 0,2,5-7"
            )
        found += range(first, last + 1)
    repeated = [seed for k, seed in enumerate(found) if seed in found[:k]]
    if repeated:
        raise UserError(f"--seeds {text!r} repeats seed {repeated[0]}: write each seed once")
    return tuple(found)


def format_seeds(seeds: Sequence[int]) -> str:
    """Format seeds for ``--seeds``: a range if they are consecutive, else a list.

    >>> format_seeds((0, 1, 2)), format_seeds((3,)), format_seeds((0, 2))
    ('0-2', '3', '0,2')
    """
    if len(seeds) > 1 and list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]}-{seeds[-1]}"
    return ",".join(map(str, seeds))
