"""Copy the results of finished rows, without their networks.

    python benchmarks/row_results.py runs/reproduce-cpu results

``ebmkit reproduce TARGET --scale SCALE --out results`` then writes the reports of these rows again
without training, and trains only what is missing, such as further seeds. A row is finished, and has
a ``facts.json``, once a report has been written with it.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

from ebmkit.experiments.runs import FACTS

COPIED = ("environment.json", FACTS, "evaluation/*/*.json", "evaluation/*/*.safetensors")


def without_paths(value: Any) -> Any:
    """``value`` of a JSON file, with the last part of each absolute path."""
    if isinstance(value, dict):
        return {key: without_paths(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_paths(one) for one in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def copy(source: Path, target: Path) -> list[str]:
    """Copy the results of all rows in ``source`` that have facts; return the rows' names."""
    rows = [path.parent for path in sorted((source / "rows").rglob(FACTS))]
    for row in rows:
        own = target / row.relative_to(source)
        for pattern in COPIED:
            for path in row.glob(pattern):
                place = own / path.relative_to(row)
                place.parent.mkdir(parents=True, exist_ok=True)
                if path.suffix == ".json":
                    place.write_text(
                        json.dumps(without_paths(json.loads(path.read_text())), indent=1)
                    )
                else:
                    shutil.copyfile(path, place)
        config = yaml.safe_load((row / "config.yaml").read_text())
        config["dataset"].pop("data_dir", None)  # of the machine that trained
        (own / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return [row.name for row in rows]


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(*copy(Path(sys.argv[1]), Path(sys.argv[2])), sep="\n")
