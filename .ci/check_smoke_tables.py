"""Whether the smoke tables are whole: every row there, trained and measured, and none made up."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ebmkit.reproduce import TABLES
from ebmkit.reproduce.figures import FIG4
from ebmkit.reproduce.tables import CLAIMS, GRID

PICTURES = (
    *(f"{name}.png" for name in ("table1", "table2", "table3", "claims", "claims-beyond")),
    *(f"{name}.png" for name in ("fig1", "fig3", "fig3-spectrum", "fig3-linearity", "fig4")),
)


def main(folder: Path) -> None:
    """Check the reports in ``folder``."""
    for table in (*TABLES.values(), CLAIMS):
        report = json.loads((folder / f"{table.name}.json").read_text())
        names = [row["name"] for row in report["rows"]]
        assert names == [row.name for row in table.rows], names
        for row, found in zip(table.rows, report["rows"], strict=True):
            if row.missing is not None:
                assert found["ours"] == {}, f"{row.name} has figures and did not run"
                continue
            assert found["status"] == "done", f"{table.name}: {row.name} is {found['status']}"
            wanted = {"classification": {"accuracy"}, "denoising": {"15", "25", "50"}}
            expected = wanted.get(row.task, {"accuracy", "15", "25", "50"})
            assert expected <= found["ours"].keys(), f"{row.name}: {sorted(found['ours'])}"
        print(f"{table.name}: {len(names)} rows")
    figures = {n: json.loads((folder / f"{n}.json").read_text()) for n in ("fig1", "fig3", "fig4")}
    assert len(figures["fig1"]["settings"]) >= 4
    assert [cell["name"] for cell in figures["fig3"]["cells"]] == [row.name for row in GRID]
    attacked = [name for name, found in figures["fig4"]["documents"].items() if found]
    assert len(attacked) == len(FIG4), attacked
    for name in PICTURES:
        assert (folder / name).stat().st_size > 10_000, name


if __name__ == "__main__":
    main(Path(sys.argv[1]))
