"""Commands without a RUN, with ``--pretrained`` or a name; and ``ebmkit models``."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from ebmkit_tests.support.command_line import ebmkit_command
from PIL import Image

import ebmkit
from ebmkit import pretrained
from ebmkit.cli.app import COMMANDS
from ebmkit.cli.models import choose
from ebmkit.data import load_dataset


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with images of digits; three.png is the first 3 of the test images."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "photos").mkdir()
    images = load_dataset("digits", split="test")
    x, labels = next(iter(images.batches(len(images))))
    three = (x[labels == 3][0, 0] * 255).round().byte().numpy()
    for path in ("three.png", "photos/a.png"):
        Image.fromarray(three).save(folder / path)
    Image.fromarray(np.stack([three, 255 - three, three // 2], -1)).save(folder / "colour.png")
    shutil.copytree(pretrained.find_model("digits-joint"), folder / "run")
    return folder


def assert_refused(result, *messages):
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for text in messages:
        assert text in result.stderr


def test_images_alone_are_classified_by_the_default_model(home):
    done = ebmkit_command("classify", "three.png", "--json", "found.json", cwd=home)
    assert done.returncode == 0, done.stderr
    assert "the model is digits-joint" in done.stderr
    assert json.loads((home / "found.json").read_text())[0]["class"] == "3"


def test_images_alone_are_denoised_into_a_new_folder(home):
    done = ebmkit_command("denoise", "three.png", "--sigma", "25/255", cwd=home)
    assert done.returncode == 0, done.stderr
    assert "the model is photos-gray" in done.stderr
    assert (home / "denoised" / "three.png").is_file()
    again = ebmkit_command("denoise", "three.png", "--sigma", "25/255", "--quiet", cwd=home)
    assert again.returncode == 2
    assert "exists: choose another --out" in again.stderr


def test_the_gray_denoiser_takes_the_channels_of_a_colour_image_one_by_one(home):
    done = ebmkit_command("denoise", "colour.png", "--sigma", "25/255", "--out", "one", cwd=home)
    assert done.returncode == 0, done.stderr
    found = np.asarray(Image.open(home / "one" / "colour.png"))
    model = ebmkit.load("photos-gray")
    for k, own in enumerate(np.moveaxis(np.asarray(Image.open(home / "colour.png")), 2, 0)):
        y = torch.from_numpy(own.copy()).float()[None, None] / 255
        expected = 255 * model.denoise(y, 25 / 255).clamp(0, 1)[0, 0]
        assert np.abs(found[..., k] - expected.numpy()).max() <= 0.51  # rounded to 8 bits


@pytest.mark.slow
def test_samples_of_a_pretrained_model_are_written_to_the_current_folder(home):
    package = sorted(pretrained.WEIGHTS.rglob("*"))
    done = ebmkit_command("sample", "--label", "3", "--count", "2", cwd=home)
    assert done.returncode == 0, done.stderr
    (path,) = home.glob("runs/pretrained/digits-joint/samples/*/sampling.json")
    assert json.loads(path.read_text())["run"] == "digits-joint"
    assert sorted(pretrained.WEIGHTS.rglob("*")) == package


@pytest.mark.slow
def test_evaluation_of_a_pretrained_model_is_written_to_the_current_folder(home):
    done = ebmkit_command(
        "evaluate", "--pretrained", "digits-joint", "--suite", "classify", "--limit", "20", cwd=home
    )
    assert done.returncode == 0, done.stderr
    assert (home / "runs/pretrained/digits-joint/evaluation/classify.json").is_file()
    assert not (pretrained.WEIGHTS / "digits-joint" / "report.html").exists()


@pytest.mark.parametrize(
    ("run", "images", "model", "rest"),
    [
        ("three.png", [], "photos-gray", ["three.png"]),
        ("three.png", ["colour.png"], "photos-gray", ["three.png", "colour.png"]),
        ("photos", [], "photos-gray", ["photos"]),
        ("photos/*.png", [], "photos-gray", ["photos/*.png"]),
        ("photos/*", [], "photos-gray", ["photos/*"]),
        ("absent.png", [], "photos-gray", ["absent.png"]),
        ("digits-joint", ["three.png"], "digits-joint", ["three.png"]),
        ("run", ["photos"], "run", ["photos"]),
        ("run", ["absent"], "run", ["absent"]),
    ],
)
def test_the_first_argument_is_a_run_or_an_image(home, monkeypatch, run, images, model, rest):
    monkeypatch.chdir(home)
    options = {"run": Path(run), "images": [Path(image) for image in images]}
    choose("denoise", options, None)
    assert options["run"].name == model
    assert [str(path) for path in options["images"]] == rest


def test_every_command_with_a_run_takes_a_pretrained_model():
    names = {f.__name__ for group in COMMANDS.values() for f in group.values()}
    for command in {"classify", "denoise", "restore", "sample", "evaluate", "export", "verify"}:
        assert command in names
        options = {"run": None}
        choose(command, options, "digits-joint")
        assert options["run"] == pretrained.find_model("digits-joint")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["classify", "--pretrained", "digit-joint", "three.png"], "did you mean 'digits-joint'"),
        (["classify", "run", "--pretrained", "digits-joint", "three.png"], "leave one out"),
        (["classify", "digit-joint", "three.png"], "no run folder or pretrained model"),
        (["classify", "runs/absent", "three.png"], "no run folder 'runs/absent'"),
        (["classify", "run"], "name images"),
        (["denoise"], "name images"),
        (["export", "--out", "x.onnx"], "by --pretrained NAME"),
        (["evaluate"], "by --pretrained NAME"),
        (["models", "digit-joint"], "did you mean 'digits-joint'"),
        (["verify", "digits-joint", "--accept", "card.json"], "is for runs of your own"),
    ],
)
def test_mistakes_are_refused_in_one_sentence(home, arguments, message):
    assert_refused(ebmkit_command(*arguments, cwd=home), message)


def test_damaged_weights_of_the_package_are_refused_in_one_sentence(home, tmp_path, monkeypatch):
    shutil.copytree(home / "run", tmp_path / "digits-joint")
    path = tmp_path / "digits-joint" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    monkeypatch.setattr(pretrained, "WEIGHTS", tmp_path)
    done = ebmkit_command("classify", "three.png", "--pretrained", "digits-joint", cwd=home)
    assert_refused(done, "model.safetensors", "is damaged")
    verified = ebmkit_command("verify", "digits-joint", cwd=home)
    assert verified.returncode == 2
    assert "model.safetensors" in verified.stderr


def test_models_lists_all_and_shows_a_card(home):
    listed = ebmkit_command("models", cwd=home, COLUMNS="200")
    shown = ebmkit_command("models", "digits-joint", cwd=home)
    assert listed.returncode == shown.returncode == 0
    assert all(name in listed.stdout for name in ebmkit.list_models())
    card = pretrained.read_card("digits-joint")
    assert card.licence in shown.stdout
    assert all(limit in shown.stdout for limit in card.limits)
    assert str(card.figures[0]) in shown.stdout
