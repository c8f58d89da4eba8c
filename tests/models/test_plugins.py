"""A network of a plugin: built by name, saved and loaded; without the plugin, one sentence."""

import pytest
import torch

import ebmkit
from ebmkit import ModelCard, UserError, create_model, plugins
from ebmkit.models import BACKBONES, ModelConfig
from ebmkit.validation import validated

FILE = """
from typing import Literal
from torch import nn
from ebmkit.models import BACKBONES, BackboneConfig, Features
from ebmkit.registry import Preset


class ToyConfig(BackboneConfig):
    kind: Literal["toy"] = "toy"
    width: int = 4

    def build(self, in_channels):
        return Toy(in_channels, self.width)


class Toy(nn.Module):
    def __init__(self, channels, width):
        super().__init__()
        self.num_features = width
        self.mix = nn.Linear(channels, width)

    def forward(self, y):
        return Features(nn.functional.gelu(self.mix(y.movedim(1, -1))).mean((1, 2)))


BACKBONES["toy"] = Preset(ToyConfig(), "a toy")
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    path = tmp_path / "toy_network.py"
    path.write_text(FILE)
    monkeypatch.setattr(plugins, "_LOADED", {})
    yield path
    BACKBONES.pop("toy", None)
    plugins.sys.modules.pop("toy_network", None)


def test_a_plugins_network_comes_back(tmp_path, plugin, monkeypatch):
    plugins.load_plugin(plugin)
    assert create_model("toy", 3, width=8).backbone.num_features == 8
    values = {"backbone": {"kind": "toy", "width": 6}, "num_classes": 2}
    config = validated(ModelConfig, values, "model")
    assert config.model_dump()["backbone"] == {"kind": "toy", "width": 6}
    model = config.build().eval()
    ebmkit.save_model(tmp_path, model, config, ModelCard())
    y = torch.rand(2, 3, 5, 5)
    assert torch.equal(ebmkit.load(tmp_path).logits(y), model.logits(y))
    with pytest.raises(UserError, match="did you mean 'width'"):
        validated(ModelConfig, {"backbone": {"kind": "toy", "widht": 6}}, "model")
    monkeypatch.setattr(plugins, "_LOADED", {})
    with pytest.raises(UserError, match=r"needs the plugin 'toy_network'.*plugins=\[") as caught:
        ebmkit.load(tmp_path)
    assert "\n" not in str(caught.value)
    BACKBONES.pop("toy")
    plugins.sys.modules.pop("toy_network")
    assert torch.equal(ebmkit.load(tmp_path, plugins=[plugin]).logits(y), model.logits(y))
