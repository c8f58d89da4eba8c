"""Speed and memory on this device, compared with plain eager PyTorch and other libraries.

    uv run --with torchebm --with deepinv --with 'ebmkit==0.16.0' \\
        python benchmarks/speed.py --out benchmarks/results/speed-cpu.json

(``ebmkit`` on the package index is another library with import name ``ebm``; it does not conflict
with this one.) Comparisons: training steps by objective and backbone with (a) the plain eager step;
denoising score matching with (b) torchebm and the other ebmkit; denoising with (c) deepinv's
DRUNet; step time and memory as functions of width, image size and batch. ``--full`` adds training
steps of GradResNet18 at width 64; ``--quick`` runs everything at a tiny size.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import peers
from matplotlib.ticker import NullLocator

from ebmkit.bench import (
    INFERENCES,
    OURS,
    PLAIN,
    SCALING,
    BenchmarkSetting,
    Comparison,
    Row,
    comparison,
    document,
    measure,
    scaling,
    scaling_settings,
)
from ebmkit.compute import ComputeConfig, pick_compile, pick_device, pick_precision
from ebmkit.errors import UserError
from ebmkit.plots import BLUE, ORANGE, new_figure, save_figure
from ebmkit.storage import write_atomically
from ebmkit.terminal import progress_bar

OBJECTIVES = ("ce", "dsm", "cdsm", "ce+dsm")


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file, which must not exist")
    parser.add_argument("--plot", type=Path, help="PNG file of the scaling curve")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--compile", default="auto")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--full", action="store_true", help="GradResNet18 at width 64 too")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, as a test")
    options = parser.parse_args()
    if options.out.exists() or not options.out.parent.is_dir():
        parser.error(f"--out {options.out} must be a new file in a folder that exists")
    device = pick_device(options.device)
    pick_precision(options.precision, device)
    pick_compile(options.compile, device)
    compute = ComputeConfig.model_validate(
        {"precision": options.precision, "compile": options.compile}
    )
    for name in ("torchebm", "ebm", "deepinv"):
        if not peers.installed(name):
            print(f"{name} is not installed: its rows are skipped")
    base = (
        BenchmarkSetting("", width=8, image_size=8, batch=4)
        if options.quick
        else BenchmarkSetting("")
    )
    wide = base._replace(width=8 if options.quick else 64)

    plan: list[Callable[[], Comparison]] = []
    for backbone in ("gradresnet18", "gradresnet34"):
        full = options.full and backbone == "gradresnet18"
        for setting in (base, wide) if full else (base,):
            for objective in OBJECTIVES:
                own = setting._replace(what=f"train {objective}", backbone=backbone)
                plan.append(partial(comparison, own, 3, device, compute, objective))
        for what in INFERENCES:
            own = base._replace(what=what, backbone=backbone)
            plan.append(partial(comparison, own, 3, device, compute))
    for setting in (base, wide) if options.full else (base,):
        own = setting._replace(what="train dsm at one sigma")
        plan.append(partial(peers.score_matching, own, device, compute))
    for size, batch in ((base.image_size, base.batch), (8 * base.image_size, 1)):
        own = wide._replace(what="denoise against DRUNet", image_size=size, batch=batch)
        plan.append(partial(peers.denoising, own, device, compute, trained_at=base.image_size))
    rows: list[Row] = []
    for prepare in progress_bar(plan, "comparisons", True):
        found = measure(prepare(), device, options.rounds)
        report(found)
        rows += found

    curve = base._replace(what=SCALING)
    points = scaling_settings(curve)
    if options.quick:
        points = scaling_settings(curve, (8, 16), (8, 16), (4, 8))
    few = max(2, options.rounds // 3)
    for found in progress_bar(
        scaling(points, 3, device, few, compute), "scaling", True, len(points)
    ):
        report(found)
        rows += found
    write_atomically(options.out, (json.dumps(document(rows), indent=1) + "\n").encode())
    if options.plot:
        scaling_plot(rows, options.plot)


def scaling_plot(rows: Sequence[Row], path: Path) -> None:
    """Plot step time and memory against width, image size and batch.

    Args:
        rows: results of `scaling`, the base point first; other rows are ignored.
        path: PNG file to write.

    Raises:
        UserError: if there are no rows of `scaling`.
    """
    found = [(setting, row) for row in rows if (setting := BenchmarkSetting.read(row.name))]
    found = [(setting, row) for setting, row in found if setting.what == SCALING]
    if not found:
        raise UserError("there are no rows of scaling to draw: measure with --scaling")
    base = found[0][0]
    figure = new_figure(9.6, 5.2, layout="constrained")
    panels = figure.subplots(2, 3, sharex="col")
    looks = {OURS: (BLUE, "o", "-"), PLAIN: (ORANGE, "s", "--")}
    for column, field in enumerate(("width", "image_size", "batch")):
        for who, (color, marker, line) in looks.items():
            points = sorted(
                (getattr(setting, field), row.median_s, row.peak_mb)
                for setting, row in found
                if row.name.endswith(f": {who}")
                and setting._replace(**{field: getattr(base, field)}) == base
            )
            at, *values = zip(*points, strict=True) if points else ((), (), ())
            for panel, own in zip(panels[:, column], values, strict=True):
                style = {"color": color, "marker": marker, "linestyle": line, "markersize": 4}
                panel.plot(at, own, label=who, **style)
        ticks = sorted({getattr(setting, field) for setting, _ in found})
        for panel in panels[:, column]:
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(ticks, [str(tick) for tick in ticks])
            panel.xaxis.set_minor_locator(NullLocator())
            panel.grid(alpha=0.3)
        panels[1, column].set_xlabel(field.replace("_", " "))
    panels[0, 0].set_ylabel("step (s)")
    panels[1, 0].set_ylabel("peak memory (MB)")
    panels[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{base}, on {found[0][1].device}", fontsize=10)
    save_figure(figure, path)


def report(rows: list[Row]) -> None:
    """Print rows immediately, so that an interrupted run shows its results."""
    for row in rows:
        against = ", ".join(
            f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f}) to {who}"
            for who, ratio in row.ratios.items()
        )
        print(f"{row.name}: {1e3 * row.median_s:.1f} ms, {row.peak_mb:.0f} MB; {against}")


if __name__ == "__main__":
    main()
