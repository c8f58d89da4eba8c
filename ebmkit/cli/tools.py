"""``ebmkit import``, ``export``, ``verify``, ``list``, ``data pack`` and ``bench``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from rich.table import Table
from typer import Argument, Option

from ebmkit.cli.console import check_new_file, warn
from ebmkit.errors import UserError
from ebmkit.terminal import COUNT, ProgressBar, console, errors

if TYPE_CHECKING:
    from ebmkit.bench import BenchmarkSetting, Row

Kind = Literal[
    "backbones", "denoisers", "diffusion", "heads", "objectives", "datasets", "recipes", "suites",
    "samplers", "tasks", "checkpoints", "guidance", "schedules",
]  # fmt: skip


def import_(
    source: str,
    *,
    out: Path,
    sigma: list[str] | None = None,
    kind: Annotated[str | None, Option("--as")] = None,
    backbone: str | None = None,
    rename: Annotated[list[str] | None, Option("--map")] = None,
    classes: int | None = None,
    mean: str | None = None,
    std: str | None = None,
    image_size: int | None = None,
    dataset: str | None = None,
    averaged: bool = True,
    set_: list[str] | None = None,
) -> None:
    """Convert a published checkpoint to a run folder.

    Formats: files of the robustness package and of JEM, published DnCNN and DRUNet, state dicts,
    UNets of diffusers. No code in the file is executed. Other commands use the folder like a run.

    Example:
        ebmkit import dncnn_25.pth --out runs/dncnn --sigma 25/255

    Args:
        source: file or folder, or OWNER/NAME:FILE (diffusers: OWNER/NAME) on the Hugging Face hub
        out: new folder for the model
        sigma: noise level that the model was trained for, for example 25/255; give it twice for
            lowest and highest
        kind: format: robustness, jem, denoiser, state or diffusers [default: detected]
        backbone: backbone of a state dict, from `ebmkit list backbones`
        rename: rename the prefix of parameter names, OLD=NEW; repeatable, applied in order
        classes: number of classes, if the weights do not determine it
        mean: mean to subtract from images in [0, 1]: 0.5 or 0.49,0.48,0.45
        std: standard deviation to divide by after that
        image_size: height and width of the training images, in pixels
        dataset: training data set, for example cifar10; sets the class names
        averaged: of a file with raw and averaged weights (params_ema, state_dict_ema), import the
            averaged ones
        set_: configuration field for a state dict, for example model.backbone.width=32; repeatable
    """
    from ebmkit.data import DATASETS
    from ebmkit.models.importing import import_checkpoint
    from ebmkit.noise import parse_sigma
    from ebmkit.registry import find
    from ebmkit.training.config import parse_assignments

    if len(sigma or []) > 2:
        raise UserError(f"--sigma was given {len(sigma or [])} times: once, or lowest and highest")
    levels = sorted(parse_sigma(level) for level in sigma or [])
    settings: dict[str, Any] = parse_assignments(set_ or [])
    if set(settings) - {"model"}:
        other = next(key for key in settings if key != "model")
        raise UserError(f"--set {other}: fields here begin with model, as model.backbone.width=32")
    model = import_checkpoint(
        str(source),
        out,
        kind,
        backbone=backbone,
        rename=[_rule(text) for text in rename or []],
        classes=classes,
        mean=_numbers("--mean", mean),
        std=_numbers("--std", std),
        image_size=image_size,
        settings=settings.get("model"),
        dataset=dataset or "",
        class_names=find("data set", DATASETS, dataset).class_names if dataset else (),
        sigma_range=(levels[0], levels[-1]) if levels else None,
        averaged=averaged,
    )
    count = sum(p.numel() for p in model.parameters())
    kind = type(getattr(model, "network", getattr(model, "backbone", model))).__name__
    labels = f", {model.num_classes} classes" if model.num_classes else ""
    console.print(f"{kind} with {count:,} parameters{labels}: {out}")


def _rule(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not equals or not old:
        raise UserError(f"--map {text!r} is not of the form OLD=NEW, as in fc.=head.classifier.")
    return old, new


def _numbers(option: str, text: str | None) -> float | tuple[float, ...] | None:
    if text is None:
        return None
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"{option} {text!r} must be one number or one per channel, as 0.49,0.48,0.45"
        ) from None
    return numbers[0] if len(numbers) == 1 else numbers


def export(
    run: Path,
    *,
    out: Path,
    what: Literal["classifier", "denoiser", "blind-denoiser"] = "denoiser",
    image_size: str | None = None,
    batch: Annotated[int | None, Option(min=1)] = None,
    weights: str = "last",
) -> None:
    """Write a trained model as a file for PyTorch or an ONNX runtime.

    Loads the file again, runs it on random images and compares it with the model; keeps no file if
    they differ. Never overwrites an existing file.

    Example:
        ebmkit export runs/digits --what classifier --out digits.onnx

    Args:
        out: file to write: .pt2 for PyTorch, .onnx for ONNX runtimes
        what: classifier: log-probabilities and log-density; denoiser: takes the noise level;
            blind-denoiser: estimates it
        image_size: input size, H or HxW, in pixels [default: the training size]
        batch: fixed batch size [default: any]
    """
    from ebmkit.export import export as export_model
    from ebmkit.models import load

    size = None if image_size is None else _parse_size(image_size)
    model = load(run, weights=weights)
    if what != "classifier" and model.card and not model.card.denoises:
        warn("this model was never trained to denoise")
    with errors.status(f"exporting {out.name}"):
        done = export_model(model, out, what, size, batch=batch)
    shapes = ", ".join(f"{n} ({', '.join(map(str, shape))})" for n, shape in done.inputs.items())
    console.say(f"{done.path}: {shapes} -> {', '.join(done.differences)}")
    for name, difference in done.differences.items():
        console.say(
            f"compared with the model on {sum(done.batches)} random images: {name} differs by "
            f"{difference.largest:.1e} of its largest value at most, {difference.median:.1e} at "
            "the median"
        )


def _parse_size(text: str) -> tuple[int, int]:
    """Parse height and width from ``32`` or ``32x48``."""
    height, _, width = text.lower().partition("x")
    try:
        return int(height), int(width or height)
    except ValueError:
        raise UserError(
            f"image size {text!r} must be H or HxW in pixels, as in 32 or 32x48"
        ) from None


def verify(
    run: Path,
    *,
    accept: list[str] | None = None,
    as_json: Annotated[bool, Option("--json")] = False,
) -> None:
    """Compare every file of a run with its checksum in manifest.json.

    Exit code 2 if a file is changed or missing. Writes nothing unless --accept is given.

    Example:
        ebmkit verify runs/digits

    Args:
        accept: accept the current content of this file, changed on purpose; repeatable
        as_json: print JSON instead of a table
    """
    from ebmkit.pretrained import name_of, results_folder
    from ebmkit.storage.verify import accept_files, verify_run

    if accept and results_folder(run) != run:
        raise UserError(f"--accept is for runs of your own: {name_of(run)!r} is not one")
    if accept:
        accept_files(run, accept)
    found = verify_run(run)
    wrong = [finding for finding in found if finding.state in ("changed", "missing")]
    if as_json:
        console.print_json(json.dumps([finding._asdict() for finding in found]))
    else:
        table = Table(show_edge=False)
        longest = max((len(finding.name) for finding in found), default=0)
        table.add_column("file", no_wrap=True, min_width=longest)
        for title in ("state", "bytes", ""):
            table.add_column(title, justify="right" if title == "bytes" else "left")
        for name, state, size, reason in found:
            table.add_row(name, state, f"{size:,}", reason)
        console.print(table)
    if wrong:
        names = ", ".join(finding.name for finding in wrong)
        raise UserError(
            f"{len(wrong)} of {len(found)} files in {str(run)!r} are changed or missing: {names};"
            " `ebmkit train --resume` continues from the undamaged files, --accept NAME accepts a"
            " file that was changed on purpose"
        )
    if not as_json:
        whole = sum(finding.state == "whole" for finding in found)
        console.say(f"all {whole} files of the run are whole")


TABLES: dict[str, tuple[str, str]] = {
    "backbones": ("models", "BACKBONES"),
    "denoisers": ("models", "DENOISERS"),
    "diffusion": ("models", "DENOISERS"),
    "heads": ("models", "HEADS"),
    "objectives": ("objectives", "OBJECTIVES"),
    "datasets": ("data", "DATASETS"),
    "recipes": ("training", "RECIPES"),
    "suites": ("evaluation", "SUITES"),
    "samplers": ("sampling", "SAMPLERS"),
    "tasks": ("sampling.inverse", "TASKS"),
    "guidance": ("guidance", "GUIDES"),
    "schedules": ("guidance", "GUIDANCE_SCHEDULES"),
}
"""Module and name of the registry of each kind."""

USES: dict[str, str] = {
    "backbones": "train --backbone",
    "denoisers": "train --backbone",
    "diffusion": "train --backbone",
    "heads": "train --head",
    "objectives": "train --objective",
    "datasets": "train --dataset",
    "recipes": "train --recipe",
    "suites": "evaluate --suite",
    "samplers": "sample --sampler",
    "tasks": "restore --task",
    "checkpoints": "import --as",
    "guidance": "sample --guidance",
    "schedules": "sample --schedule",
}
"""The option that accepts the names of each kind."""


def described(kind: Kind) -> dict[str, str]:
    """Names and descriptions of ``kind``; imports only the registry that has them."""
    if kind == "checkpoints":
        from ebmkit.models.importing import KINDS

        return dict(KINDS)
    module, registry = TABLES[kind]
    entries: Mapping[str, Any] = getattr(import_module(f"ebmkit.{module}"), registry)
    if kind in ("denoisers", "diffusion"):
        from ebmkit.models.diffusion import UNetConfig

        unets = [name for name, entry in entries.items() if isinstance(entry.config, UNetConfig)]
        entries = {n: e for n, e in entries.items() if (n in unets) == (kind == "diffusion")}
    found = {getattr(entry, "form", name): entry.description for name, entry in entries.items()}
    if kind == "backbones":
        found["timm:NAME"] = "any network of timm, as timm:convnext_atto"
    if kind == "objectives":
        from ebmkit.objectives import ALIASES

        found |= {name: f"short for {'+'.join(parts)}" for name, parts in ALIASES.items()}
    return found


def tables() -> dict[str, dict[str, str]]:
    """`described` of every kind."""
    return {kind: described(kind) for kind in get_args(Kind)}


def list_(
    kind: Annotated[Kind | None, Argument(help=", ".join(get_args(Kind)))] = None,
) -> None:
    """List the names that options accept; without a kind, an overview.

    Example:
        ebmkit list backbones
    """
    if kind is None:
        table = Table("kind", "names", "option", show_lines=True)
        for name, found in tables().items():
            table.add_row(name, ", ".join(found), USES[name])
        console.print(table)
        console.say("descriptions: ebmkit list KIND; networks of timm: --backbone timm:NAME")
        return
    table = Table(kind.removesuffix("s"), "description")
    for name, description in described(kind).items():
        table.add_row(name, description)
    console.print(table)


def pack(
    src: str,
    out: Path,
    *,
    image_size: int | None = None,
    skip_unreadable: bool = False,
    follow_links: bool = False,
) -> None:
    """Pack an image folder or torchvision data set into one HDF5 file.

    Train on it with --dataset hdf5 --data-dir OUT.h5.

    Example:
        ebmkit data pack photos photos.h5 --image-size 64

    Args:
        src: image folder, CIFAR folder, or torchvision:NAME[:FOLDER]
        out: HDF5 file to write
        skip_unreadable: skip images that cannot be read
        follow_links: follow links that lead out of the folder
    """
    from ebmkit.data import FaultPolicy
    from ebmkit.data.sets import pack as pack_file

    faults = FaultPolicy(skip_unreadable, follow_links)
    pack_file(src, out, image_size=image_size, progress=True, faults=faults)
    console.say(f"wrote {out}")


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

    Example:
        ebmkit bench --backbone gradresnet18 --objective ce+dsm --width 16

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

    if json_ is not None:
        check_new_file("--json", json_)
    where = pick_device(device)
    pick_precision(precision, where)
    pick_compile(compile_, where)
    compute = ComputeConfig.model_validate({"precision": precision, "compile": compile_})
    base = measured.BenchmarkSetting("", backbone, width, image_size, batch)
    names = [name.strip() for name in objective.split(",")]
    for name in names:
        measured.timed_terms(name)
    measured.network(base, channels, where)
    calls = measured.INFERENCES if inference_ else ()
    curve = base._replace(what=measured.SCALING)
    points = measured.scaling_settings(curve) if scaling_ else []
    timed: list[tuple[str, str | None]] = [(f"train {name}", name) for name in names]
    timed += [(call, None) for call in calls]
    rows: list[Row] = []
    with ProgressBar(COUNT) as progress:
        task = progress.add_task("", total=len(timed) + len(points))
        for what, trained in timed:
            setting = base._replace(what=what)
            progress.update(task, description=str(setting))
            found = measured.comparison(setting, channels, where, compute, trained)
            rows += measured.measure(found, where, rounds)
            progress.advance(task)
        progress.update(task, description=measured.SCALING)
        for more in measured.scaling(points, channels, where, rounds, compute):
            rows += more
            progress.advance(task)
    console.print(_bench_table(rows, base))
    if json_ is not None:
        write_atomically(json_, (json.dumps(measured.document(rows), indent=1) + "\n").encode())
        console.say(f"rows: {json_}")


def _bench_table(rows: list[Row], base: BenchmarkSetting) -> Table:
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
