"""Settings of heads; the source of a classifier's energies, given by its card or its objective."""

import pytest
import torch
from pydantic import Field

import ebmkit
from ebmkit import ModelCard, UserError, create_model
from ebmkit.errors import validated
from ebmkit.models import HEADS, HeadConfig, HeadEntry, LinearHead, LinearQuadraticHead, ModelConfig
from ebmkit.models.heads import LogitEnergy, energy_source
from ebmkit.training import resolve

SMALL = {"backbone": {"kind": "gradresnet", "width": 8}, "num_classes": 3}


class ScaledConfig(HeadConfig):
    scale: float = Field(1.0, gt=0)


class ScaledHead(LinearQuadraticHead):
    """log p(y) multiplied by a setting."""

    def __init__(self, num_features, num_classes, config):
        super().__init__(num_features, num_classes, config.bias)
        self.scale = config.scale

    def forward(self, pooled):
        logits, log_density = super().forward(pooled)
        return ebmkit.Energies(logits, self.scale * log_density)


@pytest.fixture
def scaled(monkeypatch):
    monkeypatch.setitem(HEADS, "scaled", HeadEntry("scaled", ScaledConfig, ScaledHead))


@pytest.mark.usefixtures("scaled")
def test_settings_of_a_head_are_saved_and_loaded(tmp_path):
    head = {"kind": "scaled", "bias": True, "scale": 2.5}
    config = validated(ModelConfig, SMALL | {"head": head}, "model")
    assert config.model_dump()["head"] == head
    model = config.build().eval()
    ebmkit.save_model(tmp_path, model, config, ModelCard())
    loaded = ebmkit.load(tmp_path)
    y = torch.rand(2, 3, 8, 8)
    assert loaded.head.scale == 2.5
    assert torch.equal(loaded.log_density(y), model.log_density(y))


@pytest.mark.usefixtures("scaled")
def test_settings_of_a_head_are_those_of_its_class():
    of_base = ModelConfig(head=HeadConfig(kind="scaled", bias=True)).head
    assert of_base == ScaledConfig(kind="scaled", bias=True)
    assert ModelConfig(head=of_base).head is of_base
    with pytest.raises(UserError, match=r"no field 'head\.scael': did you mean 'scale'"):
        validated(ModelConfig, {"head": {"kind": "scaled", "scael": 2}}, "model")
    with pytest.raises(UserError, match=r"no field 'head\.scale'"):
        validated(ModelConfig, {"head": {"kind": "logit", "scale": 2}}, "model")
    with pytest.raises(UserError, match=r"head\.scale = 0 is not legal"):
        validated(ModelConfig, {"head": {"kind": "scaled", "scale": 0}}, "model")


@pytest.mark.usefixtures("scaled")
def test_replaced_head_leaves_no_settings():
    first = {"head": "scaled", "model": {"head": {"scale": 2.0}}}
    assert resolve(first).model.head.scale == 2
    assert resolve(first, {"head": "logit"}).model.head.kind == "logit"


@pytest.mark.parametrize(
    "head", [{}, {"kind": "linear-quadratic"}, {"kind": "logit", "bias": True}]
)
def test_head_of_an_earlier_file_is_the_same(head):
    assert ModelConfig.model_validate({"head": head}).head == HeadConfig(**head)


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


def test_log_density_is_minus_half_the_square_of_one_direction():
    """CDN equation 11; a linear head has the direction itself."""
    f = torch.randn(5, 7)
    head = LinearQuadraticHead(7, 3)
    along = f @ head.density.weight[0]
    torch.testing.assert_close(head(f).log_density, -along.square() / 2)
    torch.testing.assert_close(LinearHead.forward(head, f).log_density, along)
