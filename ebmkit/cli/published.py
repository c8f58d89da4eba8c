"""``ebmkit import``: checkpoints of other programs as a folder like a run's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from ebmkit.cli.console import console
from ebmkit.errors import UserError


def import_(
    source: Annotated[
        str, Argument(help="file or folder, or OWNER/NAME:FILE (diffusers: OWNER/NAME) on the hub")
    ],
    out: Annotated[Path, Option(help="new folder for the model")],
    sigma: Annotated[
        list[str] | None,
        Option(help="noise level it was trained for, as 25/255; twice: lowest and highest"),
    ] = None,
    kind: Annotated[
        str | None,
        Option("--as", help="robustness, jem, denoiser, state or diffusers; default: found"),
    ] = None,
    backbone: Annotated[
        str | None, Option(help="for state: a name from `ebmkit list backbones`")
    ] = None,
    rename: Annotated[
        list[str] | None,
        Option("--map", help="OLD=NEW, prefixes of names, in order; may be repeated"),
    ] = None,
    classes: Annotated[int | None, Option(help="labels, if the weights do not tell")] = None,
    mean: Annotated[
        str | None, Option(help="subtracted from images in [0, 1]: 0.5 or 0.49,0.48,0.45")
    ] = None,
    std: Annotated[str | None, Option(help="what they are divided by then")] = None,
    image_size: Annotated[int | None, Option(help="height and width in training")] = None,
    dataset: Annotated[
        str | None, Option(help="what it was trained on, as cifar10: gives the class names")
    ] = None,
    set_: Annotated[
        list[str] | None,
        Option("--set", help="for state: one field, as model.backbone.width=32; repeatable"),
    ] = None,
) -> None:
    """Import a checkpoint, to evaluate, sample and use as a run. Nothing in it is executed.

    Files of the robustness package, JEM's, published DnCNN and DRUNet, state dicts, and UNets of
    diffusers. Then, for example: ebmkit evaluate OUT --suite robustness
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
