"""Models on the hub, against a local stand-in for its API."""

import pytest
import torch
from ebmkit_tests.support.command_line import ebmkit_command
from ebmkit_tests.support.hub import hub
from PIL import Image

import ebmkit
from ebmkit.errors import UserError
from ebmkit.hub import MODEL_FILES
from ebmkit.models import DirectDenoiser, JointModel
from ebmkit.models.saving import model_files

huggingface_hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A running stand-in that huggingface_hub uses, with an empty cache."""
    from huggingface_hub import constants

    with hub({}) as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        yield running


def small_model():
    model = ebmkit.create_model("gradresnet10", num_classes=3, in_channels=1, width=8)
    model.card = ebmkit.ModelCard(
        dataset="mine", channels=1, image_size=(8, 8), classifies=True, class_names=["a", "b", "c"]
    )
    return model.eval().requires_grad_(False)


def test_an_uploaded_model_is_downloaded_with_the_same_outputs(server, tmp_path):
    model, y = small_model(), torch.rand(2, 1, 8, 8)
    address = model.push_to_hub("user/net")
    assert address.startswith(f"{server.url}/user/net/commit/")
    files = server.repositories["user/net"]
    assert {"model.json", "model.safetensors", "README.md"} == files.keys()
    assert b'ebmkit.load("hub:user/net")' in files["README.md"]
    loaded = ebmkit.load("hub:user/net")
    assert torch.equal(loaded.score(y), model.score(y))
    assert loaded.card == model.card
    assert torch.equal(JointModel.from_pretrained("user/net").score(y), loaded.score(y))
    with pytest.raises(UserError, match="is a JointModel, not a DirectDenoiser"):
        DirectDenoiser.from_pretrained("user/net")


def test_only_files_of_a_model_are_downloaded_and_read_as_data(server, tmp_path):
    """A repository also holds code, a pickle and a plugin; none of them is fetched."""
    model = small_model()
    evil = {"pytorch_model.bin": b"pickle", "modeling.py": b"raise SystemExit", "setup.py": b""}
    server.repositories["user/net"] = model_files(model, model.built_from, model.card) | evil
    ebmkit.load("hub:user/net")
    fetched = {line.rpartition("/")[2] for line in server.asked if "/resolve/" in line}
    assert fetched == {"model.json", "model.safetensors"} <= set(MODEL_FILES)


@pytest.mark.slow
def test_commands_take_a_model_of_the_hub_and_write_nothing_to_its_cache(server, tmp_path):
    small_model().push_to_hub("user/net")
    Image.new("L", (8, 8), 99).save(tmp_path / "gray.png")
    done = ebmkit_command("classify", "hub:user/net", "gray.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "gray.png" in done.stdout
    before = sorted((tmp_path / "cache").rglob("*"))
    done = ebmkit_command(
        "sample", "hub:user/net", "--sampler", "langevin", "--steps", "2", "--count", "2",
        "--image-size", "8", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("runs/pretrained/user--net/samples/*/sampling.json"))
    assert sorted((tmp_path / "cache").rglob("*")) == before


def test_a_damaged_download_is_refused(server):
    model = small_model()
    files = model_files(model, model.built_from, model.card)
    weights = bytearray(files["model.safetensors"])
    weights[-1] ^= 1
    server.repositories["user/net"] = files | {"model.safetensors": bytes(weights)}
    with pytest.raises(UserError, match="is damaged"):
        ebmkit.load("hub:user/net")


def test_errors_are_one_sentence(server, tmp_path, monkeypatch):
    for name, message in [
        ("hub:user/absent", "cannot fetch 'hub:user/absent'"),
        ("hub:net", "is no repository on the hub: its name is like hub:owner/name"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            ebmkit.load(name)
        assert "\n" not in str(caught.value)
    model = small_model()
    with pytest.raises(UserError, match="is no repository on the hub"):
        model.push_to_hub("net")
    model.card = None
    with pytest.raises(UserError, match="stored with its model card"):
        model.push_to_hub("user/net")
    server.repositories["user/notes"] = {"README.md": b"text"}
    with pytest.raises(UserError, match=r"holds no model\.json"):
        ebmkit.load("hub:user/notes")


def test_without_a_network_the_cached_model_is_loaded_and_others_are_refused(server, monkeypatch):
    from huggingface_hub import constants

    small_model().push_to_hub("user/net")
    ebmkit.load("hub:user/net")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # no one listens there
    ebmkit.load("hub:user/net")
    with pytest.raises(UserError, match="cannot fetch 'hub:user/other'") as caught:
        ebmkit.load("hub:user/other")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot upload to 'user/net'"):
        small_model().push_to_hub("user/net")


def test_a_saved_model_is_loaded_and_never_overwrites(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path / "net")
    y = torch.rand(2, 1, 8, 8)
    loaded = JointModel.from_pretrained(tmp_path / "net")
    assert torch.equal(loaded.score(y), model.score(y))
    with pytest.raises(UserError, match="choose a new or empty folder"):
        model.save_pretrained(tmp_path / "net")
