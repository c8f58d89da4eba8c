"""Saving and loading models: bit-identical round trips, one-line errors for damaged files."""

import errno
import json
import os
import re

import pytest
import torch
from ebmkit_tests.support.small_models import PAIRS
from torch import nn

from ebmkit import JointModel, ModelCard, UserError, create_model, load, save_model
from ebmkit.models import (
    BACKBONES,
    Features,
    GradResNetConfig,
    HeadConfig,
    LinearQuadraticHead,
    ModelConfig,
)
from ebmkit.models.saving import weights_file

CARD = ModelCard(
    dataset="digits",
    objective="ce+dsm",
    steps=600,
    image_size=(8, 8),
    channels=1,
    class_names=["a", "b", "c"],
    sigma_range=(1 / 255, 100 / 255),
    classifies=True,
)


def config(**options):
    return ModelConfig(
        backbone=GradResNetConfig(width=8, **options),
        in_channels=1,
        num_classes=3,
        reference_size=(8, 8),
    )


@pytest.fixture
def run(tmp_path):
    """A folder with a saved model, and that model."""
    model = config().build()
    save_model(tmp_path, model, config(), CARD)
    return tmp_path, model


def load_error(folder, **options):
    with pytest.raises(UserError) as caught:
        load(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_presets_round_trip_bit_identically(tmp_path, backbone, head):
    shape = BACKBONES[backbone].config.model_copy(update={"width": 8})
    built = ModelConfig(
        backbone=shape,
        head=HeadConfig(kind=head),
        in_channels=1,
        num_classes=3,
        reference_size=(32, 32),
        size_scaling="factor",
        input_std=0.5,
    )
    model = built.build().eval()
    save_model(tmp_path, model, built, CARD)
    y = torch.rand(2, 1, 40, 40)
    back = load(tmp_path)
    back._warned = model._warned = True  # of ReLU and BatchNorm
    model.requires_grad_(False)  # as loaded models are: no graph for second derivatives
    assert torch.equal(back.logits(y), model.logits(y))
    assert torch.equal(back.log_density(y), model.log_density(y))
    assert torch.equal(back.score(y), model.score(y))
    assert sorted(os.listdir(tmp_path)) == ["model.json", "model.safetensors"]


def test_loaded_model_is_frozen_and_has_its_card(run):
    folder, _ = run
    model = load(str(folder))
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.card == CARD
    assert not model.score(torch.rand(1, 1, 8, 8)).requires_grad


def test_model_json_contains_settings_and_card(run):
    document = json.loads((run[0] / "model.json").read_text())
    assert document["model"]["backbone"]["width"] == 8
    assert document["card"]["dataset"] == "digits"


def test_batch_norm_statistics_are_saved(tmp_path):
    shape = config(norm="batch")
    model = shape.build()
    model(torch.rand(4, 1, 8, 8))  # updates the statistics
    save_model(tmp_path, model, shape, CARD)
    y = torch.rand(2, 1, 8, 8)
    assert torch.equal(load(tmp_path).log_density(y), model.eval().log_density(y))


def test_old_field_extent_is_read_as_size_scaling(run):
    path = run[0] / "model.json"
    document = json.loads(path.read_text())
    del document["model"]["size_scaling"]
    document["model"]["extent"] = "factor"
    path.write_text(json.dumps(document))
    assert load(run[0]).size_scaling == "factor"


def test_best_weights_are_loaded_from_their_own_file(run):
    folder, _ = run
    assert "holds no checkpoints/best.safetensors" in load_error(folder, weights="best")
    (folder / "checkpoints").mkdir()
    best = config().build()
    (folder / "checkpoints" / "best.safetensors").write_bytes(weights_file(best))
    y = torch.rand(1, 1, 8, 8)
    assert torch.equal(load(folder, weights="best").logits(y), best.logits(y))
    assert load_error(folder, weights="first") == "weights 'first' must be one of last, best"


class Mean(nn.Module):
    """A custom backbone: mean and standard deviation of the image."""

    num_features = 2

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(()))

    def forward(self, y):
        return Features(self.gain * torch.stack([y.mean((1, 2, 3)), y.std((1, 2, 3))], dim=1))


def test_custom_model_must_be_passed_to_load(tmp_path):
    def compose():
        return JointModel(Mean(), LinearQuadraticHead(2, 3))

    model = compose()
    save_model(tmp_path, model, None, CARD)
    assert "composed by hand: give it, as in ebmkit.load(run, model=" in load_error(tmp_path)
    y = torch.rand(2, 1, 8, 8)
    assert torch.equal(load(tmp_path, compose()).score(y), model.score(y))


# --- damage --------------------------------------------------------------------------------------


def test_missing_folder_and_model_json_are_refused(tmp_path, run):
    assert load_error(tmp_path / "nowhere").startswith("there is no run folder")
    (run[0] / "model.json").unlink()
    assert "holds no model.json: it is no run folder, or training never saved" in load_error(run[0])


def test_missing_weights_are_refused(run):
    (run[0] / "model.safetensors").unlink()
    assert "holds no model.safetensors" in load_error(run[0])


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"not json"])
def test_damaged_json_is_refused(run, content):
    (run[0] / "model.json").write_bytes(content)
    assert re.search(r"model\.json' is damaged: it is not (JSON|UTF-8)", load_error(run[0]))


@pytest.mark.parametrize("content", ["[]", "{}", '{"format": 99}', '{"format": "1"}'])
def test_unknown_format_version_is_refused(run, content):
    (run[0] / "model.json").write_text(content)
    assert "is not of format 1: made by another version?" in load_error(run[0])


def test_unknown_field_is_refused_with_a_suggestion(run):
    path = run[0] / "model.json"
    document = json.loads(path.read_text())
    document["model"]["backbone"]["widht"] = 8
    path.write_text(json.dumps(document))
    assert "did you mean 'width'?" in load_error(run[0])


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_damaged_weights_are_refused(run, keep):
    path = run[0] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "model.safetensors' is damaged: " in load_error(run[0])


def test_a_flipped_bit_of_a_weight_is_detected(run):
    folder, _ = run
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="its tensors are not those that were written"):
        load(folder)


def test_weights_of_another_model_are_refused(run):
    other = ModelConfig(backbone=GradResNetConfig(width=16), in_channels=1, num_classes=3)
    save_model(run[0], other.build(), config(), CARD)
    assert "do not fit the model: size mismatch for" in load_error(run[0])


def test_passed_model_must_fit_the_weights(run):
    assert "do not fit the model" in load_error(run[0], model=create_model(width=8, depth=34))


# --- a full disk ---------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_keeps_the_old_model(run, monkeypatch, call):
    folder, old = run

    def disk_full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, disk_full)
        with pytest.raises(UserError, match=r"model\.safetensors'.*No space left.*untouched"):
            save_model(folder, config().build(), config(), CARD)
    assert sorted(os.listdir(folder)) == ["model.json", "model.safetensors"]
    y = torch.rand(1, 1, 8, 8)
    assert torch.equal(load(folder).logits(y), old.logits(y))


def test_saving_into_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="No such file or directory"):
        save_model(tmp_path / "nowhere", config().build(), config(), CARD)


def test_head_kind_is_restored(tmp_path):
    shape = config().model_copy(update={"head": HeadConfig(kind="logit", bias=True)})
    save_model(tmp_path, shape.build(), shape, CARD)
    energies = load(tmp_path)(torch.rand(2, 1, 8, 8))
    torch.testing.assert_close(energies.log_density, energies.logits.logsumexp(1))
