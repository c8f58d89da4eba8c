"""The page on reliability and security names tests that exist, and figures no host."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"


def test_every_test_that_is_named_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE.read_text())
    assert len(named) > 25
    for file, name in named:
        assert f"def {name}(" in (ROOT / file).read_text(), f"{file}::{name}"


def test_the_constraints_pin_what_the_golden_runs_were_made_on():
    pinned = re.search(r"^torch==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.M)[1]
    assert f'"made_on": "torch {pinned},' in (ROOT / "tests/golden/golden.json").read_text()


def test_constraints_and_results_name_no_host():
    for path in [ROOT / "constraints.txt", *(ROOT / "benchmarks/results").glob("promises-*.json")]:
        assert "://" not in path.read_text(), path
