"""What is reproduced: rows, each a run of its own, and the tables that they make.

A row names the configuration that differs from its table's, and the figures that the paper prints
for it. Rows of one configuration are one run: what table 1 calls "joint" is the first row of table
3, and is trained once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from ebmkit.registry import find

__all__ = ["METRICS", "Expectation", "Metric", "Row", "Table"]

Metric = Literal["accuracy", "15", "25", "50", "hours"]

METRICS: dict[str, str] = {
    "accuracy": "accuracy, %",
    "15": "PSNR at 15/255, dB",
    "25": "PSNR at 25/255, dB",
    "50": "PSNR at 50/255, dB",
    "hours": "training, hours",
}
"""Figures of a row, in the order of the paper's columns, with their units."""


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        name: for ``--only``; of the run's folder, too, unless ``run`` says otherwise.
        label: what it is, in words.
        task: classification, denoising or joint.
        layer: the configuration, over the scale's (nested fields of `TrainConfig`).
        paper: the paper's figures, by `METRICS`; empty where it has no such row.
        run: name of the row whose run this one reads; None: its own.
        reads: which denoiser of the suite ``denoise`` its PSNR is of.
        at_full: what is laid over ``layer`` at the scale ``full``, whose recipe differs.
        missing: why there is no such run; None: there is.
        within: folder of its run's folder, for rows whose names other tables have, too.
    """

    name: str
    label: str
    task: str
    layer: Mapping[str, Any] = field(default_factory=dict)
    paper: Mapping[str, float] = field(default_factory=dict)
    run: str | None = None
    reads: str = "unconditional"
    at_full: Mapping[str, Any] = field(default_factory=dict)
    missing: str | None = None
    within: str = ""

    @property
    def folder(self) -> str:
        """The run's folder, below that of all rows."""
        name = self.run or self.name
        return f"{self.within}/{name}" if self.within else name


class Expectation(NamedTuple):
    """An ordering that the paper reports: ``better`` above ``worse`` in ``metric``."""

    better: str
    worse: str
    metric: str


@dataclass(frozen=True)
class Table:
    """A table of the paper.

    Attributes:
        name: as on the command line.
        title: one line.
        rows: by name, in the paper's order.
        expected: the orderings of the paper that ours are held against.
        family: which of a scale's settings it is trained with: cifar10 or imagenet.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    expected: tuple[Expectation, ...] = ()
    family: str = "cifar10"

    def row(self, name: str) -> Row:
        """The row called ``name``.

        Raises:
            UserError: if there is none; it names the nearest.
        """
        return find(f"row of {self.name}", {row.name: row for row in self.rows}, name)

    def own(self, row: Row) -> Row:
        """The row whose run ``row`` reads; itself, mostly."""
        return self.row(row.run) if row.run else row
