"""The long form of the promises: ``python -m ebmkit_tests.soak``, from the repository's root.

Kills training at random and compares how it ends with a run that was never interrupted, bit by bit;
runs 20,000 steps and watches memory, files and descriptors. Ends with a table, exit code 1 if a
promise is broken, and JSON for the documentation.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from ebmkit_tests.soak.flat import stay_flat
from ebmkit_tests.soak.kills import killed
from ebmkit_tests.soak.scenarios import TRAININGS
from rich.console import Console
from rich.table import Table

from ebmkit.compute import environment

TOLD = ("ebmkit", "python", "torch", "numpy", "cores", "git_commit")


def main() -> int:
    """Run what was asked for; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ebmkit_tests.soak", description=__doc__)
    names = [*TRAININGS, "flat"]
    parser.add_argument("--only", action="append", choices=names, help="a scenario; repeatable")
    parser.add_argument("--kills", type=int, default=20, help="of each training")
    parser.add_argument("--saves", type=int, default=6, help="of these in a save, at least")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--quick", action="store_true", help="short runs, 3 kills each")
    parser.add_argument("--json", type=Path, help="write what was found")
    parser.add_argument("--keep", type=Path, help="folder for the runs, kept; else a temporary one")
    asked = parser.parse_args()
    kills, saves = (3, 1) if asked.quick else (asked.kills, asked.saves)
    console = Console()
    place = asked.keep or Path(tempfile.mkdtemp(prefix="soak-"))
    results, broken = dict[str, Any](), []
    for name in asked.only or names:
        folder = place / name
        folder.mkdir(parents=True)
        with console.status(name) as status:
            if name == "flat":
                found = stay_flat(folder, 2000 if asked.quick else 20_000)
                whole = not found["growing"]
            else:
                training = TRAININGS[name]
                few = 2 if training.defect else kills
                outcome = killed(
                    training,
                    folder,
                    few,
                    min(saves, few) if not training.defect else 0,
                    asked.seed,
                    asked.quick,
                    lambda text, name=name, status=status: status.update(f"{name}: {text}"),
                )
                found = {
                    "about": training.description,
                    "ranks": training.ranks,
                    **outcome.document(),
                }
                whole = bool(outcome.differing) == bool(training.defect)
                whole = whole and (training.defect is not None or outcome.in_a_save >= saves)
        results[name] = found
        console.print(f"{name}: {'held' if whole else 'BROKEN'} {found}", soft_wrap=True)
        broken += [] if whole else [name]
    console.print(table(results))
    if asked.json:
        document = {
            "command": " ".join(["python -m ebmkit_tests.soak", *sys.argv[1:]]),
            "seed": asked.seed,
            "environment": {k: v for k, v in environment().items() if k in TOLD},
            "results": results,
            "broken": broken,
        }
        asked.json.write_text(json.dumps(document, indent=1) + "\n")
    if not asked.keep and not broken:
        shutil.rmtree(place)
    elif broken:
        console.print(f"broken: {', '.join(broken)}; the runs are in {place}")
    return 1 if broken else 0


def table(results: dict[str, Any]) -> Table:
    """What was found, a row for each training."""
    shown = Table(show_edge=False)
    for title in ("scenario", "kills", "in a save", "one rank", "at start", "steps lost", "ended"):
        shown.add_column(title)
    for name, found in results.items():
        if "kills" in found:
            count = len(found["differing"])
            ended = f"{count} differences" if count else "the same bits"
            counts = ("kills", "in_a_save", "one_rank", "at_start", "steps_lost")
            shown.add_row(name, *(str(found[key]) for key in counts), ended)
        else:
            shown.add_row(name, *[""] * 5, "growing" if found["growing"] else "flat")
    return shown


if __name__ == "__main__":
    sys.exit(main())
