"""The command-line application: commands and exit codes.

Exit codes: 0 success; 2 user error (one sentence on stderr); 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP.
Before the last three, the work is saved.

Help and usage errors must not import PyTorch. So the modules of the commands import at the top only
what declares and formats options, and everything else inside functions.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer import Option
from typer.core import TyperGroup

from ebmkit import __version__
from ebmkit.cli.console import warn
from ebmkit.cli.demo import demo
from ebmkit.cli.evaluate import evaluate
from ebmkit.cli.images import classify, denoise, restore, sample
from ebmkit.cli.models import choose, models, optional
from ebmkit.cli.options import Command, declare, example_of, options_of
from ebmkit.cli.report import report
from ebmkit.cli.tools import bench, export, import_, list_, pack, verify
from ebmkit.cli.train import cost, reproduce, train
from ebmkit.errors import UserError
from ebmkit.terminal import console, errors, replace_unencodable

COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    "Train and evaluate": {
        "train": train,
        "evaluate": evaluate,
        "report": report,
        "cost": cost,
        "bench": bench,
    },
    "Use a model": {
        "classify": classify,
        "denoise": denoise,
        "sample": sample,
        "restore": restore,
        "demo": demo,
        "export": export,
        "models": models,
    },
    "The papers": {"reproduce": reproduce},
    "Data and files": {"list": list_, "data pack": pack, "import": import_, "verify": verify},
}
"""Commands by group, in the order of `ebmkit --help`."""

LONGEST_NAME = max(len(name) for group in COMMANDS.values() for name in group)

NOT_COMPUTING = (import_, verify, list_, pack, report, models)
"""Commands that never run a network."""


LARGEST = 2**31 - 1
"""Largest magnitude of an integer option; seeds have 63 bits."""


def _load_plugins(named: list[str]) -> list[str]:
    if named:  # the module imports pydantic, which would slow down help
        from ebmkit.registry import load_plugins

        load_plugins(named)
    return named


def _set_output(quiet: bool | None) -> None:
    """Set the amount of output: less for True, more for False."""
    console.quiet, console.verbose = quiet is True, quiet is False


def _option(name: str, kind: Any, default: Any, **declared: Any) -> inspect.Parameter:
    flags = declared.pop("flags", ())
    annotation = Annotated[kind, Option(*flags, is_eager=True, **declared)]
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, keyword, default=default, annotation=annotation)


COMMON = (
    _option(
        "quiet",
        bool | None,
        None,
        flags=["--quiet/--verbose"],
        callback=_set_output,
        help="print only warnings and errors, or more: all logged steps, tracebacks of errors",
    ),
    _option(
        "plugin",
        list[str],
        [],
        callback=_load_plugins,
        metavar="FILE",
        help="Python file or installed plugin that registers custom components; repeatable",
    ),
)
"""Options of every command; plugins are imported before other options are parsed."""


def _with_common(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options `COMMON` to ``function``."""

    @functools.wraps(function)
    def command(*, quiet: bool | None, plugin: list[str], **options: Any) -> None:
        for name, value in options.items():
            if name != "seed" and isinstance(value, int) and abs(value) > LARGEST:
                raise UserError(
                    f"--{name.replace('_', '-')} {value} is too large: give at most {LARGEST}"
                )
        if function not in NOT_COMPUTING:
            from ebmkit.compute import flush_denormals

            flush_denormals()  # before PyTorch starts its threads
        if "run" in options:
            choose(function.__name__, options, options.pop("pretrained"))
        function(**options)

    command.__doc__, own = options_of(function)
    if any(p.name == "run" for p in own):
        own = optional(own)
    kind = inspect.Parameter.KEYWORD_ONLY
    declare(command, [*(p.replace(kind=kind) for p in own), *COMMON])
    return command


class Commands(TyperGroup):
    """The commands in groups."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a table of commands for each group."""
        for title, group in COMMANDS.items():
            with formatter.section(title):
                formatter.write_dl(
                    [
                        (name.ljust(LONGEST_NAME), (function.__doc__ or "").partition("\n")[0])
                        for name, function in group.items()
                    ]
                )


app = typer.Typer(
    name="ebmkit",
    cls=Commands,
    help="Joint energy-based models of images and labels: train, evaluate, classify, denoise.",
    epilog="Help of a command, with an example: ebmkit COMMAND -h",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
data_app = typer.Typer(help="Prepare data sets.", no_args_is_help=True)
for _group in COMMANDS.values():
    for _name, _function in _group.items():
        _owner = data_app if _name.startswith("data ") else app
        _owner.command(_name.removeprefix("data "), cls=Command, epilog=example_of(_function))(
            _with_common(_function)
        )
app.add_typer(data_app, name="data")


def _show_version(asked: bool) -> None:
    if asked:
        print(f"ebmkit {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=False)
def _common(
    version: Annotated[
        bool, Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, *details: object, **more: object) -> None:
    warn(message)


def main() -> None:
    """Run the command line; a `UserError` prints its sentence and ends with exit code 2."""
    replace_unencodable()
    try:
        app(prog_name="ebmkit")
    except UserError as error:
        if "RANK" in os.environ:  # of several processes, one reports
            from ebmkit.distributed import wait_for_root_cause

            wait_for_root_cause(error)
        if console.verbose:
            traceback.print_exc()
        errors.say(f"ebmkit: {error}", "red")
        sys.exit(2)
