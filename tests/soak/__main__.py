"""Long reliability tests: ``python -m ebmkit_tests.soak``, from the root of the repository.

Kills training at random, resumes it, and compares the result bit by bit with an uninterrupted run;
runs 20,000 steps and measures memory, files and descriptors. Prints a table, writes JSON for the
documentation, and exits with 1 if a scenario fails.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from ebmkit_tests.soak.flat import measure_growth
from ebmkit_tests.soak.kills import kill_and_compare
from ebmkit_tests.soak.scenarios import TRAININGS
from rich.console import Console
from rich.table import Table

from ebmkit.compute import environment

ENVIRONMENT_FIELDS = ("ebmkit", "python", "torch", "numpy", "cores", "git_commit")


def main() -> int:
    """Run the selected scenarios; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ebmkit_tests.soak", description=__doc__)
    names = [*TRAININGS, "flat"]
    parser.add_argument("--only", action="append", choices=names, help="a scenario; repeatable")
    parser.add_argument("--kills", type=int, default=20, help="kills of each training")
    parser.add_argument(
        "--saves", type=int, default=6, help="minimum number of kills during a save"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the kill times")
    parser.add_argument("--quick", action="store_true", help="short runs, 3 kills each")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument(
        "--keep", type=Path, help="keep the runs in this folder instead of a temporary one"
    )
    options = parser.parse_args()
    kills, saves = (3, 1) if options.quick else (options.kills, options.saves)
    console = Console()
    place = options.keep or Path(tempfile.mkdtemp(prefix="soak-"))
    results, broken = dict[str, Any](), []
    for name in options.only or names:
        folder = place / name
        folder.mkdir(parents=True)
        with console.status(name) as status:
            if name == "flat":
                found = measure_growth(folder, 2000 if options.quick else 20_000)
                passed = not found["growing"]
            else:
                training = TRAININGS[name]
                few = 2 if training.defect else kills
                outcome = kill_and_compare(
                    training,
                    folder,
                    few,
                    min(saves, few) if not training.defect else 0,
                    options.seed,
                    options.quick,
                    lambda text, name=name, status=status: status.update(f"{name}: {text}"),
                )
                found = {
                    "about": training.description,
                    "ranks": training.ranks,
                    **outcome.document(),
                }
                passed = bool(outcome.differing) == bool(training.defect)
                passed = passed and (training.defect is not None or outcome.in_a_save >= saves)
        results[name] = found
        console.print(f"{name}: {'passed' if passed else 'FAILED'} {found}", soft_wrap=True)
        broken += [] if passed else [name]
    console.print(table(results))
    if options.json:
        document = {
            "command": " ".join(["python -m ebmkit_tests.soak", *sys.argv[1:]]),
            "seed": options.seed,
            "environment": {k: v for k, v in environment().items() if k in ENVIRONMENT_FIELDS},
            "results": results,
            "broken": broken,
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    if not options.keep and not broken:
        shutil.rmtree(place)
    elif broken:
        console.print(f"failed: {', '.join(broken)}; the runs are in {place}")
    return 1 if broken else 0


def table(results: dict[str, Any]) -> Table:
    """The results, one row per scenario."""
    shown = Table(show_edge=False)
    for title in ("scenario", "kills", "in a save", "one rank", "at start", "steps lost", "result"):
        shown.add_column(title)
    for name, found in results.items():
        if "kills" in found:
            count = len(found["differing"])
            result = f"{count} differences" if count else "bit-identical"
            counts = ("kills", "in_a_save", "one_rank", "at_start", "steps_lost")
            shown.add_row(name, *(str(found[key]) for key in counts), result)
        else:
            shown.add_row(name, *[""] * 5, "growing" if found["growing"] else "constant")
    return shown


if __name__ == "__main__":
    sys.exit(main())
