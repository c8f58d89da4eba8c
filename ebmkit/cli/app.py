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
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer import Option

from ebmkit import __version__
from ebmkit.cli.console import warn
from ebmkit.cli.evaluate import evaluate
from ebmkit.cli.images import classify, denoise, restore, sample
from ebmkit.cli.options import Command, declare, options_of
from ebmkit.cli.tools import bench, export, import_, list_, pack, verify
from ebmkit.cli.train import cost, reproduce, train
from ebmkit.errors import UserError
from ebmkit.terminal import errors, replace_unencodable

COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "cost": cost,
    "evaluate": evaluate,
    "classify": classify,
    "denoise": denoise,
    "sample": sample,
    "restore": restore,
    "reproduce": reproduce,
    "import": import_,
    "export": export,
    "verify": verify,
    "bench": bench,
    "list": list_,
}
"""Commands in the order of `ebmkit --help`; `data` follows them."""

NOT_COMPUTING = (import_, verify, list_, pack)
"""Commands that never run a network."""


def _load_plugins(named: list[str]) -> list[str]:
    if named:  # the module imports pydantic, which would slow down help
        from ebmkit.registry import load_plugins

        load_plugins(named)
    return named


PLUGIN = inspect.Parameter(
    "plugin",
    inspect.Parameter.KEYWORD_ONLY,
    default=[],
    annotation=Annotated[
        list[str],
        Option(
            callback=_load_plugins,
            is_eager=True,
            help="Python file or installed plugin that registers custom components; repeatable",
        ),
    ],
)
"""Option of every command; plugins are imported before other options are parsed."""


def _with_plugins(function: Callable[..., None]) -> Callable[..., None]:
    """Add the option `PLUGIN` to ``function``."""

    @functools.wraps(function)
    def command(*, plugin: list[str], **options: Any) -> None:
        if function not in NOT_COMPUTING:
            from ebmkit.compute import flush_denormals

            flush_denormals()  # before PyTorch starts its threads
        function(**options)

    command.__doc__, own = options_of(function)
    declare(command, [*(p.replace(kind=PLUGIN.kind) for p in own), PLUGIN])
    return command


app = typer.Typer(
    name="ebmkit",
    help="Joint energy-based models of images and labels: train, evaluate, classify, denoise.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _name, _function in COMMANDS.items():
    app.command(_name, cls=Command)(_with_plugins(_function))
data_app = typer.Typer(help="Prepare data sets.", no_args_is_help=True)
data_app.command("pack", cls=Command)(_with_plugins(pack))
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
        errors.say(f"ebmkit: {error}", "red")
        sys.exit(2)
