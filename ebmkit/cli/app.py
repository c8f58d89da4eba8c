"""The application: its commands, and how it ends.

Exit codes: 0 done; 2 a mistake in what was given, told in one sentence; 130 interrupted by Ctrl-C;
143 asked to terminate, 129 left by the terminal: in each case what was done is saved.
"""

from __future__ import annotations

import sys
import warnings
from typing import TextIO

import typer

from ebmkit.cli.console import errors
from ebmkit.errors import UserError
from ebmkit.parallel import yield_to_others

__all__ = ["app", "main"]

app = typer.Typer(
    name="ebmkit",
    help="Joint energy-based models of images and labels: train, evaluate, classify, denoise.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Prepare data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@app.callback(invoke_without_command=False)
def _common() -> None:
    warnings.showwarning = _show_warning


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    errors.print(f"warning: {message}", style="yellow", highlight=False, soft_wrap=True)


def main() -> None:
    """Run the command line; a user's mistake ends it with one sentence and exit code 2."""
    from ebmkit.cli import commands  # noqa: F401  (registers the commands)

    try:
        app()
    except UserError as error:
        yield_to_others(error)
        errors.print(f"ebmkit: {error}", style="red", highlight=False, soft_wrap=True)
        sys.exit(2)
