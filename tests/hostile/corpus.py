"""All cases, found by the names of their modules, and their files on disk."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path

from ebmkit_tests.hostile.case import SECRET, Case, outside

__all__ = ["all_cases", "write"]


def all_cases() -> tuple[list[Case], dict[str, Callable[[Path], object]]]:
    """Every case of ``files_*.py``, and what opens each kind."""
    cases: list[Case] = []
    openers: dict[str, Callable[[Path], object]] = {}
    for path in sorted(Path(__file__).parent.glob("files_*.py")):
        module = importlib.import_module(f"ebmkit_tests.hostile.{path.stem}")
        cases += module.CASES
        openers |= module.OPENERS
    names = [slug(case.name) for case in cases]
    twice = {name for name in names if names.count(name) > 1}
    without = {case.kind for case in cases} - openers.keys()
    assert not twice, f"two cases of one name: {twice}"
    assert not without, f"no opener for {without}"
    return cases, openers


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write(case: Case, home: Path) -> Path:
    """Make the files of ``case`` in a folder of ``home``; what is to be opened."""
    folder = home / "cases" / slug(case.name)
    folder.mkdir(parents=True)
    outside(folder).mkdir(parents=True)
    (outside(folder) / "secret.txt").write_text(SECRET)
    return case.make(folder)


def index(cases: list[Case], paths: list[Path], home: Path) -> str:
    """What lies where, as JSON."""
    rows = [
        {"name": c.name, "kind": c.kind, "file": str(p.relative_to(home)), "says": c.says}
        for c, p in zip(cases, paths, strict=True)
    ]
    return json.dumps(rows, indent=1)
