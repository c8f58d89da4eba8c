"""The paper's tables and figures, each out of one command, at three scales."""

from ebmkit.experiments.keeping import Protocol
from ebmkit.experiments.rows import Expectation, Row, Table
from ebmkit.experiments.runs import Rows
from ebmkit.experiments.scales import SCALES, Scale, find_scale
from ebmkit.experiments.tables import TABLES
from ebmkit.experiments.tabulate import run_table
from ebmkit.experiments.targets import TARGETS, Target, check_targets, targets_of

__all__ = [
    "SCALES",
    "TABLES",
    "TARGETS",
    "Expectation",
    "Protocol",
    "Row",
    "Rows",
    "Scale",
    "Table",
    "Target",
    "check_targets",
    "find_scale",
    "run_table",
    "targets_of",
]
