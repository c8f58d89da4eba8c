"""Consistency of docs/reliability.md, the constraints and the stored results."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"


def test_tests_named_in_the_documentation_exist():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE.read_text())
    assert len(named) > 25
    for file, name in named:
        assert f"def {name}(" in (ROOT / file).read_text(), f"{file}::{name}"


def test_constraints_pin_the_pytorch_version_of_the_golden_runs():
    pinned = re.search(r"^torch==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.M)[1]
    assert f'"made_on": "torch {pinned},' in (ROOT / "tests/golden/golden.json").read_text()


def test_constraints_and_results_name_no_host():
    for path in [
        ROOT / "constraints.txt",
        *(ROOT / "benchmarks/results").glob("reliability-*.json"),
    ]:
        assert "://" not in path.read_text(), path
