"""The source of a classifier's energies: given by its card, otherwise by its objective."""

import pytest
import torch

from ebmkit import ModelCard, create_model
from ebmkit.models.heads import LogitEnergy, energy_source


@pytest.mark.parametrize(
    ("card", "source"),
    [
        (ModelCard(objective="ce"), "logits"),
        (ModelCard(objective="ce+dsm"), "model"),
        (ModelCard(objective="published: net.pt"), "model"),
        (ModelCard(objective="ce", energies="model"), "model"),
        (ModelCard(objective="of another program", energies="logits"), "logits"),
        (None, "model"),
    ],
)
def test_energy_source_follows_card_and_objective(card, source):
    model = create_model(width=8).eval()
    model.card = card
    assert energy_source(model) == source
    wrapped = LogitEnergy.of(model)
    assert LogitEnergy.of(wrapped) is wrapped
    y = torch.rand(2, 3, 8, 8)
    logits = model.logits(y)
    expected = logits.logsumexp(1) if source == "logits" else model.log_density(y)
    assert torch.equal(wrapped.log_density(y), expected)
    assert torch.equal(wrapped.logits(y), logits)
