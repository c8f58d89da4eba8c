r"""How the energies of a classifier are read: off its own density, or off its logits.

=========== ================================================ =================================
reading     E(y)                                             E(y, c)
=========== ================================================ =================================
``model``   :math:`-\log p(y)` as the head gives it          :math:`E(y) - \log p(c \mid y)`
``logits``  :math:`-\operatorname{logsumexp}` of the logits  :math:`-\operatorname{logit}_c`
=========== ================================================ =================================

With a head ``logit`` the two are one. With another, a model whose objective trains labels alone
(``ce``, ``adv``, ``trades``) has a density that nothing trained, and logits that RCG (eq.
2.32-2.38) and JEM read as energies. ``auto`` takes the logits there, and the model's own density
elsewhere.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ebmkit.compile import WrappedEnergyModel
from ebmkit.energy import Energies, EnergyModel, Noise
from ebmkit.errors import UserError
from ebmkit.objectives import parse_objective

__all__ = ["LogitEnergy", "Reading", "as_read", "reading_of"]

Reading = Literal["auto", "model", "logits"]


def reading_of(model: EnergyModel, reading: Reading = "auto") -> Reading:
    """How the energies of ``model`` are read, ``model`` or ``logits``; see the module's table.

    Raises:
        UserError: if logits are asked for and the model has none.
    """
    if reading == "logits" and not model.num_classes:
        raise UserError("this model has no labels, so its energies cannot be read off logits")
    if reading != "auto":
        return reading
    if not model.num_classes or model.card is None:
        return "model"
    try:
        terms = [term.objective for term in parse_objective(model.card.objective)]
    except UserError:  # an imported model, or one composed by hand
        return "model"
    trained = any(term.trains_density for term in terms)
    return "model" if trained else "logits"


def as_read(model: EnergyModel, reading: Reading = "auto") -> EnergyModel:
    """``model`` as an energy model whose energies are so read; itself where they are its own.

    Raises:
        UserError: if logits are asked for and the model has none.
    """
    if reading_of(model, reading) == "model":
        return model
    if isinstance(model, WrappedEnergyModel):
        return WrappedEnergyModel(as_read(model.model, reading), model.inference)
    return model if isinstance(model, LogitEnergy) else LogitEnergy(model)


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

    def forward(self, y: Tensor, sigma: Noise | None = None) -> Energies:
        """Energies of noisy images ``y`` (B, C, H, W) in image units."""
        logits = self.model(y, sigma).logits
        return Energies(logits, logits.logsumexp(dim=1))
