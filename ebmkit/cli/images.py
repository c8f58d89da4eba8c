"""Commands that apply a model: ``ebmkit classify``, ``denoise``, ``restore`` and ``sample``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from rich.table import Table
from typer import Option

from ebmkit.cli.console import interrupted, warn
from ebmkit.errors import Interrupted, UserError
from ebmkit.terminal import COUNT, ProgressBar, console, counting, errors, one_line, shown_name

if TYPE_CHECKING:
    from torch import Tensor

    from ebmkit.energy import ScoreModel
    from ebmkit.sampling.jobs.job import SamplingJob


def classify(
    run: Path,
    images: list[Path],
    *,
    top: Annotated[int, Option(min=1)] = 3,
    resize: bool = True,
    weights: str = "last",
    device: str = "auto",
) -> None:
    """Classify images: print the most likely classes, their probabilities and the log-density.

    Log-densities are in nats, up to a constant of the model. Compare them only between images of
    the same size.

    Args:
        top: number of classes to show
        resize: resize and crop images to the training size
    """
    from ebmkit.compute import pick_device
    from ebmkit.data import read_image
    from ebmkit.energy import classifies
    from ebmkit.models import load

    place = pick_device(device)
    model = load(run, device=str(place), weights=weights)
    if not classifies(model):
        raise UserError(f"the model in {str(run)!r} was trained without labels: it cannot classify")
    loaded = [(path, read_image(path, _channels(model))) for path in images]
    names = model.card.class_names if model.card else []
    table = Table("image", "class", "probability", "log-density (nats)")
    for path, own in loaded:
        y = _sized(model, own.image) if resize else own.image
        energies = model(y[None].to(place))
        posterior = energies.log_posterior()[0].exp().cpu()
        _check_numbers(run, path, posterior)
        for rank, label in enumerate(posterior.argsort(descending=True)[:top].tolist()):
            first = rank == 0
            table.add_row(
                shown_name(path.name) if first else "",
                shown_name(names[label] if label < len(names) else str(label)),
                f"{float(posterior[label]):.2%}",
                f"{float(energies.log_density[0]):.1f}" if first else "",
            )
    console.print(table)


def denoise(
    run: Path,
    images: list[Path],
    *,
    out: Path,
    sigma: str | None = None,
    label: str | None = None,
    weights: str = "last",
    device: str = "auto",
    precision: str = "auto",
    compile_: str = "auto",
) -> None:
    """Remove Gaussian noise from images of any size, in tiles.

    Writes each image under its own name to --out, and never overwrites a file. If the model is for
    colour, the output for a gray image is the mean over channels.

    Args:
        out: folder for the denoised images
        sigma: noise level, for example 25/255 [default: estimated by the model]
    """
    from ebmkit.compile import optimize
    from ebmkit.compute import pick_device
    from ebmkit.data import read_image, write_image
    from ebmkit.inference import denoise_image
    from ebmkit.models import load
    from ebmkit.noise import format_sigma, parse_sigma
    from ebmkit.sampling.jobs.settings import parse_label
    from ebmkit.storage import make_folder

    level, place = None if sigma is None else parse_sigma(sigma), pick_device(device)
    model = optimize(load(run, device=str(place), weights=weights), precision, compile_)
    c = None if label is None else parse_label(model, label)
    _warn_range(model, level)
    targets = [out / path.name for path in images]
    _check_targets(images, targets)
    for path in images:  # check all inputs first; then one image in memory at a time
        read_image(path, _channels(model))
    make_folder(out)
    for path, target in zip(images, targets, strict=True):
        loaded = read_image(path, _channels(model))
        with counting(target.name) as progress:
            found = denoise_image(model, loaded.image.to(place), level, c, progress=progress)
        image = found.image.cpu()
        _check_numbers(run, path, image)
        image = image.mean(0, keepdim=True) if loaded.was_gray else image
        write_image(image.clamp(0, 1), target, bits=loaded.bits)
        removed = f"removed noise of level {format_sigma(found.sigma)}"
        how = "given" if level is not None else "estimated"
        console.say(f"{one_line(str(target))}: {removed} ({how})")
        if level is None:
            _warn_range(model, found.sigma)


def restore(
    run: Path,
    images: list[Path],
    *,
    out: Path,
    task: str = "inpaint",
    mask: Path | None = None,
    share: float | None = None,
    factor: int | None = None,
    measured: bool = False,
    samples: int = 1,
    label: str | None = None,
    steps: int | None = None,
    set_: list[str] | None = None,
    seed: int = 0,
    weights: str = "last",
    device: str = "auto",
    precision: str = "auto",
    compile_: str = "auto",
) -> None:
    """Restore images from linear measurements, by stochastic ascent (Kadkhodaie & Simoncelli).

    The input is the clean image: the command measures it, restores it, and compares the result with
    it and with simple methods. With --measured the input is the measurement. Writes
    NAME-measured.png, NAME-restored.png, NAME-comparison.png and NAME.json; overwrites nothing.
    After Ctrl-C or a kill, the same command resumes and produces the same images.

    Args:
        run: run folder of a blind denoiser
        out: output folder
        task: inpaint, random-pixels, superres, deblur, compressed
        mask: for inpaint: image that is white where pixels are missing [default: a hole in the
            centre]
        share: share of the image: the hole (inpaint, 0.1), or the measured share (random-pixels
            0.5, deblur 0.25, compressed 0.25)
        factor: for superres: enlargement factor [default: 2]
        measured: the input images are measurements: with missing parts, low-resolution, or blurred
        samples: number of restorations per image; also writes their mean
        steps: maximum number of steps
        set_: setting of the sampler kadkhodaie_simoncelli, for example beta=0.1; repeatable
    """
    from ebmkit.compile import make_inference, wrap_channels_last
    from ebmkit.compute import pick_device
    from ebmkit.errors import validated
    from ebmkit.models import load
    from ebmkit.sampling.ascent import KADKHODAIE_SIMONCELLI_ENTRY as SAMPLER
    from ebmkit.sampling.inverse import TaskOptions, find_task
    from ebmkit.sampling.jobs.restore import RestoreJob, read_mask
    from ebmkit.sampling.jobs.settings import parse_label, parse_options
    from ebmkit.training import parse_assignments
    from ebmkit.training.loop import stop_requested

    chosen = find_task(task)
    values = parse_options(parse_assignments(set_ or []), steps)
    config = validated(SAMPLER.config, values, f"settings of sampler {SAMPLER.name!r}")
    place = pick_device(device)
    inference = make_inference(place, precision, compile_)
    model = wrap_channels_last(load(run, device=str(place), weights=weights), inference)
    c = None if label is None else parse_label(model, label)
    SAMPLER.check(model, c)
    options = TaskOptions(None if mask is None else read_mask(mask), share, factor, seed)
    computed = f"{place.type}, {inference.precision}, compile {inference.mode}"
    job = RestoreJob(model, chosen, options, config, measured, samples, seed, c, str(run), computed)
    folder = job.begin(images, out)
    table = Table("image", "dB", *(["mean, dB"] if samples > 1 else []), "simple methods, dB")
    with folder.alone("restoring"), stop_requested() as stop:
        for number, path in enumerate(images):
            try:
                with counting(path.name) as progress:
                    document = job.run_on(images, number, folder, progress, stop=stop)
            except Interrupted as stopped:
                _interrupted(stopped, f" of {shown_name(path.name)}", stop.signal)
            for sentence in document["warnings"]:
                warn(sentence)
            if document["psnr"] is not None:
                table.add_row(shown_name(path.name), *_cells(document["psnr"]))
        folder.finish()
    if table.row_count:
        console.print(table)
    console.say(f"images: {out}")


def sample(
    run: Path,
    *,
    out: Path | None = None,
    sampler: str | None = None,
    count: Annotated[int, Option("-n", "--count")] = 64,
    label: str | None = None,
    steps: int | None = None,
    start: str | None = None,
    set_: list[str] | None = None,
    guide: Path | None = None,
    guidance: str | None = None,
    scale: float | None = None,
    schedule: str | None = None,
    view: str | None = None,
    guide_start: float | None = None,
    guide_set: list[str] | None = None,
    guide_weights: str = "last",
    seed: int = 0,
    batch_size: int = 64,
    image_size: int | None = None,
    dataset: str | None = None,
    data_dir: Path | None = None,
    weights: str = "last",
    device: str = "auto",
    precision: str = "auto",
    compile_: str = "auto",
) -> None:
    """Sample images from a trained model: from p(x), or with --label from p(x|c).

    With --guide a classifier guides another model, for example a diffusion model, to the label:
    --guidance energy --scale 4 --schedule sigmoid:t0=500,y0=0.05,k=0.02.

    Writes samples.h5 (samples and their energies; also a data set of kind hdf5), samples.png,
    path.png, path.gif and sampling.json (settings, traces, diagnostics). After Ctrl-C or a kill,
    the same command resumes and produces the same samples.

    Args:
        out: folder for the samples: new, or an interrupted job to resume [default: a folder in
            RUN/samples/ named after the settings]
        sampler: sampler, from `ebmkit list samplers`; buffer: export the replay buffer [default:
            kadkhodaie_simoncelli for blind denoisers, ddim if the noise level is an input, else
            sgld]
        count: number of samples
        label: class, by name or number; all: each class in turn
        steps: number of steps per chain [default: set by the sampler]
        start: starting points: noise (Gaussian noise around gray), uniform, data, class_gaussian
            (draws from the Gaussian of a class's images), mean (noise around the mean image),
            buffer [default: set by the sampler]
        set_: setting of the sampler, for example step_size=1e-4; repeatable
        guide: run folder of the guide: a classifier or joint model
        guidance: guidance method, from `ebmkit list guidance`; classifier-free needs no --guide
            [default: energy]
        scale: guidance scale [default: 1]
        schedule: guidance schedule: exact, constant, step:at=500,low=0.37, linear, power:k=2,
            sigmoid:t0=500,y0=0.05,k=0.02 [default: exact]
        view: input of the guide: noisy, x_t, x0_hat, x0_hat-backpropagate (gradient backpropagated
            through the denoiser) [default: noisy if the guide takes the noise level, else x_t]
        guide_start: share of the noise levels without guidance, from the noisiest down [default: 0]
        guide_set: setting of the guide: n=50, gamma=0.005, lambda=0.15 or inner=dual; repeatable
        guide_weights: which weights of the guide: last, or best (lowest validation loss)
        batch_size: number of chains per batch; the samples depend on it
        image_size: height and width of the samples, in pixels [default: the training size]
        dataset: data set for starting points and for the energies of real images [default: the
            training data set]
    """
    from ebmkit.compile import make_inference, wrap_channels_last
    from ebmkit.compute import pick_device
    from ebmkit.models import load
    from ebmkit.sampling.jobs.arrival import forecast
    from ebmkit.sampling.jobs.chains import JobFolder
    from ebmkit.sampling.jobs.job import SamplingJob, write_results
    from ebmkit.sampling.jobs.settings import default_folder, make_settings
    from ebmkit.sampling.jobs.sources import (
        at_hand,
        guide_by,
        parse_guidance,
        sources_for,
        training_images,
    )
    from ebmkit.training import parse_assignments
    from ebmkit.training.cost import format_seconds

    place = pick_device(device)
    how = parse_guidance(
        guide, guidance, scale, schedule, view, guide_start, parse_assignments(guide_set or [])
    )
    model = load(run, device=str(place), weights=weights)
    inference = make_inference(place, precision, compile_)
    model = wrap_channels_last(model, inference)
    guided, digest = dict[str, Any](), model.weights_sha256
    if how is not None:
        with counting("mean energies of the guide") as progress:
            model, guided = guide_by(
                model, how, guide, guide_weights, run, dataset, data_dir, progress,
                True, inference,
            )  # fmt: skip
    settings = make_settings(
        model,
        sampler,
        count=count,
        label=label,
        steps=steps,
        start=start,
        options=parse_assignments(set_ or []),
        data_available=at_hand(run, dataset, data_dir),
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
    sources = sources_for(run, model, settings, dataset, data_dir, progress=True)
    job = SamplingJob(model, settings, JobFolder(out), sources)
    job.folder.begin(settings)
    with counting("trial of a few chains") as progress:
        spare = partial(training_images, run, settings, dataset, data_dir)
        expected = forecast(job, spare, progress)
    if expected is not None and expected.caution is not None:
        job.cautions.append(expected.caution)
    for sentence in job.cautions:
        warn(sentence)
    if expected is not None:
        duration = format_seconds(expected.seconds)
        console.say(f"{settings.count:,} samples, {job.length:,} steps each: about {duration}")
    with job.folder.alone():
        _draw(job)
        document = write_results(job, str(run))
    _report(document, out, len(job.cautions))


def _check_numbers(run: Path, path: Path, found: Tensor) -> None:
    if not bool(found.isfinite().all()):
        raise UserError(
            f"the model in {str(run)!r} gives NaN or Inf for {path.name!r}: its training "
            "diverged, or its weights are damaged; try `--weights best`"
        )


def _channels(model: ScoreModel) -> int | None:
    return model.card.channels if model.card else None


def _warn_range(model: ScoreModel, sigma: float | None) -> None:
    from ebmkit.noise import format_sigma

    if model.card is None:
        return
    if model.card.sigma_range is None:
        warn("this model was never trained to denoise")
    elif sigma is not None:
        low, high = model.card.sigma_range
        if not low <= sigma <= high:
            warn(
                f"noise level {format_sigma(sigma)} is outside the range this model was "
                f"trained for, {format_sigma(low)} to {format_sigma(high)}"
            )


def _check_targets(sources: list[Path], targets: list[Path]) -> None:
    from ebmkit.data.images import WRITERS

    for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
        if target in targets[:i]:
            raise UserError(f"two images are called {source.name!r}: denoise them separately")
        if target.suffix.lower() not in WRITERS:
            raise UserError(
                f"cannot write {target.name!r}: images to denoise must be called "
                f"{', '.join(sorted(WRITERS))}; convert it first"
            )
        if target.exists():
            raise UserError(f"{str(target)!r} exists: choose another --out, or move it away")


def _sized(model: ScoreModel, image: Tensor) -> Tensor:
    """Resize the shorter side of the image to the training size, and crop the centre."""
    from torch import nn

    size = model.card.image_size if model.card else None
    if size is None or tuple(image.shape[-2:]) == tuple(size):
        return image
    height, width = image.shape[-2:]
    scale = max(size[0] / height, size[1] / width)
    scaled = (max(size[0], round(height * scale)), max(size[1], round(width * scale)))
    note = f"note: {width}x{height} image resized to {size[1]}x{size[0]}, the training size"
    errors.say(f"{note} (--no-resize turns this off)")
    small = nn.functional.interpolate(image[None], scaled, mode="bilinear", antialias=True)[0]
    top, left = (scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2
    return small[:, top : top + size[0], left : left + size[1]]


def _cells(psnr: dict[str, Any]) -> list[str]:
    known = [value for value in psnr["samples"] if value is not None]
    cells = [f"{sum(known) / len(known):.2f}" if known else "-"]
    if "mean_of_samples" in psnr:
        cells.append(f"{psnr['mean_of_samples']:.2f}")
    simple = psnr["baselines"].items()
    cells.append(", ".join(f"{name} {value:.2f}" for name, value in simple if value is not None))
    return cells


def _draw(job: SamplingJob) -> None:
    from ebmkit.training.loop import stop_requested

    what = f"{job.settings.count:,} samples by {job.settings.sampler}"
    with ProgressBar(f"step {COUNT}", transient=True) as progress, stop_requested() as stop:
        task = progress.add_task(what, total=job.total)
        try:
            job.run(lambda done, total: progress.update(task, completed=done, total=total), stop)
        except Interrupted as stopped:
            progress.stop()
            _interrupted(stopped, "", stop.signal)


def _interrupted(stopped: Interrupted, of: str, signum: int | None) -> NoReturn:
    done = f"saved after step {stopped.step:,} of {stopped.total:,}{of}"
    interrupted(f"{done}. Resume by the same command.", signum)


def _report(document: dict[str, Any], out: Path, before: int) -> None:
    """Print the results, and the warnings except the first ``before``, which are already shown."""
    from ebmkit.sampling.diagnostics import describe_arrival

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
    if diagnostics["noise"] is not None:
        lines.append(describe_arrival(diagnostics["noise"]))
    for line in lines:
        console.say(line)
    for sentence in document["warnings"][before:]:
        warn(sentence)
    if len(document["lost"]) == document["samples"]:
        raise UserError(f"every chain diverged to NaN or Inf; see {str(out / 'sampling.json')!r}")
