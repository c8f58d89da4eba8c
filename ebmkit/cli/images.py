"""Commands that apply a model: ``ebmkit classify``, ``denoise``, ``restore`` and ``sample``."""

from __future__ import annotations

import csv
import glob
import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from rich.table import Table
from typer import Option

from ebmkit.cli.console import check_new_file, interrupted, warn
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
    json_: Annotated[Path | None, Option()] = None,
    csv_: Annotated[Path | None, Option()] = None,
    weights: str = "last",
    device: str = "auto",
) -> None:
    """Classify images: most likely classes and log-density.

    Log-densities are in nats, up to a constant of the model. Compare them only between images of
    the same size. Images that cannot be classified are reported, and the exit code is then 2.

    Without RUN, a pretrained model classifies.

    Example:
        ebmkit classify runs/digits photos 'scans/*.png' --csv classes.csv

    Args:
        top: number of classes to show
        resize: resize and crop images to the training size
        json_: also write the table to this new JSON file
        csv_: also write the table to this new CSV file
    """
    from ebmkit.compute import pick_device
    from ebmkit.data import read_image
    from ebmkit.energy import classifies
    from ebmkit.models import load
    from ebmkit.pretrained import name_of

    paths = [path for path, _ in _expand(images)]
    write = _row_writer(json_, csv_)
    place = pick_device(device)
    model = load(run, device=str(place), weights=weights)
    if not classifies(model):
        raise UserError(
            f"the model {name_of(run)!r} was trained without labels: it cannot classify"
        )
    names = model.card.class_names if model.card else []
    table, rows = Table("image", "class", "probability", "log-density (nats)"), list[_Row]()

    def classify_one(path: Path) -> None:
        own = read_image(path, _channels(model)).image
        energies = model((_sized(model, own) if resize else own)[None].to(place))
        posterior = energies.log_posterior()[0].exp().cpu()
        _check_numbers(run, path, posterior)
        density = float(energies.log_density[0])
        for rank, label in enumerate(posterior.argsort(descending=True)[:top].tolist(), 1):
            name, first = names[label] if label < len(names) else str(label), rank == 1
            table.add_row(
                shown_name(path.name) if first else "",
                shown_name(name),
                f"{float(posterior[label]):.2%}",
                f"{density:.1f}" if first else "",
            )
            found = {"class": name, "probability": float(posterior[label])}
            rows.append({"image": str(path), "rank": rank, **found, "log_density": density})

    failed = _for_each(paths, classify_one, rows, write)
    console.print(table)
    _check_failed(failed, len(paths), "classified")


def denoise(
    run: Path,
    images: list[Path],
    *,
    out: Path = Path("denoised"),
    sigma: str | None = None,
    label: str | None = None,
    json_: Annotated[Path | None, Option()] = None,
    csv_: Annotated[Path | None, Option()] = None,
    weights: str = "last",
    device: str = "auto",
    precision: str = "auto",
    compile_: str = "auto",
) -> None:
    """Remove Gaussian noise from images of any size, in tiles.

    Without --sigma the model estimates the noise level, and the command warns if the estimate is
    unreliable: the image is unlike the training images, or what is removed is not noise.

    Writes each image under its own name to --out, images of a folder under their names in it, and
    never overwrites a file. If the model is for colour, the output for a gray image is the mean
    over channels; a gray model without labels denoises colour images channel by channel. Images
    that cannot be denoised are reported, and the exit code is then 2. Without RUN, a pretrained
    model denoises.

    Example:
        ebmkit denoise runs/photos noisy --sigma 25/255 --out denoised

    Args:
        out: folder for the denoised images
        sigma: noise level, for example 25/255 [default: estimated by the model]
        json_: also write inputs, outputs and noise levels to this new JSON file
        csv_: also write inputs, outputs and noise levels to this new CSV file
    """
    import torch

    from ebmkit.compile import optimize
    from ebmkit.compute import pick_device
    from ebmkit.data import read_image, write_image
    from ebmkit.inference import denoise_image
    from ebmkit.models import load
    from ebmkit.noise import format_sigma, parse_sigma
    from ebmkit.sampling.jobs.settings import parse_label
    from ebmkit.storage import make_folder

    named = _expand(images)
    targets = {path: out / name for path, name in named}
    if len(set(targets.values())) < len(named):
        names = [name for _, name in named]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"two images are called {str(twice)!r}: denoise them separately")
    write = _row_writer(json_, csv_)
    level, place = None if sigma is None else parse_sigma(sigma), pick_device(device)
    model = optimize(load(run, device=str(place), weights=weights), precision, compile_)
    c = None if label is None else parse_label(model, label)
    _warn_range(model, level)
    each_channel = _channels(model) == 1 and not model.num_classes
    rows = list[_Row]()

    def denoise_one(path: Path) -> None:
        target = targets[path]
        _check_target(target)
        channels = None if each_channel else _channels(model)
        loaded = read_image(path, channels)
        make_folder(target.parent)
        parts = torch.split(loaded.image.to(place), 1 if each_channel else len(loaded.image))
        found = []
        for part in parts:
            with counting(target.name) as progress:
                found.append(denoise_image(model, part, level, c, progress=progress))
        image = torch.cat([one.image.cpu() for one in found])
        estimate = sum(one.sigma for one in found) / len(found)
        _check_numbers(run, path, image)
        image = image.mean(0, keepdim=True) if loaded.was_gray else image
        write_image(image.clamp(0, 1), target, bits=loaded.bits)
        removed = f"removed noise of level {format_sigma(estimate)}"
        how = "given" if level is not None else "estimated"
        console.say(f"{one_line(str(target))}: {removed} ({how})")
        for sentence in dict.fromkeys(sentence for one in found for sentence in one.warnings):
            warn(f"{one_line(path.name)}: {sentence}")
        rows.append({"image": str(path), "output": str(target), "sigma": estimate, "from": how})

    failed = _for_each(list(targets), denoise_one, rows, write)
    _check_failed(failed, len(targets), "denoised")


def _expand(named: list[Path]) -> list[tuple[Path, Path]]:
    """The images in ``named``, which may be files, folders and patterns, and their names: those of
    a folder relative to it, others without their folder.

    Raises:
        UserError: if a folder or pattern has no images.
    """
    from ebmkit.data.folders import find_images

    found: dict[Path, Path] = {}
    for path in named:
        if path.is_dir():
            own = {path / name: Path(name) for name in find_images(path, path)}
        elif not path.exists() and glob.has_magic(str(path)):
            files = map(Path, sorted(glob.glob(str(path), recursive=True)))
            own = {file: Path(file.name) for file in files if file.is_file()}
        else:
            own = {path: Path(path.name)}
        if not own:
            what = "no images and no model" if path.is_dir() else "no images"
            raise UserError(f"there are {what} in {str(path)!r}: name image files")
        found |= own
    return list(found.items())


_Row = dict[str, Any]


def _for_each(
    paths: list[Path],
    work: Callable[[Path], None],
    rows: list[_Row] | None = None,
    write: Callable[[list[_Row]], None] = lambda rows: None,
) -> int:
    """Call ``work`` for each image and ``write`` the ``rows``; return the number of failures, which
    are printed and get a row. The error of a single image is raised."""
    failed, rows = 0, [] if rows is None else rows
    for path in paths:
        try:
            work(path)
        except UserError as error:
            if len(paths) == 1:
                raise
            failed += 1
            errors.say(f"ebmkit: {error}", "red")
            rows.append({"image": str(path), "error": str(error)})
    write(rows)
    return failed


def _check_failed(failed: int, count: int, done: str) -> None:
    if failed:
        raise UserError(f"{failed} of {count} images could not be {done}, for the reasons above")


def _row_writer(json_: Path | None, csv_: Path | None) -> Callable[[list[_Row]], None]:
    """A function that writes rows to the files; raises a `UserError` if one exists."""
    from ebmkit.storage import write_atomically

    for option, path in (("--json", json_), ("--csv", csv_)):
        if path is not None:
            check_new_file(option, path)

    def write(rows: list[_Row]) -> None:
        if json_ is not None:
            write_atomically(json_, (json.dumps(rows, indent=1) + "\n").encode())
        if csv_ is not None:
            text = io.StringIO(newline="")
            ordered = sorted(rows, key=lambda row: "error" in row)  # its column is the last one
            table = csv.DictWriter(text, list(dict.fromkeys(key for row in ordered for key in row)))
            table.writeheader()
            table.writerows(rows)
            write_atomically(csv_, text.getvalue().encode(errors="surrogateescape"))

    return write


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
    """Restore images from linear measurements.

    The method is stochastic ascent (Kadkhodaie & Simoncelli). The input is the clean image: the
    command measures it, restores it, and compares the result with it and with simple methods. With
    --measured the input is the measurement. Writes NAME-measured.png, NAME-restored.png,
    NAME-comparison.png and NAME.json; overwrites nothing. After Ctrl-C or a kill, the same command
    resumes and produces the same images. Images that cannot be read or restored are reported, and
    the exit code is then 2.

    Example:
        ebmkit restore runs/photos photo.png --task superres --out restored

    Args:
        run: run folder or name of a blind denoiser
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
    from ebmkit.data import read_image
    from ebmkit.errors import validated
    from ebmkit.models import load
    from ebmkit.pretrained import name_of
    from ebmkit.sampling.ascent import KADKHODAIE_SIMONCELLI_ENTRY as SAMPLER
    from ebmkit.sampling.inverse import TaskOptions, find_task
    from ebmkit.sampling.jobs.restore import DivergedError, RestoreJob, read_mask
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
    name = name_of(run)
    job = RestoreJob(model, chosen, options, config, measured, samples, seed, c, name, computed)
    named, images = [path for path, _ in _expand(images)], []

    def check(path: Path) -> None:
        read_image(path, _channels(model))
        images.append(path)

    failed = _for_each(named, check)
    if not images:
        _check_failed(failed, len(named), "restored")
    folder = job.begin(images, out)
    mean = ["mean image, dB"] if samples > 1 else []
    table = Table("image", "restored, dB", *mean, "simple methods, dB")
    with folder.alone("restoring"), stop_requested() as stop:
        for number, path in enumerate(images):
            try:
                with counting(path.name) as progress:
                    document = job.run_on(images, number, folder, progress, stop=stop)
            except Interrupted as stopped:
                _interrupted(stopped, f" of {shown_name(path.name)}", stop.signal)
            except DivergedError as error:
                if len(named) == 1:
                    raise
                failed += 1
                errors.say(f"ebmkit: {error}", "red")
                continue
            for sentence in document["warnings"]:
                warn(sentence)
            if document["psnr"] is not None:
                table.add_row(shown_name(path.name), *_cells(document))
        folder.finish()
    if table.row_count:
        console.print(table)
    console.say(f"images: {out}")
    _check_failed(failed, len(named), "restored")


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
    """Sample images from p(x), or with --label from p(x|c).

    Without RUN, a pretrained model is sampled. With --guide a classifier guides another model, for
    example a diffusion model, to the label: --guidance energy --scale 4
    --schedule sigmoid:t0=500,y0=0.05,k=0.02.

    Writes samples.h5 (samples and their energies; also a data set of kind hdf5), samples.png,
    path.png, path.gif and sampling.json (settings, traces, diagnostics). After Ctrl-C or a kill,
    the same command resumes and produces the same samples.

    Example:
        ebmkit sample runs/digits --label 3 --count 16 --out samples

    Args:
        out: folder for the samples: new, or an interrupted job to resume [default: a folder named
            after the settings, in RUN/samples/, of a pretrained model in
            runs/pretrained/NAME/samples/]
        sampler: sampler, from `ebmkit list samplers`; buffer: export the replay buffer [default:
            ddim if the run stores class Gaussians, else kadkhodaie_simoncelli for blind denoisers;
            if the noise level is an input, heun if training noise hides an image, else ddim; sgld
            for other models]
        count: number of samples
        label: class, by name or number; all: each class in turn [default: all if chains start from
            stored class Gaussians by default, else none]
        steps: number of steps per chain [default: set by the sampler]
        start: starting points: noise (Gaussian noise around gray), uniform, data, class_gaussian
            (draws from the Gaussian of a class's images), mean (noise around the mean image),
            buffer [default: set by the sampler]
        set_: setting of the sampler, for example step_size=1e-4; repeatable
        guide: the guide, as RUN: a classifier or joint model
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
    from ebmkit.pretrained import locate, name_of
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
    guide = None if guide is None else locate(guide)
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
        spare = partial(training_images, run, model, settings, dataset, data_dir)
        expected = forecast(job, spare, progress)
    if expected is not None and expected.caution is not None:
        job.cautions.append(expected.caution)
    for sentence in job.cautions:
        warn(sentence)
    if job.assumption:
        console.say(job.assumption)
    if expected is not None:
        duration = format_seconds(expected.seconds)
        of = "" if expected.steps == job.length else f"about {expected.steps:,} of at most "
        what = f"{settings.count:,} samples, {of}{job.length:,} steps each"
        console.say(f"{what}: about {duration}")
    with job.folder.alone():
        _draw(job)
        document = write_results(job, name_of(run))
    _report(document, out, len(job.cautions))


def _check_numbers(run: Path, path: Path, found: Tensor) -> None:
    from ebmkit.pretrained import name_of

    if not bool(found.isfinite().all()):
        raise UserError(
            f"the model {name_of(run)!r} gives NaN or Inf for {path.name!r}: its training "
            "diverged, or its weights are damaged; try `--weights best`"
        )


def _channels(model: ScoreModel) -> int | None:
    return model.card.channels if model.card else None


def _warn_range(model: ScoreModel, sigma: float | None) -> None:
    from ebmkit.noise import format_sigma

    if model.card is None:
        return
    if not model.card.denoises:
        warn("this model was never trained to denoise")
    elif sigma is not None and model.card.sigma_range is not None:
        low, high = model.card.sigma_range
        if not low <= sigma <= high:
            warn(
                f"noise level {format_sigma(sigma)} is outside the range this model was "
                f"trained for, {format_sigma(low)} to {format_sigma(high)}"
            )


def _check_target(target: Path) -> None:
    from ebmkit.data.images import WRITERS

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


def _cells(document: dict[str, Any]) -> list[str]:
    """PSNR of the images in ``NAME-comparison.png``: of the first chain that did not diverge, and
    of the mean; and of all simple methods."""
    psnr, lost = document["psnr"], document["lost"]
    first = next(v for k, v in enumerate(psnr["samples"]) if k not in lost)
    cells = ["-" if first is None else f"{first:.2f}"]
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
    from ebmkit.sampling.diagnostics import describe_arrival, describe_importance

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
    if diagnostics["importance"] is not None:
        lines += describe_importance(diagnostics["importance"])
    for line in lines:
        console.say(line)
    for sentence in document["warnings"][before:]:
        warn(sentence)
    if len(document["lost"]) == document["samples"]:
        raise UserError(f"every chain diverged to NaN or Inf; see {str(out / 'sampling.json')!r}")
