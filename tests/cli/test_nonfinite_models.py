"""NaN in weights and outputs: warnings and errors name the file."""

import math
import warnings

import pytest
import torch
from ebmkit_tests.support.command_line import ebmkit_command

import ebmkit
from ebmkit.card import ModelCard
from ebmkit.data.images import write_image
from ebmkit.metrics import predict
from ebmkit.models import save_model
from ebmkit.models.config import ModelConfig


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a run whose first weight is NaN, an intact run, and an image."""
    folder = tmp_path_factory.mktemp("nonfinite")
    config = ModelConfig.model_validate(
        {
            "backbone": {"kind": "gradresnet", "width": 8},
            "in_channels": 1,
            "num_classes": 10,
            "reference_size": (8, 8),
        }
    )
    card = ModelCard(
        dataset="digits",
        objective="ce+dsm",
        image_size=(8, 8),
        channels=1,
        class_names=[str(i) for i in range(10)],
        sigma_range=(0.0, 0.4),
        classifies=True,
    )
    for name, has_nan in (("intact", False), ("with-nan", True)):
        torch.manual_seed(0)
        model = config.build()
        with torch.no_grad():
            if has_nan:
                next(model.parameters()).view(-1)[0] = math.nan
        (folder / name).mkdir()
        save_model(folder / name, model, config, card)
    write_image(torch.rand(1, 8, 8), folder / "a.png")
    return folder


def test_load_warns_of_nan_weights_by_name(home):
    with pytest.warns(UserWarning, match=r"NaN or Inf \(backbone\.stem\.weight\): training diverg"):
        ebmkit.load(home / "with-nan")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ebmkit.load(home / "intact")


@pytest.mark.filterwarnings("default:.*holds weights that are NaN or Inf")
@pytest.mark.parametrize(
    "command",
    [("classify", "a.png"), ("denoise", "a.png", "--out", "new"),
     ("denoise", "a.png", "--sigma", "25/255", "--out", "new")],
)  # fmt: skip
def test_commands_refuse_nan_outputs(home, command):
    name, *rest = command
    result = ebmkit_command(name, "with-nan", *rest, "--device", "cpu", cwd=home)
    assert result.returncode == 2
    assert (
        "warning: 'with-nan/model.safetensors' holds weights that are NaN or Inf" in result.stderr
    )
    last = result.stderr.splitlines()[-1]
    assert "the model 'with-nan' gives NaN or Inf for 'a.png'" in last
    assert "nan" not in result.stdout
    assert not (home / "new" / "a.png").exists()
    assert ebmkit_command(name, "intact", *rest, "--device", "cpu", cwd=home).returncode == 0
    (home / "new" / "a.png").unlink(missing_ok=True)


def test_prediction_for_nan_logits_equals_no_label():
    """`argmax` returns the index of the first NaN: an image of class 0 would count as correct."""
    logits = torch.tensor([[math.nan] * 3, [0.0, math.nan, 1.0], [0.0, 2.0, -math.inf]])
    assert predict(logits).tolist() == [-1, -1, 1]


def test_error_message_keeps_only_its_own_line_breaks():
    error = ebmkit.UserError("one\nsentence", ["two", "three\x1b"])
    assert str(error) == "one\\nsentence\n  two\n  three\\x1b"
