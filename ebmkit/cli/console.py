"""Terminal output of the commands."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import NoReturn

import typer

from ebmkit.errors import UserError
from ebmkit.terminal import console, errors


def warn(sentence: object) -> None:
    """Show a warning."""
    errors.say(f"warning: {sentence}", "yellow")


def check_new_file(option: str, path: Path) -> None:
    """Check that ``path``, given to ``option``, does not exist and its folder does.

    Raises:
        UserError: if not.
    """
    if path.exists():
        raise UserError(f"{str(path)!r} exists: give {option} a file that does not")
    if not path.parent.is_dir():
        raise UserError(f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}")


def interrupted(sentence: str, signum: int | None) -> NoReturn:
    """Print how to resume, and exit with code 128 plus the number of the signal, as shells do.

    Quiet output has the sentence on stderr. The code is 130 for Ctrl-C, 143 for SIGTERM (also if
    only another process got it), and 129 for a closed terminal.

    Raises:
        typer.Exit: always.
    """
    if not console.quiet or os.environ.get("RANK", "0") == "0":  # other processes are quiet, too
        (errors if console.quiet else console).say(f"interrupted; {sentence}")
    raise typer.Exit(128 + (signal.SIGTERM if signum is None else signum)) from None
