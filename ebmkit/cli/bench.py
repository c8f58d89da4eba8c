"""``ebmkit bench``: speed and memory of training and inference on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ebmkit.cli.console import console
from ebmkit.errors import UserError

if TYPE_CHECKING:
    from ebmkit.bench import Row, Setting

__all__ = ["bench"]


def bench(
    backbone: Annotated[
        str, typer.Option(help="backbone, from `ebmkit list backbones`")
    ] = "gradresnet18",
    objective: Annotated[
        str, typer.Option(help="objectives to time, separated by commas")
    ] = "ce,dsm,cdsm,ce+dsm",
    width: Annotated[int, typer.Option(min=1, help="channels of the first stage")] = 16,
    image_size: Annotated[
        int, typer.Option(min=1, help="height and width of the images, in pixels")
    ] = 32,
    channels: Annotated[int, typer.Option(min=1, help="number of channels: 1 gray, 3 colour")] = 3,
    batch: Annotated[
        int,
        typer.Option(
            min=1, help="images per step; joint objectives use twice as many for classification"
        ),
    ] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="number of timed rounds per candidate")] = 9,
    device: Annotated[str, typer.Option(help="device: auto, cpu, cuda, cuda:1")] = "auto",
    precision: Annotated[str, typer.Option(help="precision: auto, fp32, tf32, bf16")] = "auto",
    compile_: Annotated[
        str, typer.Option("--compile", help="compile the model: auto, on, off")
    ] = "auto",
    inference_: Annotated[
        bool, typer.Option("--inference/--no-inference", help="also time inference")
    ] = True,
    scaling_: Annotated[
        bool,
        typer.Option(
            "--scaling", help="also time dsm for several widths, image sizes and batch sizes"
        ),
    ] = False,
    json_: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="write the results and library versions to this new file"
        ),
    ] = None,
) -> None:
    """Time training steps and inference against plain eager PyTorch.

    All candidates of a measurement run once per round, in alternating order. The ratio is the
    median over rounds of plain time / ebmkit time, with its quartiles; above 1, ebmkit is faster.
    """
    from ebmkit.bench import (
        INFERENCES,
        SCALING,
        Setting,
        document,
        inference,
        measure,
        network,
        scaling,
        scaling_settings,
        timed_terms,
        training,
    )
    from ebmkit.compute import ComputeConfig, pick_compile, pick_device, pick_precision
    from ebmkit.storage import write_atomically

    if json_ is not None:
        _check_new(json_)
    where = pick_device(device)
    pick_precision(precision, where)
    pick_compile(compile_, where)
    compute = ComputeConfig.model_validate({"precision": precision, "compile": compile_})
    base = Setting("", backbone, width, image_size, batch)
    names = [name.strip() for name in objective.split(",")]
    for name in names:
        timed_terms(name)
    network(base, channels, where)
    calls = INFERENCES if inference_ else ()
    points = scaling_settings(base._replace(what=SCALING)) if scaling_ else []
    rows: list[Row] = []
    with _bar(len(names) + len(calls) + len(points)) as bar:
        (task,) = bar.task_ids
        for name in names:
            setting = base._replace(what=f"train {name}")
            bar.update(task, description=str(setting))
            rows += measure(training(setting, name, channels, where, compute), where, rounds)
            bar.advance(task)
        for name in calls:
            setting = base._replace(what=name)
            bar.update(task, description=str(setting))
            rows += measure(inference(setting, channels, where, compute), where, rounds)
            bar.advance(task)
        bar.update(task, description=SCALING)
        for found in scaling(points, channels, where, rounds, compute):
            rows += found
            bar.advance(task)
    console.print(_table(rows, base))
    if json_ is not None:
        write_atomically(json_, (json.dumps(document(rows), indent=1) + "\n").encode())
        console.say(f"rows: {json_}")


def _check_new(path: Path) -> None:
    if path.exists():
        raise UserError(f"{str(path)!r} exists: give --json a file that does not")
    if not path.parent.is_dir():
        raise UserError(f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}")


def _bar(total: int) -> Progress:
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    progress.add_task("", total=total)
    return progress


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
