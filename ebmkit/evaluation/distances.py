r"""Distances between two sets of images by their features, and scores of one: what IS, FID, KID,
precision and recall are made of, for any network that gives features.

With features :math:`a_1, \dots, a_n` of samples and :math:`b_1, \dots, b_m` of real images, in d
dimensions,

- the *Frechet distance* is that of two Gaussians with their means and covariances,

  .. math:: \|\mu_a - \mu_b\|^2
      + \operatorname{tr}\bigl(\Sigma_a + \Sigma_b - 2(\Sigma_a \Sigma_b)^{1/2}\bigr)

  (Heusel et al., arXiv 1706.08500). Of n samples it is biased upwards by about 1/n, and much so
  where n is not well above d;
- the *kernel distance* is the unbiased estimate of the squared maximum mean discrepancy with
  :math:`k(a, b) = (a^\top b/d + 1)^3` (Binkowski et al., arXiv 1801.01401); above 2000 images the
  mean over ten or more disjoint blocks of up to 1000 of either set. It has mean 0 where the
  distributions are equal, and may be negative;
- *precision* is the share of samples that lie in a ball about a real image, of a radius that
  reaches its third nearest real neighbour, and *recall* the share of real images that lie in such
  balls about samples (Kynkaanniemi et al., arXiv 1904.06991). Both sets are cut to equal numbers;
- the *score* is :math:`\exp \frac1n \sum_i \mathrm{KL}(p(c \mid a_i) \,\|\, \bar p(c))` (Salimans
  et al., arXiv 1606.03498), 1 to the number of classes, over all samples at once.

Everything is computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ebmkit.errors import UserError
from ebmkit.evaluation import statistics
from ebmkit.evaluation.statistics import Estimate

BLOCK = 1000
"""Features of either set in a block, at most."""

WHOLE = 2000
"""Features of the smaller set, up to which the kernel distance is of all at once."""

NEIGHBOURS = 3
GROUPS = 10
MOST = 10_000
"""Images of either set in precision and recall, at most."""


def frechet_distance(a: Tensor, b: Tensor) -> float:
    r"""Between the Gaussians of features ``a`` (n, d) and ``b`` (m, d).

    Of few, the trace of the root is the nuclear norm of :math:`A B^\top`, n by m, with the centred
    features A and B, as :math:`\Sigma_a = A^\top A`.
    """
    if len(a) * len(b) < a.shape[1] ** 2 and min(len(a), len(b)) > 1:
        (mean_a, few), (mean_b, others) = _centred(a), _centred(b)
        inner = torch.linalg.svdvals(few @ others.T).sum()
        spread = few.square().sum() + others.square().sum() - 2 * inner
        return float((mean_a - mean_b).square().sum() + spread)
    (mean_a, root), (mean_b, other) = _moments(a), _moments(b)
    values, axes = torch.linalg.eigh(root)
    root = axes * values.clamp_min(0).sqrt() @ axes.T
    inner = torch.linalg.eigvalsh(root @ other @ root).clamp_min(0).sqrt().sum()
    spread = values.sum() + other.trace() - 2 * inner
    return float((mean_a - mean_b).square().sum() + spread)


def kernel_distance(a: Tensor, b: Tensor) -> Estimate:
    """The squared MMD of features ``a`` (n, d) and ``b`` (m, d), with its interval.

    The interval is Student's over the blocks or, of all features at once, the jackknife's.
    """
    least = min(len(a), len(b))
    if least <= WHOLE:
        return jackknife(_mmd, a.double(), b.double())
    count = max(math.ceil(least / BLOCK), 10)
    size = least // count
    blocks = [slice(k * size, (k + 1) * size) for k in range(count)]
    found = statistics.mean(torch.tensor([_mmd(a[s].double(), b[s].double()) for s in blocks]))
    return replace(found, count=least)


def precision_recall(a: Tensor, b: Tensor) -> tuple[Estimate, Estimate]:
    """Precision and recall of samples ``a`` (n, d) against real features ``b`` (m, d).

    Wilson's intervals take the balls as given.

    Raises:
        UserError: if there are too few for a third nearest neighbour.
    """
    count = min(len(a), len(b), MOST)
    if count <= NEIGHBOURS:
        raise UserError(
            f"precision and recall need more than {NEIGHBOURS} samples and real images, and there "
            f"are {len(a)} and {len(b)}: make more"
        )
    a, b = a[:count].double(), b[:count].double()
    return _covered(a, b), _covered(b, a)


def score(logits: Tensor) -> float:
    """exp of the mean KL from the mean of class probabilities, of ``logits`` (n, C)."""
    log_p = logits.double().log_softmax(dim=1)
    mean = log_p.exp().mean(dim=0)
    information = (log_p.exp() * log_p).sum(1).mean() - torch.special.xlogy(mean, mean).sum()
    return float(information.exp())


def mean_distance(a: Tensor) -> float:
    """Mean Euclidean distance of two different ones of features ``a`` (n, d); nan of fewer than
    two."""
    return float(torch.pdist(a.double()).mean()) if len(a) > 1 else math.nan


def jackknife(statistic: Callable[..., float], *parts: Tensor) -> Estimate:
    """A statistic of independent ``parts`` (n_k, ...), with an interval of the grouped jackknife.

    Each part is left out by tenths in turn; the variances that this gives add up. The interval is
    Student's with 9 degrees of freedom; a bias is not taken off.

    Source: B. Efron, The Jackknife, the Bootstrap and Other Resampling Plans (1982), chapter 2.
    """
    value, variance = statistic(*parts), 0.0
    for k, part in enumerate(parts):
        if len(part) < 2 * GROUPS:
            return statistics.without_interval(value, len(parts[0]))
        group = torch.arange(len(part), device=part.device) % GROUPS
        found = torch.tensor(
            [statistic(*parts[:k], part[group != g], *parts[k + 1 :]) for g in range(GROUPS)],
            dtype=torch.float64,
        )
        variance += float((GROUPS - 1) / GROUPS * (found - found.mean()).square().sum())
    return statistics.student(value, math.sqrt(variance), GROUPS - 1, len(parts[0]))


def _moments(a: Tensor) -> tuple[Tensor, Tensor]:
    a = a.double()
    return a.mean(dim=0), torch.cov(a.T).reshape(a.shape[1], a.shape[1])


def _centred(a: Tensor) -> tuple[Tensor, Tensor]:
    """The mean, and what is left of features (n, d), whose squares are the covariance."""
    mean = a.double().mean(dim=0)
    return mean, (a.double() - mean) / math.sqrt(len(a) - 1)


def _mmd(a: Tensor, b: Tensor) -> float:
    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def off_diagonal(k: Tensor) -> Tensor:
        return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))

    if len(a) < 2:
        return math.nan
    return float(off_diagonal(kernel(a, a)) + off_diagonal(kernel(b, b)) - 2 * kernel(a, b).mean())


def _covered(points: Tensor, centres: Tensor) -> Estimate:
    """The share of ``points`` that lie in the ball of some of ``centres``."""
    # the nearest of all is the centre itself
    radii = torch.cat(
        [d.kthvalue(NEIGHBOURS + 1, dim=1).values for d in _distances(centres, centres)]
    )
    inside = torch.cat([(d <= radii).any(dim=1) for d in _distances(points, centres)])
    return statistics.proportion(int(inside.sum()), len(points))


def _distances(points: Tensor, centres: Tensor) -> Iterator[Tensor]:
    """Euclidean distances to ``centres``, of some points at a time."""
    for at in range(0, len(points), BLOCK):
        yield torch.cdist(points[at : at + BLOCK], centres)
