"""Terminal output (consoles, progress bars) and TensorBoard."""

from __future__ import annotations

import importlib.util
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.text import Text

from ebmkit.errors import UserError
from ebmkit.terminal import COUNT, ProgressBar, console, errors, escape_markup

if TYPE_CHECKING:
    from ebmkit.training import Reporter


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


_HIDDEN = ("kind", "step", "lr", "images_per_s")


class TrainingBar:
    """Progress of training: losses, images/s, remaining time and the last held-out figures.

    ``name`` is that of the run, if there are several. Without a terminal, lines; every logged step
    has a line if more output is asked for.
    """

    def __init__(self, steps: int, start: int = 0, name: str = "") -> None:
        self.steps, self.name = steps, f"{name}: " if name else ""
        self.lines = console.verbose or not console.is_terminal
        losses = () if console.is_terminal else ("{task.fields[losses]}",)
        self.progress = ProgressBar(
            f"step {COUNT}",
            *losses,
            "{task.fields[rate]}",
            show=not console.verbose,
            last_line=True,
        )
        self.losses, self.held_out, table = "", "", self.progress.get_renderables
        self.progress.get_renderables = lambda: [  # type: ignore[method-assign]
            *table(),
            *(Text(line) for line in (self.losses, self.held_out) if line),
        ]
        what = escape_markup(f"{self.name}training")
        self.task = self.progress.add_task(what, total=steps, completed=start, losses="", rate="")

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
            return
        if row["kind"] == "unreadable":
            return
        values = "  ".join(f"{k} {v:.4g}" for k, v in row.items() if k not in _HIDDEN)
        at = f"{self.name}step {row['step']}/{self.steps}  "
        if row["kind"] == "validation":
            self.held_out = f"held-out: {values} (step {row['step']})"
            if self.lines:
                console.say(f"{at}held-out: {values}")
            return
        rate = f"{row['images_per_s']:.0f} images/s"
        self.losses = values
        self.progress.update(self.task, completed=row["step"], losses=values, rate=rate)
        if console.verbose:
            console.say(f"{at}{values}  {rate}")


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
