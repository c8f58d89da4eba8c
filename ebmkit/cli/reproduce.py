"""``ebmkit reproduce``: the papers' tables and figures, next to the published values."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ebmkit.cli.console import TrainingBar, console
from ebmkit.errors import UserError

if TYPE_CHECKING:
    from ebmkit.training import Trainer
    from ebmkit.training.loop import Stop

__all__ = ["reproduce"]


def reproduce(
    target: Annotated[
        str,
        typer.Argument(help="table1, table2, table3, fig1, fig3, fig4, guidance, claims, or all"),
    ],
    scale: Annotated[
        str,
        typer.Option(
            help="smoke: digits, seconds per row; cpu: CIFAR-10, minutes per row; full: "
            "the paper's scale"
        ),
    ] = "smoke",
    more: Annotated[
        list[str] | None, typer.Argument(help="further rows for --only", metavar="ROW")
    ] = None,
    only: Annotated[list[str] | None, typer.Option("--only", help="run only these rows")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="folder for rows and reports [default: runs/reproduce-SCALE]"),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="folder of CIFAR-10 [default: data]")
    ] = None,
    imagenet_dir: Annotated[
        Path | None, typer.Option(help="folder of ImageNet, for table2 at scale full")
    ] = None,
    device: Annotated[str, typer.Option(help="device: auto, cpu, cuda, cuda:1")] = "auto",
    precision: Annotated[
        str | None,
        typer.Option(
            help="precision of training: auto, fp32, tf32, bf16 [default: set by the scale]"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="random seed of all rows")] = 0,
) -> None:
    """Reproduce a table or figure of the papers: write Markdown, JSON and a plot to --out.

    Every row is a separate run. The same command skips finished rows and resumes an interrupted
    one.
    """
    from ebmkit.compute import limited_threads, pick_device
    from ebmkit.experiments import TARGETS, Rows, check_targets, find_scale, targets_of
    from ebmkit.training import Interrupted
    from ebmkit.training.loop import Stop, exit_code

    if more and not only:
        raise UserError(f"unexpected {more[0]!r}: name rows after --only, as in --only {more[0]}")
    names = [*(only or []), *(more or [])]
    chosen = targets_of(target, names)
    pick_device(device)
    rows = Rows(
        out or Path("runs") / f"reproduce-{scale}",
        find_scale(scale),
        data_dir,
        device,
        seed,
        precision,
        _fit,
        console.say,
        console.is_terminal,
        imagenet_dir,
    )
    if target == "all":
        if scale == "full" and imagenet_dir is None:
            console.say("table2 is left out: it needs ImageNet, --imagenet-dir")
            chosen.remove("table2")
        check_targets(chosen, rows)
    try:
        rows.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make folder {str(rows.out)!r}: {error.strerror}") from None
    stop = Stop()
    try:
        with limited_threads(rows.scale.threads), _terminated_as_interrupted(stop):
            for name in chosen:
                for path in TARGETS[name].run(rows, names):
                    if path.suffix == ".md":
                        console.say(path.read_text())
                    console.say(f"written: {path}")
    except (Interrupted, KeyboardInterrupt) as stopped:
        signum = stopped.signal if isinstance(stopped, Interrupted) else stop.signal
        console.say(f"interrupted; run the same command to resume {rows.out}")
        raise typer.Exit(exit_code(signum or signal.SIGINT)) from None
    if rows.stopped:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in rows.stopped.items())
        raise UserError(f"not all rows could be finished, the reports say so: {reasons}")


@contextmanager
def _terminated_as_interrupted(stop: Stop) -> Iterator[None]:
    """Inside, a request to terminate ends what is going on as Ctrl-C does, and ``stop`` tells."""

    def interrupt(signum: int, frame: object) -> None:
        stop.signal = signum
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fit(trainer: Trainer, name: str) -> None:
    """Train under a progress bar, or with a line where there is no terminal."""
    steps = trainer.config.steps
    went_on = f" after step {trainer.step:,}" if trainer.step else ""
    console.say(f"{name}: training, {steps:,} steps{went_on}")
    bar = TrainingBar(steps, trainer.step)
    trainer.reporter = bar if bar.live else None
    with bar if bar.live else nullcontext():
        trainer.fit()
