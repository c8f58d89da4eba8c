"""Suite ``robustness-grid``: accuracy of known classifiers, columns, names, errors."""

import json
import math

import pytest
import torch
from ebmkit_tests.support.command_line import ebmkit_command

from ebmkit import GaussianMixture, UserError
from ebmkit.card import ModelCard
from ebmkit.data import ImageSet
from ebmkit.evaluation import evaluate, tables
from ebmkit.evaluation.robustness_grid import ROBUSTNESS_GRID, THESIS, column_names, trained
from ebmkit.evaluation.runner import parse_options
from ebmkit.evaluation.suite import EvaluationContext
from ebmkit.models import ModelConfig, save_model
from ebmkit.models.config import create_model

SHAPE = (1, 2, 2)


def images(values):
    """Constant images of these gray values (255ths); label 1 above 127."""
    pixels = torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, *SHAPE)
    labels = (torch.tensor(values) > 127).long()
    return ImageSet(pixels.contiguous(), labels, ("dark", "light"), "gray", "test")


def gray_classifier(threshold=0.5):
    """Two Gaussians with constant means: the boundary is the hyperplane of this mean gray value."""
    means = torch.tensor([threshold - 0.25, threshold + 0.25])[:, None, None, None].expand(
        2, *SHAPE
    )
    model = GaussianMixture(means.contiguous(), 0.1)
    model.card = ModelCard(objective="ce", channels=1, classifies=True)
    return model


def table_text(document):
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as capture:
        console.print(tables({"robustness-grid": document})[0])
    return capture.get()


def test_accuracy_is_the_share_of_images_farther_from_the_boundary(tmp_path):
    """A constant image of gray value g has l2 distance |g - 1/2| sqrt(d) to the boundary."""
    values = [10, 60, 100, 120, 135, 160, 200, 250]
    distance = (torch.tensor(values) / 255 - 0.5).abs() * 2
    radii = [0.1, 0.3, 0.6]
    options = {"robustness-grid": {"epsilons": radii}}
    found = evaluate(
        gray_classifier(), images(values), ["robustness-grid"], tmp_path, options=options
    )
    document = found["robustness-grid"].document
    (column,) = document["columns"]
    expected = [(distance > r).double().mean().item() for r in [0.0, *radii]]
    assert [e["value"] for e in column["accuracy"]] == expected
    assert column["trained"] == ("", 0.0) or column["trained"] == ["", 0.0]
    for estimate in column["accuracy"]:
        assert estimate["low"] <= estimate["value"] <= estimate["high"]
    assert document["epsilons"] == [0.0, *radii]
    assert document["thesis"] == []
    assert document["pictures"] == ["robustness-grid.png"]
    text = table_text(found["robustness-grid"])
    assert "trained 0" in text
    assert "100.0 (68 to 100)" in text
    linf = {"robustness-grid": {"norm": "linf", "epsilons": [r / 2 for r in radii]}}
    again = evaluate(gray_classifier(), images(values), ["robustness-grid"], tmp_path, options=linf)
    (column,) = again["robustness-grid"].document["columns"]
    assert [e["value"] for e in column["accuracy"]] == expected  # l2 distance: sqrt(d) = 2 times


def run_folder(path, attack="", objective="adv", **config):
    torch.manual_seed(0)
    options = {"num_classes": 2, "in_channels": 1} | config
    model = create_model("mlp", head="logit", width=8, **options)
    document = ModelConfig.model_validate(
        {"backbone": {"kind": "mlp", "width": 8, "kernel": 7}, "head": {"kind": "logit"}} | options
    )
    card = ModelCard(objective=objective, channels=options["in_channels"], attack=attack)
    card.classifies = True
    path.mkdir()
    save_model(path, model, document, card)
    return str(path)


def test_other_runs_are_columns_in_order_of_their_training_attack(tmp_path):
    beside = [
        run_folder(tmp_path / "strong", "l2 1"),
        run_folder(tmp_path / "weak", "l2 0.25"),
        run_folder(tmp_path / "signs", "linf 0.0313725"),
        run_folder(tmp_path / "plain", objective="ce"),
        run_folder(tmp_path / "imported", objective=""),
    ]
    options = {"robustness-grid": {"beside": beside, "epsilons": [0.25], "steps": 2}}
    own = gray_classifier()
    own.card = own.card.model_copy(update={"dataset": "gray"})
    found = evaluate(own, images([60, 200]), ["robustness-grid"], tmp_path / "e", options=options)
    document = found["robustness-grid"].document
    assert column_names(document) == [
        "trained 0 (this run)",
        "trained 0 (plain)",
        "trained l_inf 8/255",
        "trained 0.25",
        "trained 1",
        "(imported)",
    ]
    assert [c["name"] for c in document["columns"]] == [
        "",
        "plain",
        "signs",
        "weak",
        "strong",
        "imported",
    ]
    json.loads(found["robustness-grid"].path.read_text())


def test_training_attack_is_read_from_card():
    assert trained(ModelCard(objective="adv", attack="l2 0.5")) == ("l2", 0.5)
    assert trained(ModelCard(objective="ce+dsm")) == ("", 0.0)
    assert trained(ModelCard()) is None
    assert trained(None) is None
    # cards saved before the field existed
    assert ModelCard.model_validate({"objective": "ce"}).attack == ""


def test_table_of_thesis_is_shown_for_cifar10(tmp_path):
    source = images([60, 200])
    cifar = ImageSet(source.images, source.labels, source.class_names, "cifar10", "test")
    options = {"robustness-grid": {"steps": 1}}
    found = evaluate(gray_classifier(), cifar, ["robustness-grid"], tmp_path, options=options)
    text = table_text(found["robustness-grid"])
    assert "thesis 0.25" in text
    assert "70.17" in text
    assert len(THESIS) == 20
    assert THESIS[1.0, 0.5] == 0.4048


def test_illegal_runs_and_settings_are_refused_in_prepare(tmp_path):
    def prepare(run, **more):
        options = parse_options({"robustness-grid": {"beside": [run]} | more}, ["robustness-grid"])
        ROBUSTNESS_GRID.prepare(
            EvaluationContext(gray_classifier(), images([60, 200]), options=options)
        )

    with pytest.raises(UserError, match="there is no run folder or pretrained model 'nowhere'"):
        prepare("nowhere")
    with pytest.raises(UserError, match=r"beside: .*has 3 classes and the evaluated model 2"):
        prepare(run_folder(tmp_path / "three", num_classes=3))
    with pytest.raises(UserError, match="takes images of 3 channel"):
        prepare(run_folder(tmp_path / "colour", in_channels=3))
    with pytest.raises(UserError, match="norm = 'l3' is not legal"):
        prepare("nowhere", norm="l3")


@pytest.mark.slow
def test_robust_run_has_higher_accuracy_than_plain_run_on_command_line(tmp_path):
    """On digits, adversarial training raises the accuracy under its own attack by over 20 %."""
    for objective in ("adv", "ce"):
        ended = ebmkit_command(
            "train", "--recipe=digits-robust", f"--objective={objective}", "--steps=120",
            "--set=terms.adv.warmup_steps=90", "--no-evaluate", f"--out={objective}", cwd=tmp_path,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
    arguments = ["--suite=robustness-grid", "--set=robustness-grid.beside=[ce]"]
    arguments += ["--set=robustness-grid.epsilons=[0.5]"]
    ended = ebmkit_command("evaluate", "adv", *arguments, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "trained 0.5" in ended.stdout
    (path,) = (tmp_path / "adv" / "evaluation").rglob("robustness-grid.json")
    plain, robust = json.loads(path.read_text())["columns"]
    assert [plain["trained"], robust["trained"]] == [["", 0], ["l2", 0.5]]
    gap = robust["accuracy"][1]["value"] - plain["accuracy"][1]["value"]
    assert gap > 0.2
    assert not math.isnan(gap)
