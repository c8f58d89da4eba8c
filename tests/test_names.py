"""Nothing here depends on a top-level package called `tests`, which other distributions install."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("tests", "ebmkit", "benchmarks", "examples", "docs", ".ci")
IMPORTS_TESTS = re.compile(r"^\s*(?:from|import) tests\b|-m\W+tests\.|\"tests\.\w", re.MULTILINE)
"""An import, a module to run, and a module's name in a string."""


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


def test_modules_run_beside_a_foreign_package_called_tests(foreign):
    """One after the other in one process, which imports torch once."""
    modules = ("fuzz", "hostile", "soak")
    code = f"""
import runpy, sys
sys.path.insert(0, {str(foreign)!r})
import tests
assert tests.FOREIGN
sys.argv = ["", "--help"]
for module in {modules}:
    try:
        runpy.run_module("ebmkit_tests." + module, {{}}, "__main__")
    except SystemExit as end:
        assert not end.code, (module, end.code)
    else:
        raise AssertionError(module)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for module in modules:
        assert f"python -m ebmkit_tests.{module}" in done.stdout
