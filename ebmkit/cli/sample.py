"""``ebmkit sample``: images from a trained model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ebmkit.cli.console import console, warn
from ebmkit.errors import UserError

if TYPE_CHECKING:
    from ebmkit.sampling.jobs import SamplingJob

__all__ = ["sample"]


def sample(
    run: Annotated[Path, typer.Argument(help="run folder")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="folder for the samples: new, or an interrupted job to resume [default: "
            "a folder in RUN/samples/ named after the settings]"
        ),
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            help="sampler, from `ebmkit list samplers`; buffer: export the replay buffer "
            "[default: ks for blind denoisers, ddim if the noise level is an input, "
            "else sgld]"
        ),
    ] = None,
    count: Annotated[int, typer.Option("-n", "--count", help="number of samples")] = 64,
    label: Annotated[
        str | None, typer.Option(help="class, by name or number; all: each class in turn")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="number of steps per chain [default: set by the sampler]")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            help="starting points: noise (Gaussian noise around gray), uniform, data, "
            "seeds (draws from the Gaussian of a class's images), mean (noise "
            "around the mean image), buffer [default: set by the sampler]"
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="setting of the sampler, for example step_size=1e-4; repeatable"
        ),
    ] = None,
    guide: Annotated[
        Path | None, typer.Option(help="run folder of the guide: a classifier or joint model")
    ] = None,
    guidance: Annotated[
        str | None,
        typer.Option(
            help="guidance method, from `ebmkit list guidance`; classifier-free needs no "
            "--guide [default: energy]"
        ),
    ] = None,
    scale: Annotated[float | None, typer.Option(help="guidance scale [default: 1]")] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="guidance schedule: exact, constant, step:at=500,low=0.37, linear, "
            "power:k=2, sigmoid:t0=500,y0=0.05,k=0.02 [default: exact]"
        ),
    ] = None,
    view: Annotated[
        str | None,
        typer.Option(
            help="input of the guide: noisy, shrunk, clean, clean-through (gradient "
            "backpropagated through the denoiser) [default: noisy if the guide "
            "takes the noise level, else shrunk]"
        ),
    ] = None,
    late: Annotated[
        float | None,
        typer.Option(
            help="share of the noise levels without guidance, from the noisiest down [default: 0]"
        ),
    ] = None,
    guide_set: Annotated[
        list[str] | None,
        typer.Option(
            help="setting of the guide: n=50, gamma=0.01, lambda=0.15 or inner=dual; repeatable"
        ),
    ] = None,
    guide_weights: Annotated[
        str, typer.Option(help="which weights of the guide: last, or best (lowest validation loss)")
    ] = "last",
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="random seed of starting points and steps")
    ] = 0,
    batch_size: Annotated[
        int, typer.Option(help="number of chains per batch; another value draws other samples")
    ] = 64,
    image_size: Annotated[
        int | None,
        typer.Option(
            help="height and width of the samples, in pixels [default: the training size]"
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="data set for starting points and for the energies of real images "
            "[default: the training data set]"
        ),
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="folder or file of the data set")] = None,
    weights: Annotated[
        str, typer.Option(help="which weights: last, or best (lowest validation loss)")
    ] = "last",
    device: Annotated[str, typer.Option(help="device: auto, cpu, cuda, cuda:1")] = "auto",
    precision: Annotated[
        str, typer.Option(help="precision: fp32, tf32, bf16; auto: fp32")
    ] = "auto",
    compile_: Annotated[
        str,
        typer.Option(
            "--compile",
            help="compile the score: on, off; auto: off, so that resuming is bit-identical",
        ),
    ] = "auto",
) -> None:
    """Sample images from a trained model: from p(x), or with --label from p(x|c).

    With --guide a classifier guides another model, for example a diffusion model, to the label:
    --guidance energy --scale 4 --schedule sigmoid:t0=500,y0=0.05,k=0.02.

    Writes samples.h5 (samples and their energies; also a data set of kind hdf5), samples.png,
    path.png, path.gif and sampling.json (settings, traces, diagnostics). After Ctrl-C or a kill,
    the same command resumes and gives the same samples.
    """
    from ebmkit.compile import laid_out, make_inference
    from ebmkit.compute import pick_device
    from ebmkit.models import load
    from ebmkit.sampling.jobs import (
        SamplingFolder,
        SamplingJob,
        at_hand,
        default_folder,
        guidance_asked,
        guide_by,
        make_settings,
        sources_for,
        write_results,
    )
    from ebmkit.training import parse_assignments

    place = pick_device(device)
    how = guidance_asked(
        guide, guidance, scale, schedule, view, late, parse_assignments(guide_set or [])
    )
    model = load(run, device=str(place), weights=weights)
    inference = make_inference(place, precision, compile_)
    model = laid_out(model, inference)
    guided, digest = dict[str, Any](), model.weights_sha256
    if how is not None:
        with _counting("mean energies of the guide") as progress:
            found = guide_by(
                model, how, guide, guide_weights, run, dataset, data_dir, progress,
                console.is_terminal, inference,
            )  # fmt: skip
        model, guided = found.model, found.settings
    settings = make_settings(
        model,
        sampler,
        count=count,
        label=label,
        steps=steps,
        start=start,
        options=parse_assignments(set_ or []),
        data_at_hand=at_hand(run, dataset, data_dir),
        batch_size=batch_size,
        image_size=image_size,
        seed=seed,
        weights=weights,
        digest=digest or "",
        dataset=dataset or "",
        precision=inference.precision,
        compile="on" if inference.mode == "on" else "off",
        computed_on=place.type,
        **guided,
    )
    out = default_folder(run, settings) if out is None else out
    sources = sources_for(run, model, settings, dataset, data_dir, console.is_terminal)
    job = SamplingJob(model, settings, SamplingFolder(out), sources)
    job.folder.begin(settings)
    for sentence in job.cautions:
        warn(sentence)
    with job.folder.alone():
        _draw(job)
        document = write_results(job, str(run))
    _tell(document, out, len(job.cautions))


@contextmanager
def _counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar that is shown once something is counted."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)


def _draw(job: SamplingJob) -> None:
    from ebmkit.sampling.jobs import Interrupted
    from ebmkit.training.loop import exit_code, stop_requested

    settings = job.settings
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar, stop_requested() as stop:
        task = bar.add_task(f"{settings.count:,} samples by {settings.sampler}", total=None)
        try:
            job.run(lambda done, total: bar.update(task, completed=done, total=total), stop)
        except Interrupted as stopped:
            bar.stop()
            console.say(
                f"interrupted; saved after step {stopped.done:,} of {stopped.total:,}. Go on with "
                "the same command."
            )
            raise typer.Exit(exit_code(stop.signal)) from None


def _tell(document: dict[str, Any], out: Path, before: int) -> None:
    """What came out; warnings after the first ``before``, which were told at the start."""
    diagnostics = document["diagnostics"]
    energies, chains = diagnostics["energies"], diagnostics["chains"]
    lines = [f"{document['samples']:,} samples in {document['seconds']:.1f} s: {out}"]
    if diagnostics["acceptance"] is not None:
        lines.append(f"acceptance {diagnostics['acceptance']:.2f}")
    if chains.get("split_rhat") is not None:
        lines.append(
            f"split R-hat {chains['split_rhat']:.3f}, effective size "
            f"{chains['effective_size']:.0f} of {chains['draws'] * chains['chains']} draws"
        )
    if energies.get("gap") is not None:
        lines.append(
            f"mean log p: samples {energies['log_density_of_samples']:.1f}, held-out images "
            f"{energies['log_density_of_data']:.1f} (nats)"
        )
    for line in lines:
        console.say(line)
    found = document["warnings"][before:]
    for sentence in found:
        warn(sentence)
    if len(document["lost"]) == document["samples"]:
        raise UserError(f"every chain left the finite numbers; see {str(out / 'sampling.json')!r}")
