"""Terminal output of the commands."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.progress import Progress

from ebmkit.terminal import bar, console, errors, escape_markup, left

__all__ = ["bar", "console", "counting", "errors", "interrupted", "left", "warn"]


def warn(sentence: object) -> None:
    """Show a warning."""
    errors.say(f"warning: {sentence}", "yellow")


def interrupted(sentence: str, signum: int | None) -> NoReturn:
    """Print how to resume, and exit with code 128 plus the number of the signal, as shells do.

    The code is 130 for Ctrl-C, 143 for SIGTERM (also if only another process got it), and 129 for a
    closed terminal.

    Raises:
        typer.Exit: always.
    """
    console.say(f"interrupted; {sentence}")
    raise typer.Exit(128 + (signal.SIGTERM if signum is None else signum)) from None


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """Context with a bar called ``what``: yields a function (done, total) that shows the bar."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(escape_markup(what), total=None, visible=False)
        yield lambda done, total: progress.update(task, completed=done, total=total, visible=True)
