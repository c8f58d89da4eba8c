"""``ebmkit restore``: pictures from what is known of them, by a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress
from rich.table import Table

from ebmkit.cli.console import console, warn
from ebmkit.terminal import for_bar, shown_name

if TYPE_CHECKING:
    from ebmkit.sampling.jobs.restoring import RestoreJob

__all__ = ["restore"]


def restore(
    run: Annotated[Path, typer.Argument(help="run folder of a blind denoiser")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="images: PNG, JPEG, TIFF")],
    out: Annotated[Path, typer.Option(help="output folder")],
    task: Annotated[
        str, typer.Option(help="inpaint, random-pixels, superres, deblur, compressed")
    ] = "inpaint",
    mask: Annotated[
        Path | None,
        typer.Option(
            help="for inpaint: image that is white where pixels are missing [default: a "
            "hole in the centre]"
        ),
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(
            help="share of the image: the hole (inpaint, 0.1), or the measured share "
            "(random-pixels 0.5, deblur 0.25, compressed 0.25)"
        ),
    ] = None,
    factor: Annotated[
        int | None, typer.Option(help="for superres: enlargement factor [default: 2]")
    ] = None,
    measured: Annotated[
        bool,
        typer.Option(
            "--measured",
            help="the input images are measurements: with missing parts, low-resolution, "
            "or blurred",
        ),
    ] = False,
    samples: Annotated[
        int, typer.Option(help="number of restorations per image; also writes their mean")
    ] = 1,
    label: Annotated[
        str | None,
        typer.Option(help="class (name or number), to use the class-conditional denoiser"),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="maximum number of steps")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="setting of the sampler ks, for example beta=0.1; repeatable"),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(min=0, max=2**63 - 1, help="random seed of the noise and of the measurements"),
    ] = 0,
    weights: Annotated[
        str, typer.Option(help="which weights: last, or best (lowest validation loss)")
    ] = "last",
    device: Annotated[str, typer.Option(help="device: auto, cpu, cuda, cuda:1")] = "auto",
    precision: Annotated[
        str, typer.Option(help="precision: fp32, tf32, bf16; auto: fp32")
    ] = "auto",
    compile_: Annotated[
        str, typer.Option("--compile", help="compile the score: on, off; auto: off")
    ] = "auto",
) -> None:
    """Restore images from linear measurements, by stochastic ascent (Kadkhodaie & Simoncelli).

    The input is the clean image: the command measures it, restores it, and compares the result with
    it and with simple methods. With --measured the input is the measurement. Writes
    NAME-measured.png, NAME-restored.png, NAME-comparison.png and NAME.json; overwrites nothing.
    """
    from ebmkit.compile import optimize
    from ebmkit.compute import pick_device
    from ebmkit.models import load
    from ebmkit.sampling.config import StochasticAscentConfig
    from ebmkit.sampling.jobs import TaskOptions, find_task, parse_label
    from ebmkit.sampling.jobs.restoring import RestoreJob, make_folder, read_mask
    from ebmkit.sampling.jobs.settings import no_steps
    from ebmkit.sampling.presets import SAMPLERS
    from ebmkit.training import parse_assignments
    from ebmkit.validation import validated

    chosen = find_task(task)
    values: dict[str, Any] = parse_assignments(set_ or [])
    if steps is not None:
        values["steps"] = steps
    no_steps(values)
    config = validated(StochasticAscentConfig, values, "settings of sampler 'ks'")
    model = load(run, device=str(pick_device(device)), weights=weights)
    model = optimize(model, precision, compile_)
    c = None if label is None else parse_label(model, label)
    SAMPLERS["ks"].check(model, c)
    options = TaskOptions(None if mask is None else read_mask(mask), share, factor, seed)
    job = RestoreJob(model, chosen, options, config, measured, samples, seed, c, str(run))
    job.check(images, out)
    make_folder(out)
    table = Table("picture", "dB", *(["mean, dB"] if samples > 1 else []), "simple methods, dB")
    for path in images:
        document = _restore_one(job, path, out)
        for sentence in document["warnings"]:
            warn(sentence)
        if document["psnr"] is not None:
            table.add_row(shown_name(path.name), *_cells(document["psnr"]))
    if table.row_count:
        console.print(table)
    console.say(f"pictures: {out}")


def _restore_one(job: RestoreJob, path: Path, out: Path) -> dict[str, Any]:
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        line = bar.add_task(for_bar(path.name), total=None)
        return job.run_on(
            path, out, lambda done, total: bar.update(line, completed=done, total=total)
        )


def _cells(psnr: dict[str, Any]) -> list[str]:
    known = [value for value in psnr["samples"] if value is not None]
    cells = [f"{sum(known) / len(known):.2f}" if known else "-"]
    if "mean_of_samples" in psnr:
        cells.append(f"{psnr['mean_of_samples']:.2f}")
    simple = psnr["baselines"].items()
    cells.append(", ".join(f"{name} {value:.2f}" for name, value in simple if value is not None))
    return cells
