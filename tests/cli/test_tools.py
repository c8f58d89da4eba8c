"""Import of published weights, and their evaluation on images of several sizes."""

import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image

import ebmkit
from ebmkit import UserError
from ebmkit.cli.evaluate import evaluate
from ebmkit.cli.tools import import_
from ebmkit.data import load_dataset
from ebmkit.evaluation.suite import noisy_batches
from ebmkit.metrics import psnr
from ebmkit.models.importing import import_checkpoint

SIGMA = 25 / 255


def published(depth: int = 17, width: int = 4) -> dict[str, torch.Tensor]:
    """Random weights of a gray DnCNN (convolutions and ReLU, no norms), with the names of KAIR."""
    generator = torch.Generator().manual_seed(0)
    widths = [1, *[width] * (depth - 1), 1]
    state = {}
    for i, (inner, outer) in enumerate(itertools.pairwise(widths)):
        state[f"model.{2 * i}.weight"] = torch.randn(outer, inner, 3, 3, generator=generator) / 4
        state[f"model.{2 * i}.bias"] = torch.randn(outer, generator=generator) / 20
    return state


def network(state, y):
    """y minus the residual, by the definition of DnCNN."""
    h, count = y, len(state) // 2
    for i in range(count):
        weight, bias = state[f"model.{2 * i}.weight"], state[f"model.{2 * i}.bias"]
        h = torch.nn.functional.conv2d(h, weight, bias, padding=1)
        h = h.relu() if i < count - 1 else h
    return y - h


@pytest.fixture
def pictures(tmp_path):
    """A folder with images of two sizes, portrait and landscape."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, shape in (("a", (20, 30)), ("b", (30, 20)), ("c", (20, 30))):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


@pytest.mark.parametrize("prefix", ["", "module."])
def test_imported_weights_compute_the_same_function(tmp_path, prefix):
    state = published()
    torch.save({prefix + name: value for name, value in state.items()}, tmp_path / "dncnn_25.pth")
    import_checkpoint(
        tmp_path / "dncnn_25.pth", tmp_path / "run", "denoiser", sigma_range=(SIGMA, SIGMA)
    )
    model = ebmkit.load(tmp_path / "run")
    y = torch.rand(2, 1, 13, 17)
    torch.testing.assert_close(model.denoise_blind(y)[0], network(state, y))
    torch.testing.assert_close(model.denoise(y, SIGMA), network(state, y))  # sigma has no effect
    assert model.card.sigma_range == (SIGMA, SIGMA)


@pytest.mark.slow
def test_psnr_protocol_on_images_of_several_sizes(tmp_path, pictures, capsys):
    """The reported PSNR is the mean of the PSNR of each full-size image, with clipped output."""
    state = published()
    torch.save(state, tmp_path / "dncnn_25.pth")
    import_(tmp_path / "dncnn_25.pth", out=tmp_path / "run", sigma=["25/255"])
    evaluate(tmp_path / "run", suite="denoise", dataset="pictures", data_dir=pictures)
    (path,) = (tmp_path / "run/evaluation").rglob("denoise.json")
    document = json.loads(path.read_text())
    images = load_dataset("pictures", pictures, "test")
    expected = [
        float(psnr(network(state, batch.y).clamp(0, 1), batch.x))
        for batch in noisy_batches(images, SIGMA)
    ]
    assert len(expected) == document["images"] == 3
    assert document["psnr"]["25"] == pytest.approx(np.mean(expected), abs=1e-4)
    assert document["knows_sigma"]["unconditional"] == "unused"
    assert "blind" not in document["denoisers"]  # it does not estimate sigma
    assert (path.parent / "denoising.png").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model.0.weight": torch.zeros(4, 1, 3, 3)}, "model"),
        ({"fc.weight": torch.zeros(3)}, "'fc.weight' is no parameter"),
        ({"model.0.weight": 3}, r"model\.0\.weight.* is no tensor"),
        ({}, "holds no state dict"),
    ],
)
def test_files_without_matching_weights_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=message):
        import_checkpoint(tmp_path / "weights.pth", tmp_path / "run", "denoiser")
    assert not (tmp_path / "run").exists()


def test_files_that_would_execute_code_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"model.0.weight": Evil()}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="read safely"):
        import_checkpoint(tmp_path / "weights.pth", tmp_path / "run", "denoiser")
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(UserError, match="read safely"):
        import_checkpoint(tmp_path / "text.pth", tmp_path / "run", "denoiser")


def test_existing_folder_stays_unchanged(tmp_path):
    torch.save(published(), tmp_path / "weights.pth")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("mine")
    with pytest.raises(UserError, match="exists: choose another --out"):
        import_checkpoint(tmp_path / "weights.pth", tmp_path / "run", "denoiser")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["mine"]


def test_pictures_data_set_refuses_training_resizing_and_mixed_channels(pictures, tmp_path):
    with pytest.raises(UserError, match="train on data set 'folder'"):
        load_dataset("pictures", pictures, "train")
    with pytest.raises(UserError, match="remove the image size"):
        load_dataset("pictures", pictures, "test", image_size=16)
    Image.new("RGB", (8, 8), "red").save(pictures / "colour.png")
    with pytest.raises(UserError, match="keep them apart"):
        load_dataset("pictures", pictures, "test")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        load_dataset("pictures", tmp_path / "empty", "test")
