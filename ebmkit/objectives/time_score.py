r"""Objectives that compare the density at different noise levels.

Score matching is blind to constants: two distant modes have the same score whatever their weights,
and each noise level has a constant of its own. For a noise-conditional density, the derivative by
the noise level is a regression, too. Since :math:`p_\sigma = p * \mathcal N(0, \sigma^2 I)`,

.. math::
    \frac{\partial \log p_\sigma(y)}{\partial \log \sigma} = E[\|\epsilon\|^2 - d \mid y], \qquad
    \text{tsm:} \quad \frac{1}{2d}
        \Bigl(\frac{\partial \log p_\sigma(y)}{\partial \log\sigma} - \|\epsilon\|^2 + d\Bigr)^2 ,

which is 1 in expectation for a prediction of zero, because :math:`\|\epsilon\|^2` has the variance
2d. Beside dsm it is *dual score matching* (arXiv 2506.05310). It ties all levels to the highest,
where the density is that of a Gaussian and modes have merged. dsm and tsm are balanced alike
(`ebmkit.objectives.loss`).

``diffclf`` (arXiv 2601.21025) ties them by a classifier: which of K noise levels does a noisy image
have? Given the levels, the answer is :math:`p_{\sigma_k}(y) / \sum_j p_{\sigma_j}(y)` if each was
equally likely, and

.. math::
    \text{diffclf:} \quad -\log\frac{p_{\sigma_1}(y)}{\sum_{k=1}^K p_{\sigma_k}(y)}

is the cross-entropy with the image's own level :math:`\sigma_1`. The K levels are those of a group
of K images of the batch (or of the part of it that is computed at once). Groups are formed by the
ranks of the levels alone, so within a group each image is equally likely to have each level, and
the prior is uniform for every noise law. The ranks in a group differ in log2 K of their binary
digits, spread evenly: it has levels that are close and levels that are far apart. diffclf needs
K - 1 further forward passes; tsm needs none, as its derivative comes from the pass of dsm.
"""

from __future__ import annotations

import torch
from pydantic import Field, field_validator
from torch import Tensor

from ebmkit.data import Batch
from ebmkit.objectives.base import ModelOutput, Objective, ObjectiveConfig, Scale

__all__ = ["DIFFCLF", "TSM", "DiffusiveConfig", "level_groups", "time_score_matching"]


def time_score_matching(output: ModelOutput, batch: Batch) -> Tensor:
    """(d log p / d log sigma - (|eps|^2 - d))^2 / (2 d), (B,)."""
    assert output.time_score is not None
    d = batch.eps[0].numel()
    target = batch.eps.square().flatten(1).sum(dim=1) - d
    return (output.time_score - target).square() / (2 * d)


class DiffusiveConfig(ObjectiveConfig):
    """Settings of ``diffclf``."""

    levels: int = Field(
        4, ge=2, le=64, description="K, the noise levels to choose from: 2, 4, 8, 16, 32, 64"
    )

    @field_validator("levels")
    @classmethod
    def _power_of_two(cls, levels: int) -> int:
        if levels & (levels - 1):
            raise ValueError("a group has 2, 4, 8, 16, 32 or 64 levels")
        return levels


def level_groups(sigma: Tensor, levels: int) -> Tensor:
    """Indices (B, K) of the images of each image's group, first itself; -1: the group is smaller.

    Args:
        sigma: noise levels (B,).
        levels: K, a power of 2.
    """
    count = len(sigma)
    bits = max(1, (count - 1).bit_length())
    chosen = min(levels.bit_length() - 1, bits)
    digits = [i * bits // (chosen + 1) for i in range(1, chosen + 1)]
    flips = [sum(1 << b for i, b in enumerate(digits) if n >> i & 1) for n in range(1 << chosen)]
    order = sigma.argsort(stable=True)
    rank = order.argsort()
    others = rank[:, None] ^ torch.tensor(flips, device=sigma.device)
    return order[others.clamp_max(count - 1)].masked_fill(others >= count, -1)


def configure(config: DiffusiveConfig) -> Objective:
    """Objective ``diffclf`` with K noise levels."""

    def diffusive_classification(output: ModelOutput, batch: Batch) -> Tensor:
        """Cross-entropy of the noise level among those of its group, (B,), nats."""
        assert output.energies is not None
        group = level_groups(batch.sigma, config.levels)
        found = [output.energies.log_density]
        for k in range(1, group.shape[1]):
            sigma = batch.sigma[group[:, k].clamp_min(0)]
            own = output.energies_at(batch.y, sigma).log_density
            found.append(own.masked_fill(group[:, k] < 0, -torch.inf))
        return -torch.stack(found, dim=1).log_softmax(dim=1)[:, 0]

    return Objective(
        description="classification of the noise level by the densities of all levels",
        stream="denoise",
        loss=diffusive_classification,
        family="score matching",
        needs_levels=True,
        config=DiffusiveConfig,
        configure=configure,
    )


DIFFCLF = configure(DiffusiveConfig())

TSM = Objective(
    description="matching of the derivative of log p(y) by the noise level (dual score matching)",
    stream="denoise",
    loss=time_score_matching,
    family="score matching",
    needs_time_score=True,
    needs_levels=True,
    scale=Scale.BALANCED,
)
