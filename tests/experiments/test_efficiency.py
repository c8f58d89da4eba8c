"""Sample efficiency: rows, comparisons over seeds, report and plot, mostly without training."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from scipy.stats import ttest_1samp

from ebmkit import UserError
from ebmkit.experiments import EXPERIMENTS, SCALES, ExperimentRuns, describe
from ebmkit.experiments.efficiency import (
    OBJECTIVES,
    VARIANTS,
    draw_efficiency,
    efficiency_document,
    efficiency_text,
    objective_of,
    paired_test,
)
from ebmkit.experiments.report import VariantResult
from ebmkit.experiments.tables import JOINT
from ebmkit.training.config import differences

ABOUT = {"about": "made up", "dataset": "cifar10", "notes": [], "command": "", "budget": "none"}
TOTAL = 48_929


@dataclass(frozen=True)
class Seeds(VariantResult):
    """A result of several seeds."""

    by_seed: dict = None


def documents(accuracy, nll=1.0, ece=0.05, attacked=(0.6, 0.5), psnr=None):
    """Documents of the suites with these values."""
    column = [{"value": value} for value in (accuracy, *attacked)]
    found = {
        "classify": {"accuracy": accuracy, "nll": nll},
        "calibration": {"ece": ece},
        "robustness-grid": {"epsilons": [0.0, 0.1, 0.25], "columns": [{"accuracy": column}]},
    }
    if psnr is not None:
        level = {"psnr": {"25": {"value": psnr}}}
        found["denoise"] = {"denoisers": {"unconditional": level}}
    return found


def rows(scale="cpu"):
    return ExperimentRuns(Path("out"), SCALES[scale]).distinct(VARIANTS)


def learning_curves():
    """Three seeds per row: joint rows are better on few images, and worse on many."""
    generator = np.random.default_rng(0)
    results = []
    for variant in rows():
        n = variant.layer.get("dataset", {}).get("limit", TOTAL)
        bias, slope = {"ce": (0.1, 12), "ce+dsm": (0.16, 8), "ce+cdsm": (0.15, 9)}[
            objective_of(variant)
        ]
        found = {}
        for seed in range(3):
            error = bias + slope / n**0.5 + 0.01 * generator.standard_normal()
            found[seed] = documents(
                1 - error,
                3 * error,
                error / 3,
                (0.9 - error, 0.8 - 1.1 * error),
                None if variant.task == "classification" else 24 + 4 * (1 - error),
            )
        results.append(Seeds(variant, found[0], {"seed": 0}, by_seed=found))
    return results


@pytest.mark.parametrize(
    ("scale", "sizes", "losses"),
    [
        ("smoke", [50, 200, None], ("ce", "ce+dsm", "ce+cdsm")),
        ("cpu", [500, 1000, 2000, 5000, 10_000, None], ("ce", "ce+dsm", "ce+cdsm")),
        ("cpu-cdn", [500, 1000, 2000, 5000, 10_000, None], ("ce", "ce+dsm-mean", "ce+cdsm-mean")),
        ("full", [500, 1000, 2000, 5000, 10_000, None], ("ce", "ce+dsm-mean", "ce+cdsm-mean")),
    ],
)
def test_rows_differ_in_objective_and_images_alone(scale, sizes, losses):
    """At every scale the joint row of a table is the base: the same steps and augmentation."""
    runs = ExperimentRuns(Path("out"), SCALES[scale])
    base = runs.config(JOINT).model_dump(mode="json")
    found = []
    for variant in rows(scale):
        config = runs.config(variant)
        allowed = {"objective", "dataset.limit", "dataset.subset"}
        assert differences(base, config.model_dump(mode="json")).keys() <= allowed
        assert config.dataset.limit is None or config.dataset.subset == "balanced"
        found.append((config.dataset.limit, config.objective))
    assert found == [(n, loss) for n in sizes for loss in losses]


def test_rows_of_all_images_share_the_runs_of_the_tables():
    assert [row.folder for row in rows()[-3:]] == list(OBJECTIVES.values())


def test_show_lists_the_rows_of_the_scale():
    text = describe("efficiency", ExperimentRuns(Path("out"), SCALES["smoke"]))
    assert "**ce+dsm-50**" in text
    assert "**ce-500**" not in text
    assert "- **joint**, ce+dsm, all images" in text


def test_a_row_of_another_scale_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no row 'ce-50' at scale cpu: --show lists"):
        EXPERIMENTS["efficiency"].run(ExperimentRuns(tmp_path, SCALES["cpu"]), ["ce-50"])


def test_paired_test_is_a_t_test_of_the_differences_of_common_seeds():
    a, b = {"0": 3.0, "1": 5.0, "2": 4.5, "3": 9.0}, {"2": 2.0, "1": 4.0, "0": 2.5, "7": 1.0}
    found = paired_test(a, b)
    expected = ttest_1samp([0.5, 1.0, 2.5], 0.0)
    assert found["seeds"] == 3
    assert found["difference"] == pytest.approx(4 / 3)
    assert found["p"] == pytest.approx(expected.pvalue)
    assert (found["low"], found["high"]) == pytest.approx(tuple(expected.confidence_interval(0.95)))


@pytest.mark.parametrize(
    ("a", "b", "p"),
    [((1.0,), (2.0,), None), ((1.0, 2.0), (1.0, 2.0), 1.0), ((1.1, 2.1), (1.0, 2.0), 0.0)],
)
def test_paired_test_of_one_seed_or_of_equal_differences(a, b, p):
    pair = (dict(zip("01", values, strict=False)) for values in (a, b))
    assert paired_test(*pair)["p"] == p


def test_verdicts_follow_the_test_and_the_direction_of_the_metric():
    ce, joint = rows()[0], rows()[1]
    results = [
        Seeds(variant, {}, {"seed": 0}, by_seed=dict(enumerate(found)))
        for variant, found in [
            (
                ce,
                [documents(0.50, 1.5, 0.1), documents(0.52, 1.6, 0.11), documents(0.51, 1.4, 0.1)],
            ),
            (
                joint,
                [documents(0.55, 2.5, 0.1), documents(0.58, 2.7, 0.08), documents(0.56, 2.4, 0.13)],
            ),
        ]
    ]
    report = efficiency_document("cpu", results, TOTAL, ABOUT)
    verdicts = {one["metric"]: one["verdict"] for one in report["verdicts"]}
    assert (verdicts["accuracy"], verdicts["nll"], verdicts["ece"]) == ("better", "worse", "open")
    assert {(o["objective"], o["against"]) for o in report["verdicts"]} == {("ce+dsm", "ce")}
    text = efficiency_text(report)
    assert "| 500 | ce | 3 | 51.0 ± 1.0 | 1.500 ± 0.100 |" in text
    assert "| 500 | ce+dsm | ce | +5.3 better | +1.033 worse |" in text
    assert "5 tests" in text


def test_a_single_seed_has_neither_deviation_nor_test():
    """The results of one seed, as `run_grid` returns them; PSNR that is NaN is left out."""
    ce, joint, unfinished = rows()[-3:]
    found = [
        VariantResult(ce, by_seed={4: documents(0.8)}),
        VariantResult(joint, by_seed={4: documents(0.82)}),
        VariantResult(unfinished, status="not run yet"),
    ]
    found[1].by_seed[4]["denoise"] = documents(0.8, psnr=1.0)["denoise"]
    found[1].by_seed[4]["denoise"]["denoisers"]["unconditional"]["psnr"]["25"]["value"] = None
    report = efficiency_document("cpu", found, TOTAL, ABOUT)
    assert list(report["rows"][0]["by_seed"]) == ["4"]
    assert {one["verdict"] for one in report["verdicts"]} == {"one seed"}
    text = efficiency_text(report)
    assert "| 48,929 | ce | 1 | 80.0 |" in text
    assert "| 48,929 | ce+cdsm: not run yet |" in text
    assert "+2.0 one seed" in text
    assert "PSNR" not in text
    json.dumps(report, allow_nan=False)


def test_report_names_the_theory_and_its_constants():
    report = efficiency_document("cpu", learning_curves(), TOTAL, ABOUT)
    assert [len(row["by_seed"]) for row in report["rows"]] == [3] * 18
    text = efficiency_text(report)
    assert "not measured" in text
    assert "generative 5 + 20/n, discriminative 1 + 100/n" in text
    json.dumps(report, allow_nan=False)


@pytest.mark.slow
def test_plot_has_panels_for_theory_and_metrics(tmp_path):
    """With all metrics, and with nothing but the theory."""
    results = learning_curves()
    report = efficiency_document("cpu", results, TOTAL, ABOUT)
    draw_efficiency(report, tmp_path / "all.png")
    nothing = [replace(one, by_seed={}, status="not run yet") for one in results]
    draw_efficiency(efficiency_document("cpu", nothing, TOTAL, ABOUT), tmp_path / "theory.png")
    full, bare = (matplotlib.image.imread(tmp_path / f"{n}.png") for n in ("all", "theory"))
    assert full.shape[1] > 3 * bare.shape[1]
