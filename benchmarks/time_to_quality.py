"""Time to quality: seconds, steps and FLOPs until two recipes reach target qualities.

    uv run python benchmarks/time_to_quality.py --data digits --out OUT
    uv run python benchmarks/time_to_quality.py --data cifar10 --data-dir DIR --out OUT --marks 2

A *mark* is a target accuracy and three target PSNRs (at sigma 15, 25, 50 of 255; for digits, gains
over the noisy image). The learning rate falls to 0 at the end of a run, so the result of a recipe
is the shortest *length* (in steps) whose complete runs reach the mark on test images (mean over
seeds). The script tries the lengths of `LENGTHS` from short to long. All runs stay in OUT; finished
runs are not repeated, and interrupted runs resume. The time includes training, not evaluation.
OUT/time-to-quality-DATA.json and .png (quality against FLOPs) contain all runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ebmkit.compute import environment
from ebmkit.storage import write_atomically

LEVELS = ("15", "25", "50")
RECIPES = {
    "digits": {"AdamW": "digits-adamw", "ours": "digits"},
    "cifar10": {"AdamW": "cifar10-adamw", "ours": "cifar10-short"},
}
MARKS: dict[str, list[tuple[float, tuple[float, ...]]]] = {
    "digits": [(0.985, (3.2, 4.1, 5.5))],
    "cifar10": [
        (0.66, (29.9, 26.9, 22.9)),
        (0.775, (30.8, 27.8, 23.8)),
        (0.90, (31.3, 28.4, 24.5)),
    ],
}
"""Accuracy and PSNR, dB; for digits, PSNR gains."""

LENGTHS = {
    "digits": {"AdamW": (400, 800, 1600), "ours": (200, 300, 400, 600)},
    "cifar10": {
        "AdamW": (1000, 2000, 4000, 8000, 16_000, 32_000),
        "ours": (350, 500, 700, 1000, 2100, 4200, 8400, 16_800),
    },
}


def main() -> None:
    """Train with increasing lengths until each recipe has reached each mark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=[*RECIPES], default="digits")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--marks", type=int, help="number of marks, from the easiest; default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lengths", type=int, nargs="+", help="steps, instead of LENGTHS")
    parser.add_argument("--longest", type=int, default=10**9, help="steps of the longest run")
    parser.add_argument("--only", nargs="+", choices=["AdamW", "ours"], default=["AdamW", "ours"])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    marks = MARKS[options.data][: options.marks]
    runs: list[dict[str, Any]] = []
    for who in options.only:
        left = list(marks)
        for steps in options.lengths or LENGTHS[options.data][who]:
            if not left or steps > options.longest:
                break
            own = [measured(options, who, steps, seed) for seed in range(options.seeds)]
            runs += own
            while left and reaches(own, left[0]):
                left.pop(0)
            write(options, runs, marks)
    write(options, runs, marks)


def measured(options: argparse.Namespace, who: str, steps: int, seed: int) -> dict[str, Any]:
    """Train and evaluate one run; finished parts are skipped."""
    recipe = RECIPES[options.data][who]
    run = options.out / f"{recipe}-{steps}-{seed}"
    if not (run / "cost.json").exists():
        line = ["train", "--no-evaluate"]
        if (run / "config.yaml").exists():
            line += ["--resume", str(run)]
        else:
            line += ["--recipe", recipe, "--steps", str(steps), "--seed", str(seed)]
            line += ["--out", str(run), *where(options)]
        call(line)
    found: dict[str, Any] = {}
    for suite, more in (("classify", []), ("denoise", ["--limit", "1000"])):
        # results of fewer images have a folder of their own beside those of all
        if not (files := sorted((run / "evaluation").rglob(f"{suite}.json"))):
            call(["evaluate", str(run), "--suite", suite, *more])
            files = sorted((run / "evaluation").rglob(f"{suite}.json"))
        found[suite] = json.loads(files[0].read_text())
    cost = json.loads((run / "cost.json").read_text())
    classify, denoise = found["classify"], found["denoise"]
    psnr = [denoise["psnr"][level] for level in LEVELS]
    if options.data == "digits":
        psnr = [denoise["psnr"][level] - denoise["psnr_noisy"][level] for level in LEVELS]
    return {
        "who": who,
        "recipe": recipe,
        "steps": steps,
        "seed": seed,
        "tflop": sum(cost["flops"].values()) * steps / 1e12,
        "seconds": cost["step_seconds"] * steps,
        "accuracy": classify["accuracy"],
        "psnr": psnr,
        "commit": json.loads((run / "environment.json").read_text()).get("git_commit"),
    }


def where(options: argparse.Namespace) -> list[str]:
    """Command-line options of the data set."""
    return ["--data-dir", str(options.data_dir)] if options.data_dir else []


def call(line: list[str]) -> None:
    """Run an ebmkit command; exit with its code if it fails."""
    ended = subprocess.run([sys.executable, "-m", "ebmkit", *line])
    if ended.returncode:
        sys.exit(ended.returncode)


def reaches(runs: list[dict[str, Any]], mark: tuple[float, tuple[float, ...]]) -> bool:
    """Whether the mean over ``runs`` reaches the mark in all four metrics."""
    accuracy, psnr = mark
    found = [statistics.mean(run["psnr"][i] for run in runs) for i in range(3)]
    good = statistics.mean(run["accuracy"] for run in runs) >= accuracy
    return good and all(f >= p for f, p in zip(found, psnr, strict=True))


def summary(
    runs: list[dict[str, Any]], marks: list[tuple[float, tuple[float, ...]]]
) -> list[dict[str, Any]]:
    """Rows for each mark and recipe, with the results of the shortest length that reaches it."""
    rows = []
    for mark in marks:
        for who in dict.fromkeys(run["who"] for run in runs):
            lengths = sorted({run["steps"] for run in runs if run["who"] == who})
            groups = [[r for r in runs if r["who"] == who and r["steps"] == n] for n in lengths]
            first = next((group for group in groups if reaches(group, mark)), None)
            row: dict[str, Any] = {"mark": mark, "who": who, "longest_tried": lengths[-1]}
            if first is not None:
                keys = ("steps", "tflop", "seconds", "accuracy")
                row |= {key: statistics.mean(run[key] for run in first) for key in keys}
                row |= {"psnr": [statistics.mean(r["psnr"][i] for r in first) for i in range(3)]}
                row |= {"seeds": len(first)}
            rows.append(row)
    return rows


def write(
    options: argparse.Namespace,
    runs: list[dict[str, Any]],
    marks: list[tuple[float, tuple[float, ...]]],
) -> None:
    """Write the JSON file and the plot, and print a table."""
    rows = summary(runs, marks)
    found = {
        "command": " ".join(["python", *sys.argv]),
        "environment": environment(),
        "marks": rows,
        "runs": runs,
    }
    path = options.out / f"time-to-quality-{options.data}.json"
    write_atomically(path, json.dumps(found, indent=1).encode())
    plot(runs, options.data, path.with_suffix(".png"))
    table = Table("mark", "recipe", "steps", "TFLOP", "seconds", "accuracy", "PSNR")
    for row in rows:
        accuracy, psnr = row["mark"]
        mark = f"{accuracy:.1%}, {' / '.join(map(str, psnr))}"
        if "steps" not in row:
            table.add_row(mark, row["who"], f"not by {row['longest_tried']}")
            continue
        cells = [f"{row['steps']:.0f}", f"{row['tflop']:.1f}", f"{row['seconds']:.0f}"]
        own = " / ".join(f"{value:.2f}" for value in row["psnr"])
        table.add_row(mark, row["who"], *cells, f"{row['accuracy']:.1%}", own)
    Console().print(table)


def plot(runs: list[dict[str, Any]], data: str, path: Path) -> None:
    """Plot accuracy and PSNR at 25/255 against FLOPs: runs, and means over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    gain = "gain" if data == "digits" else "PSNR"
    for axis, name in zip(axes, ("accuracy, %", f"{gain} at 25/255, dB"), strict=True):
        axis.set(xscale="log", xlabel="training, TFLOP", ylabel=name)
        for ticks in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
            ticks(ticker.LogFormatter(labelOnlyBase=False, minor_thresholds=(1, 0.7)))
        axis.grid(alpha=0.3)
    for who, colour in (("AdamW", "tab:gray"), ("ours", "tab:blue")):
        own = [run for run in runs if run["who"] == who]
        costs = sorted({run["tflop"] for run in own})
        for axis, quality in zip(
            axes, (lambda run: 100 * run["accuracy"], lambda run: run["psnr"][1]), strict=True
        ):
            axis.plot([run["tflop"] for run in own], [*map(quality, own)], "o", color=colour)
            means = [statistics.mean(quality(r) for r in own if r["tflop"] == c) for c in costs]
            axis.plot(costs, means, color=colour, label=who)
    axes[0].legend()
    figure.suptitle(f"{data}: runs, and their mean over seeds")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
