"""Report of runs: one self-contained HTML file with what was trained, its cost and its results."""

from ebmkit.report.render import render_report, write_report
from ebmkit.report.runs import Evaluation, Run, read_run

__all__ = ["Evaluation", "Run", "read_run", "render_report", "write_report"]
