"""Freezes what the package computes: ``python -m ebmkit_tests.freeze record FILE.json``.

``record`` computes small runs, samples, evaluations and tables and keeps their numbers, ``compare``
computes them again, at another commit on the same machine, and says which differ and by how much.
An interrupted call is resumed by the same call. The smoke tables take far longer than the rest:
``--skip 'smoke/*'`` leaves them out, ``--only 'smoke/*'`` takes them alone.
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
from ebmkit_tests.freeze.process import ROOT, Workshop, fingerprint
from ebmkit_tests.freeze.summary import compare
from rich.console import Console
from rich.progress import Progress


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 if an entry failed or differs."""
    parser = argparse.ArgumentParser("python -m ebmkit_tests.freeze", description=__doc__)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", action="append", metavar="GLOB", help="entries; may be repeated")
    parser.add_argument("--skip", action="append", metavar="GLOB", default=[])
    asked = parser.parse_args(arguments)
    path = asked.file.resolve()

    def chosen(name: str) -> bool:
        wanted = any(fnmatchcase(name, glob) for glob in asked.only or ["*"])
        return wanted and not any(fnmatchcase(name, glob) for glob in asked.skip)

    names = [name for name in ENTRIES if chosen(name)]
    if not names:
        parser.error(f"no entry is named so; there are {', '.join(list(ENTRIES)[:3])}, ...")
    key = hashlib.sha256(repr((fingerprint(), asked.only, asked.skip)).encode()).hexdigest()[:8]
    work = path.with_suffix(f".{asked.action}-{key}")  # another call does not share it
    if asked.action == "record":
        return record(path, names, work)
    recorded = json.loads(path.read_text())["entries"]
    lost = [name for name in recorded.keys() - ENTRIES.keys() if chosen(name)]
    return check(path, work, [name for name in names if name in recorded], lost)


def record(path: Path, names: list[str], work: Path) -> int:
    """Compute what ``path`` does not hold yet and write it there, entry by entry."""
    document: dict[str, Any] = {"made": _made(), "entries": {}}
    if path.exists():
        document = json.loads(path.read_text())
        if document["made"]["source"] != fingerprint():
            raise SystemExit(f"{path} was recorded at other source: delete it or name another file")
    entries = document["entries"]
    shop = Workshop(work)
    wanted = [name for name in names if "failed" in entries.get(name, {"failed": ""})]
    with Progress(auto_refresh=False) as progress:
        task = progress.add_task("recording", total=len(wanted))
        for name in wanted:
            start = time.monotonic()
            entries[name] = shop.compute(name)
            part = path.with_suffix(".part")
            part.write_text(json.dumps(document, indent=1) + "\n")
            os.replace(part, path)
            said = f"FAILED: {entries[name]['failed']}" if "failed" in entries[name] else "done"
            _say(progress.console, f"{name}: {said} ({time.monotonic() - start:.1f} s)")
            progress.update(task, advance=1, refresh=True)
    shutil.rmtree(work)
    failed = [name for name in names if "failed" in entries[name]]
    _say(progress.console, f"{len(names) - len(failed)} entries in {path}, {len(failed)} failed")
    return int(bool(failed))


def check(path: Path, work: Path, names: list[str], lost: list[str]) -> int:
    """Compute entries again and say which differ from those recorded."""
    shop = Workshop(work)
    document = json.loads(path.read_text())
    made, recorded = document["made"], document["entries"]
    with Progress(auto_refresh=False) as progress:
        if made["machine"] != _made()["machine"]:
            _say(progress.console, f"recorded on another machine, {made['machine']}")
        task = progress.add_task("comparing", total=len(names))
        counts = Counter({"missing": len(lost)})
        for name in lost:
            _say(progress.console, f"{name}: missing, no such entry any more")
        for name in names:
            old, new = recorded[name], shop.compute(name)
            if "failed" in old or "failed" in new:
                same = "failed" in old and "failed" in new
                verdict = "failed before, too" if same else "failed" if "failed" in new else "new"
                lines = [str(new.get("failed", "failed when it was recorded"))]
            else:
                verdict, lines = compare(old, new)
            counts[verdict] += 1
            if verdict != "same":
                _say(progress.console, "\n    ".join([f"{name}: {verdict}", *lines]))
            progress.update(task, advance=1, refresh=True)
    shutil.rmtree(work)
    _say(progress.console, ", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return int(any(counts[bad] for bad in ("different", "failed", "missing")))


def _made() -> dict[str, str]:
    """Where and of what a recording is made."""
    import torch

    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    processor = torch.backends.cpu.get_cpu_capability()
    machine = f"{platform.machine()} {processor}, torch {torch.__version__}"
    return {"commit": commit, "source": fingerprint(), "machine": machine}


def _say(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False, markup=False)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same call resumes") from None
