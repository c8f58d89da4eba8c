"""Whether the smoke tables are whole: every row there, trained and measured, and none made up."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ebmkit.experiments import TABLES
from ebmkit.experiments.figures import ATTACKED
from ebmkit.experiments.guidance import AMOUNTS
from ebmkit.experiments.tables import CLAIMS, GRID

PICTURES = (
    *(f"{name}.png" for name in ("table1", "table2", "table3", "claims", "claims-beyond")),
    *(
        f"{name}.png"
        for name in ("efficiency", "fig1", "fig3", "fig3-spectrum", "fig3-linearity", "fig4")
    ),
    *(f"guidance-{name}.png" for name in ("samples", "ways", "diffusion-path", "robustness-grid")),
    *(f"rcg-{name}.png" for name in ("table2.1", "table4.2", "fig2.6", "fig2.8", "fig4.10")),
)

ROBUST_MARGIN, GUIDED_MARGIN = 0.1, 0.3
"""Of accuracy at l2 0.5, robust over plain; of recognised samples, guided over unguided."""


def main(folder: Path) -> None:
    """Check the reports in ``folder``."""
    for table in (*TABLES.values(), CLAIMS):
        report = json.loads((folder / f"{table.name}.json").read_text())
        names = [row["name"] for row in report["rows"]]
        assert names == [row.name for row in table.variants], names
        for row, found in zip(table.variants, report["rows"], strict=True):
            assert found["status"] == "done", f"{table.name}: {row.name} is {found['status']}"
            wanted = {"classification": {"accuracy"}, "denoising": {"15", "25", "50"}}
            expected = wanted.get(row.task, {"accuracy", "15", "25", "50"})
            assert expected <= found["ours"].keys(), f"{row.name}: {sorted(found['ours'])}"
        print(f"{table.name}: {len(names)} rows")
    figures = {n: json.loads((folder / f"{n}.json").read_text()) for n in ("fig1", "fig3", "fig4")}
    assert len(figures["fig1"]["settings"]) >= 4
    assert [cell["name"] for cell in figures["fig3"]["cells"]] == [row.name for row in GRID]
    attacked = [name for name, found in figures["fig4"]["documents"].items() if found]
    assert len(attacked) == len(ATTACKED), attacked
    efficiency = json.loads((folder / "efficiency.json").read_text())["rows"]
    assert [row["n"] for row in efficiency] == [50] * 3 + [200] * 3 + [1293] * 3, efficiency
    assert all(row["status"] == "done" for row in efficiency), efficiency
    check_guidance(json.loads((folder / "guidance.json").read_text()))
    for name in PICTURES:
        assert (folder / name).stat().st_size > 10_000, name


def check_guidance(report: dict[str, Any]) -> None:
    """Whether training under attack and guidance do what they are for, by the stated margins."""
    at = report["grid"]["epsilons"].index(0.5)
    robust = {c["name"]: c["accuracy"][at]["value"] for c in report["grid"]["columns"]}
    assert robust["robust-0.5"] > robust["plain"] + ROBUST_MARGIN, robust
    ways = {way["name"]: way for way in report["ways"]}
    assert list(ways) == [w for w in ways if w in AMOUNTS["smoke"].methods], list(ways)
    assert len(ways) == len(AMOUNTS["smoke"].methods)
    seen = {name: way["accuracy"]["value"] for name, way in ways.items()}
    for name in ("energy", "by robust-0.5", "free 1"):
        assert seen[name] > seen["unguided"] + GUIDED_MARGIN, seen
    print(f"guidance: {len(ways)} ways, robust {robust}, recognised {seen}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
