"""Terminal output (consoles, progress bars) and TensorBoard."""

from __future__ import annotations

import importlib.util
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ebmkit.errors import UserError
from ebmkit.terminal import CleanConsole, escape_markup

if TYPE_CHECKING:
    from ebmkit.training import Reporter

console = CleanConsole()
errors = CleanConsole(stderr=True)


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

    The code is 130 for Ctrl-C, 143 for SIGTERM (also if only another process got it), and 129 for a
    closed terminal.

    Raises:
        typer.Exit: always.
    """
    console.say(f"interrupted; {sentence}")
    raise typer.Exit(128 + (signal.SIGTERM if signum is None else signum)) from None


def bar(*columns: str | Any, description: str = "{task.description}", **options: Any) -> Progress:
    """A progress bar with description, bar and ``columns``; hidden without a terminal."""
    return Progress(
        TextColumn(description),
        BarColumn(bar_width=24),
        *(TextColumn(column) if isinstance(column, str) else column for column in columns),
        console=console,
        disable=not console.is_terminal,
        **options,
    )


def left() -> tuple[Any, ...]:
    """Columns for the elapsed and the remaining time."""
    return TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(compact=True)


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """Context with a bar called ``what``: yields a function (done, total) that shows the bar."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(escape_markup(what), total=None, visible=False)
        yield lambda done, total: progress.update(task, completed=done, total=total, visible=True)


_HIDDEN = ("kind", "step", "lr", "images_per_s")


class TrainingBar:
    """Progress bar with losses, images/s, remaining time and the last held-out figures.

    Without a terminal, or if more output is asked for, plain lines.
    """

    def __init__(self, steps: int, start: int = 0) -> None:
        self.steps = steps
        self.live = console.is_terminal
        self.next_line, self.every = start, 1 if console.verbose else max(1, steps // 20)
        self.progress = bar(
            MofNCompleteColumn(), "{task.fields[rate]}", *left(), description="training"
        )
        self.losses, self.held_out, table = "", "", self.progress.get_renderables
        self.progress.get_renderables = lambda: [  # type: ignore[method-assign]
            *table(),
            *(Text(line) for line in (self.losses, self.held_out) if line),
        ]
        self.task = self.progress.add_task("", total=steps, completed=start, rate="")

    def __enter__(self) -> TrainingBar:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def report(self, row: dict[str, Any]) -> None:
        """Show a row of metrics."""
        if row["kind"] == "rollback":
            errors.say(f"rollback: {row['message']}", "yellow")
            self.progress.update(self.task, completed=row["step"])
            self.next_line = row["step"]
            return
        if row["kind"] == "unreadable":
            return
        values = "  ".join(f"{k} {v:.4g}" for k, v in row.items() if k not in _HIDDEN)
        lines, at = console.verbose or not self.live, f"step {row['step']}/{self.steps}  "
        if row["kind"] == "validation":
            self.held_out = f"held-out: {values} (step {row['step']})"
            if lines:
                console.say(f"{at}held-out: {values}")
            return
        rate = f"{row['images_per_s']:.0f} images/s"
        self.losses = values
        self.progress.update(self.task, completed=row["step"], rate=rate)
        if lines and row["step"] >= self.next_line:
            console.say(f"{at}{values}  {rate}")
            self.next_line = row["step"] + self.every


class TensorBoard:
    """Writes metrics as TensorBoard scalars to ``folder``; needs the extra ``tensorboard``."""

    def __init__(self, folder: Path, step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder, purge_step=step + 1)

    @staticmethod
    def check() -> None:
        """Check that TensorBoard is installed.

        Raises:
            UserError: if it is not.
        """
        if importlib.util.find_spec("tensorboard") is None:
            raise UserError(
                "TensorBoard is not installed: pip install 'ebmkit-vision[tensorboard]'"
            )

    def report(self, row: dict[str, Any]) -> None:
        """Write a row of metrics."""
        for key, value in row.items():
            if key not in ("kind", "step") and isinstance(value, (int, float)):
                self.writer.add_scalar(f"{row['kind']}/{key}", value, row["step"])


class Reporters:
    """Combines several reporters into one."""

    def __init__(self, reporters: Sequence[Reporter]) -> None:
        self.reporters = reporters

    def report(self, row: dict[str, Any]) -> None:
        """Pass a row of metrics to each reporter."""
        for reporter in self.reporters:
            reporter.report(row)
