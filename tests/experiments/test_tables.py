"""Tables: published values, configurations of their rows, and orderings in the report."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ebmkit import UserError
from ebmkit.experiments import EXPERIMENTS, SCALES, TABLES, ExperimentRuns, experiments_of
from ebmkit.experiments.report import VariantResult
from ebmkit.experiments.tables import (
    CLAIMS,
    GRID,
    JOINT,
    ROWS,
    difference,
    figures_by_seed,
    figures_of,
    run_table,
    table_document,
    table_text,
)
from ebmkit.models import ModelConfig
from ebmkit.training.config import differences, flat

ALL = [*TABLES.values(), CLAIMS]

PAPER = {  # arXiv 2410.03505, tables 1 to 3: accuracy, PSNR at 15, 25, 50, hours
    "resnet18": (96.5, None, None, None, 0.7),
    "gradresnet-ce": (96.1, None, None, None, 0.7),
    "dncnn": (None, 32.05, 29.07, 25.23, 0.8),
    "drunet": (None, 32.12, 29.20, 25.52, 0.9),
    "gradresnet-dsm": (None, 32.21, 29.28, 25.51, 1.3),
    "jem": (92.9, None, None, None, 36),
    "joint": (96.3, 31.90, 29.00, 25.25, 1.3),
    "imagenet-resnet18": (69.8, None, None, None, 96),
    "imagenet-joint": (68.6, 34.59, 31.94, 27.17, 208),
    "relu": (92.0, 29.59, 24.90, 17.11, None),
    "batch": (11.9, 24.33, 20.84, 18.06, None),
    "bias": (95.9, 31.95, 29.03, 25.30, None),
    "no-side": (94.0, 31.86, 28.95, 25.17, None),
}


def test_rows_have_the_published_values():
    found = {
        row.name: tuple(row.paper.get(m) for m in ("accuracy", "15", "25", "50", "hours"))
        for table in TABLES.values()
        for row in table.variants
        if row.paper
    }
    assert found == PAPER


RESNET = {"backbone": "resnet18", "head": "logit", "model.head.bias": True, "objective": "ce"}
DENOISING = {"objective": "dsm-mean"}
IMAGENET_RESNET = RESNET | {"backbone": "resnet18-imagenet"}
BIASES = {"model.backbone.bias": True, "model.head.bias": True}
EQUAL_NOISE = {
    "streams.classify.noise.min": pytest.approx(1 / 255),
    "streams.classify.noise.max": pytest.approx(100 / 255),
}
AT_FULL = {  # row of a table -> what differs from the paper's recipe of its data set
    "resnet18": RESNET,
    "gradresnet-ce": {"objective": "ce"},
    "dncnn": DENOISING | {"backbone": "dncnn20"},
    "drunet": DENOISING | {"backbone": "drunet-blind"},
    "drunet-map": DENOISING | {"backbone": "drunet"},
    "gradresnet-dsm": DENOISING,
    "gs-drunet": DENOISING | {"backbone": "gs-drunet"},
    "gradncnn": DENOISING | {"backbone": "gradncnn", "model.backbone.width": 128},
    "jem": {},
    "joint": {},
    "joint-sum": {"objective": "ce+dsm-sum"},
    "joint-balanced": {"objective": "ce+dsm"},
    "joint-shortcut-norm": {"model.backbone.shortcut_norm": True},
    "imagenet-resnet18": IMAGENET_RESNET,
    "imagenet-joint": {},
    "relu": {"model.backbone.activation": "relu"},
    "batch": {"model.backbone.norm": "batch"},
    "bias": BIASES,
    "no-side": {"model.backbone.side_connections": False},
    "ce-cdsm": {"objective": "ce+cdsm-mean"},
    "ce-dsm-cdsm": {"objective": "ce+dsm-mean+cdsm-mean"},
    "no-mix": {"streams.classify.augmentation.mix": "none"},
    "equal-noise": EQUAL_NOISE,
    "norm-everywhere": {"model.backbone.norm_everywhere": True},
    "scale-norm": {"model.backbone.norm": "scale"},
}


def test_rows_at_full_scale_are_the_published_recipes_with_the_named_differences():
    runs = ExperimentRuns(Path("out"), SCALES["full"])
    found = {}
    for table in ALL:
        for row in runs.distinct([row for row in table.variants if row.run is None]):
            recipe = {"jem": "jem"}.get(row.name, f"cdn-{row.family}")
            assert runs.scale.recipe_of(row) == recipe, row.name
            found[row.name] = {key: own for key, (_, own) in runs.differences(row).items()}
    assert found == AT_FULL


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("target", [name for name, one in EXPERIMENTS.items() if one.variants])
def test_rows_differ_from_their_recipe_in_nothing_that_they_do_not_list(target, scale):
    """Some fields follow from others, as settings of Muon from the choice of AdamW."""
    runs = ExperimentRuns(Path("out"), SCALES[scale])
    for row in EXPERIMENTS[target].variants:
        if row.run is None:
            listed = flat(runs.scale.differences(row)).keys()
            follow = {"model.backbone.class_conditional", "dataset.hold_out"}
            if "optimizer.kind" in listed:
                follow |= {"optimizer.adamw_lr", "optimizer.nesterov"}
            assert runs.differences(row).keys() <= listed | follow, row.name


@pytest.mark.parametrize("scale", SCALES)
def test_ablations_differ_from_joint_only_in_the_named_settings(scale):
    runs = ExperimentRuns(Path("out"), SCALES[scale])
    base = runs.config(JOINT).model_dump(mode="json")
    for name in ("relu", "batch", "bias", "no-side", "scale-norm", "norm-everywhere", "ce-cdsm"):
        own = runs.config(ROWS[name]).model_dump(mode="json")
        assert differences(base, own).keys() == AT_FULL[name].keys(), name


def test_rows_that_equal_an_earlier_row_are_left_out():
    for scale, absent in [
        ("full", {"joint-mean", "joint-no-shortcut-norm"}),
        ("cpu", {"joint-balanced", "joint-shortcut-norm"}),
    ]:
        runs = ExperimentRuns(Path("out"), SCALES[scale])
        rows = TABLES["table1"].variants
        assert {row.name for row in rows} - {row.name for row in runs.distinct(rows)} == absent
    with pytest.raises(
        UserError, match="'joint-balanced' of table1 has the configuration of anoth"
    ):
        run_table(TABLES["table1"], runs, ["joint-balanced"])


@pytest.mark.parametrize("scale", SCALES)
def test_rows_share_a_run_folder_if_and_only_if_configurations_are_equal(scale):
    """Rows with one folder have one configuration; different folders have different ones."""
    runs = ExperimentRuns(Path("out"), SCALES[scale])
    configs = {}
    for row in (*(row for table in ALL for row in table.variants), *GRID):
        if row.run is None:
            dump = str(runs.config(row).model_dump(mode="json"))
            assert configs.setdefault((row.family, row.folder), dump) == dump, row.name
    rows = [row for table in ALL for row in runs.distinct(table.variants)]
    folders = {(row.family, row.folder) for row in (*rows, *GRID)}
    assert len({configs[own] for own in folders}) == len(folders)


@pytest.mark.parametrize(("name", "parameters"), [("dncnn", 669_376), ("gradncnn", 911_003)])
def test_full_scale_denoisers_have_the_published_parameter_counts(name, parameters):
    """The recipe's width of 64 applies to DnCNN, not to GraDnCNN, which has 128."""
    config = ExperimentRuns(Path("out"), SCALES["full"]).config(TABLES["table1"].variant(name))
    network = ModelConfig.model_validate(config.model.model_dump() | {"in_channels": 3}).build()
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_unknown_names_of_experiments_and_rows_suggest_the_nearest():
    for name, only, message in [
        ("tabel1", [], "did you mean 'table1'"),
        ("table1", ["jonit"], "unknown row of table1 'jonit': did you mean 'joint'"),
        ("all", ["joint"], "picks rows of one target"),
        ("fig1", ["joint"], "has no rows"),
    ]:
        with pytest.raises(UserError, match=message):
            experiments_of(name, only)
    assert experiments_of("all", []) == list(EXPERIMENTS)


def _result(name: str, *seeds: int, images: int = 200, **means: float) -> VariantResult:
    """Results with values by image around ``means``; each seed adds a tenth of its number."""
    by_seed, values, rng = {}, {}, np.random.default_rng(0)
    noise = torch.from_numpy(rng.standard_normal(images))
    for seed in seeds:
        columns = {
            f"unconditional/{m[1:]}": mean + seed / 10 + noise
            for m, mean in means.items()
            if m != "accuracy"
        }
        right = torch.arange(images) < round(means["accuracy"] * images / 100)
        values[seed] = {"classify": {"right/0": right}, "denoise": columns}
        share = float(right.double().mean())
        psnr = {
            key.split("/")[1]: {"value": float(own.mean()), "low": 0.0, "high": 99.0}
            for key, own in columns.items()
        }
        by_seed[seed] = {
            "classify": {"accuracy": share, "accuracy_interval": [share - 0.01, share + 0.01]},
            "denoise": {"denoisers": {"unconditional": {"psnr": psnr}}},
        }
    variant = TABLES["table3"].variant(name)
    facts = {seed: {"seconds": 3600.0} for seed in seeds}
    return VariantResult(variant, by_seed=by_seed, facts_by_seed=facts, image_values=values)


def _report(*results: VariantResult):
    about = {"about": "", "dataset": "cifar10", "notes": [], "command": ""}
    return table_document(TABLES["table3"], "cpu", results, about)


def test_orderings_are_reported_as_holds_reversed_or_open():
    report = _report(
        _result("joint", 0, 1, 2, accuracy=60, p15=30.0, p25=27.0),
        _result("relu", 0, 1, 2, accuracy=60, p15=25.0, p25=27.0),
        _result("no-side", 0, 1, 2, accuracy=75, p15=30.5),
    )
    verdicts = {(o["worse"], o["metric"]): o["verdict"] for o in report["orderings"]}
    assert verdicts == {
        ("relu", "accuracy"): "open",
        ("relu", "15"): "holds",
        ("relu", "25"): "open",
        ("no-side", "accuracy"): "reversed",
        ("no-side", "15"): "reversed",
    }
    (row,) = [o for o in report["orderings"] if (o["worse"], o["metric"]) == ("relu", "15")]
    assert row["paper"] == pytest.approx(31.90 - 29.59)
    assert row["ours"] == pytest.approx(5.0)
    assert (row["seeds"], row["images"]) == ([0, 1, 2], 200)
    assert "| joint | relu | PSNR at 15/255, dB | +5.00 | +2.31 | < 0.001 | holds |" in table_text(
        report
    )


def test_differences_are_paired_by_seed_and_image():
    """PSNRs spread by 1 dB over images and 0.1 over seeds, their differences by nothing."""
    a = _result("joint", 0, 1, 2, accuracy=60, p15=30.0)
    b = _result("relu", 2, 1, accuracy=60, p15=29.99)
    found = difference(a, b, "15")
    assert found["seeds"] == [1, 2]
    assert found["ours"] == pytest.approx(0.01)
    assert found["verdict"] == "holds"
    assert difference(b, a, "15")["verdict"] == "reversed"
    assert difference(a, _result("bias", 7, accuracy=60, p15=29.0), "15") is None
    other_images = _result("relu", 0, 1, 2, images=100, accuracy=60, p15=29.0)
    found = difference(a, other_images, "15")
    assert found["images"] is None
    assert found["p_images"] is None
    assert found["ours"] == pytest.approx(np.mean(_psnr(a)) - np.mean(_psnr(other_images)))


def _psnr(result):
    return [figures["15"]["value"] for figures in figures_by_seed(result).values()]


def test_cells_are_mean_and_sample_deviation_over_seeds():
    result = _result("joint", 0, 1, 4, accuracy=60, p15=30.0)
    cell = figures_of(result)["15"]
    assert cell["seeds"] == 3
    assert cell["value"] == pytest.approx(np.mean(_psnr(result)))
    assert cell["sd"] == pytest.approx(np.std([0.0, 0.1, 0.4], ddof=1))
    text = table_text(_report(replace(result, missing={5: "not run yet"})))
    assert f"{cell['value']:.2f} ± {cell['sd']:.2f} (31.90)" in text
    assert "GradResNet, 3 of 4 seeds" in text
    assert "mean ± standard deviation over 3 seeds" in text


def test_one_seed_decides_nothing():
    report = _report(
        _result("joint", 0, accuracy=60, p15=30.0), _result("relu", 0, accuracy=60, p15=25.0)
    )
    verdicts = {o["metric"]: o["verdict"] for o in report["orderings"]}
    assert verdicts == {"accuracy": "open", "15": "open (one seed)"}
    text = table_text(report)
    assert "the spread over training runs is unknown" in text
    assert "±" not in text
