"""Records the results of the package: ``python -m ebmkit_tests.freeze record FILE.json``.

``record`` computes small runs, samples, evaluations and tables and stores their numbers.
``compare`` computes them again, at another commit on the same machine, and prints which differ and
by how much. To resume an interrupted call, repeat it. The smoke tables take far longer than the
rest: ``--skip 'smoke/*'`` omits them, ``--only 'smoke/*'`` selects them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ebmkit_tests.freeze.entries import ENTRIES
from ebmkit_tests.freeze.process import ROOT, EntryRunner, fingerprint
from ebmkit_tests.freeze.summary import compare
from rich.console import Console
from rich.progress import Progress


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns 1 if an entry failed or differs."""
    parser = argparse.ArgumentParser("python -m ebmkit_tests.freeze", description=__doc__)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", action="append", metavar="GLOB", help="entries; may be repeated")
    parser.add_argument("--skip", action="append", metavar="GLOB", default=[])
    options = parser.parse_args(arguments)
    path = options.file.resolve()

    def selected(name: str) -> bool:
        wanted = any(fnmatchcase(name, glob) for glob in options.only or ["*"])
        return wanted and not any(fnmatchcase(name, glob) for glob in options.skip)

    names = [name for name in ENTRIES if selected(name)]
    if not names:
        parser.error(f"no entry is named so; there are {', '.join(list(ENTRIES)[:3])}, ...")
    key = hashlib.sha256(repr((fingerprint(), options.only, options.skip)).encode()).hexdigest()[:8]
    work = path.with_suffix(f".{options.action}-{key}")  # other calls do not share it
    if options.action == "record":
        return record(path, names, work)
    recorded = json.loads(path.read_text())["entries"]
    missing = [name for name in recorded.keys() - ENTRIES.keys() if selected(name)]
    return check(path, work, [name for name in names if name in recorded], missing)


def record(path: Path, names: list[str], work: Path) -> int:
    """Compute the entries that ``path`` does not contain and write them there one by one."""
    document: dict[str, Any] = {"made": _provenance(), "entries": {}}
    if path.exists():
        document = json.loads(path.read_text())
        if document["made"]["source"] != fingerprint():
            raise SystemExit(f"{path} was recorded at other source: delete it or name another file")
    entries = document["entries"]
    runner = EntryRunner(work)
    wanted = [name for name in names if "failed" in entries.get(name, {"failed": ""})]
    with Progress(auto_refresh=False) as progress:
        task = progress.add_task("recording", total=len(wanted))
        for name in wanted:
            start = time.monotonic()
            entries[name] = runner.compute(name)
            part = path.with_suffix(".part")
            part.write_text(json.dumps(document, indent=1) + "\n")
            os.replace(part, path)
            outcome = f"FAILED: {entries[name]['failed']}" if "failed" in entries[name] else "done"
            _print(progress.console, f"{name}: {outcome} ({time.monotonic() - start:.1f} s)")
            progress.update(task, advance=1, refresh=True)
    shutil.rmtree(work)
    failed = [name for name in names if "failed" in entries[name]]
    _print(progress.console, f"{len(names) - len(failed)} entries in {path}, {len(failed)} failed")
    return int(bool(failed))


def check(path: Path, work: Path, names: list[str], missing: list[str]) -> int:
    """Compute entries again and print which differ from the recorded ones."""
    runner = EntryRunner(work)
    document = json.loads(path.read_text())
    made, recorded = document["made"], document["entries"]
    with Progress(auto_refresh=False) as progress:
        if made["machine"] != _provenance()["machine"]:
            _print(progress.console, f"recorded on another machine, {made['machine']}")
        task = progress.add_task("comparing", total=len(names))
        counts = Counter({"missing": len(missing)})
        for name in missing:
            _print(progress.console, f"{name}: missing, no such entry any more")
        for name in names:
            old, new = recorded[name], runner.compute(name)
            if "failed" in old or "failed" in new:
                same = "failed" in old and "failed" in new
                verdict = "failed before, too" if same else "failed" if "failed" in new else "new"
                lines = [str(new.get("failed", "failed when it was recorded"))]
            else:
                verdict, lines = compare(old, new)
            counts[verdict] += 1
            if verdict != "same":
                _print(progress.console, "\n    ".join([f"{name}: {verdict}", *lines]))
            progress.update(task, advance=1, refresh=True)
    shutil.rmtree(work)
    _print(progress.console, ", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return int(any(counts[bad] for bad in ("different", "failed", "missing")))


def _provenance() -> dict[str, str]:
    """Commit, hash of the source and machine of a recording."""
    import torch

    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    processor = torch.backends.cpu.get_cpu_capability()
    machine = f"{platform.machine()} {processor}, torch {torch.__version__}"
    return {"commit": commit, "source": fingerprint(), "machine": machine}


def _print(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False, markup=False)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same call resumes") from None
