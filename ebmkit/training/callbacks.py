"""Callbacks of the trainer: progress bar, TensorBoard, Weights & Biases, CSV.

A callback is any object with some of the methods of `Callback`; the trainer calls those that it
has, in the first process.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import shlex
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from rich.text import Text
from torch import Tensor

from ebmkit.errors import UserError, first_line
from ebmkit.randomness import keyed_generator
from ebmkit.storage import write_atomically
from ebmkit.terminal import COUNT, ProgressBar, console, errors, escape_markup, is_live
from ebmkit.training.metrics import SIGMA

if TYPE_CHECKING:
    from ebmkit.training.loop import Trainer

NOT_METRICS = ("kind", "step")
"""Entries of a row that are no metrics."""

_HIDDEN = (*NOT_METRICS, "lr", "images_per_s")


class Callback:
    """Base class of callbacks, with methods that do nothing. Any of them may call `Trainer.stop`.

    Rows have ``kind`` ("train", "validation", "rollback" or "unreadable"), ``step`` and metrics.
    """

    def on_start(self, trainer: Trainer) -> None:
        """Called when `Trainer.fit` starts."""

    def report(self, row: dict[str, Any]) -> None:
        """Called with each row of metrics, every ``log_every`` steps and after validations."""

    def on_step(self, trainer: Trainer) -> None:
        """Called after each optimiser step; ``trainer.step`` is the number of completed steps."""

    def on_validation(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """Called after each validation, with its metrics; the model is in evaluation mode."""

    def on_end(self, trainer: Trainer) -> None:
        """Called when `Trainer.fit` ends, also by an error."""


class TrainingBar(Callback):
    """Progress of training: losses, images/s, remaining time and the last held-out figures.

    ``name`` is that of the run, if there are several. Without a terminal, lines; every logged step
    has a line if more output is asked for.
    """

    def __init__(self, name: str = "") -> None:
        self.name = f"{name}: " if name else ""

    def on_start(self, trainer: Trainer) -> None:
        """Show the bar."""
        self.steps, live = trainer.config.steps, is_live(console)
        self.lines = console.verbose or not live
        losses = () if live else ("{task.fields[losses]}",)
        self.progress = ProgressBar(
            f"step {COUNT}",
            *losses,
            "{task.fields[rate]}",
            to=console,
            show=not console.verbose,
            last_line=True,
        )
        self.losses, self.held_out, table = "", "", self.progress.get_renderables
        self.progress.get_renderables = lambda: [  # type: ignore[method-assign]
            *table(),
            *(Text(line) for line in (self.losses, self.held_out) if line),
        ]
        self.task = self.progress.add_task(
            escape_markup(f"{self.name}training"),
            total=self.steps,
            completed=trainer.step,
            losses="",
            rate="",
        )
        self.progress.start()

    def on_end(self, trainer: Trainer) -> None:
        """End the bar."""
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


class TensorBoard(Callback):
    """Writes metrics as curves, and at each validation `example_images`, to ``folder``.

    Args:
        folder: folder of the events. None: ``tensorboard`` in the run folder.

    Raises:
        UserError: if the extra ``tensorboard`` is not installed.
    """

    def __init__(self, folder: Path | str | None = None) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise UserError(
                "TensorBoard is not installed: pip install 'ebmkit-vision[tensorboard]'"
            )
        self.folder = folder

    def on_start(self, trainer: Trainer) -> None:
        """Open the file; events after the trainer's step, of an earlier process, are hidden."""
        from torch.utils.tensorboard import SummaryWriter

        folder = self.folder or _in_run(trainer, "tensorboard")
        self.writer = SummaryWriter(folder, purge_step=trainer.step + 1)

    def report(self, row: dict[str, Any]) -> None:
        """Write a row of metrics."""
        for key, value in metrics_of(row).items():
            self.writer.add_scalar(key, value, row["step"])

    def on_validation(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """Write example images."""
        if (images := example_images(trainer)) is not None:
            self.writer.add_image("clean, noisy, denoised", images, row["step"])

    def on_end(self, trainer: Trainer) -> None:
        """Flush and close the file."""
        self.writer.close()


class WeightsAndBiases(Callback):
    """Writes the same as `TensorBoard` to a run of Weights & Biases.

    Without an API key or a connection, the run is written offline, to ``wandb`` in the working
    folder; `wandb sync` uploads it.

    Args:
        project: name of the project.
        **options: further arguments of `wandb.init`, for example ``mode="offline"``.

    Raises:
        UserError: if the extra ``wandb`` is not installed.
    """

    def __init__(self, project: str = "ebmkit", **options: Any) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(
                "Weights & Biases is not installed: pip install 'ebmkit-vision[wandb]'"
            ) from None
        self.wandb: ModuleType = wandb
        self.options = {"project": project, **options}
        self.run: Any = None

    def on_start(self, trainer: Trainer) -> None:
        """Start a run with the configuration of the trainer."""
        settings = {"config": trainer.config.model_dump(mode="json")} | self.options
        if trainer.run is not None:
            settings = {"name": trainer.run.path.name} | settings
        try:
            self.run = self.wandb.init(**settings)
        except self.wandb.Error as error:  # no API key, no network
            self.run = self.wandb.init(**settings | {"mode": "offline"})
            warnings.warn(
                f"Weights & Biases logs offline ({first_line(error)}): upload the run by "
                f"wandb sync {shlex.quote(str(Path(self.run.dir).parent))}",
                stacklevel=2,
            )

    def report(self, row: dict[str, Any]) -> None:
        """Write a row of metrics."""
        self.run.log(metrics_of(row), step=row["step"])

    def on_validation(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """Write example images."""
        if (images := example_images(trainer)) is not None:
            pixels = images.permute(1, 2, 0).numpy()
            self.run.log({"clean, noisy, denoised": self.wandb.Image(pixels)}, step=row["step"])

    def on_end(self, trainer: Trainer) -> None:
        """Finish the run."""
        self.run.finish()


class CSVLog(Callback):
    """Writes the rows of metrics to the CSV file ``path``, at each validation and at the end.

    Columns are ``step``, ``kind`` and one for each metric; a metric that a row lacks is empty.
    ``path`` None is ``metrics.csv`` in the run folder.
    """

    def __init__(self, path: Path | str | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.rows: list[dict[str, Any]] = []

    def on_start(self, trainer: Trainer) -> None:
        """Start with the rows of a resumed run."""
        self.path = self.path or _in_run(trainer, "metrics.csv")
        self.rows = trainer.run.metrics() if trainer.run is not None else []

    def report(self, row: dict[str, Any]) -> None:
        """Store a row of metrics."""
        self.rows.append(row)

    def on_validation(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """Write the file."""
        columns = dict.fromkeys(["step", "kind", *(key for own in self.rows for key in own)])
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(columns))
        writer.writeheader()
        writer.writerows(self.rows)
        assert self.path is not None
        write_atomically(self.path, text.getvalue().encode())

    def on_end(self, trainer: Trainer) -> None:
        """Write the file."""
        self.on_validation(trainer, {})


LOGGERS: dict[str, type[Callback]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "csv": CSVLog,
}
"""Loggers by name; without arguments, the first and the last write into the run folder."""


def _in_run(trainer: Trainer, name: str) -> Path:
    """The path ``name`` in the run folder."""
    if trainer.run is None:
        raise UserError(f"there is no run folder for {name!r}: give out, or the logger a path")
    return trainer.run.path / name


def metrics_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row, as KIND/NAME."""
    return {
        f"{row['kind']}/{name}": value
        for name, value in row.items()
        if name not in NOT_METRICS and isinstance(value, (int, float))
    }


@torch.no_grad()
def example_images(trainer: Trainer, count: int = 8, sigma: float = SIGMA) -> Tensor | None:
    """The first held-out (or training) images, with noise, and denoised, in three rows.

    Args:
        trainer: trainer, with its model in evaluation mode.
        count: number of images, a column each.
        sigma: noise level, image units; the noise is the same in every call.

    Returns:
        (C, 3 H, count * W) in [0, 1], on the CPU; None if the objective has no denoising term.
    """
    if trainer.card.sigma_range is None:
        return None
    images = (trainer.validation or trainer.train).first(count)
    x = next(iter(images.batches(count)))[0].cpu()
    generator = keyed_generator("cpu", trainer.config.seed, "examples")
    y = x + sigma * torch.randn(x.shape, generator=generator)
    clean = trainer.trained.denoise(y.to(trainer.device), sigma).cpu()
    rows = [torch.cat(list(own), dim=2) for own in (x, y, clean)]
    return torch.cat(rows, dim=1).clamp(0, 1)
