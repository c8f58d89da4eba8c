"""The paper's tables and figures, each out of one command, at three scales."""

from ebmkit.reproduce.keeping import Protocol
from ebmkit.reproduce.rows import Expectation, Row, Table
from ebmkit.reproduce.runs import Rows
from ebmkit.reproduce.scales import SCALES, Scale, find_scale
from ebmkit.reproduce.tables import TABLES
from ebmkit.reproduce.tabulate import run_table
from ebmkit.reproduce.targets import TARGETS, Target, check_targets, targets_of

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
