r"""Denoising and implicit score matching.

With :math:`y = x + \sigma\epsilon` (CDN eq. 5 and 13), denoising score matching (Vincent, 2011) is

.. math::
    \text{dsm:}  & \quad \tfrac1d \|\sigma\,\nabla_y \log p(y) + \epsilon\|^2 \\
    \text{cdsm:} & \quad \tfrac1d \|\sigma\,\nabla_y \log p(y \mid c) + \epsilon\|^2 ,

a regression whose minimiser at one sigma is the score of the noisy images, since
:math:`\sigma\nabla\log p + \epsilon = (D(y) - x)/\sigma`. The paper does not say whether
:math:`\|\cdot\|^2` is the sum or the mean over the d entries of an image. Both are available
(``dsm-sum``, ``dsm-mean``); the default ``dsm`` is a balanced form (`ebmkit.objectives.loss`).

Implicit score matching (Hyvarinen, 2005; RCG eq. 2.5) learns the same score without the noise in
its formula,

.. math::
    J(y) = \tfrac12 \|s(y)\|^2 + \operatorname{tr} \nabla s(y), \qquad
    E\,J = \tfrac12 E\|s(y) - \nabla\log p_\sigma(y)\|^2 + \text{constant}, \qquad
    \text{ism:} \quad 1 + \tfrac{2\sigma^2}{d} J(y) .

With this scale it equals dsm in expectation, for every score and every sigma, because
:math:`E[\epsilon^\top s] = \sigma E[\operatorname{tr}\nabla s]` (Stein). Up to `EXACT_TRACE`
entries the trace is exact, with one Hessian-vector product per entry. For larger images it is
estimated without bias by one product, :math:`v^\top H v` with random signs v (Hutchinson; sliced
score matching, Song et al. 2019). The signs must be independent of y, which the image's noise is
not: :math:`E[\epsilon^\top H \epsilon \mid y]` is not a trace. So they are a hash of the *bits* of
the noise (`rademacher_probes`): they have its seed and do not depend on how a batch is divided.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ebmkit.data import Batch
from ebmkit.energy import per_image
from ebmkit.objectives.base import ModelOutput, Objective, Scale
from ebmkit.randomness import bit_hash

__all__ = [
    "EXACT_TRACE",
    "ISM",
    "denoising",
    "denoising_score_matching",
    "hyvarinen",
    "labels_of",
    "rademacher_probes",
    "trace_vectors",
]

EXACT_TRACE = 16
"""Maximum number of entries of an image for which the trace is exact."""


def denoising_score_matching(output: ModelOutput, batch: Batch) -> Tensor:
    """Mean over entries of (sigma * score + eps)^2, (B,); 1 for a zero score (CDN eq. 13)."""
    score = output.score
    assert score is not None
    return (per_image(batch.sigma, score) * score + batch.eps).square().flatten(1).mean(dim=1)


def labels_of(batch: Batch) -> Tensor:
    """Labels (B,) for the class-conditional score (CDN section 3.3)."""
    assert batch.labels is not None
    return batch.labels


def implicit_score_matching(output: ModelOutput, batch: Batch) -> Tensor:
    """1 + 2 sigma^2 J / d, (B,): equals dsm in expectation, but can be negative."""
    assert output.score is not None
    J = hyvarinen(output.score, trace_vectors(batch), output.hessian_products)
    return 1 + 2 * batch.sigma**2 * J / batch.y[0].numel()


def trace_vectors(batch: Batch) -> list[Tensor]:
    """Vectors v, each (B, ...), whose sum of v^T H v has the trace of H as its expectation.

    These are the unit vectors up to `EXACT_TRACE` entries of an image; for larger images one vector
    of random signs, computed from the bits of the noise (`rademacher_probes`).
    """
    y, entries = batch.y, batch.y[0].numel()
    if entries > EXACT_TRACE:
        return [rademacher_probes(batch.eps).to(y)]
    units = torch.eye(entries, dtype=y.dtype, device=y.device).reshape(entries, *y.shape[1:])
    return [unit.expand(y.shape) for unit in units]


def rademacher_probes(eps: Tensor) -> Tensor:
    """Random signs, with shape and dtype of the continuous noise ``eps``, from a hash of its bits.

    The hash of an entry depends on its last bits, which carry no information about its value. So
    the signs are practically independent of smooth functions of the noise. The same noise gives
    the same signs on every device and with every compiler.
    """
    return (1 - 2 * (bit_hash(eps) & 1)).to(eps.dtype)


def hyvarinen(score: Tensor, vectors: Sequence[Tensor], products: Sequence[Tensor]) -> Tensor:
    """J = |s|^2 / 2 + tr grad s, (B,), per squared image unit (Hyvarinen 2005; RCG eq. 2.5).

    Args:
        score: score s, (B, ...).
        vectors: vectors v with the shape of the score (`trace_vectors`).
        products: Hessian-vector product H v for each vector.
    """
    trace = torch.zeros(len(score), dtype=score.dtype, device=score.device)
    for v, product in zip(vectors, products, strict=True):
        trace = trace + (v * product).flatten(1).sum(dim=1)
    return 0.5 * score.square().flatten(1).sum(dim=1) + trace


def denoising(scale: Scale = Scale.BALANCED, conditional: bool = False) -> Objective:
    """Denoising score matching of log p(y), or of log p(y|c), with the given ``scale``."""
    what = "log p(y|c)" if conditional else "log p(y)"
    how = {
        Scale.BALANCED: "balanced against the other objectives",
        Scale.MEAN: "mean over the entries of an image, unweighted",
        Scale.SUM: "sum over the entries of an image, unweighted",
    }[scale]
    return Objective(
        description=f"denoising score matching of {what}; {how}",
        stream="denoise",
        loss=denoising_score_matching,
        family="score matching",
        needs_labels=conditional,
        needs_hard_labels=conditional,
        needs_score=True,
        score_labels=labels_of if conditional else None,
        scale=scale,
    )


ISM = Objective(
    description="implicit score matching of log p(y), by the trace of its Hessian; unweighted",
    stream="denoise",
    loss=implicit_score_matching,
    family="score matching",
    needs_score=True,
    hessian_vectors=trace_vectors,
)
