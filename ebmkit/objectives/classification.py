r"""Classification: cross-entropy of the labels.

With soft labels q (one-hot, or mixed by MixUp or CutMix) and :math:`y = x + \sigma\epsilon` (CDN
eq. 13),

.. math:: \text{ce:} \quad -\sum_c q_c \log p(c \mid y) .

Label smoothing s replaces q by :math:`(1 - s) q + s / C`, in training only.
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field
from torch import Tensor

from ebmkit.data import Batch
from ebmkit.objectives.base import ModelOutput, Objective, ObjectiveConfig

__all__ = ["CE", "ClassificationConfig", "cross_entropy"]


class ClassificationConfig(ObjectiveConfig):
    """Cross-entropy of the labels."""

    needs_term = True  # smoothing applies to no other objective of labels

    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of each label that is spread over all classes, for example 0.1",
    )


def cross_entropy(output: ModelOutput, batch: Batch) -> Tensor:
    """-sum_c q_c log p(c|y) with (soft) labels q, (B,), in nats (CDN eq. 13)."""
    assert batch.soft is not None
    assert output.energies is not None
    return -(batch.soft * output.energies.log_posterior()).sum(dim=1)


def configure(config: ClassificationConfig) -> Objective:
    """Objective ``ce`` with the label smoothing of ``config``."""
    share = config.label_smoothing
    if not share:
        return CE

    def loss(output: ModelOutput, batch: Batch) -> Tensor:
        assert output.energies is not None
        log_posterior = output.energies.log_posterior()
        return (1 - share) * cross_entropy(output, batch) - share * log_posterior.mean(dim=1)

    return replace(CE, loss=loss, validation_loss=cross_entropy)


CE = Objective(
    description="cross-entropy of the labels, -log p(c|y)",
    stream="classify",
    loss=cross_entropy,
    family="classification",
    needs_labels=True,
    config=ClassificationConfig,
    configure=configure,
)
