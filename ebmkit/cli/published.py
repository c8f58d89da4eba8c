"""``ebmkit import``: published weights of a denoiser as a folder like a run's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ebmkit.cli.app import app
from ebmkit.cli.console import console
from ebmkit.errors import UserError
from ebmkit.units import parse_sigma

__all__ = ["import_"]


@app.command("import")
def import_(
    weights: Annotated[Path, typer.Argument(help="state dict of a DnCNN or DRUNet, .pth")],
    out: Annotated[Path, typer.Option(help="new folder for the model")],
    sigma: Annotated[
        list[str] | None,
        typer.Option(help="noise level it was trained for, as 25/255; twice: lowest and highest"),
    ] = None,
) -> None:
    """Import published weights of DnCNN or DRUNet, to evaluate and use as a run.

    Then, for example: ebmkit evaluate OUT --dataset pictures --data-dir Set12
    """
    from ebmkit.models.published import import_weights

    if len(sigma or []) > 2:
        raise UserError(f"--sigma was given {len(sigma or [])} times: once, or lowest and highest")
    levels = sorted(parse_sigma(level) for level in sigma or [])
    model = import_weights(weights, out, (levels[0], levels[-1]) if levels else None)
    count = sum(p.numel() for p in model.parameters())
    kind = type(model.network).__name__
    console.print(f"{kind} with {count:,} parameters: {out}", soft_wrap=True, highlight=False)
