"""Tables: published values, configurations of their rows, and orderings in the report."""

import copy
from pathlib import Path

import pytest

from ebmkit import UserError
from ebmkit.experiments import EXPERIMENTS, SCALES, TABLES, ExperimentRuns, experiments_of
from ebmkit.experiments.report import VariantResult
from ebmkit.experiments.tables import CLAIMS, GRID, JOINT, table_document, table_text
from ebmkit.models import ModelConfig
from ebmkit.training.config import difference

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


@pytest.mark.parametrize("scale", SCALES)
def test_ablations_differ_from_joint_only_in_the_named_settings(scale):
    runs = ExperimentRuns(Path("out"), SCALES[scale])
    base = runs.config(JOINT).model_dump(mode="json")
    expected = {
        "relu": {"model.backbone.activation"},
        "batch": {"model.backbone.norm"},
        "bias": {"model.backbone.bias", "model.head.bias"},
        "no-side": {"model.backbone.side_connections"},
        "scale-norm": {"model.backbone.norm"},
        "ce-cdsm": {"objective"},
        "mix": {"streams.classify.augmentation.mix"},
        "norm-everywhere": {"model.backbone.norm_everywhere"},
        "joint-mean": {"objective"},
    }
    for table in ALL:
        for row in table.variants:
            if row.name in expected:
                own = runs.config(row).model_dump(mode="json")
                assert _differing(base, own) == expected[row.name], row.name


def _differing(old: dict, new: dict) -> set[str]:
    old, new, found = copy.deepcopy(old), copy.deepcopy(new), set()
    while (first := difference(old, new)) is not None:
        key = first[0]
        found.add(key)
        for tree in (old, new):
            *path, last = key.split(".")
            for part in path:
                tree = tree[part]
            tree.pop(last, None)
    return found


@pytest.mark.parametrize("scale", SCALES)
def test_rows_share_a_run_folder_if_and_only_if_configurations_are_equal(scale):
    """Rows with one folder have one configuration; different folders have different ones."""
    runs = ExperimentRuns(Path("out"), SCALES[scale])
    configs = {}
    for row in (*(row for table in ALL for row in table.variants), *GRID):
        if row.run is None:
            dump = str(runs.config(row).model_dump(mode="json"))
            assert configs.setdefault((row.family, row.folder), dump) == dump, row.name
    assert len(set(configs.values())) == len(configs)


def test_denoising_rows_have_a_lower_learning_rate_below_full_scale():
    table = TABLES["table1"]
    for scale, rates in [("cpu", (1e-3, 3e-3)), ("full", (3e-4, 3e-4))]:
        runs = ExperimentRuns(Path("out"), SCALES[scale])
        found = [runs.config(table.variant(n)).optimizer for n in ("dncnn", "joint")]
        assert tuple(o.lr for o in found) == rates
        assert (found[0].clip_norm is None) == (scale == "full")


def test_row_mix_inverts_the_mixing_of_the_recipe():
    for scale, mix in [("smoke", "both"), ("cpu", "both"), ("full", "none")]:
        runs = ExperimentRuns(Path("out"), SCALES[scale])
        config = runs.config(CLAIMS.variant("mix"))
        assert config.streams.classify.augmentation.mix == mix
        assert runs.config(JOINT).streams.classify.augmentation.mix != mix


def test_full_scale_has_the_recipe_of_the_paper():
    full = ExperimentRuns(Path("out"), SCALES["full"])
    config = full.config(JOINT)
    assert (config.steps, config.optimizer.lr, config.model.backbone.width) == (78_000, 3e-4, 64)
    imagenet = full.config(TABLES["table2"].variant("imagenet-joint"))
    assert (imagenet.dataset.name, imagenet.steps) == ("imagenet", 1_000_912)


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


def _result(name: str, **figures: tuple[float, float, float]) -> VariantResult:
    values = {
        key.removeprefix("p"): dict(zip(("value", "low", "high"), numbers, strict=True))
        for key, numbers in figures.items()
    }
    accuracy = values.pop("accuracy")
    documents = {
        "classify": {
            "accuracy": accuracy["value"] / 100,
            "accuracy_interval": [accuracy["low"] / 100, accuracy["high"] / 100],
        },
        "denoise": {"denoisers": {"unconditional": {"psnr": values}}},
    }
    return VariantResult(TABLES["table3"].variant(name), documents, {"knows_sigma": "true"})


def test_orderings_are_reported_as_holds_reversed_or_open():
    found = [
        _result("joint", accuracy=(60, 59, 61), p15=(30.0, 29, 31), p25=(27.0, 26, 28)),
        _result("relu", accuracy=(59.5, 58.5, 60.5), p15=(25.0, 24, 26), p25=(27.01, 26, 28)),
        _result("no-side", accuracy=(65, 64, 66), p15=(30.5, 29, 31)),
    ]
    report = table_document(
        TABLES["table3"],
        "cpu",
        found,
        {"about": "", "dataset": "cifar10", "notes": [], "command": ""},
    )
    verdicts = {(o["worse"], o["metric"]): o["verdict"] for o in report["orderings"]}
    assert verdicts == {
        ("relu", "accuracy"): "open",  # each within the other's interval
        ("relu", "15"): "holds",
        ("relu", "25"): "open",  # within 0.1 dB
        ("no-side", "accuracy"): "reversed",
        ("no-side", "15"): "reversed",
    }
    (row,) = [o for o in report["orderings"] if (o["worse"], o["metric"]) == ("relu", "15")]
    assert row["paper"] == pytest.approx(31.90 - 29.59)
    assert row["ours"] == pytest.approx(5.0)
    assert "| joint | relu | PSNR at 15/255, dB | +5.00 | +2.31 | holds |" in table_text(report)
