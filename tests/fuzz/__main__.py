"""Fuzz the parsers: ``python -m ebmkit_tests.fuzz [--inputs N] [--only TARGET] [--json FILE]``.

If atheris (libFuzzer) is installed, inputs are guided by coverage, as in
``uv run --with atheris python -m ebmkit_tests.fuzz`` (it has wheels for CPython 3.11). Otherwise
they are mutated seeds, drawn by a seeded generator. Each target runs in a separate process with
limited memory. A failing input is saved, and its traceback is printed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

GUIDED = importlib.util.find_spec("atheris") is not None

if GUIDED and "--child" in sys.argv:  # before anything else imports what is to be instrumented
    import atheris

    with atheris.instrument_imports(include=["ebmkit"]):
        import ebmkit.data.hdf5
        import ebmkit.evaluation.runner
        import ebmkit.guidance.score
        import ebmkit.models.importing
        import ebmkit.sampling.jobs.settings
        import ebmkit.storage.verify
        import ebmkit.training  # noqa: F401

from ebmkit_tests.fuzz.mutate import mutated  # noqa: E402
from ebmkit_tests.fuzz.targets import SECONDS, TARGETS, check  # noqa: E402

MEMORY = 12 * 2**30
"""Limit of address space for a process, bytes; PyTorch alone maps 6 GiB."""


def main() -> int:
    """Fuzz the selected targets; return 1 if one fails."""
    parser = argparse.ArgumentParser(prog="python -m ebmkit_tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=20_000, help="for a target of share 1")
    parser.add_argument("--only", action="append", choices=list(TARGETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.child, options.inputs, options.seed)
    console, results = Console(), dict[str, Any]()
    for name in options.only or TARGETS:
        count = max(20, round(options.inputs * TARGETS[name].share))
        begun = time.monotonic()
        words = [sys.executable, "-m", "ebmkit_tests.fuzz", "--child", name]
        words += ["--inputs", str(count), "--seed", str(options.seed)]
        with console.status(f"{name}: {count:,} inputs"):
            ended = subprocess.run(words, capture_output=True, text=True)
        output = ended.stdout + ended.stderr
        covered = re.findall(r"cov: (\d+)", output)
        found = re.findall(r"INPUTS (\d+) READ (\d+) REFUSED (\d+)", output)
        row: dict[str, Any] = {"asked": count, "seconds": round(time.monotonic() - begun, 1)}
        if found:
            row |= dict(zip(("inputs", "read", "refused"), map(int, found[-1]), strict=True))
        row |= {"edges": int(covered[-1])} if covered else {}
        row["failed"] = ended.returncode != 0
        results[name] = row
        if row["failed"]:
            console.print("\n".join(output.splitlines()[-30:]), markup=False)
    table = Table("target", "inputs", "read", "refused", "edges", "seconds", "", show_edge=False)
    for name, row in results.items():
        cells = [f"{row.get(k, 0):,}" for k in ("inputs", "read", "refused", "edges")]
        table.add_row(name, *cells, str(row["seconds"]), "FAILED" if row["failed"] else "")
    console.print(table)
    if options.json:
        from ebmkit.compute import environment

        recorded = ("ebmkit", "python", "torch", "cores", "git_commit")
        document = {
            "command": " ".join(["python -m ebmkit_tests.fuzz", *sys.argv[1:]]),
            "guided": "atheris" if GUIDED else "seeded mutants",
            "environment": {k: v for k, v in environment().items() if k in recorded},
            "results": results,
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return int(any(row["failed"] for row in results.values()))


def child(name: str, count: int, seed: int) -> int:
    """Fuzz one target in this process."""
    import torch

    torch.set_num_threads(1)
    target = TARGETS[name]
    seeds = target.seeds()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    outcomes = {"read": 0, "refused": 0}

    def print_counts() -> None:
        total = sum(outcomes.values())
        print(f"INPUTS {total} READ {outcomes['read']} REFUSED {outcomes['refused']}", flush=True)

    def one(content: bytes) -> None:
        signal.alarm(SECONDS)
        outcomes[check(target, content)] += 1
        signal.alarm(0)
        if sum(outcomes.values()) % 50 == 0:
            print_counts()

    signal.signal(signal.SIGALRM, too_slow)
    if GUIDED:
        guided(one, seeds, count, seed)  # ends the process
    drawn = random.Random(seed)
    for content in [*seeds, *(mutated(drawn, seeds) for _ in range(count))]:
        try:
            one(content)
        except BaseException:
            traceback.print_exc()
            saved = Path(tempfile.mkdtemp()) / "input"
            saved.write_bytes(content)
            print(f"the input is saved in {saved}: {content[:80]!r}", flush=True)
            return 1
    print_counts()
    return 0


def guided(one: Any, seeds: list[bytes], count: int, seed: int) -> None:
    """Fuzz with atheris, guided by the coverage of the package; ends the process."""
    import atheris

    corpus = Path(tempfile.mkdtemp(prefix="corpus-"))
    for number, content in enumerate(seeds):
        (corpus / str(number)).write_bytes(content)
    words = [sys.argv[0], str(corpus), f"-runs={count}", f"-seed={seed + 1}", "-max_len=100000"]
    words += ["-rss_limit_mb=0", "-timeout=60", f"-artifact_prefix={corpus}/crash-"]
    atheris.Setup(words, one)
    atheris.Fuzz()


def too_slow(number: int, frame: object) -> None:
    raise TimeoutError(f"an input took more than {SECONDS} s")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.exit(main())
