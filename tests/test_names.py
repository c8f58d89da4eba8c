"""No code depends on a top-level package `tests`, because other distributions install one."""

import importlib
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("tests", "ebmkit", "benchmarks", "examples", "docs", ".ci")
IMPORTS_TESTS = re.compile(r"^\s*(?:from|import) tests\b|-m\W+tests\.|\"tests\.\w", re.MULTILINE)
"""Matches imports, ``-m tests.MODULE`` and module names in strings."""


def test_nothing_imports_a_package_called_tests():
    found = []
    paths = [p for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.is_file()]
    for path in [*paths, *ROOT.glob("*.md")]:
        if path.suffix in ("", ".py", ".md") and path != Path(__file__):
            found += [str(path) for _ in IMPORTS_TESTS.findall(path.read_text())]
    assert found == []


@pytest.fixture
def foreign(tmp_path):
    """A folder with another distribution's package `tests`."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").write_text("FOREIGN = True\n")
    return tmp_path


@pytest.mark.parametrize("module", ["fuzz", "hostile", "soak"])
def test_modules_run_beside_a_foreign_package_called_tests(foreign, module, monkeypatch, capsys):
    monkeypatch.syspath_prepend(foreign)
    for name in [n for n in sys.modules if n == "tests" or n.startswith("tests.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "argv", ["", "--help"])
    assert importlib.import_module("tests").FOREIGN
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(f"ebmkit_tests.{module}", {}, "__main__")
    finally:
        del sys.modules["tests"]
    assert not ended.value.code
    assert f"python -m ebmkit_tests.{module}" in capsys.readouterr().out
