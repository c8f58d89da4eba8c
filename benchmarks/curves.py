"""Validation curves of runs against training FLOPs: a JSON file and a plot.

    uv run python benchmarks/curves.py RUN... --out FILE.json

A run needs its metrics.jsonl and its cost; for an unfinished run, `ebmkit cost` counts the FLOPs.
The plot lies beside FILE.json. Runs of one recipe have one colour.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ebmkit.storage import write_atomically
from ebmkit.training import RunFolder
from ebmkit.training.config import resolve
from ebmkit.training.loop import assemble


def main() -> None:
    """Read the runs, write the file and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    found = [curve(path) for path in options.runs]
    write_atomically(options.out, (json.dumps(found, indent=1) + "\n").encode())
    plot(found, options.out.with_suffix(".png"))


def curve(path: Path) -> dict[str, Any]:
    """The validation rows of the run in ``path``, and the FLOPs of a step."""
    run = RunFolder.open(path)
    config = resolve(run.config())
    cost = assemble(config).budget.cost(config.steps)
    environment = json.loads((path / "environment.json").read_text())
    rows = [row for row in run.metrics() if row["kind"] == "validation"]
    return {
        "network": f"{config.backbone}, width {config.model.backbone.width}",  # type: ignore[union-attr]
        "steps": config.steps,
        "seed": config.seed,
        "gflop_per_step": cost.step_flops / 1e9,
        "precision": config.compute.precision,
        "commit": environment.get("git_commit"),
        "step": [row["step"] for row in rows],
        "accuracy": [row["accuracy"] for row in rows],
        "psnr_25": [row["psnr_25"] for row in rows],
    }


def plot(curves: list[dict[str, Any]], path: Path) -> None:
    """Held-out accuracy and PSNR at 25/255 against training FLOPs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    names = list(dict.fromkeys(f"{c['network']}, {c['steps']:,} steps" for c in curves))
    for found in curves:
        name = f"{found['network']}, {found['steps']:,} steps"
        flops = [step * found["gflop_per_step"] / 1e3 for step in found["step"]]
        style = {"color": f"C{names.index(name)}", "marker": ".", "alpha": 0.8}
        label = name if found is next(c for c in curves if c["steps"] == found["steps"]) else None
        axes[0].plot(flops, [100 * a for a in found["accuracy"]], label=label, **style)
        axes[1].plot(flops, found["psnr_25"], **style)
    for axis, name in zip(axes, ("accuracy, %", "PSNR at 25/255, dB"), strict=True):
        axis.set(xscale="log", xlabel="training, TFLOP", ylabel=f"held-out {name}")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
