"""Options that several commands share, and help with standard metavars: RUN, IMAGE..., INTEGER,
PATH.

Each option is declared here once; each command sets its type and default, as in
``device: Annotated[str, DEVICE] = "auto"``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import Any

from typer import Argument, Option
from typer.core import TyperCommand

RUN = Argument(help="run folder")
IMAGES = Argument(metavar="IMAGE", help="images: PNG, JPEG, TIFF")
WEIGHTS = Option(help="which weights: last, or best (lowest validation loss)")
DEVICE = Option(help="device: auto, cpu, cuda, cuda:1")
PRECISION = Option(help="precision: fp32, tf32, bf16; auto: fp32")
TRAIN_PRECISION = Option(
    help="precision of training: auto, fp32, tf32, bf16 [default: set by the configuration, auto]"
)
COMPILE = Option("--compile", help="compile the score: on, off; auto: off")
DATASET = Option(help="data set, from `ebmkit list datasets` [default: the training data set]")
DATA_DIR = Option(help="folder or file of the data set")
IMAGE_SIZE = Option(
    min=1,
    help="image height and width, in pixels; images in a folder are resized and cropped to it",
)
LABEL = Option(help="class (name or number), to use the class-conditional denoiser")
WIDTH = Option(min=1, help="channels of the first stage")
SEED = Option(min=0, max=2**63 - 1, help="random seed")
SETTING = Option("--set", help="setting of the sampler, for example step_size=1e-4; repeatable")

VALUES = {"str": "TEXT", "int": "INTEGER", "float": "FLOAT", "path": "PATH"}
"""Names of an option's value, by the types that Typer shows: ``<str>``, ``<list[Path]>``."""


class Command(TyperCommand):
    """A command of ``ebmkit``."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.arguments = [p for p in self.params if p.param_type_name == "argument"]
        for argument in self.arguments:
            argument.metavar = argument.metavar or (argument.name or "").upper()

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """What follows the command's name in its usage line."""
        return ["[OPTIONS]", *map(argument_name, self.arguments)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the tables of arguments and options."""
        arguments, options = [], []
        for param in self.get_params(ctx):
            names, meaning = param.get_help_record(ctx) or ("", "")
            if param in self.arguments:
                arguments.append((argument_name(param), meaning))
            else:
                options.append((re.sub(r"<(?:list\[)?(\w+)[^|>]*>", _value_name, names), meaning))
        for title, rows in (("Arguments", arguments), ("Options", options)):
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


def declare(function: Any, parameters: Iterable[inspect.Parameter]) -> None:
    """Let Typer read ``parameters`` as the options of ``function``."""
    found = list(parameters)
    function.__signature__ = inspect.Signature(found)
    function.__annotations__ = {p.name: p.annotation for p in found} | {"return": None}


def argument_name(argument: Any) -> str:
    """An argument in a usage line: ``RUN``, ``IMAGE...``, ``[ROW]...``."""
    name = argument.metavar if argument.required else f"[{argument.metavar}]"
    return name if argument.nargs == 1 else f"{name}..."


def _value_name(found: re.Match[str]) -> str:
    return VALUES.get(found[1].lower(), found[0])
