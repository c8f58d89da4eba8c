"""Whether the smoke tables are whole: every row there, trained and measured, and none made up."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ebmkit.reproduce import TABLES
from ebmkit.reproduce.tables import CLAIMS

PICTURES = ("fig1.png", "fig3.png", "fig3-spectrum.png", "fig3-linearity.png", "fig4.png")


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
    for name in PICTURES:
        assert (folder / name).stat().st_size > 10_000, name


if __name__ == "__main__":
    main(Path(sys.argv[1]))
