"""The corpus of hostile files is refused: nothing runs, nothing else is read, memory is bounded.

The corpus is made and opened by ``python -m ebmkit_tests.hostile``, in processes of its own, for an
audit hook stays for good and a bound on memory would be that of the tests.
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
    ended = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.exists(), ended.stderr
    document = json.loads(found.read_text())
    wrong = [
        f"{row['kind']}: {row['name']}: {row['wrong']}" for row in document["cases"] if row["wrong"]
    ]
    assert not wrong, "\n" + "\n".join(wrong)
    assert document["refused"] > 200
