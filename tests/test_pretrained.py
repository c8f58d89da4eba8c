"""Pretrained models: figures on their cards, damage, names, and where results are written."""

import json
import shutil

import pytest
import torch

import ebmkit
from ebmkit import pretrained
from ebmkit.data import load_dataset
from ebmkit.errors import UserError
from ebmkit.storage.manifest import read_manifest

NAMES = ebmkit.list_models()


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A folder of pretrained models with a copy of digits-joint, to be damaged."""
    shutil.copytree(pretrained.WEIGHTS / "digits-joint", tmp_path / "weights" / "digits-joint")
    monkeypatch.setattr(pretrained, "WEIGHTS", tmp_path / "weights")
    return tmp_path / "weights" / "digits-joint"


def test_the_package_stays_small():
    sizes = {name: pretrained.size_of(name) for name in NAMES}
    assert max(sizes.values()) <= 8e6, sizes
    assert sum(sizes.values()) <= 20e6, sizes


@pytest.mark.parametrize("name", NAMES)
def test_a_model_has_a_complete_card_and_float16_weights(name):
    """The manifest lists each file, so that damage of any of them is detected."""
    card, folder = pretrained.read_card(name), pretrained.find_model(name)
    manifest = read_manifest(folder)
    assert {path.name for path in folder.iterdir()} == {*manifest.files, "manifest.json"}
    assert card.figures
    assert card.limits
    assert card.training.steps <= card.training.of
    assert " /" not in card.training.command  # no path of the machine that trained
    text = pretrained.as_markdown(name, card)
    assert all(figure.name in text for figure in card.figures)
    model = ebmkit.load(name)
    assert sum(p.numel() for p in model.parameters()) == card.parameters
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for own in model.parameters():
        assert torch.equal(own, own.half().float())


def test_accuracy_on_the_card_is_that_of_the_model():
    """The same images and weights: at most one of 360 may change class in other arithmetic."""
    (figure,) = (f for f in pretrained.read_card("digits-joint").figures if f.name == "accuracy")
    images = load_dataset("digits", split="test")
    x, labels = next(iter(images.batches(len(images))))
    right = (ebmkit.load("digits-joint").logits(x).argmax(1) == labels).double().mean()
    assert figure.images == len(images)
    assert float(right) == pytest.approx(figure.value, abs=1.5 / len(images))


def test_a_pretrained_model_improves_noisy_images():
    """Its card has a gain of more than 4 dB at 25/255; 2 dB are left for another 32 images."""
    x, _ = next(iter(load_dataset("digits", split="test").first(32).batches(32)))
    y = x + 25 / 255 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    model = ebmkit.load("digits-joint")

    def psnr(image):
        return float(-10 * (image.clamp(0, 1) - x).square().mean((1, 2, 3)).log10().mean())

    assert psnr(model.denoise(y, 25 / 255)) > psnr(y) + 2


@pytest.mark.parametrize("file", ["model.safetensors", "model.json", "class_gaussians.safetensors"])
def test_damaged_weights_are_refused_in_one_sentence(weights, file):
    content = bytearray((weights / file).read_bytes())
    content[len(content) // 2] ^= 1
    (weights / file).write_bytes(content)
    with pytest.raises(UserError, match=f"{file}.* is damaged"):
        ebmkit.load("digits-joint")


def test_a_damaged_card_is_refused(weights):
    card = weights / "card.json"
    card.write_text(card.read_text().replace("99", "98", 1) + " ")
    with pytest.raises(UserError, match=r"card\.json.* is damaged"):
        pretrained.read_card("digits-joint")


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'digits-joint'"):
        pretrained.find_model("digit-joint")
    with pytest.raises(UserError, match="no run folder or pretrained model 'digit-joint': did you"):
        ebmkit.load("digit-joint")
    with pytest.raises(UserError, match="no run folder 'runs/digits-joint'"):
        ebmkit.load("runs/digits-joint")


def test_a_folder_is_loaded_before_a_pretrained_model_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits-joint").mkdir()
    with pytest.raises(UserError, match=r"holds no model\.json"):
        ebmkit.load("digits-joint")


def test_results_are_never_written_to_the_package_or_the_cache(tmp_path):
    assert pretrained.results_folder(tmp_path) == tmp_path
    own = pretrained.results_folder(pretrained.locate("digits-joint"))
    assert own.parts == ("runs", "pretrained", "digits-joint")
    cached = tmp_path / "models--user--net" / "snapshots" / "1a2b"
    assert pretrained.name_of(cached) == "hub:user/net"
    assert pretrained.results_folder(cached).parts == ("runs", "pretrained", "user--net")


def test_the_card_of_an_unfinished_run_states_its_step():
    card = pretrained.read_card("digits-joint")
    unfinished = json.loads(card.model_dump_json())
    unfinished["training"] |= {"steps": 120, "of": 360, "flops": None}
    text = pretrained.as_markdown(
        "digits-joint", pretrained.PretrainedCard.model_validate(unfinished)
    )
    assert "step 120 of 360: the run had not ended" in text
    assert "FLOPs not counted" in text


def test_defaults_are_models_of_the_package():
    assert set(pretrained.DEFAULTS.values()) <= set(NAMES)
