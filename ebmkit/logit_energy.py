r"""Where the energies of a classifier come from: its own density, or its logits.

A model whose objective trains labels alone (``ce``, ``adv``, ``trades``) has a density that nothing
trained, unless its head is ``logit``, and logits that RCG (eq. 2.32-2.38) and JEM read as energies.
`LogitEnergy` is that classifier as an energy model:

=========== ================================================ =================================
source      E(y)                                             E(y, c)
=========== ================================================ =================================
``model``   :math:`-\log p(y)` as the head gives it          :math:`E(y) - \log p(c \mid y)`
``logits``  :math:`-\operatorname{logsumexp}` of the logits  :math:`-\operatorname{logit}_c`
=========== ================================================ =================================

``auto`` is what the model's card says (`ebmkit.ModelCard.energies`); of a card of an earlier
version, what its objective trains.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ebmkit.card import ModelCard
from ebmkit.compile import WrappedEnergyModel
from ebmkit.energy import Energies, EnergyModel, Noise
from ebmkit.errors import UserError
from ebmkit.objectives import parse_objective

EnergySource = Literal["auto", "model", "logits"]


class LogitEnergy(EnergyModel):
    """A classifier with E(y) = -logsumexp(logits) and E(y, c) = -logit_c.

    Args:
        model: what gives the logits; shared, not copied.
    """

    def __init__(self, model: EnergyModel) -> None:
        super().__init__()
        self.model, self.training = model, model.training
        self.num_classes, self.noise_conditional = model.num_classes, model.noise_conditional
        self.card, self.in_channels = model.card, model.in_channels

    @classmethod
    def of(cls, model: EnergyModel, source: EnergySource = "auto") -> EnergyModel:
        """``model`` with energies of ``source``: itself where they are its own.

        Raises:
            UserError: if logits are asked for and the model has none.
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
    """Where the energies of ``model`` come from; see the module's table.

    Raises:
        UserError: if logits are asked for and the model has none.
    """
    if source == "logits" and not model.num_classes:
        raise UserError("this model has no labels, so its energies cannot be read off logits")
    if source != "auto":
        return source
    if not model.num_classes or model.card is None:
        return "model"
    return model.card.energies or trained_energies(model.card)


def trained_energies(card: ModelCard) -> Literal["model", "logits"]:
    """Which energies the objective of ``card`` trains; the model's own if it is not known."""
    try:
        terms = [term.objective for term in parse_objective(card.objective)]
    except UserError:  # of an imported model, or one composed by hand
        return "model"
    density = any(term.trains_density for term in terms)
    return "model" if density else "logits"
