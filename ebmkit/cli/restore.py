"""``ebmkit restore``: images from what is known of them, by a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from rich.table import Table
from typer import Argument, Option

from ebmkit.cli.console import console, counting, interrupted, warn
from ebmkit.cli.options import COMPILE, DEVICE, IMAGES, LABEL, PRECISION, SEED, WEIGHTS
from ebmkit.terminal import shown_name


def restore(
    run: Annotated[Path, Argument(help="run folder of a blind denoiser")],
    images: Annotated[list[Path], IMAGES],
    out: Annotated[Path, Option(help="output folder")],
    task: Annotated[
        str, Option(help="inpaint, random-pixels, superres, deblur, compressed")
    ] = "inpaint",
    mask: Annotated[
        Path | None,
        Option(
            help="for inpaint: image that is white where pixels are missing [default: a hole "
            "in the centre]"
        ),
    ] = None,
    share: Annotated[
        float | None,
        Option(
            help="share of the image: the hole (inpaint, 0.1), or the measured share "
            "(random-pixels 0.5, deblur 0.25, compressed 0.25)"
        ),
    ] = None,
    factor: Annotated[
        int | None, Option(help="for superres: enlargement factor [default: 2]")
    ] = None,
    measured: Annotated[
        bool,
        Option(
            "--measured",
            help="the input images are measurements: with missing parts, low-resolution, or "
            "blurred",
        ),
    ] = False,
    samples: Annotated[
        int, Option(help="number of restorations per image; also writes their mean")
    ] = 1,
    label: Annotated[str | None, LABEL] = None,
    steps: Annotated[int | None, Option(help="maximum number of steps")] = None,
    set_: Annotated[
        list[str] | None,
        Option(
            "--set",
            help="setting of the sampler kadkhodaie_simoncelli, for example beta=0.1; repeatable",
        ),
    ] = None,
    seed: Annotated[int, SEED] = 0,
    weights: Annotated[str, WEIGHTS] = "last",
    device: Annotated[str, DEVICE] = "auto",
    precision: Annotated[str, PRECISION] = "auto",
    compile_: Annotated[str, COMPILE] = "auto",
) -> None:
    """Restore images from linear measurements, by stochastic ascent (Kadkhodaie & Simoncelli).

    The input is the clean image: the command measures it, restores it, and compares the result with
    it and with simple methods. With --measured the input is the measurement. Writes
    NAME-measured.png, NAME-restored.png, NAME-comparison.png and NAME.json; overwrites nothing.
    After Ctrl-C or a kill, the same command resumes and gives the same images.
    """
    from ebmkit.compile import laid_out, make_inference
    from ebmkit.compute import pick_device
    from ebmkit.errors import validated
    from ebmkit.models import load
    from ebmkit.sampling.ascent import KADKHODAIE_SIMONCELLI_ENTRY as SAMPLER
    from ebmkit.sampling.inverse import TaskOptions, find_task
    from ebmkit.sampling.jobs.chains import Interrupted
    from ebmkit.sampling.jobs.restore import RestoreJob, read_mask
    from ebmkit.sampling.jobs.settings import parse_label, parse_options
    from ebmkit.training import parse_assignments
    from ebmkit.training.loop import stop_requested

    chosen = find_task(task)
    values = parse_options(parse_assignments(set_ or []), steps)
    config = validated(SAMPLER.config, values, f"settings of sampler {SAMPLER.name!r}")
    place = pick_device(device)
    inference = make_inference(place, precision, compile_)
    model = laid_out(load(run, device=str(place), weights=weights), inference)
    c = None if label is None else parse_label(model, label)
    SAMPLER.check(model, c)
    options = TaskOptions(None if mask is None else read_mask(mask), share, factor, seed)
    job = RestoreJob(
        model,
        chosen,
        options,
        config,
        measured,
        samples,
        seed,
        c,
        str(run),
        f"{place.type}, {inference.precision}, compile {inference.mode}",
    )
    folder = job.begin(images, out)
    table = Table("image", "dB", *(["mean, dB"] if samples > 1 else []), "simple methods, dB")
    with folder.alone("restoring"), stop_requested() as stop:
        for number, path in enumerate(images):
            try:
                with counting(path.name) as progress:
                    document = job.run_on(images, number, folder, progress, stop=stop)
            except Interrupted as stopped:
                interrupted(
                    f"saved after step {stopped.done:,} of {stopped.total:,} of {path.name}. "
                    "Resume by the same command.",
                    stop.signal,
                )
            for sentence in document["warnings"]:
                warn(sentence)
            if document["psnr"] is not None:
                table.add_row(shown_name(path.name), *_cells(document["psnr"]))
    folder.finish()
    if table.row_count:
        console.print(table)
    console.say(f"images: {out}")


def _cells(psnr: dict[str, Any]) -> list[str]:
    known = [value for value in psnr["samples"] if value is not None]
    cells = [f"{sum(known) / len(known):.2f}" if known else "-"]
    if "mean_of_samples" in psnr:
        cells.append(f"{psnr['mean_of_samples']:.2f}")
    simple = psnr["baselines"].items()
    cells.append(", ".join(f"{name} {value:.2f}" for name, value in simple if value is not None))
    return cells
