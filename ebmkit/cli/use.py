"""``ebmkit classify`` and ``ebmkit denoise``: a trained model on images of the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.table import Table
from typer import Option

from ebmkit.cli.console import console, counting, errors, warn
from ebmkit.errors import UserError
from ebmkit.terminal import one_line, shown_name

if TYPE_CHECKING:
    from torch import Tensor

    from ebmkit.energy import ScoreModel


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
    pictures = [(path, read_image(path, _channels(model))) for path in images]
    table = Table("image", "class", "probability", "log-density (nats)")
    for path, picture in pictures:
        y = _sized(model, picture.image) if resize else picture.image
        energies = model(y[None].to(place))
        posterior = energies.log_posterior()[0].exp().cpu()
        _check_numbers(run, path, posterior)
        for rank, label in enumerate(posterior.argsort(descending=True)[:top].tolist()):
            first = rank == 0
            table.add_row(
                shown_name(path.name) if first else "",
                shown_name(_class_name(model, label)),
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
    for path in images:  # all mistakes first, then the work, one image in memory at a time
        read_image(path, _channels(model))
    make_folder(out)
    for path, target in zip(images, targets, strict=True):
        picture = read_image(path, _channels(model))
        with counting(target.name) as progress:
            found = denoise_image(model, picture.image.to(place), level, c, progress=progress)
        image = found.image.cpu()
        _check_numbers(run, path, image)
        image = image.mean(0, keepdim=True) if picture.was_gray else image
        write_image(image.clamp(0, 1), target, bits=picture.bits)
        how = "given" if level is not None else "estimated"
        console.say(
            f"{one_line(str(target))}: noise level {format_sigma(found.sigma)} ({how}) taken out"
        )
        if level is None:
            _warn_range(model, found.sigma)


def _check_numbers(run: Path, picture: Path, found: Tensor) -> None:
    if not bool(found.isfinite().all()):
        raise UserError(
            f"the model in {str(run)!r} gives values that are not finite for {picture.name!r}: its "
            "training diverged, or its weights are damaged; `--weights best` may be whole"
        )


def _channels(model: ScoreModel) -> int | None:
    return model.card.channels if model.card else None


def _class_name(model: ScoreModel, label: int) -> str:
    names = model.card.class_names if model.card else []
    return names[label] if label < len(names) else str(label)


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
    """The image at the trained size: shorter side scaled, middle cut out."""
    from torch import nn

    size = model.card.image_size if model.card else None
    if size is None or tuple(image.shape[-2:]) == tuple(size):
        return image
    height, width = image.shape[-2:]
    scale = max(size[0] / height, size[1] / width)
    scaled = (max(size[0], round(height * scale)), max(size[1], round(width * scale)))
    errors.say(
        f"note: {width}x{height} image brought to {size[1]}x{size[0]}, the trained size "
        "(--no-resize leaves it)"
    )
    small = nn.functional.interpolate(image[None], scaled, mode="bilinear", antialias=True)[0]
    top, left = (scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2
    return small[:, top : top + size[0], left : left + size[1]]
