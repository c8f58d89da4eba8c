"""Recordings are reproducible bit by bit, and differences are reported."""

import json

import numpy as np
import pytest
from ebmkit_tests.freeze import process
from ebmkit_tests.freeze.__main__ import main
from ebmkit_tests.freeze.entries import ENTRIES, Entry
from ebmkit_tests.freeze.summary import Weights, compare, summarize

ENTRY = "sample/langevin/mixture"


@pytest.fixture
def one_thread(monkeypatch):
    """Sets the environment of the command for one test and preloads only the imports it needs."""
    for name, value in process.FIXED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(process, "IMPORTED", ["ebmkit.sampling"])


@pytest.mark.slow
def test_changed_numbers_and_failures_are_reported(one_thread, monkeypatch, tmp_path, capsys):
    file = tmp_path / "frozen.json"
    monkeypatch.setitem(ENTRIES, "sample/broken", Entry(dict))  # unknown in other processes
    assert main(["record", str(file), "--only", ENTRY, "--only", "sample/broken"]) == 1
    recorded = json.loads(file.read_text())
    assert recorded["entries"]["sample/broken"] == {"failed": "KeyError: 'sample/broken'"}
    assert main(["compare", str(file), "--only", ENTRY]) == 0
    assert "1 same" in capsys.readouterr().out
    summary = recorded["entries"][ENTRY]
    summary["numbers"]["plain/chains: mean"] *= 1.001
    summary["digests"][""] = "of other results"
    file.write_text(json.dumps(recorded))
    assert main(["compare", str(file), "--only", ENTRY]) == 1
    output = capsys.readouterr().out
    assert f"{ENTRY}: different" in output
    assert "plain/chains: mean" in output
    assert "(relative 0.001)" in output


def test_recorded_entry_is_not_computed_again(one_thread, tmp_path, monkeypatch):
    file = tmp_path / "frozen.json"
    made = {"source": process.fingerprint(), "machine": "", "commit": ""}
    file.write_text(json.dumps({"made": made, "entries": {ENTRY: {"numbers": {}, "digests": {}}}}))
    monkeypatch.setattr(process.EntryRunner, "compute", lambda self, name: pytest.fail("computed"))
    assert main(["record", str(file), "--only", ENTRY]) == 0


def test_changed_names_and_order_are_distinguished_from_changed_values():
    a, b = np.arange(6.0).reshape(2, 3), np.ones(4, np.float32)
    old = summarize({"loss": 0.5, "weights": Weights([a, b]), "seconds": 3.0, "text": "old"})
    new = summarize({"nll": 0.5, "weights": Weights([b, a]), "seconds": 4.0, "text": "new"})
    assert compare(old, new) == ("renamed", ["loss -> nll"])
    b[0] += 1e-6
    verdict, lines = compare(old, summarize({"loss": 0.5, "weights": Weights([a, b])}))
    assert verdict == "different"
    assert "other bits: weights" in lines
    assert compare(summarize({"x": [1.0, np.nan]}), summarize({"x": [1.0, np.nan]}))[0] == "same"
