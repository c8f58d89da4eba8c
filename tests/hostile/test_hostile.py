"""Malicious files are refused: no code runs, no other file is read, memory is bounded.

``python -m ebmkit_tests.hostile`` writes and opens them in separate processes, because an audit
hook cannot be removed and a memory limit would apply to the tests.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_hostile_files_are_refused(tmp_path):
    found = tmp_path / "found.json"
    words = ["-m", "ebmkit_tests.hostile", tmp_path / "corpus", "--open", "--json", found]
    result = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.exists(), result.stderr
    document = json.loads(found.read_text())
    wrong = [
        f"{row['kind']}: {row['name']}: {row['wrong']}" for row in document["cases"] if row["wrong"]
    ]
    assert not wrong, "\n" + "\n".join(wrong)
    assert document["refused"] > 200
