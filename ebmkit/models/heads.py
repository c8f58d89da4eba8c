r"""Heads: from features :math:`f \in \mathbb R^K` to class logits and a log-density.

``LinearQuadraticHead`` is the paper's (CDN eq. 10-12): linear for labels, quadratic for the image,

.. math:: \operatorname{logits} = W f, \qquad \log p(y) = -\tfrac12 (w^\top f)^2 - \log Z .

``LogitHead`` is JEM's (arXiv 1912.03263): the classifier's own logits, read as an energy,

.. math:: \operatorname{logits} = W f, \qquad \log p(y) = \operatorname{logsumexp}(W f) - \log Z ,

so that :math:`\log p(y, c) = (W f)_c` up to the constant. The constants are never computed.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ebmkit.energy import Energies
from ebmkit.errors import UserError
from ebmkit.registry import Preset

__all__ = ["HEADS", "HeadConfig", "LinearQuadraticHead", "LogitHead"]


class LinearQuadraticHead(nn.Module):
    """Linear logits and a quadratic log-density (CDN eq. 10-12).

    Args:
        num_features: K.
        num_classes: C; 0 for a density without labels.
        bias: add biases to the logits and inside the square (the paper's ablation).
    """

    def __init__(self, num_features: int, num_classes: int, bias: bool = False) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.classifier = nn.Linear(num_features, num_classes, bias) if num_classes else None
        self.density = nn.Linear(num_features, 1, bias)
        nn.init.normal_(self.density.weight, std=num_features**-0.5)

    def forward(self, pooled: Tensor) -> Energies:
        """Energies of features ``pooled`` (B, K)."""
        logits = pooled.new_zeros(pooled.shape[0], 0)
        if self.classifier is not None:
            logits = self.classifier(pooled)
        return Energies(logits, -0.5 * self.density(pooled).squeeze(1).square())


class LogitHead(nn.Module):
    """Logits whose logsumexp is the log-density (JEM).

    Args:
        num_features: K.
        num_classes: C, at least 1.
        bias: add a bias to the logits.

    Raises:
        UserError: if there are no classes, for then there is no density either.
    """

    def __init__(self, num_features: int, num_classes: int, bias: bool = False) -> None:
        super().__init__()
        if num_classes < 1:
            raise UserError(
                f"head 'logit' reads the density off the class logits and cannot have "
                f"{num_classes} classes: use head 'linear-quadratic'"
            )
        self.num_classes = num_classes
        self.classifier = nn.Linear(num_features, num_classes, bias)

    def forward(self, pooled: Tensor) -> Energies:
        """Energies of features ``pooled`` (B, K)."""
        logits = self.classifier(pooled)
        return Energies(logits, logits.logsumexp(dim=1))


class HeadConfig(BaseModel):
    """How energies are read off the features."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["linear-quadratic", "logit"] = Field(
        "linear-quadratic", description="head: linear + quadratic (the paper) or logsumexp (JEM)"
    )
    bias: bool = Field(False, description="biases in the head (the paper removes them)")

    def build(self, num_features: int, num_classes: int) -> LinearQuadraticHead | LogitHead:
        """The head for K = ``num_features`` and C = ``num_classes``."""
        if self.kind == "logit":
            return LogitHead(num_features, num_classes, self.bias)
        return LinearQuadraticHead(num_features, num_classes, self.bias)


HEADS: dict[str, Preset[HeadConfig]] = {
    "linear-quadratic": Preset(
        HeadConfig(), "log p(c|y) linear, log p(y) quadratic in the features"
    ),
    "logit": Preset(HeadConfig(kind="logit"), "log p(y) = logsumexp of the logits, as in JEM"),
}
