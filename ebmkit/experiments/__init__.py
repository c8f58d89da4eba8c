"""The tables and figures of the two papers, each out of one command, at three scales."""

from collections.abc import Sequence
from pathlib import Path

from ebmkit.errors import UserError
from ebmkit.experiments.figures import FIGURE_EXPERIMENTS
from ebmkit.experiments.guidance import GUIDANCE_EXPERIMENT
from ebmkit.experiments.report import Experiment, Report, write
from ebmkit.experiments.runs import SCALES, ExperimentRuns, Protocol, Scale, Variant
from ebmkit.experiments.tables import CLAIMS_EXPERIMENT, TABLE_EXPERIMENTS, TABLES, Table
from ebmkit.registry import find

__all__ = [
    "EXPERIMENTS",
    "SCALES",
    "TABLES",
    "Experiment",
    "ExperimentRuns",
    "Protocol",
    "Report",
    "Scale",
    "Table",
    "Variant",
    "experiments_of",
    "reproduce",
    "write",
]

EXPERIMENTS: dict[str, Experiment] = {
    **TABLE_EXPERIMENTS,
    **FIGURE_EXPERIMENTS,
    "guidance": GUIDANCE_EXPERIMENT,
    "claims": CLAIMS_EXPERIMENT,
}
"""All experiments, by the name on the command line."""


def reproduce(name: str, runs: ExperimentRuns, only: Sequence[str] = ()) -> list[Path]:
    """Train, measure and report the experiment called ``name``; the paths written.

    Args:
        name: of `EXPERIMENTS`.
        runs: the run folders.
        only: names of the variants to run; all if empty. Those that were finished before stay in
            the report.

    Raises:
        Interrupted: if training was; calling again resumes it.
        UserError: if a variant does not exist or does not suit this machine.
    """
    return write(name, EXPERIMENTS[name].run(runs, only), runs.out)


def experiments_of(name: str, only: Sequence[str]) -> list[str]:
    """The experiments that ``name`` means; ``all``: each of them.

    Raises:
        UserError: if there is no such experiment, or a variant of ``only`` is none of it.
    """
    if name == "all":
        if only:
            raise UserError("--only picks rows of one target: name it instead of all")
        return list(EXPERIMENTS)
    experiment = find("target", EXPERIMENTS | {"all": None}, name)  # 'all' is suggested, too
    assert experiment is not None
    if only and not experiment.variants:
        raise UserError(f"{name} has no rows to pick from: leave out --only")
    for variant in only:
        find(f"row of {name}", {one.name: one for one in experiment.variants}, variant)
    return [name]
