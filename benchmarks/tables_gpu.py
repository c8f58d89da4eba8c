"""The paper's tables at the paper's scale on one GPU, row by row, the most important first.

    uv run python benchmarks/tables_gpu.py --data-dir DIR --work WORK --out OUT --seconds 540

Each row runs ``ebmkit reproduce TABLE --scale full --only ROW``. At the time limit the script sends
SIGTERM: the row saves, and the next call of the script resumes it; repeat the command until all
rows are done. After each row TABLE.md, TABLE.json and TABLE.png are copied to OUT.
``--scale smoke`` tries it on digits.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROWS = (
    ("table1", "joint"),
    ("table1", "gradresnet-dsm"),
    ("table1", "resnet18"),
    ("table1", "joint-balanced"),
    ("table1", "gradresnet-ce"),
    ("table1", "drunet"),
    ("table1", "dncnn"),
    ("table3", "batch"),
    ("table3", "relu"),
    ("table3", "no-side"),
    ("table3", "bias"),
    ("table1", "gs-drunet"),
    ("table1", "drunet-map"),
    ("table1", "gradncnn"),
    ("table1", "joint-sum"),
    ("table1", "joint-shortcut-norm"),
    ("table1", "jem"),
)
SAVING = 30
"""Seconds for a stopped row to save and exit."""


def main() -> None:
    """Run the remaining rows within the time limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="CIFAR-10, as `ebmkit train` takes it")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seconds", type=float, default=540, help="time for this call")
    parser.add_argument("--scale", default="full")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds - SAVING
    options.out.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    for table, row in ROWS:
        left = end - time.monotonic()
        if left <= 0:
            break
        command = [sys.executable, "-m", "ebmkit", "reproduce", table, "--only", row]
        command += ["--scale", options.scale, "--out", str(options.work)]
        if options.data_dir is not None:
            command += ["--data-dir", str(options.data_dir)]
        print(f"== {table} {row}, {left:.0f} s left", flush=True)
        code = run(command, left)
        for kind in ("md", "json", "png"):
            source = options.work / f"{table}.{kind}"
            if source.exists():
                shutil.copyfile(source, options.out / source.name)
        if code is None:
            print("stopped: run the same command again to resume", flush=True)
            break
        if code:
            failed.append(f"{table} {row}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def run(command: list[str], seconds: float) -> int | None:
    """Run ``command`` for at most ``seconds``; return its exit code, None if it was stopped."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(SAVING)
        except subprocess.TimeoutExpired:
            process.kill()
        return None


if __name__ == "__main__":
    main()
