"""The cases of all modules ``files_*.py``, and their files on disk."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path

from ebmkit_tests.hostile.case import SECRET, Case, outside

__all__ = ["all_cases", "write"]


def all_cases() -> tuple[list[Case], dict[str, Callable[[Path], object]]]:
    """All cases of ``files_*.py``, and the function that opens each kind."""
    cases: list[Case] = []
    openers: dict[str, Callable[[Path], object]] = {}
    for path in sorted(Path(__file__).parent.glob("files_*.py")):
        module = importlib.import_module(f"ebmkit_tests.hostile.{path.stem}")
        cases += module.CASES
        openers |= module.OPENERS
    names = [slug(case.name) for case in cases]
    duplicates = {name for name in names if names.count(name) > 1}
    without = {case.kind for case in cases} - openers.keys()
    assert not duplicates, f"cases with the same name: {duplicates}"
    assert not without, f"no opener for {without}"
    return cases, openers


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write(case: Case, home: Path) -> Path:
    """Write the files of ``case`` below ``home``; return the path to open."""
    folder = home / "cases" / slug(case.name)
    folder.mkdir(parents=True)
    outside(folder).mkdir(parents=True)
    (outside(folder) / "secret.txt").write_text(SECRET)
    return case.make(folder)


def index(cases: list[Case], paths: list[Path], home: Path) -> str:
    """JSON list of cases and files."""
    rows = [
        {"name": c.name, "kind": c.kind, "file": str(p.relative_to(home)), "message": c.message}
        for c, p in zip(cases, paths, strict=True)
    ]
    return json.dumps(rows, indent=1)
