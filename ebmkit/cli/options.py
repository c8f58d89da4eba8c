"""Options from signatures and docstrings, and help with standard metavars: RUN, INTEGER, PATH.

A command is a function. Its parameters before ``*`` are arguments, those after it are options.
Their help is in the section ``Args`` of the docstring, or in `SHARED` for parameters of several
commands. Further settings, such as a range or another flag, are annotations for Typer:
``top: Annotated[int, Option(min=1)] = 3``.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any, get_args, get_origin

from typer import Argument, Option
from typer.core import TyperCommand

SHARED = {
    "run": Argument(help="run folder"),
    "images": Argument(metavar="IMAGE", help="images: PNG, JPEG, TIFF"),
    "weights": Option(help="which weights: last, or best (lowest validation loss)"),
    "device": Option(help="device: auto, cpu, cuda, cuda:1"),
    "precision": Option(help="precision: fp32, tf32, bf16; auto: fp32"),
    "compile_": Option(help="compile the score: on, off; auto: off"),
    "dataset": Option(
        help="data set, from `ebmkit list datasets` [default: the training data set]"
    ),
    "data_dir": Option(help="folder or file of the data set"),
    "image_size": Option(
        min=1,
        help="image height and width, in pixels; images in a folder are resized and cropped to it",
    ),
    "label": Option(help="class (name or number), to use the class-conditional denoiser"),
    "seed": Option(min=0, max=2**63 - 1, help="random seed"),
}
"""Help shared by several commands, by parameter name."""

_HELP = re.compile(r"^    (\w+): (.+(?:\n {8}.+)*)", re.MULTILINE)
_TYPE = re.compile(r"<(?:list\[)?(\w+)[^|>]*>")

VALUES = {"str": "TEXT", "int": "INTEGER", "float": "FLOAT", "path": "PATH"}
"""Metavars by the types that Typer shows: ``<str>``, ``<list[Path]>``."""


class Command(TyperCommand):
    """A command of ``ebmkit``, with standard metavars in its help."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.arguments = [p for p in self.params if p.param_type_name == "argument"]
        for argument in self.arguments:
            argument.metavar = argument.metavar or (argument.name or "").upper()

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The usage line after the command name."""
        return ["[OPTIONS]", *map(argument_name, self.arguments)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the tables of arguments and options."""
        arguments, options = [], []
        for param in self.get_params(ctx):
            names, meaning = param.get_help_record(ctx) or ("", "")
            if param in self.arguments:
                arguments.append((argument_name(param), meaning))
            else:
                names = _TYPE.sub(lambda found: VALUES.get(found[1].lower(), found[0]), names)
                options.append((names, meaning))
        for title, rows in (("Arguments", arguments), ("Options", options)):
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


def options_of(function: Callable[..., None]) -> tuple[str, list[inspect.Parameter]]:
    """The description of a command, and its parameters with help from the docstring."""
    description, _, arguments = inspect.cleandoc(function.__doc__ or "").partition("\n\nArgs:\n")
    helps = {name: " ".join(text.split()) for name, text in _HELP.findall(arguments)}
    found = []
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        name, kind, own = parameter.name, parameter.annotation, None
        if get_origin(kind) is Annotated:
            kind, own = get_args(kind)
        flag = name.endswith("_") or (own is None and parameter.default is False)
        if own is None and name not in helps:
            own = SHARED.get(name)  # None only under -OO, which removes docstrings
        if own is None:
            own = Option() if parameter.kind is parameter.KEYWORD_ONLY else Argument()
        own = copy.copy(own)
        own.help = helps.get(name, own.help)
        if flag and not own.param_decls and own.default is ...:  # where Typer stores the first flag
            own.param_decls = (f"--{name.rstrip('_').replace('_', '-')}",)
        found.append(parameter.replace(annotation=Annotated[kind, own]))
    return description, found


def declare(function: Any, parameters: Iterable[inspect.Parameter]) -> None:
    """Set the signature of ``function``, from which Typer reads its options."""
    found = list(parameters)
    function.__signature__ = inspect.Signature(found)
    function.__annotations__ = {p.name: p.annotation for p in found} | {"return": None}


def argument_name(argument: Any) -> str:
    """Format an argument for the usage line: ``RUN``, ``IMAGE...``, ``[ROW]...``."""
    name = argument.metavar if argument.required else f"[{argument.metavar}]"
    return name if argument.nargs == 1 else f"{name}..."
