r"""Terminal output in which control characters are escaped.

Names of files and classes, and messages of libraries, are untrusted. A terminal interprets control
characters in them as commands (set the title, clear the screen, overwrite lines), and bidirectional
controls disguise a name. All output escapes these characters, as in ``\x1b``.
"""

from __future__ import annotations

import importlib.util
import unicodedata
from collections.abc import Iterable
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

T = TypeVar("T")

_UNSAFE_CATEGORIES = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
"""Unicode categories of characters that change the display of other text, or are not printable."""


def clean(text: str, allow: str = "\n\t") -> str:
    r"""Escape control characters and other `_UNSAFE_CATEGORIES` ones in ``text``, except ``allow``.

    >>> clean("cat\x1b[2J")
    'cat\\x1b[2J'
    """
    if text.isprintable():
        return text
    return "".join(
        c if c in allow or unicodedata.category(c) not in _UNSAFE_CATEGORIES else repr(c)[1:-1]
        for c in text
    )


def one_line(text: str) -> str:
    r"""Escape an untrusted name, including line breaks, which could imitate our output.

    >>> one_line("cat\ndone")
    'cat\\ndone'
    """
    return clean(text, "")


def shown_name(name: str) -> str:
    """Format a class or file name for plots and tables: `one_line`, at most 60 characters."""
    name = one_line(name)
    return name if len(name) <= 60 else f"{name[:57]}..."


def escape_markup(name: str) -> str:
    """Escape a name for a progress bar, which interprets markup in brackets."""
    return escape(one_line(name))


class CleanConsole(Console):
    """A console that applies `clean` to all text and interprets no markup and no ``:emoji:``."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def say(self, text: object, style: str | None = None) -> None:
        """Print a sentence; the terminal wraps it."""
        self.print(text, style=style, soft_wrap=True, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]
        """Clean strings, for example table cells, before their width is measured."""
        return super().render_str(clean(text), **options)

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        """Clean all other text; segments with ``control`` are rich's own terminal commands."""
        for segment in super().render(renderable, options):
            if segment.control is None and not segment.text.isprintable():
                yield Segment(clean(segment.text), segment.style)
            else:
                yield segment


console = CleanConsole()
errors = CleanConsole(stderr=True)


def is_live() -> bool:
    """Whether progress bars can be drawn: in a terminal, and in a notebook with its widgets."""
    widgets = ("IPython", "ipywidgets")  # rich draws with them in a notebook
    notebook = console.is_jupyter and all(importlib.util.find_spec(name) for name in widgets)
    return console.is_terminal or notebook


def bar(*columns: str | Any, description: str = "{task.description}", **options: Any) -> Progress:
    """A progress bar with description, bar and ``columns``; hidden unless `is_live`."""
    return Progress(
        TextColumn(description),
        BarColumn(bar_width=24),
        *(TextColumn(column) if isinstance(column, str) else column for column in columns),
        console=console,
        disable=not is_live(),
        **options,
    )


def left() -> tuple[Any, ...]:
    """Columns for the elapsed and the remaining time."""
    return TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(compact=True)


def progress_bar(items: Iterable[T], text: str, show: bool) -> Iterable[T]:
    """Iterate over ``items``, with a bar on stderr if ``show`` and stderr is a terminal."""
    from rich.progress import track

    console = CleanConsole(stderr=True)
    hidden = not (show and console.is_terminal)
    return track(items, escape_markup(text), console=console, transient=True, disable=hidden)
