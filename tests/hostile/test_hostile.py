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


def run(out, *arguments):
    found = out / "found.json"
    command = [
        sys.executable,
        "-m",
        "ebmkit_tests.hostile",
        out / "corpus",
        "--open",
        "--json",
        found,
    ]
    ended = subprocess.run(
        [*map(str, command), *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.exists(), ended.stderr
    return json.loads(found.read_text())


def judged(document):
    wrong = [
        f"{row['kind']}: {row['name']}: {row['wrong']}" for row in document["cases"] if row["wrong"]
    ]
    assert not wrong, "\n" + "\n".join(wrong)


def test_hostile_files_are_refused(tmp_path):
    document = run(tmp_path, "--quick")
    judged(document)
    assert document["refused"] > 1


@pytest.mark.slow
def test_large_hostile_files_are_refused(tmp_path):
    judged(run(tmp_path, "--slow"))
