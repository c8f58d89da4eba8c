"""Exported files, run by PyTorch or ONNX Runtime alone, give the model's values."""

import importlib.util
import itertools
import json
import sys

import pytest
import torch
from torch import nn

import ebmkit.export
from ebmkit import GaussianMixture, JointModel, ModelCard, UserError, create_model, save_model
from ebmkit.cli import main
from ebmkit.export import export
from ebmkit.models import Features, GradResNetConfig, LinearQuadraticHead, ModelConfig

ONNX = importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnxscript")
needs_onnx = pytest.mark.skipif(not ONNX, reason="needs the extra onnx")


class Small(nn.Module):
    """A backbone that is hard to export: stride 2 on odd sizes, a group norm, GELU."""

    num_features = 8

    def __init__(self, channels):
        super().__init__()
        self.convolution = nn.Conv2d(channels, 8, 3, 2, 1, bias=False)
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, y):
        return Features(nn.functional.gelu(self.norm(self.convolution(y))).mean((2, 3)))


class Counting(Small):
    """`Small`, with the number of images as a Python integer in its code."""

    def forward(self, y):
        return Features(super().forward(y).pooled.reshape(len(y), self.num_features))


def small(channels=1, backbone=Small, reference_size=(9, 6), num_classes=3):
    head = LinearQuadraticHead(8, num_classes)
    model = JointModel(backbone(channels), head, channels, reference_size)
    return model.eval().requires_grad_(False)


def run_alone(path, *inputs):
    """Outputs of an exported file, computed without ebmkit."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(*inputs)
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    names = [argument.name for argument in session.get_inputs()]
    feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    return tuple(torch.from_numpy(output) for output in session.run(None, feed))


def assert_equal(outputs, expected):
    """Equal in float32: another order of additions gives 1e-7 to 1e-5 of the largest value."""
    assert len(outputs) == len(expected)
    for output, value in zip(outputs, expected, strict=True):
        scale = float(value.abs().max())
        torch.testing.assert_close(output, value, rtol=0, atol=1e-4 * scale)


ONNX_ALONE = [needs_onnx, pytest.mark.slow]


@pytest.mark.parametrize(
    ("suffix", "channels"), [(".pt2", 1), pytest.param(".onnx", 3, marks=ONNX_ALONE)]
)
def test_classifiers_give_the_models_values_at_another_batch_size(tmp_path, suffix, channels):
    model, y = small(channels), torch.rand(4, channels, 9, 6)
    made = export(model, tmp_path / f"classifier{suffix}", "classifier")
    expected = (model(y).log_posterior(), model.log_density(y))
    assert_equal(run_alone(made.path, y), expected)
    assert made.inputs == {"y": ("batch", channels, 9, 6)}


@pytest.mark.parametrize(
    ("suffix", "channels"), [(".pt2", 1), pytest.param(".onnx", 3, marks=ONNX_ALONE)]
)
def test_denoisers_give_the_models_values_at_another_batch_size(tmp_path, suffix, channels):
    model, y, sigma = small(channels), torch.rand(4, channels, 9, 6), torch.rand(4) + 0.5
    made = export(model, tmp_path / f"denoiser{suffix}")
    assert_equal(run_alone(made.path, y, sigma), [model.denoise(y, sigma)])
    assert list(made.inputs) == ["y", "sigma"]
    assert made.differences["denoised"].largest < 1e-4


@pytest.mark.parametrize(
    ("suffix", "channels"),
    [pytest.param(".pt2", 1, marks=pytest.mark.slow), pytest.param(".onnx", 3, marks=ONNX_ALONE)],
)
def test_blind_denoisers_give_the_models_values(tmp_path, suffix, channels):
    model, y = small(channels), torch.rand(4, channels, 9, 6)
    made = export(model, tmp_path / f"blind{suffix}", "blind-denoiser")
    assert_equal(run_alone(made.path, y), [model.denoise(y), model.estimate_sigma(y)])


@pytest.mark.parametrize(
    ("channels", "name"),
    [
        pytest.param(1, "classifier.pt2", marks=pytest.mark.slow),
        pytest.param(3, "denoiser.onnx", marks=[needs_onnx, pytest.mark.slow]),
    ],
)
def test_exported_gradresnet_gives_the_models_values(tmp_path, channels, name):
    model = create_model(num_classes=3, in_channels=channels, width=8, image_size=8)
    what = name.split(".")[0]
    made = export(model, tmp_path / name, what)
    y, sigma = torch.rand(3, channels, 8, 8), torch.rand(3)
    with torch.no_grad():
        if what == "classifier":
            assert_equal(run_alone(made.path, y), [model(y).log_posterior(), model.log_density(y)])
        else:
            assert_equal(run_alone(made.path, y, sigma), [model.denoise(y, sigma)])


@pytest.mark.slow
def test_exported_mixture_gives_the_posterior_mean(tmp_path):
    mixture = GaussianMixture(torch.rand(3, 1, 2, 3), 0.1)
    path = export(mixture, tmp_path / "mixture.pt2", image_size=(2, 3), channels=1).path
    y, sigma = torch.rand(4, 1, 2, 3), torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert_equal(run_alone(path, y, sigma), [mixture.posterior_mean(y, sigma)])


@pytest.mark.slow
def test_export_for_images_larger_than_the_trained_ones(tmp_path):
    model = small(reference_size=(4, 4))  # log-densities are sums over tiles
    path = export(model, tmp_path / "denoiser.pt2", image_size=(12, 8)).path
    y, sigma = torch.rand(2, 1, 12, 8), torch.rand(2)
    assert_equal(run_alone(path, y, sigma), [model.denoise(y, sigma)])


@pytest.mark.parametrize("kernel", [1, 3, 7])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_convolution_backward_equals_autograd(kernel, stride):
    for (height, width), groups in itertools.product([(7, 8), (9, 10)], [1, 2]):
        x = torch.rand(2, 4, height, width, dtype=torch.float64, requires_grad=True)
        weight = torch.rand(6, 4 // groups, kernel, kernel, dtype=torch.float64)
        z = nn.functional.conv2d(x, weight, None, stride, kernel // 2, 1, groups)
        gradient = torch.rand_like(z)
        (expected,) = torch.autograd.grad(z, x, gradient)
        pair = [stride] * 2, [kernel // 2] * 2, [1, 1]
        mask = [True, False, False]
        found, *_ = ebmkit.export._convolution_backward(
            gradient, x, weight, None, *pair, False, [0, 0], groups, mask
        )
        torch.testing.assert_close(found, expected)


def test_model_that_depends_on_the_batch_size_needs_a_fixed_batch(tmp_path):
    model = small(backbone=Counting)
    with pytest.raises(UserError, match=r"number of images became a constant.*fixed batch"):
        export(model, tmp_path / "free.pt2")
    made = export(model, tmp_path / "two.pt2", batch=2)
    assert made.inputs == {"y": (2, 1, 9, 6), "sigma": (2,)}
    y, sigma = torch.rand(2, 1, 9, 6), torch.rand(2)
    assert_equal(run_alone(made.path, y, sigma), [model.denoise(y, sigma)])


@pytest.mark.slow
def test_file_contains_the_card_and_the_model_stays_unchanged(tmp_path):
    model = small().double().train()
    model.card = ModelCard(dataset="digits", image_size=(5, 7), channels=1, sigma_range=(0.1, 0.2))
    path = export(model, tmp_path / "denoiser.pt2").path
    description = {"ebmkit.json": ""}
    program = torch.export.load(path, extra_files=description)
    assert json.loads(description["ebmkit.json"])["card"]["dataset"] == "digits"
    assert program.example_inputs is None
    assert run_alone(path, torch.rand(1, 1, 5, 7), torch.ones(1))[0].dtype == torch.float32
    assert model.training
    assert model.head.density.weight.dtype == torch.float64


# --- wrong outputs -------------------------------------------------------------------------------


@pytest.mark.slow
@needs_onnx
def test_a_wrong_operation_leaves_no_file(tmp_path, monkeypatch):
    right = ebmkit.export._convolution_backward

    def wrong(*arguments):
        gradient, *rest = right(*arguments)
        return gradient * 1.001, *rest

    monkeypatch.setattr(ebmkit.export, "_convolution_backward", wrong)
    with pytest.raises(UserError, match=r"was not written, because its denoised differs"):
        export(small(), tmp_path / "denoiser.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_model_with_nan_outputs_leaves_no_file(tmp_path):
    model = small()
    model.head.density.weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"by nan of an image's largest value"):
        export(model, tmp_path / "classifier.pt2", "classifier")
    assert not list(tmp_path.iterdir())


# --- invalid arguments ---------------------------------------------------------------------------


def refusal(*arguments, **options):
    with pytest.raises(UserError) as caught:
        export(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_existing_files_and_missing_folders_are_refused(tmp_path):
    path = tmp_path / "denoiser.pt2"
    path.write_bytes(b"mine")
    assert "exists: choose another name" in refusal(small(), path)
    assert path.read_bytes() == b"mine"
    assert "there is no folder" in refusal(small(), tmp_path / "nowhere" / "denoiser.pt2")


@pytest.mark.parametrize("name", ["denoiser", "denoiser.pt", "denoiser.ONNX.gz"])
def test_unknown_suffixes_are_refused(tmp_path, name):
    message = refusal(small(), tmp_path / name)
    assert ".pt2 for PyTorch" in message
    assert ".onnx for ONNX" in message


def test_missing_extra_error_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = refusal(small(), tmp_path / "denoiser.onnx")
    assert message.endswith("pip install 'ebmkit-vision[onnx]'")


def test_unsupported_functions_of_a_model_are_refused(tmp_path):
    path = tmp_path / "model.pt2"
    assert "did you mean 'denoiser'?" in refusal(small(), path, "denoise")
    assert "cannot classify" in refusal(small(num_classes=0), path, "classifier")
    mixture = GaussianMixture(torch.rand(2, 1, 2, 2))
    message = refusal(mixture, path, "blind-denoiser", image_size=2, channels=1)
    assert "takes the noise level as an input" in message


def test_invalid_sizes_and_batches_are_refused(tmp_path):
    path = tmp_path / "model.pt2"
    unsized = small(reference_size=None)
    assert "give image_size" in refusal(unsized, path)
    assert "takes images of 1 channel(s), not 3" in refusal(unsized, path, image_size=4, channels=3)
    assert "1 channel(s) and 0x4 pixels" in refusal(unsized, path, image_size=(0, 4))
    assert "batch 0 must be at least 1" in refusal(small(), path, batch=0)


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_export_command(tmp_path, monkeypatch, capsys):
    """A network exported by `ebmkit export` gives the denoised images of its model."""
    backbone = GradResNetConfig(depth=10, width=8)
    shape = ModelConfig(backbone=backbone, in_channels=3, num_classes=3)
    card = ModelCard(image_size=(8, 8), channels=3, classifies=True)
    model = shape.build()
    save_model(tmp_path, model, shape, card)
    monkeypatch.chdir(tmp_path)

    def ended(*arguments):
        monkeypatch.setattr(sys, "argv", ["ebmkit", "export", ".", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0), capsys.readouterr()

    arguments = ("--out", "small.pt2", "--what", "denoiser", "--image-size", "6x4")
    code, printed = ended(*arguments)
    assert code == 0, printed.err
    assert "small.pt2: y (batch, 3, 6, 4), sigma (batch) -> denoised" in printed.out
    assert "compared with the model on 6 random images: denoised differs by" in printed.out
    y, sigma = torch.rand(3, 3, 6, 4), torch.rand(3)
    with torch.no_grad():
        assert_equal(run_alone(tmp_path / "small.pt2", y, sigma), [model.denoise(y, sigma)])
    code, printed = ended(*arguments)
    assert code == 2
    assert "'small.pt2' exists" in printed.err
    code, printed = ended("--out", "other.pt2", "--image-size", "6:4")
    assert code == 2
    assert "image size '6:4' must be H or HxW" in printed.err
