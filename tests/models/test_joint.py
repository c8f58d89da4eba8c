"""Where the energies of a classifier come from: its card says so, or else its objective."""

import pytest
import torch

from ebmkit import ModelCard, create_model
from ebmkit.models.joint import LogitEnergy, energy_source


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
def test_energies_are_those_that_were_trained(card, source):
    model = create_model(width=8).eval()
    model.card = card
    assert energy_source(model) == source
    read = LogitEnergy.of(model)
    assert LogitEnergy.of(read) is read
    y = torch.rand(2, 3, 8, 8)
    logits = model.logits(y)
    expected = logits.logsumexp(1) if source == "logits" else model.log_density(y)
    assert torch.equal(read.log_density(y), expected)
    assert torch.equal(read.logits(y), logits)
