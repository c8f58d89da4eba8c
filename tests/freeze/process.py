"""Computes each entry in its own process and stores the results in a folder.

The processes are forked from one that has imported the libraries, because the imports take longer
than most entries.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

FIXED = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "MKL_CBWR": "COMPATIBLE",
    "COLUMNS": "1000",
    "NO_COLOR": "1",
}
"""Environment of all processes: one thread and a fixed order of sums."""

IMPORTED = [
    *("ebmkit.cli", "torch._subclasses.fake_tensor", "torch._dynamo"),
    *("torchvision", "torchmetrics", "foolbox", "diffusers", "h5py", "scipy", "PIL.Image"),
    *("sklearn.datasets", "sklearn.metrics", "sklearn.model_selection", "matplotlib.pyplot"),
]
"""Modules imported before a process is forked, if they are installed."""

ROOT = Path(__file__).resolve().parents[2]


def fingerprint() -> str:
    """Hash of the source of the package."""
    found = hashlib.sha256()
    for path in sorted((ROOT / "ebmkit").rglob("*.py")):
        found.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return found.hexdigest()


class EntryRunner:
    """Computes each entry once.

    Args:
        folder: for results, and for the training runs that entries share.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.update(FIXED)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(IMPORTED)

    def compute(self, name: str) -> dict[str, Any]:
        """The summary of an entry, or ``failed`` with the last line of its error."""
        from ebmkit_tests.freeze.entries import ENTRIES

        for needed in ENTRIES[name].runs:
            if "failed" in (found := self.compute(needed)):
                return {"failed": f"{needed}: {found['failed']}"}
        place = self.folder / name.replace("/", "~")
        result = place / "result.json"
        if not result.exists():
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            process = self._context.Process(target=_child, args=(name, place))
            process.start()
            process.join()
            if process.exitcode:
                lines = (place / "stderr").read_text(errors="replace").split("\n")
                last = [line.strip() for line in lines if line.strip()] or ["no message"]
                killed = process.exitcode < 0
                message = f"killed by signal {-process.exitcode}" if killed else last[-1]
                result.write_text(json.dumps({"failed": message}))
        found = json.loads(result.read_text())
        if "failed" in found:
            result.unlink()  # the next call tries again
        return found


def _child(name: str, place: Path) -> None:
    from ebmkit_tests.freeze.entries import ENTRIES
    from ebmkit_tests.freeze.summary import summarize

    for stream in (sys.stdout, sys.stderr):
        with open(place / stream.name.strip("<>"), "wb") as file:
            os.dup2(file.fileno(), stream.fileno())
    os.chdir(place)
    try:
        text = json.dumps(summarize(ENTRIES[name].compute()))
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    Path("result.part").write_text(text)
    os.replace("result.part", "result.json")
