r"""Terminal output: escaped control characters, progress, closed pipes, other encodings.

Names of files and classes, and messages of libraries, are untrusted. A terminal interprets control
characters in them as commands (set the title, clear the screen, overwrite lines), and bidirectional
controls disguise a name. All output escapes these characters, as in ``\x1b``.

Progress is a bar on a terminal; elsewhere, as in a file, it is a line now and then.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
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

    verbose = False
    """Whether the user asked for more output."""

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

    def on_broken_pipe(self) -> None:
        """Discard further output if the reader is gone, as in ``| head``; the work continues."""
        self.quiet = True
        with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self.file.fileno())  # also for the flush at exit


console = CleanConsole()
errors = CleanConsole(stderr=True)


def is_live(to: Console = console) -> bool:
    """Whether ``to`` can draw progress bars: a terminal, or a notebook with its widgets."""
    widgets = ("IPython", "ipywidgets")  # rich draws with them in a notebook
    notebook = to.is_jupyter and all(importlib.util.find_spec(name) for name in widgets)
    return to.is_terminal or notebook


def replace_unencodable() -> None:
    """Print ``?`` for characters that the encoding of stdout lacks, instead of raising an error."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


FIRST_LINE, LAST_INTERVAL = 10.0, 600.0
"""Seconds before the first line of `ProgressBar` without a terminal; longest interval of lines."""


class ProgressBar(Progress):
    """Progress with a bar and ``columns``, the elapsed and the remaining time.

    Without a terminal, the columns are printed as a line: after `FIRST_LINE` seconds, then at
    intervals of a fifth of the elapsed time, and at the end if a line was printed before.

    Args:
        columns: columns between the bar and the times, or their formats.
        to: console to show progress on.
        description: format of the text before the bar.
        show: False: show nothing.
        last_line: without a terminal, always print a line at the end.
    """

    def __init__(
        self,
        *columns: str | ProgressColumn,
        to: Console = console,
        description: str = "{task.description}",
        show: bool = True,
        last_line: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            TextColumn(description),
            BarColumn(bar_width=24),
            *(TextColumn(column) if isinstance(column, str) else column for column in columns),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            console=to,
            disable=not (show and is_live(to)),
            speed_estimate_period=600,
            **options,
        )
        self.lines = show and not is_live(to)
        self.began = time.monotonic()
        self.next_line = self.began + FIRST_LINE
        self.begun: set[TaskID] = set()  # tasks that have a line
        self.last_line = last_line

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Update a task, and print a line if it is due."""
        super().update(task_id, **changes)
        self._print_if_due(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Advance a task, and print a line if it is due."""
        super().advance(task_id, advance)
        self._print_if_due(task_id)

    def _print_if_due(self, task_id: TaskID) -> None:
        task, now = self._tasks[task_id], time.monotonic()
        ended = task.finished and (self.last_line or task_id in self.begun)
        if not self.lines or not task.completed or (now < self.next_line and not ended):
            return
        self.next_line = now + min(max(FIRST_LINE, (now - self.began) / 5), LAST_INTERVAL)
        self.begun.add(task_id)
        columns = (c for c in self.columns if isinstance(c, ProgressColumn))
        texts = (str(c.render(task)) for c in columns if not isinstance(c, BarColumn))
        self.console.print(
            "  ".join(text for text in texts if text), soft_wrap=True, highlight=False
        )
        if task.finished:
            self.begun.discard(task_id)


COUNT = "{task.completed:,.0f}/{task.total:,.0f}"
"""Format of a column: what is done, and all."""


@contextmanager
def counting(what: str, show: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Context with progress of ``what``: yields a function of (done, total) that shows it."""
    with ProgressBar(COUNT, show=show, transient=True) as progress:
        task = progress.add_task(escape_markup(what), total=None, visible=False)
        yield lambda done, total: progress.update(task, completed=done, total=total, visible=True)


def progress_bar(
    items: Iterable[T], text: str, show: bool, total: int | None = None
) -> Iterable[T]:
    """Iterate over ``items``, with a `ProgressBar` on stderr if ``show``, unless output is quiet.

    ``total`` is their number, if they have no length.
    """
    with ProgressBar(COUNT, to=errors, show=show and not console.quiet, transient=True) as progress:
        yield from progress.track(items, total, description=escape_markup(text))
