"""Options from signatures and docstrings, and help with standard metavars: RUN, INTEGER, PATH.

A command is a function. Its parameters before ``*`` are arguments, those after it are options.
Their help is in the section ``Args`` of the docstring, or in `SHARED` for parameters of several
commands. Further settings, such as a range or another flag, are annotations for Typer:
``top: Annotated[int, Option(min=1)] = 3``. The docstring's section ``Example`` ends the help.

The error for an unknown option names the option that was meant, or the setting: ``--learning-rate``
is ``--lr`` here, ``--weight-decay 0.1`` is ``--set optimizer.weight_decay=0.1``. Only a search in
the settings imports PyTorch.
"""

from __future__ import annotations

import copy
import inspect
import re
import shlex
from collections.abc import Callable, Iterable
from typing import Annotated, Any, get_args, get_origin

from typer import Argument, Option
from typer.core import TyperCommand

from ebmkit.synonyms import field_keys, meant

SHARED = {
    "run": Argument(
        help="run folder, pretrained model from `ebmkit models`, or hub:OWNER/NAME (Hugging Face)"
    ),
    "images": Argument(
        metavar="IMAGE", help="images (PNG, JPEG, TIFF), folders, or patterns such as 'in/*.png'"
    ),
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
_CHOICES = re.compile(r"<([\w-]+(?:\|[\w-]+)+)>")
_HYPHEN = "\N{NON-BREAKING HYPHEN}"
"""Stands for a hyphen while help is wrapped, so that names are not broken."""

VALUES = {"str": "TEXT", "int": "INTEGER", "float": "FLOAT", "path": "PATH"}
"""Metavars by the types that Typer shows: ``<str>``, ``<list[Path]>``."""


class Command(TyperCommand):
    """A command of ``ebmkit``, with standard metavars in its help."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.arguments = [p for p in self.params if p.param_type_name == "argument"]
        for argument in self.arguments:
            argument.metavar = argument.metavar or (argument.name or "").upper()

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse ``args``; the error for an unknown option suggests the right one."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # Typer's own copy of Click has no public name for it
            name = getattr(error, "option_name", None)
            if type(error).__name__ == "NoSuchOption" and (hint := _hint(self, str(name), given)):
                error.message, error.possibilities = f"No such option: {name}. {hint}", None  # type: ignore[attr-defined]
            raise

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The usage line after the command name."""
        return ["[OPTIONS]", *map(argument_name, self.arguments)]

    def get_help(self, ctx: Any) -> str:
        """The help, in which no name is broken at a hyphen."""
        return str(super().get_help(ctx)).replace(_HYPHEN, "-")

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """Write the description."""
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text((self.help or "").replace("-", _HYPHEN))

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the example, unwrapped."""
        if self.epilog:
            with formatter.section("Example"):
                formatter.write("".join(f"  {line}\n" for line in self.epilog.splitlines()))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the tables of arguments and options."""
        for title, rows in zip(("Arguments", "Options"), self.help_rows(ctx), strict=True):
            if rows:
                with formatter.section(title):
                    formatter.write_dl([(n, text.replace("-", _HYPHEN)) for n, text in rows])

    def help_rows(self, ctx: Any) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """Name and help of each argument and of each option, with standard metavars."""
        arguments, options = [], []
        for param in self.get_params(ctx):
            names, meaning = param.get_help_record(ctx) or ("", "")
            meaning = meaning.replace("<=x<=9223372036854775807", "<=x")
            if param in self.arguments:
                arguments.append((argument_name(param), meaning))
            else:
                names = _CHOICES.sub(r"[\1]", names)
                names = _TYPE.sub(lambda found: VALUES.get(found[1].lower(), found[0]), names)
                options.append((names, meaning))
        return arguments, options


def _hint(command: Command, option: str, given: list[str]) -> str:
    """What to write in place of the unknown ``option``; empty if nothing is similar."""
    own = {flag.lstrip("-"): flag for p in command.params for flag in (*p.opts, *p.secondary_opts)}
    known, keys = meant(option.lstrip("-"), own, lambda: setting_keys(command.name))
    if known is not None:
        return f"Did you mean {own[known]}?"
    if not keys:
        return ""
    after = [a for a in given if a == option or a.startswith(f"{option}=")][:1]
    value = after[0].partition("=")[2] if after else ""
    if not value and option in given[:-1] and not given[given.index(option) + 1].startswith("--"):
        value = given[given.index(option) + 1]
    shown = [f"--set {k}={shlex.quote(value) if value else 'VALUE'}" for k in keys[:3]]
    return f"Write {' or '.join(shown)}"


def setting_keys(command: str | None) -> list[str]:
    """Keys that ``--set`` of ``command`` accepts, such as ``optimizer.lr``."""
    found: list[tuple[Any, str]] = []
    if command in ("train", "cost"):
        from ebmkit.training import config

        return config.setting_keys()
    if command == "evaluate":
        from ebmkit.evaluation import SUITES

        found = [(suite.options, f"{name}.") for name, suite in SUITES.items()]
    elif command in ("sample", "restore"):
        from ebmkit.sampling import SAMPLERS

        found = [(sampler.config, "") for sampler in SAMPLERS.values()]
    return [*dict.fromkeys(key for own, prefix in found if own for key in field_keys(own, prefix))]


def _sections(function: Callable[..., None]) -> tuple[str, str, str]:
    """Description, example and arguments in the docstring of a command."""
    text, _, arguments = inspect.cleandoc(function.__doc__ or "").partition("\n\nArgs:\n")
    description, _, example = text.partition("\n\nExample:\n")
    return description, inspect.cleandoc(example), arguments


def example_of(function: Callable[..., None]) -> str:
    """The example of a command: lines for a shell."""
    return _sections(function)[1]


def options_of(function: Callable[..., None]) -> tuple[str, list[inspect.Parameter]]:
    """The description of a command, and its parameters with help from the docstring."""
    description, _, arguments = _sections(function)
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
        if name == "set_":
            own.metavar = "KEY=VALUE"
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
    """Format an argument for the usage line: ``[RUN]``, ``IMAGE...``, ``[ROW]...``."""
    needed = argument.required or argument.name == "images"  # which may begin in place of the RUN
    name = argument.metavar if needed else f"[{argument.metavar}]"
    return name if argument.nargs == 1 else f"{name}..."
