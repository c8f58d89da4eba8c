"""Models and pictures whose numbers are not finite: commands say so by name."""

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
def place(tmp_path_factory):
    """A run whose first weight is not a number, one that is whole, and a picture."""
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
    for name, spoilt in (("whole", False), ("spoilt", True)):
        torch.manual_seed(0)
        model = config.build()
        with torch.no_grad():
            if spoilt:
                next(model.parameters()).view(-1)[0] = math.nan
        (folder / name).mkdir()
        save_model(folder / name, model, config, card)
    write_image(torch.rand(1, 8, 8), folder / "a.png")
    return folder


def test_weights_that_are_not_finite_are_warned_of_by_name(place):
    with pytest.warns(UserWarning, match=r"not finite \(backbone\.stem\.weight\): training diverg"):
        ebmkit.load(place / "spoilt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ebmkit.load(place / "whole")


@pytest.mark.filterwarnings("default:.*holds weights that are not finite")
@pytest.mark.parametrize(
    "command",
    [("classify", "a.png"), ("denoise", "a.png", "--out", "new"),
     ("denoise", "a.png", "--sigma", "25/255", "--out", "new")],
)  # fmt: skip
def test_commands_refuse_what_is_no_number(place, command):
    name, *rest = command
    result = ebmkit_command(name, "spoilt", *rest, "--device", "cpu", cwd=place)
    assert result.returncode == 2
    assert "warning: 'spoilt/model.safetensors' holds weights that are not finite" in result.stderr
    last = result.stderr.splitlines()[-1]
    assert "the model in 'spoilt' gives NaN or Inf for 'a.png'" in last
    assert "nan" not in result.stdout
    assert not (place / "new" / "a.png").exists()
    assert ebmkit_command(name, "whole", *rest, "--device", "cpu", cwd=place).returncode == 0
    (place / "new" / "a.png").unlink(missing_ok=True)


def test_logits_that_are_no_numbers_are_right_for_no_label():
    """`argmax` takes the first nan for the largest: an image of class 0 would count as right."""
    logits = torch.tensor([[math.nan] * 3, [0.0, math.nan, 1.0], [0.0, 2.0, -math.inf]])
    assert predict(logits).tolist() == [-1, -1, 1]


def test_an_error_keeps_its_lines_and_no_more():
    error = ebmkit.UserError("one\nsentence", ["two", "three\x1b"])
    assert str(error) == "one\\nsentence\n  two\n  three\\x1b"
