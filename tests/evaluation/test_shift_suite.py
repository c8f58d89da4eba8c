"""What the suite shift says, against the same measures taken step by step."""

import json

import pytest
import torch
from mixture_world import Drawn
from rich.console import Console
from two_processes import run_shared

from ebmkit import UserError
from ebmkit.evaluation import EvaluationContext, evaluate, tables
from ebmkit.evaluation.corruptions import CORRUPTIONS, corrupt
from ebmkit.evaluation.shift import SHIFT, ShiftConfig
from ebmkit.metrics import psnr
from ebmkit.models.denoisers import DirectDenoiser
from ebmkit.plots import shift as shift_pictures


def measured(setting, **options):
    setting.options = {ShiftConfig: ShiftConfig(**options)}
    with torch.no_grad():
        return SHIFT.run(setting)


def numbers(value):
    if isinstance(value, dict):
        return [n for v in value.values() for n in numbers(v)]
    if isinstance(value, list):
        return [n for v in value for n in numbers(v)]
    return [value] if isinstance(value, (int, float)) else []


def test_rows_are_what_the_model_says_of_the_corrupted_images(network, squares):
    found = measured(EvaluationContext(network, squares, seed=3), strengths=[2, 5])
    assert list(found["corruptions"]) == list(CORRUPTIONS)
    x, labels, errors, rows = squares.images, squares.labels, [], [found["clean"]]
    for name, one in found["corruptions"].items():
        for strength, row in zip((2, 5), one["rows"], strict=True):
            constant = CORRUPTIONS[name].cifar[strength - 1]
            assert (row["strength"], row["constant"]) == (strength, constant)
            y = corrupt(x, name, constant, seed=3)
            confidence, predicted = network.logits(y).softmax(1).max(1)
            right = (predicted == labels).double()
            clean = network.denoise(y).clamp(0, 1)
            expected = {
                "accuracy": right,
                "confidence": confidence,
                "gap": confidence - right,
                "psnr_corrupted": psnr(y, x),
                "psnr": psnr(clean, x),
                "gain": psnr(clean, x) - psnr(y, x),
                "estimated_sigma": network.estimate_sigma(y),
                "rmse": (y - x).square().mean((1, 2, 3)).sqrt(),
            }
            for measure, values in expected.items():
                if name == "salt-and-pepper" and measure in ("psnr_corrupted", "psnr", "gain"):
                    values = values[psnr(y, x).isfinite()]  # few values of 64 are replaced
                    assert row[measure]["count"] == len(values)
                wanted = float(values.double().mean())
                assert row[measure]["value"] == pytest.approx(wanted, rel=1e-4, abs=1e-6)
            errors.append(1 - row["accuracy"]["value"])
            rows.append(row)
    mean = sum(errors) / len(errors)
    clean_error = 1 - found["clean"]["accuracy"]["value"]
    assert found["mean_corruption_error"]["value"] == pytest.approx(mean)
    assert found["mean_error_increase"]["value"] == pytest.approx(mean - clean_error)
    accuracy, confidence = ([row[m]["value"] for row in rows] for m in ("accuracy", "confidence"))
    a = torch.tensor([[v, 1.0] for v in accuracy], dtype=torch.float64)
    line = torch.linalg.lstsq(a, torch.tensor(confidence, dtype=torch.float64)[:, None]).solution
    assert found["confidence_slope"] == pytest.approx(float(line[0]), rel=1e-6)


def test_unchanged_images_have_no_psnr(network):
    """Salt or pepper of 1 % leaves most images of 64 values as they are."""
    images = Drawn(torch.rand(30, 1, 8, 8), torch.arange(30) % 3)
    row = measured(
        EvaluationContext(network, images), corruptions=["salt-and-pepper"], strengths=[1]
    )
    (row,) = row["corruptions"]["salt-and-pepper"]["rows"]
    assert 3 < row["psnr_corrupted"]["count"] < 27  # 1 - 0.99^64 = 47 % change
    assert row["psnr"]["count"] == row["gain"]["count"] == row["psnr_corrupted"]["count"]
    assert row["psnr"]["value"] is not None
    assert row["accuracy"]["count"] == 30
    clean = measured(EvaluationContext(network, images), corruptions=["blur"], strengths=[1])[
        "clean"
    ]
    assert clean["psnr_corrupted"]["value"] is None
    assert clean["psnr"]["count"] == 30  # what denoising does to clean images


def test_batch_size_and_processes_change_nothing_but_rounding(network, squares):
    options = {"strengths": [5], "corruptions": ["poisson", "salt-and-pepper", "jpeg"]}
    setting = EvaluationContext(network, squares, batch_size=7)
    found = measured(setting, **options)
    shared = run_shared(SHIFT.run, setting)
    assert shared == [found, found]
    whole = measured(EvaluationContext(network, squares), **options)
    # float32 convolutions order their sums by the batch
    assert numbers(found) == pytest.approx(numbers(whole), rel=1e-3, abs=1e-4)


def test_a_plain_denoiser_is_measured_without_labels(squares):
    model = DirectDenoiser(Identity(), in_channels=1).eval()
    found = measured(EvaluationContext(model, squares), strengths=[3])
    assert "mean_corruption_error" not in found
    assert found["warnings"] == []
    for one in found["corruptions"].values():
        (row,) = one["rows"]
        assert "accuracy" not in row
        assert row["psnr"]["value"] == pytest.approx(row["psnr_corrupted"]["value"])
        assert row["gain"]["value"] == pytest.approx(0, abs=1e-5)


class Identity(torch.nn.Module):
    def forward(self, y, sigma=None):
        return y


def test_a_model_that_must_be_told_sigma_only_classifies(mixture, drawn):
    found = measured(
        EvaluationContext(mixture, drawn.first(50)), corruptions=["blur"], strengths=[1, 5]
    )
    (warning,) = found["warnings"]
    assert "cannot estimate it" in warning
    mild, strong = found["corruptions"]["blur"]["rows"]
    assert "psnr" not in strong
    assert mild["accuracy"]["value"] >= strong["accuracy"]["value"]
    with pytest.raises(UserError, match="leave out the suite shift"):
        SHIFT.check(mixture, Drawn(drawn.images, None))


def test_other_classes_leave_denoising(network, squares):
    other = Drawn(squares.images, squares.labels % 2, class_names=("a", "b"))
    found = measured(EvaluationContext(network, other), corruptions=["blur"], strengths=[1])
    assert "accuracy" not in found["clean"]
    assert any("has not the 3 classes" in line for line in found["warnings"])


def test_a_diverged_model_is_told(network, squares):
    next(network.parameters()).fill_(float("nan"))
    found = measured(
        EvaluationContext(network, Drawn(squares.images, None)), corruptions=["blur"], strengths=[1]
    )
    assert any("not finite on 30 images" in line for line in found["warnings"])
    (row,) = found["corruptions"]["blur"]["rows"]
    assert row["psnr"]["value"] is None


def test_confidence_slope_tells_who_notices(squares):
    from ebmkit.evaluation.shift import _slope

    def rows(pairs):
        return [{"accuracy": {"value": a}, "confidence": {"value": c}} for a, c in pairs]

    assert _slope(rows([(0.9, 0.8), (0.5, 0.4), (0.1, 0.0)])) == pytest.approx(1)
    assert _slope(rows([(0.9, 0.8), (0.5, 0.8), (0.1, 0.8)])) == pytest.approx(0)
    assert _slope(rows([(0.9, 0.8), (0.9, 0.4)])) is None


def test_files_table_and_bar(network, squares, tmp_path):
    few = {"strengths": [1, 5], "corruptions": ["blur", "salt-and-pepper"]}
    results = evaluate(network, squares, ["shift"], tmp_path, limit=6, options={"shift": few})
    document = json.loads((tmp_path / "shift.json").read_text())
    assert document["options"]["constants"] == "auto"
    assert document["constants"] == "cifar"
    assert list(document["corruptions"]) == few["corruptions"]
    pictures = {path.stem for path in tmp_path.glob("*.png")}
    assert pictures == {"shift", "shift-psnr", "shift-examples"}
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(*tables(results))
    console.file.close()
    text = console.export_text()
    assert "salt-and-pepper" in text
    assert "mean error" in text
    assert "…" not in text
    told = []
    setting = EvaluationContext(network, squares, advance=told.append)
    setting.options = {ShiftConfig: ShiftConfig(strengths=(1, 1), corruptions=("blur", "jpeg"))}
    setting.left = SHIFT.passes(setting) * 30
    with torch.no_grad():
        SHIFT.run(setting)
    assert sum(told) == 3 * 30
    assert setting.left == 0


def test_pictures_span_the_strengths_measured(network, squares, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(shift_pictures, "save_figure", lambda figure, path: drawn.append(figure))
    few = {"strengths": [1, 4], "corruptions": ["blur", "jpeg"]}
    results = evaluate(network, squares, ["shift"], tmp_path, limit=6, options={"shift": few})
    document = results["shift"].document
    first, second, _ = drawn
    for figure, ticks in ((first, ["clean", "1", "4"]), (second, ["1", "4"])):
        axes = figure.axes[0]
        assert [label.get_text() for label in axes.get_xticklabels()] == ticks
        assert axes.get_xlim() == pytest.approx((-0.3, len(ticks) - 0.7))
        assert "images" in figure.get_suptitle()
    points = first.axes[-1].collections[1].get_offsets().tolist()  # jpeg: confidence, accuracy
    rows = document["corruptions"]["jpeg"]["rows"]
    expected = [[100 * row[n]["value"] for n in ("confidence", "accuracy")] for row in rows]
    assert points == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"corruptions": ["fog"]}, "fog"),
        ({"corruptions": ["specle"]}, "did you mean 'speckle'"),
        ({"strengths": [6]}, "less than or equal to 5"),
        ({"strengths": []}, "at least 1 item"),
    ],
)
def test_illegal_settings_are_refused(options, words, network, squares, tmp_path):
    with pytest.raises(UserError, match=words):
        evaluate(network, squares, ["shift"], tmp_path, options={"shift": options})


def test_images_that_are_neither_gray_nor_colour_are_refused(network):
    with pytest.raises(UserError, match="has 2 channels"):
        SHIFT.check(network, Drawn(torch.rand(3, 2, 8, 8), None))
