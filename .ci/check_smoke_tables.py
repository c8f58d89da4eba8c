"""Check that the smoke tables have exactly the expected rows, all trained and evaluated."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ebmkit.experiments import SCALES, TABLES, ExperimentRuns
from ebmkit.experiments.efficiency import METRICS
from ebmkit.experiments.figures import ATTACKED
from ebmkit.experiments.guidance import AMOUNTS
from ebmkit.experiments.tables import CLAIMS, GRID

PLOTS = (
    *(f"{name}.png" for name in ("table1", "table2", "table3", "claims", "claims-beyond")),
    *(
        f"{name}.png"
        for name in ("efficiency", "fig1", "fig3", "fig3-spectrum", "fig3-linearity", "fig4")
    ),
    *(f"guidance-{name}.png" for name in ("samples", "ways", "diffusion-path", "robustness-grid")),
    *(f"rcg-{name}.png" for name in ("table2.1", "table4.2")),
)

ROBUST_MARGIN, GUIDED_MARGIN = 0.1, 0.2
"""Minimum gains: in accuracy at l2 epsilon 0.5, of the robust over the plain classifier; in the
share of samples classified as the requested label, of guided over unguided sampling."""


def main(folder: Path) -> None:
    """Check the reports and plots in ``folder``."""
    runs = ExperimentRuns(folder, SCALES["smoke"])
    for table in (*TABLES.values(), CLAIMS):
        variants = runs.distinct(table.variants)
        report = json.loads((folder / f"{table.name}.json").read_text())
        names = [row["name"] for row in report["rows"]]
        assert names == [row.name for row in variants], names
        for row, result in zip(variants, report["rows"], strict=True):
            assert result["status"] == "done", f"{table.name}: {row.name} is {result['status']}"
            by_task = {"classification": {"accuracy"}, "denoising": {"15", "25", "50"}}
            expected = by_task.get(row.task, {"accuracy", "15", "25", "50"})
            assert expected <= result["ours"].keys(), f"{row.name}: {sorted(result['ours'])}"
        print(f"{table.name}: {len(names)} rows")
    figures = {n: json.loads((folder / f"{n}.json").read_text()) for n in ("fig1", "fig3", "fig4")}
    assert len(figures["fig1"]["settings"]) >= 4
    assert [cell["name"] for cell in figures["fig3"]["cells"]] == [row.name for row in GRID]
    for part in ("fig4", "fig4-map"):
        assert len(figures["fig4"][part]) == len(ATTACKED), (part, [*figures["fig4"][part]])
    efficiency = json.loads((folder / "efficiency.json").read_text())["rows"]
    images = [row["n"] for row in efficiency]
    assert images == [50] * 3 + [200] * 3 + [1437] * 3, images  # 1437: all training images
    assert {row["status"] for row in efficiency} == {"done"}
    for row in efficiency:
        expected = METRICS.keys() - (set() if "dsm" in row["objective"] else {"psnr"})
        assert row["by_seed"]["0"].keys() == expected, row["name"]
    check_guidance(json.loads((folder / "guidance.json").read_text()))
    for name in PLOTS:
        assert (folder / name).stat().st_size > 10_000, name


def check_guidance(report: dict[str, Any]) -> None:
    """Check that adversarial training and guidance reach the minimum gains."""
    index = report["grid"]["epsilons"].index(0.5)
    robust = {c["name"]: c["accuracy"][index]["value"] for c in report["grid"]["columns"]}
    assert robust["robust-0.5"] > robust["plain"] + ROBUST_MARGIN, robust
    methods = {method["name"]: method for method in report["ways"]}
    assert list(methods) == [m for m in methods if m in AMOUNTS["smoke"].methods], list(methods)
    assert len(methods) == len(AMOUNTS["smoke"].methods)
    accuracy = {name: method["accuracy"]["value"] for name, method in methods.items()}
    for name in ("energy", "by robust-0.5", "free 1"):
        assert accuracy[name] > accuracy["unguided"] + GUIDED_MARGIN, accuracy
    print(f"guidance: {len(methods)} methods, robust accuracy {robust}, label accuracy {accuracy}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
