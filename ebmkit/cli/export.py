"""``ebmkit export``: a trained model as a file that runs without ebmkit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from typer import Option

from ebmkit.cli.console import console, errors, warn
from ebmkit.errors import UserError


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
    if what != "classifier" and model.card and model.card.sigma_range is None:
        warn("this model was never trained to denoise")
    with errors.status(f"exporting {out.name}"):
        done = export_model(model, out, what, size, batch=batch)
    shapes = ", ".join(
        f"{name} ({', '.join(str(n) for n in shape)})" for name, shape in done.inputs.items()
    )
    console.say(f"{done.path}: {shapes} -> {', '.join(done.differences)}")
    for name, difference in done.differences.items():
        console.say(
            f"compared with the model on {sum(done.batches)} random images: {name} differs by "
            f"{difference.largest:.1e} of its largest value at the most, {difference.median:.1e} "
            "at the median"
        )


def _parse_size(text: str) -> tuple[int, int]:
    """Height and width from ``32`` or ``32x48``."""
    height, _, width = text.lower().partition("x")
    try:
        return int(height), int(width or height)
    except ValueError:
        raise UserError(
            f"image size {text!r} must be H or HxW in pixels, as in 32 or 32x48"
        ) from None
