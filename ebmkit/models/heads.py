r"""Heads: from features :math:`f \in \mathbb R^K` to class logits and a log-density.

``LinearQuadraticHead`` is the paper's (CDN eq. 10-12): linear for labels, quadratic for the image,

.. math:: \operatorname{logits} = W f, \qquad \log p(y) = -\tfrac12 (w^\top f)^2 - \log Z .

``LogitHead`` is JEM's (arXiv 1912.03263): the class logits define the energy,

.. math:: \operatorname{logits} = W f, \qquad \log p(y) = \operatorname{logsumexp}(W f) - \log Z ,

so that :math:`\log p(y, c) = (W f)_c` up to the constant. The constants are not computed.

``LinearHead`` is linear for both, :math:`\log p(y) = w^\top f`. It is for the
difference from a Gaussian, which has both signs (`ebmkit.models.noise_conditional`).

**Energies of a classifier.** If the objective trains labels only (``ce``, ``adv``, ``trades``), the
density of a `LinearQuadraticHead` is untrained. RCG (eq. 2.32-2.38) and JEM define energies by the
logits instead. `LogitEnergy` is the classifier with these energies:

=========== ================================================ =================================
source      E(y)                                             E(y, c)
=========== ================================================ =================================
``model``   :math:`-\log p(y)` from the head                 :math:`E(y) - \log p(c \mid y)`
``logits``  :math:`-\operatorname{logsumexp}` of the logits  :math:`-\operatorname{logit}_c`
=========== ================================================ =================================

``auto`` is the source in the model card (`ebmkit.ModelCard.energies`). With the head ``logit`` the
two sources are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from ebmkit.compile import WrappedEnergyModel
from ebmkit.energy import Energies, EnergyModel, Noise
from ebmkit.errors import UserError
from ebmkit.registry import Table, find

EnergySource = Literal["auto", "model", "logits"]


class LinearHead(nn.Module):
    """Linear logits and a linear log-density.

    Args:
        num_features: K.
        num_classes: C; 0: a density without labels.
        bias: add biases.
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
        return Energies(logits, self.density(pooled).squeeze(1))


class LinearQuadraticHead(LinearHead):
    """Linear logits and a quadratic log-density (CDN eq. 10-12).

    Args:
        num_features: K.
        num_classes: C; 0: a density without labels.
        bias: add biases to the logits and inside the square (the paper's ablation).
    """

    def forward(self, pooled: Tensor) -> Energies:
        """Energies of features ``pooled`` (B, K)."""
        logits, direction = super().forward(pooled)
        return Energies(logits, -0.5 * direction.square())


class LogitHead(nn.Module):
    """Logits whose logsumexp is the log-density (JEM).

    Args:
        num_features: K.
        num_classes: C, at least 1.
        bias: add a bias to the logits.

    Raises:
        UserError: if there are no classes, because the density is computed from the logits.
    """

    def __init__(self, num_features: int, num_classes: int, bias: bool = False) -> None:
        super().__init__()
        if num_classes < 1:
            raise UserError(
                f"head 'logit' computes the density from the class logits and cannot have "
                f"{num_classes} classes: use head 'linear-quadratic'"
            )
        self.num_classes = num_classes
        self.classifier = nn.Linear(num_features, num_classes, bias)

    def forward(self, pooled: Tensor) -> Energies:
        """Energies of features ``pooled`` (B, K)."""
        logits = self.classifier(pooled)
        return Energies(logits, logits.logsumexp(dim=1))


class HeadConfig(BaseModel):
    """Configuration of a head; a subclass adds settings of its own (`HeadEntry.config`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str = Field(
        "linear-quadratic",
        description="head, from `ebmkit list heads`: linear-quadratic (the paper), "
        "logit (logsumexp, JEM), linear (preconditioned models)",
    )
    bias: bool = Field(False, description="biases in the head (the paper removes them)")

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        find("head", HEADS, kind)
        return kind

    @classmethod
    def class_for(cls, given: Any) -> type[HeadConfig]:
        """The configuration class for the ``kind`` in ``given``, a configuration as a mapping.

        Raises:
            UserError: if there is no such head.
        """
        default = cls.model_fields["kind"].default
        kind = given.get("kind", default) if isinstance(given, Mapping) else default
        return find("head", HEADS, str(kind)).config

    def build(self, num_features: int, num_classes: int) -> nn.Module:
        """Build the `Head` for K = ``num_features`` and C = ``num_classes``."""
        return HEADS[self.kind].make(num_features, num_classes, self)


@dataclass(frozen=True)
class HeadEntry:
    """An entry of `HEADS`.

    Attributes:
        description: one line of text.
        config: class of its configuration, with the head's own settings.
        make: function of K, C and the configuration that returns the `ebmkit.models.Head`.
    """

    description: str
    config: type[HeadConfig]
    make: Callable[[int, int, Any], nn.Module]


HEADS: dict[str, HeadEntry] = Table(
    "head",
    {
        "linear-quadratic": HeadEntry(
            "log p(c|y) linear, log p(y) quadratic in the features",
            HeadConfig,
            lambda k, c, own: LinearQuadraticHead(k, c, own.bias),
        ),
        "logit": HeadEntry(
            "log p(y) = logsumexp of the logits, as in JEM",
            HeadConfig,
            lambda k, c, own: LogitHead(k, c, own.bias),
        ),
        "linear": HeadEntry(
            "log p(c|y) and log p(y) linear in the features, for preconditioned models",
            HeadConfig,
            lambda k, c, own: LinearHead(k, c, own.bias),
        ),
    },
)


def find_head(name: str) -> HeadConfig:
    """The default configuration of the head called ``name``.

    Raises:
        UserError: if there is none.
    """
    return find("head", HEADS, name).config(kind=name)


class LogitEnergy(EnergyModel):
    """A classifier as an energy model, E(y) = -logsumexp(logits) and E(y, c) = -logit_c.

    Args:
        model: model with class logits; shared, not copied.
    """

    def __init__(self, model: EnergyModel) -> None:
        super().__init__()
        self.model, self.training = model, model.training
        self.num_classes, self.noise_conditional = model.num_classes, model.noise_conditional
        self.card, self.in_channels = model.card, model.in_channels

    @classmethod
    def of(cls, model: EnergyModel, source: EnergySource = "auto") -> EnergyModel:
        """``model`` with energies from ``source``; ``model`` itself if they are its own.

        Raises:
            UserError: if ``source`` is ``logits`` and the model has no labels.
        """
        if isinstance(model, cls) or energy_source(model, source) == "model":
            return model
        if isinstance(model, WrappedEnergyModel):
            return WrappedEnergyModel(cls.of(model.model, source), model.inference)
        return cls(model)

    def forward(self, y: Tensor, sigma: Noise | None = None) -> Energies:
        """Energies of noisy images ``y`` (B, C, H, W) in image units."""
        logits = self.model(y, sigma).logits
        return Energies(logits, logits.logsumexp(dim=1))


def energy_source(model: EnergyModel, source: EnergySource = "auto") -> Literal["model", "logits"]:
    """The source of the energies of ``model``, with ``auto`` resolved.

    Raises:
        UserError: if ``source`` is ``logits`` and the model has no labels.
    """
    if source == "logits" and not model.num_classes:
        raise UserError("this model has no labels, so its energies cannot be computed from logits")
    if source != "auto":
        return source
    if not model.num_classes or model.card is None:
        return "model"
    return model.card.energy_source
