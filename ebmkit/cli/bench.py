"""``ebmkit bench``: speed and memory of training and inference on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.progress import MofNCompleteColumn, TimeElapsedColumn
from rich.table import Table
from typer import Option

from ebmkit.cli.console import bar, console
from ebmkit.errors import UserError

if TYPE_CHECKING:
    from ebmkit.bench import Row, Setting


def bench(
    *,
    backbone: str = "gradresnet18",
    objective: str = "ce,dsm,cdsm,ce+dsm",
    width: Annotated[int, Option(min=1)] = 16,
    image_size: Annotated[int, Option(min=1)] = 32,
    channels: Annotated[int, Option(min=1)] = 3,
    batch: Annotated[int, Option(min=1)] = 64,
    rounds: Annotated[int, Option(min=1)] = 9,
    device: str = "auto",
    precision: str = "auto",
    compile_: str = "auto",
    inference_: Annotated[bool, Option("--inference/--no-inference")] = True,
    scaling_: bool = False,
    json_: Annotated[Path | None, Option(metavar="FILE")] = None,
) -> None:
    """Time training steps and inference against plain eager PyTorch.

    All candidates of a measurement run once per round, in alternating order. The ratio is the
    median over rounds of plain time / ebmkit time, with its quartiles; above 1, ebmkit is faster.

    Args:
        backbone: backbone, from `ebmkit list backbones`
        objective: objectives to time, separated by commas
        width: channels of the first stage
        image_size: height and width of the images, in pixels
        channels: number of channels: 1 gray, 3 colour
        batch: images per step; joint objectives use twice as many for classification
        rounds: number of timed rounds per candidate
        precision: precision: auto, fp32, tf32, bf16
        compile_: compile the model: auto, on, off
        inference_: also time inference
        scaling_: also time dsm for several widths, image sizes and batch sizes
        json_: write the results and library versions to this new file
    """
    from ebmkit import bench as measured
    from ebmkit.compute import ComputeConfig, pick_compile, pick_device, pick_precision
    from ebmkit.storage import write_atomically

    if json_ is not None and json_.exists():
        raise UserError(f"{str(json_)!r} exists: give --json a file that does not")
    if json_ is not None and not json_.parent.is_dir():
        raise UserError(f"cannot write {str(json_)!r}: there is no folder {str(json_.parent)!r}")
    where = pick_device(device)
    pick_precision(precision, where)
    pick_compile(compile_, where)
    compute = ComputeConfig.model_validate({"precision": precision, "compile": compile_})
    base = measured.Setting("", backbone, width, image_size, batch)
    names = [name.strip() for name in objective.split(",")]
    for name in names:
        measured.timed_terms(name)
    measured.network(base, channels, where)
    calls = measured.INFERENCES if inference_ else ()
    curve = base._replace(what=measured.SCALING)
    points = measured.scaling_settings(curve) if scaling_ else []
    rows: list[Row] = []
    total = len(names) + len(calls) + len(points)
    with bar(MofNCompleteColumn(), TimeElapsedColumn()) as progress:
        task = progress.add_task("", total=total)
        for what in (*(f"train {name}" for name in names), *calls):
            setting = base._replace(what=what)
            progress.update(task, description=str(setting))
            name = what.removeprefix("train ")
            trained = None if name == what else name
            found = measured.comparison(setting, channels, where, compute, trained)
            rows += measured.measure(found, where, rounds)
            progress.advance(task)
        progress.update(task, description=measured.SCALING)
        for more in measured.scaling(points, channels, where, rounds, compute):
            rows += more
            progress.advance(task)
    console.print(_table(rows, base))
    if json_ is not None:
        write_atomically(json_, (json.dumps(measured.document(rows), indent=1) + "\n").encode())
        console.say(f"rows: {json_}")


def _table(rows: list[Row], base: Setting) -> Table:
    common = str(base).strip()
    table = Table(title=f"{common}, on {rows[0].device}", title_justify="left")
    table.add_column("measurement", no_wrap=True)
    for heading in ("ms", "images/s", "peak MB", "ratio", "quartiles"):
        table.add_column(heading, justify="right")
    table.add_column("computed in")
    for row in rows:
        table.add_row(
            row.name.replace(f" {common}:", ":"),
            f"{1e3 * row.median_s:.1f}",
            f"{row.images_per_s:.0f}",
            f"{row.peak_mb:.0f}",
            "" if row.ratio is None else f"{row.ratio:.2f}",
            "" if row.ratio_range is None else "{:.2f}-{:.2f}".format(*row.ratio_range),
            row.note,
        )
    return table
