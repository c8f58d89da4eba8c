"""The page of promises names tests that exist; the code imports what is declared."""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "promises.md"

NAMES = {"pyyaml": "yaml", "pillow": "PIL", "scikit-learn": "sklearn"}
"""Distributions that are imported by another name."""

OPTIONAL = {"click", "eagerpy", "skimage", "robustness", "dill", "timm"}
"""Named in the code and imported, if at all, only where they are installed already."""


BY_OTHERS = {"onnx", "onnxscript", "tensorboard", "pyautoattack", "einops"}
"""Declared for what PyTorch does with them, or for networks of the user's own."""


def test_every_test_that_is_named_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE.read_text())
    assert len(named) > 25
    for file, name in named:
        assert f"def {name}(" in (ROOT / file).read_text(), f"{file}::{name}"


def imported():
    found = set()
    for path in (ROOT / "ebmkit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"ebmkit"}


def test_what_is_imported_is_declared():
    """And what is declared is imported: neither too little nor too much is installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = [line for extra in project["optional-dependencies"].values() for line in extra]
    lines = [*project["dependencies"], *optional]
    declared = {re.split(r"[><=\[; ]", line)[0].lower() for line in lines}
    modules = {NAMES.get(name, name.replace("-", "_")) for name in declared}
    assert imported() - modules - OPTIONAL == set()
    assert modules - imported() - BY_OTHERS == set()


def test_the_constraints_pin_what_the_golden_runs_were_made_on():
    pinned = re.search(r"^torch==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.M)[1]
    assert f'"made_on": "torch {pinned},' in (ROOT / "tests/golden/golden.json").read_text()


def test_constraints_and_results_name_no_host():
    for path in [ROOT / "constraints.txt", *(ROOT / "benchmarks/results").glob("promises-*.json")]:
        assert "://" not in path.read_text(), path
