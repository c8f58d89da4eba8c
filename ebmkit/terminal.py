r"""What is shown on a terminal is text and nothing else.

Names of files and classes, and messages of libraries, come from elsewhere. A terminal takes control
characters in them for commands (set the title, clear the screen, move up and write over), and
changes of direction show a name other than it is. They are spelled out, as in ``\x1b``, whichever
way they reach the screen.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.segment import Segment
from rich.text import Text

T = TypeVar("T")

_HARMFUL = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
"""Kinds of characters that change how a terminal shows what follows, or cannot be shown."""


def clean(text: str, allow: str = "\n\t") -> str:
    r"""``text`` with all control characters but ``allow``, and the like, spelled out.

    >>> clean("cat\x1b[2J")
    'cat\\x1b[2J'
    """
    if text.isprintable():
        return text
    return "".join(
        c if c in allow or unicodedata.category(c) not in _HARMFUL else repr(c)[1:-1] for c in text
    )


def one_line(text: str) -> str:
    r"""A name from elsewhere, `clean` and without line breaks, which would pass for ours.

    >>> one_line("cat\ndone")
    'cat\\ndone'
    """
    return clean(text, "")


def shown_name(name: str) -> str:
    """A class's or file's name as plots and tables show it: `one_line`, at most 60 characters."""
    name = one_line(name)
    return name if len(name) <= 60 else f"{name[:57]}..."


def for_bar(name: str) -> str:
    """A name as a progress bar takes it, which reads markup in brackets."""
    return escape(one_line(name))


class CleanConsole(Console):
    """A console that shows all text `clean`, and names as they are: no markup, no ``:emoji:``."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def say(self, text: object, style: str | None = None) -> None:
        """Print a sentence, which the terminal breaks where its line ends."""
        self.print(text, style=style, soft_wrap=True, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]
        """Plain strings, cells of tables among them; before they are measured."""
        return super().render_str(clean(text), **options)

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        """All the rest; what rich itself says to the terminal has ``control``."""
        for segment in super().render(renderable, options):
            if segment.control is None and not segment.text.isprintable():
                yield Segment(clean(segment.text), segment.style)
            else:
                yield segment


def progress_bar(items: Iterable[T], text: str, show: bool) -> Iterable[T]:
    """``items``, with a bar on a terminal's standard error if ``show``."""
    from rich.progress import track

    console = CleanConsole(stderr=True)
    hidden = not (show and console.is_terminal)
    return track(items, for_bar(text), console=console, transient=True, disable=hidden)
