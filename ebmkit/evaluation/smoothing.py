r"""Randomised smoothing: certificates that no small perturbation changes a label.

A classifier f of noisy images is smoothed by asking it many times,

.. math:: g(x) = \arg\max_c \, P\bigl(f(x + \sigma\epsilon) = c\bigr),
    \qquad \epsilon \sim \mathcal N(0, I).

If f gives the label A with a probability of at least :math:`\underline{p_A} > 1/2`, then g gives A
at every :math:`x + \delta` with

.. math:: \|\delta\|_2 < R = \sigma \, \Phi^{-1}(\underline{p_A}),

whatever f is, and for f linear no larger radius holds (Cohen, Rosenfeld, Kolter, arXiv 1902.02918,
theorems 1 and 2). The procedure CERTIFY of that paper takes the most frequent label of :math:`n_0`
votes as A, counts its votes k among n others, and takes the exact (Clopper-Pearson) lower bound of
a binomial probability at level :math:`1 - \alpha`,

.. math:: \underline{p_A} = B^{-1}(\alpha;\; k,\; n - k + 1),

the :math:`\alpha` quantile of a Beta law. If it is 1/2 or less, the image gets no certificate:
CERTIFY abstains. Any certificate is wrong with a probability of at most :math:`\alpha`, over the
votes. Even if all n votes agree, :math:`\underline{p_A} = \alpha^{1/n}`, which limits R.

The *average certified radius* counts an image whose certified label is wrong, or that has none, as
0 (Zhai et al., arXiv 2001.02378).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "ABSTAIN",
    "Certificates",
    "Classify",
    "certificates",
    "draw_votes",
    "largest_radius",
    "lower_bound",
    "vote_generator",
]

ABSTAIN = -1
"""Stands where a label would, if there is no certificate."""

BLOCK = 16
"""Noise is drawn for so many votes at once, whatever the batch size."""

Classify = Callable[[Tensor], Mapping[str, Tensor]]
"""Labels (B,) of noisy images (B, C, H, W), by the name of the classifier."""


class Certificates(NamedTuple):
    """What is certified of N images.

    Attributes:
        labels: (N,) int64, the certified label, or `ABSTAIN`.
        radius: (N,) float64, l2 radius in image units; 0 where there is no certificate.
        top: (N,) int64, the most frequent label of the estimation votes, certified or not.
        lower: (N,) float64, the lower bound of the probability of the selected label.
    """

    labels: Tensor
    radius: Tensor
    top: Tensor
    lower: Tensor

    def right_radius(self, truth: Tensor) -> Tensor:
        """The radius where the certified label is the true one of ``truth`` (N,), -1 elsewhere.

        So an image is certified right at radius r where this is at least r, 0 included.
        """
        return torch.where(self.labels == truth, self.radius, -1.0)


def lower_bound(hits: Tensor, count: int, alpha: float) -> Tensor:
    """The exact one-sided lower confidence bound of a probability, at level 1 - alpha.

    Args:
        hits: (N,) how often the event was seen.
        count: of how many trials.
        alpha: probability that the bound is above the truth.

    Returns:
        (N,) float64.

    Source: C. Clopper, E. Pearson, Biometrika 26 (1934); scipy's Beta quantile.
    """
    from scipy.stats import beta

    k = hits.double().numpy()
    found = torch.from_numpy(beta.ppf(alpha, k.clip(min=1), count - k + 1))
    return torch.where(hits > 0, found, 0.0)


def certificates(votes: Tensor, selection: int, sigma: float, alpha: float) -> Certificates:
    """CERTIFY of Cohen et al., for N images at once.

    Args:
        votes: (N, selection + n) int64, the labels of noisy copies of each image.
        selection: the first so many votes select the label; the other n estimate its probability.
        sigma: the noise level of the votes, image units.
        alpha: probability of a wrong certificate, for each image.
    """
    from scipy.special import ndtri

    if votes.shape[1] <= selection:
        raise ValueError(f"{votes.shape[1]} votes leave none to estimate from after {selection}")
    selected, estimating = _most_frequent(votes[:, :selection]), votes[:, selection:]
    hits = (estimating == selected[:, None]).sum(dim=1)
    lower = lower_bound(hits, estimating.shape[1], alpha)
    certain = lower > 0.5
    radius = sigma * torch.from_numpy(ndtri(lower.numpy()))
    return Certificates(
        labels=selected.where(certain, ABSTAIN),
        radius=radius.where(certain, 0.0),
        top=_most_frequent(estimating),
        lower=lower,
    )


def largest_radius(sigma: float, samples: int, alpha: float) -> float:
    """The radius that ``samples`` votes for one label certify, image units; 0 if too few.

    >>> round(largest_radius(0.25, 100_000, 0.001), 3)
    0.953
    """
    from scipy.special import ndtri

    return max(0.0, sigma * float(ndtri(alpha ** (1 / samples))))


def draw_votes(
    classify: Classify,
    x: Tensor,
    sigma: float,
    count: int,
    generator: torch.Generator,
    batch_size: int = 250,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, Tensor]:
    """Ask classifiers about ``count`` noisy copies of an image, all of them about the same copies.

    Noise is drawn on the CPU and does not depend on the batch size. All batches have one size, no
    larger than ``batch_size``; what is left over of the last is not counted.

    Args:
        classify: labels of noisy images by each classifier.
        x: the image (C, H, W).
        sigma: the noise level, image units.
        count: how many votes.
        generator: of the noise, on the CPU.
        batch_size: noisy copies at a time.
        advance: told how many votes more were cast.

    Returns:
        (count,) int64 on the CPU, by the name of the classifier.
    """
    batches = math.ceil(count / batch_size)
    size = math.ceil(count / batches)
    eps = torch.empty(0, *x.shape)
    cast: dict[str, list[Tensor]] = {}
    for k in range(batches):
        missing = math.ceil((size - len(eps)) / BLOCK)
        blocks = [torch.randn(BLOCK, *x.shape, generator=generator) for _ in range(missing)]
        eps = torch.cat([eps, *blocks])
        for name, labels in classify(x + sigma * eps[:size].to(x)).items():
            cast.setdefault(name, []).append(labels.cpu())
        eps = eps[size:]
        advance(min(size, count - k * size))
    return {name: torch.cat(parts)[:count] for name, parts in cast.items()}


def vote_generator(seed: int, index: int) -> torch.Generator:
    """The generator of the noise on image number ``index``, the same at every noise level."""
    key = hashlib.sha256(f"smoothing {seed} {index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:7]))


def _most_frequent(votes: Tensor) -> Tensor:
    """The most frequent label of each row of ``votes`` (N, n), the smallest of equals; (N,)."""
    classes = int(votes.max()) + 1
    rows = classes * torch.arange(len(votes))[:, None]
    counts = torch.bincount((rows + votes).flatten(), minlength=classes * len(votes))
    return counts.reshape(len(votes), classes).argmax(dim=1)
