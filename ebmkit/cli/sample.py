"""``ebmkit sample``: images from a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from ebmkit.cli.console import bar, console, counting, interrupted, left, warn
from ebmkit.cli.options import COMPILE, DATA_DIR, DEVICE, PRECISION, RUN, SEED, SETTING, WEIGHTS
from ebmkit.errors import UserError

if TYPE_CHECKING:
    from ebmkit.sampling.jobs.job import SamplingJob


def sample(
    run: Annotated[Path, RUN],
    out: Annotated[
        Path | None,
        Option(
            help="folder for the samples: new, or an interrupted job to resume [default: a "
            "folder in RUN/samples/ named after the settings]"
        ),
    ] = None,
    sampler: Annotated[
        str | None,
        Option(
            help="sampler, from `ebmkit list samplers`; buffer: export the replay buffer "
            "[default: kadkhodaie_simoncelli for blind denoisers, ddim if the noise "
            "level is an input, else sgld]"
        ),
    ] = None,
    count: Annotated[int, Option("-n", "--count", help="number of samples")] = 64,
    label: Annotated[
        str | None, Option(help="class, by name or number; all: each class in turn")
    ] = None,
    steps: Annotated[
        int | None, Option(help="number of steps per chain [default: set by the sampler]")
    ] = None,
    start: Annotated[
        str | None,
        Option(
            help="starting points: noise (Gaussian noise around gray), uniform, data, "
            "class_gaussian (draws from the Gaussian of a class's images), mean (noise "
            "around the mean image), buffer [default: set by the sampler]"
        ),
    ] = None,
    set_: Annotated[list[str] | None, SETTING] = None,
    guide: Annotated[
        Path | None, Option(help="run folder of the guide: a classifier or joint model")
    ] = None,
    guidance: Annotated[
        str | None,
        Option(
            help="guidance method, from `ebmkit list guidance`; classifier-free needs no "
            "--guide [default: energy]"
        ),
    ] = None,
    scale: Annotated[float | None, Option(help="guidance scale [default: 1]")] = None,
    schedule: Annotated[
        str | None,
        Option(
            help="guidance schedule: exact, constant, step:at=500,low=0.37, linear, "
            "power:k=2, sigmoid:t0=500,y0=0.05,k=0.02 [default: exact]"
        ),
    ] = None,
    view: Annotated[
        str | None,
        Option(
            help="input of the guide: noisy, x_t, x0_hat, x0_hat-backpropagate (gradient "
            "backpropagated through the denoiser) [default: noisy if the guide takes the "
            "noise level, else x_t]"
        ),
    ] = None,
    guide_start: Annotated[
        float | None,
        Option(
            help="share of the noise levels without guidance, from the noisiest down [default: 0]"
        ),
    ] = None,
    guide_set: Annotated[
        list[str] | None,
        Option(
            help="setting of the guide: n=50, gamma=0.01, lambda=0.15 or inner=dual; repeatable"
        ),
    ] = None,
    guide_weights: Annotated[
        str, Option(help="which weights of the guide: last, or best (lowest validation loss)")
    ] = "last",
    seed: Annotated[int, SEED] = 0,
    batch_size: Annotated[
        int, Option(help="number of chains per batch; another value draws other samples")
    ] = 64,
    image_size: Annotated[
        int | None,
        Option(help="height and width of the samples, in pixels [default: the training size]"),
    ] = None,
    dataset: Annotated[
        str | None,
        Option(
            help="data set for starting points and for the energies of real images "
            "[default: the training data set]"
        ),
    ] = None,
    data_dir: Annotated[Path | None, DATA_DIR] = None,
    weights: Annotated[str, WEIGHTS] = "last",
    device: Annotated[str, DEVICE] = "auto",
    precision: Annotated[str, PRECISION] = "auto",
    compile_: Annotated[str, COMPILE] = "auto",
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
    from ebmkit.sampling.jobs.chains import JobFolder
    from ebmkit.sampling.jobs.job import SamplingJob, write_results
    from ebmkit.sampling.jobs.settings import default_folder, make_settings
    from ebmkit.sampling.jobs.sources import at_hand, guide_by, parse_guidance, sources_for
    from ebmkit.training import parse_assignments

    place = pick_device(device)
    how = parse_guidance(
        guide, guidance, scale, schedule, view, guide_start, parse_assignments(guide_set or [])
    )
    model = load(run, device=str(place), weights=weights)
    inference = make_inference(place, precision, compile_)
    model = laid_out(model, inference)
    guided, digest = dict[str, Any](), model.weights_sha256
    if how is not None:
        with counting("mean energies of the guide") as progress:
            model, guided = guide_by(
                model, how, guide, guide_weights, run, dataset, data_dir, progress,
                console.is_terminal, inference,
            )  # fmt: skip
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
    job = SamplingJob(model, settings, JobFolder(out), sources)
    job.folder.begin(settings)
    for sentence in job.cautions:
        warn(sentence)
    with job.folder.alone():
        _draw(job)
        document = write_results(job, str(run))
    _report(document, out, len(job.cautions))


def _draw(job: SamplingJob) -> None:
    from ebmkit.sampling.jobs.chains import Interrupted
    from ebmkit.training.loop import stop_requested

    what = f"{job.settings.count:,} samples by {job.settings.sampler}"
    steps = "step {task.completed:,.0f}/{task.total:,.0f}"
    with bar(steps, *left(), transient=True) as progress, stop_requested() as stop:
        task = progress.add_task(what, total=None)
        try:
            job.run(lambda done, total: progress.update(task, completed=done, total=total), stop)
        except Interrupted as stopped:
            progress.stop()
            interrupted(
                f"saved after step {stopped.done:,} of {stopped.total:,}. Resume by the same "
                "command.",
                stop.signal,
            )


def _report(document: dict[str, Any], out: Path, before: int) -> None:
    """Show what came out; warnings after the first ``before``, which were told at the start."""
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
        raise UserError(f"every chain diverged to NaN or Inf; see {str(out / 'sampling.json')!r}")
