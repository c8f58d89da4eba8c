"""Terminal output: consoles, the training bar; and TensorBoard."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ebmkit.errors import UserError
from ebmkit.terminal import CleanConsole

if TYPE_CHECKING:
    from ebmkit.training import Reporter

__all__ = ["TensorBoard", "Together", "TrainingBar", "console", "errors", "warn"]

console = CleanConsole()
errors = CleanConsole(stderr=True)


def warn(sentence: object) -> None:
    """Show a warning."""
    errors.say(f"warning: {sentence}", "yellow")


_HIDDEN = ("kind", "step", "lr", "images_per_s")


class TrainingBar:
    """A progress bar with losses, images/s and time left; plain lines without a terminal."""

    def __init__(self, steps: int, start: int = 0) -> None:
        self.steps = steps
        self.live = console.is_terminal
        self.next_line = start
        self.validation = ""
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[losses]}"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not self.live,
        )
        self.task = self.progress.add_task("", total=steps, completed=start, losses="", rate="")

    def __enter__(self) -> TrainingBar:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def report(self, row: dict[str, Any]) -> None:
        """Show a row of metrics."""
        if row["kind"] == "breach":
            errors.say(f"breach: {row['told']}", "yellow")
            self.progress.update(self.task, completed=row["step"])
            self.next_line = row["step"]
            return
        if row["kind"] == "unreadable":
            return
        values = "  ".join(f"{k} {v:.4g}" for k, v in row.items() if k not in _HIDDEN)
        if row["kind"] == "validation":
            if not self.live:
                console.say(f"step {row['step']}/{self.steps}  held-out: {values}")
            return
        rate = f"{row['images_per_s']:.0f} images/s"
        self.progress.update(self.task, completed=row["step"], losses=values, rate=rate)
        if not self.live and row["step"] >= self.next_line:
            console.say(f"step {row['step']}/{self.steps}  {values}  {rate}")
            self.next_line = row["step"] + max(1, self.steps // 20)


class TensorBoard:
    """Metrics as TensorBoard scalars in ``folder``; needs the extra ``tensorboard``."""

    def __init__(self, folder: Path, step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder, purge_step=step + 1)

    @staticmethod
    def check() -> None:
        """Whether TensorBoard can be imported.

        Raises:
            UserError: if not.
        """
        if importlib.util.find_spec("tensorboard") is None:
            raise UserError(
                "TensorBoard is not installed: pip install 'ebmkit-vision[tensorboard]'"
            )

    def close(self) -> None:
        """Write what is pending."""
        self.writer.close()

    def report(self, row: dict[str, Any]) -> None:
        """Write a row of metrics."""
        for key, value in row.items():
            if key not in ("kind", "step") and isinstance(value, (int, float)):
                self.writer.add_scalar(f"{row['kind']}/{key}", value, row["step"])


class Together:
    """Several reporters as one."""

    def __init__(self, reporters: Sequence[Reporter]) -> None:
        self.reporters = reporters

    def report(self, row: dict[str, Any]) -> None:
        """Pass the row on to each."""
        for reporter in self.reporters:
            reporter.report(row)
