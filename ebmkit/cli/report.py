"""``ebmkit report``: a page with what runs were trained for, their cost and results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument

from ebmkit.terminal import console


def report(
    runs: Annotated[list[Path], Argument(metavar="RUN", help="run folders, to compare several")],
    *,
    out: Path | None = None,
) -> None:
    """Write an HTML page with the training, cost and results of runs.

    One file without external parts. Several runs are compared: tables side by side, curves in one
    plot. An older report is replaced, no other file.

    Example:
        ebmkit report runs/digits

    Args:
        out: HTML file to write [default: RUN/report.html; for several runs, report.html]
    """
    from ebmkit.report import write_report

    console.say(f"report: {write_report(list(dict.fromkeys(runs)), out)}")
