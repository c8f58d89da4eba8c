"""``ebmkit models``, and the model of a command: a RUN, ``--pretrained NAME``, or its default."""

from __future__ import annotations

import glob
import inspect
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table
from typer import Option

from ebmkit.errors import UserError
from ebmkit.terminal import console, errors

KEY_FIGURES = 3
"""Number of figures of a card in the list."""

RUN_FILES = ("model.json", "config.yaml", "manifest.json")
"""A folder with one of these files is a run."""

PRETRAINED = inspect.Parameter(
    "pretrained",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        str | None,
        Option(metavar="NAME", help="pretrained model, from `ebmkit models`, in place of RUN"),
    ],
)
"""Option of every command that takes a RUN."""


def models(name: str | None = None) -> None:
    """List the pretrained models; with a name, show its model card.

    Example:
        ebmkit models digits-joint

    Args:
        name: pretrained model
    """
    from rich.markdown import Markdown

    from ebmkit.pretrained import DEFAULTS, as_markdown, list_models, read_card, size_of

    if name is not None:
        text = as_markdown(name, read_card(name))
        if console.is_terminal:
            console.print(Markdown(text))
        else:
            console.say(text)
        return
    table = Table("name", "description", "MB", "key figures", "default of")
    for known in list_models():
        card = read_card(known)
        figures = "\n".join(f"{figure.name}: {figure}" for figure in card.figures[:KEY_FIGURES])
        uses = ", ".join(command for command, default in DEFAULTS.items() if default == known)
        table.add_row(known, card.description, f"{size_of(known) / 1e6:.1f}", figures, uses)
    console.print(table)
    console.say("model card: ebmkit models NAME; use: --pretrained NAME, or NAME in place of RUN")


def optional(parameters: list[inspect.Parameter]) -> list[inspect.Parameter]:
    """The ``parameters`` of a command with a RUN: it and the images may be left out, because the
    parser takes the first image for the RUN. `choose` tells them apart."""
    defaults: dict[str, Any] = {"run": None, "images": []}
    return [
        p.replace(default=defaults[p.name]) if p.name in defaults else p for p in parameters
    ] + [PRETRAINED]


def choose(command: str, options: dict[str, Any], pretrained: str | None) -> None:
    """Set ``run`` in ``options`` to the folder of the model, and ``images`` to the rest.

    The first argument is a RUN if it is a folder with one of `RUN_FILES`, or if there is no file of
    this name and it is not called like an image or a pattern: a pretrained model, or
    ``hub:owner/name``.

    Raises:
        UserError: if there is no such model, it is named twice, no model is named and ``command``
            has no default, or there are no images.
    """
    from ebmkit.pretrained import DEFAULTS, find_model, locate, read_card

    run: Path | None = options["run"]
    if "images" in options and run is not None and not _is_run(run):
        options["images"], run = [run, *options["images"]], None
    if run is not None and pretrained is not None:
        raise UserError(
            f"RUN {str(run)!r} and --pretrained {pretrained!r} both name a model: leave one out"
        )
    if "images" in options and not options["images"]:
        raise UserError("name images: files (PNG, JPEG, TIFF), folders or patterns")
    if run is not None:
        options["run"] = locate(run)
        return
    name = pretrained or DEFAULTS.get(command)
    if name is None:
        raise UserError("name a RUN (a folder), or a model of `ebmkit models` by --pretrained NAME")
    options["run"] = find_model(name)
    if pretrained is None:
        card = read_card(name)
        errors.say(f"note: the model is {name}, {card.description} (--pretrained for another)")


def _is_run(path: Path) -> bool:
    if path.is_dir():
        return any((path / name).is_file() for name in RUN_FILES)
    from ebmkit.data.folders import SUFFIXES

    is_image = path.exists() or path.suffix.lower() in SUFFIXES
    return not is_image and not glob.has_magic(str(path))
