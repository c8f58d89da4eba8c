"""Initial weights from runs and files: what is loaded, what is said, what is refused."""

import pytest
import torch

import ebmkit
from ebmkit import UserError
from ebmkit.models import ModelConfig, create_model
from ebmkit.models.config import find_backbone
from ebmkit.models.initial import initialize, read_weights


def network(classes=3, width=8, backbone="gradresnet10"):
    return create_model(backbone, num_classes=classes, in_channels=1, width=width)


@pytest.fixture
def run(tmp_path):
    backbone = find_backbone("gradresnet10").config.model_copy(update={"width": 8})
    config = ModelConfig(backbone=backbone, num_classes=3, in_channels=1)
    (tmp_path / "run").mkdir()
    ebmkit.save_model(tmp_path / "run", config.build(), config, ebmkit.ModelCard())
    return tmp_path / "run"


def backbone_state(model):
    return {n: v.clone() for n, v in model.state_dict().items() if n.startswith("backbone.")}


@pytest.mark.parametrize("kind", ["run", "safetensors", "state dict of the backbone"])
def test_weights_of_a_run_or_file_are_loaded(run, tmp_path, kind):
    source, trained = run, ebmkit.load(run)
    if kind == "safetensors":
        source = run / "model.safetensors"
    if kind == "state dict of the backbone":
        source = tmp_path / "net.pth"
        torch.save({"state_dict": trained.backbone.state_dict()}, source)
    model = network()
    found = initialize(model, str(source), read_weights(str(source)))
    for name, value in backbone_state(trained).items():
        assert torch.equal(model.state_dict()[name], value)
    whole = kind != "state dict of the backbone"
    assert torch.equal(model.head.density.weight, trained.head.density.weight) == whole
    assert [name for name in found.missing if whole] == []
    assert found.unused == []
    assert f"loaded from {source}" in found.sentence()


def test_weights_of_a_pretrained_model_are_read_by_its_name():
    state = ebmkit.load("digits-joint").state_dict()
    own = read_weights("digits-joint")
    assert own.keys() == state.keys()
    assert all(torch.equal(own[name], state[name]) for name in own)


def test_a_head_of_another_size_keeps_its_random_weights_and_is_reported(run):
    model = network(classes=7)
    before = model.head.classifier.weight.clone()
    found = initialize(model, str(run), read_weights(str(run)))
    assert torch.equal(model.head.classifier.weight, before)
    assert found.reshaped == {"head.classifier.weight": ([3, 92], [7, 92])}
    assert "head.classifier.weight [3, 92] there, [7, 92] here" in found.sentence()
    assert torch.equal(model.head.density.weight, ebmkit.load(run).head.density.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 16}, r"backbone\..* is \[.*\] there and \[.*\] here; choose the same"),
        ({"backbone": "resnet18", "width": 4}, "do not fit|belongs to this backbone"),
    ],
)
def test_weights_of_another_backbone_are_refused(run, options, message):
    model = network(**options)
    before = backbone_state(model)
    with pytest.raises(UserError, match=message):
        initialize(model, str(run), read_weights(str(run)))
    assert all(torch.equal(before[name], v) for name, v in backbone_state(model).items())
