"""``ebmkit reproduce``: the papers' tables and figures, next to the published values."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument

from ebmkit.cli.console import TrainingBar, console, interrupted
from ebmkit.errors import UserError

if TYPE_CHECKING:
    from ebmkit.training import Trainer
    from ebmkit.training.loop import Stop


def reproduce(
    target: str,
    more: Annotated[list[str] | None, Argument(metavar="ROW")] = None,
    *,
    scale: str = "smoke",
    only: list[str] | None = None,
    out: Path | None = None,
    data_dir: Path | None = None,
    imagenet_dir: Path | None = None,
    device: str = "auto",
    precision: str | None = None,
    seed: int = 0,
) -> None:
    """Reproduce a table or figure of the papers: write Markdown, JSON and plots to --out.

    Every row is a separate run. The same command skips finished rows and resumes an interrupted
    one.

    Args:
        target: table1, table2, table3, fig1, fig3, fig4, guidance, claims, or all
        scale: smoke: digits, seconds per row; cpu: CIFAR-10, minutes per row; full: the paper's
            scale
        more: further rows for --only
        only: run only these rows
        out: folder for rows and reports [default: runs/reproduce-SCALE]
        data_dir: folder of CIFAR-10 [default: data]
        imagenet_dir: folder of ImageNet, for table2 at scale full
        precision: precision of training: auto, fp32, tf32, bf16 [default: set by the scale]
    """
    from ebmkit.compute import limited_threads, pick_device
    from ebmkit.experiments import EXPERIMENTS, SCALES, ExperimentRuns, experiments_of
    from ebmkit.experiments import reproduce as run_experiment
    from ebmkit.registry import find
    from ebmkit.storage import make_folder
    from ebmkit.training import Interrupted
    from ebmkit.training.loop import Stop

    if more and not only:
        raise UserError(f"unexpected {more[0]!r}: name rows after --only, as in --only {more[0]}")
    names = [*(only or []), *(more or [])]
    chosen = experiments_of(target, names)
    pick_device(device)
    folder, settings = out or Path("runs") / f"reproduce-{scale}", find("scale", SCALES, scale)
    runs = ExperimentRuns(folder, settings, data_dir, device, seed, precision, _fit, console.say,
                          console.is_terminal, imagenet_dir)  # fmt: skip
    if target == "all":
        if scale == "full" and imagenet_dir is None:
            console.say("table2 is skipped: it needs ImageNet, --imagenet-dir")
            chosen.remove("table2")
        runs.check([v for name in chosen for v in EXPERIMENTS[name].variants if v.run is None])
    make_folder(runs.out)
    stop = Stop()
    try:
        with limited_threads(runs.scale.threads), _terminated_as_interrupted(stop):
            for name in chosen:
                for path in run_experiment(name, runs, names):
                    if path.suffix == ".md":
                        console.say(path.read_text())
                    console.say(f"written: {path}")
    except (Interrupted, KeyboardInterrupt) as stopped:
        signum = stopped.signal if isinstance(stopped, Interrupted) else stop.signal
        interrupted(f"run the same command to resume {runs.out}", signum or signal.SIGINT)
    if runs.stopped:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in runs.stopped.items())
        raise UserError(f"not all rows could be finished, the reports say so: {reasons}")


@contextmanager
def _terminated_as_interrupted(stop: Stop) -> Iterator[None]:
    """Inside, SIGTERM interrupts as Ctrl-C does; ``stop`` names the signal."""

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
    resumed = f" after step {trainer.step:,}" if trainer.step else ""
    console.say(f"{name}: training, {steps:,} steps{resumed}")
    bar = TrainingBar(steps, trainer.step)
    trainer.reporter = bar if bar.live else None
    with bar if bar.live else nullcontext():
        trainer.fit()
