"""``ebmkit import``: convert checkpoints of other programs to a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Option

from ebmkit.cli.console import console
from ebmkit.errors import UserError


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
    set_: list[str] | None = None,
) -> None:
    """Convert a checkpoint to a run folder, to evaluate it or sample from it.

    Formats: files of the robustness package and of JEM, published DnCNN and DRUNet, state dicts,
    UNets of diffusers. No code in the file is executed. Then, for example: ebmkit evaluate OUT
    --suite robustness

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
