"""Tables and figures of the two papers, one command each, at four scales."""

from collections.abc import Sequence
from pathlib import Path

from ebmkit.errors import UserError
from ebmkit.experiments.efficiency import EFFICIENCY_EXPERIMENT
from ebmkit.experiments.figures import FIGURE_EXPERIMENTS
from ebmkit.experiments.guidance import GUIDANCE_EXPERIMENT
from ebmkit.experiments.report import Experiment, Report, write
from ebmkit.experiments.runs import SCALES, ExperimentRuns, ExperimentScale, Protocol, Variant
from ebmkit.experiments.tables import CLAIMS_EXPERIMENT, TABLE_EXPERIMENTS, TABLES, PaperTable
from ebmkit.experiments.thesis import THESIS_TABLES
from ebmkit.experiments.thesis_figures import THESIS_FIGURES
from ebmkit.registry import find

__all__ = [
    "EXPERIMENTS",
    "SCALES",
    "TABLES",
    "Experiment",
    "ExperimentRuns",
    "ExperimentScale",
    "PaperTable",
    "Protocol",
    "Report",
    "Variant",
    "describe",
    "experiments_of",
    "reproduce",
    "write",
]

EXPERIMENTS: dict[str, Experiment] = {
    **TABLE_EXPERIMENTS,
    **FIGURE_EXPERIMENTS,
    "guidance": GUIDANCE_EXPERIMENT,
    "claims": CLAIMS_EXPERIMENT,
    "efficiency": EFFICIENCY_EXPERIMENT,
    **THESIS_TABLES,
    **THESIS_FIGURES,
}
"""All experiments, by their name on the command line."""


def reproduce(name: str, runs: ExperimentRuns, only: Sequence[str] = ()) -> list[Path]:
    """Train, evaluate and report the experiment ``name``; return the paths written.

    Args:
        name: key of `EXPERIMENTS`.
        runs: run folders.
        only: names of the variants to run; empty: all. Other finished variants stay in the report.

    Raises:
        Interrupted: if training is interrupted; the same call resumes it.
        UserError: if a variant does not exist, or data or memory do not suffice.
    """
    experiment = EXPERIMENTS[name]
    return write(name, experiment, experiment.run(runs, only), runs.out)


def describe(name: str, runs: ExperimentRuns) -> str:
    """Markdown: the recipe of each row of experiment ``name``, and the fields that differ from it.

    Each difference is "the recipe's value -> the row's". Rows that share a run are left out.

    Raises:
        UserError: if a configuration cannot be resolved.
    """
    lines = [f"## {name}, scale {runs.scale.name}: {EXPERIMENTS[name].title}", ""]
    for variant in runs.distinct([v for v in EXPERIMENTS[name].variants if v.run is None]):
        lines.append(f"- **{variant.name}**, {variant.label}: `{runs.scale.recipe_of(variant)}`")
        for key, (theirs, ours) in runs.differences(variant).items():
            lines.append(f"    - `{key}`: {theirs} -> {ours}")
    return "\n".join(lines) + "\n"


def experiments_of(name: str, only: Sequence[str]) -> list[str]:
    """The experiments that ``name`` selects; ``all`` selects every one.

    Raises:
        UserError: if there is no such experiment, or it has no variant of a name in ``only``.
    """
    if name == "all":
        if only:
            raise UserError("--only picks rows of one target: give its name instead of all")
        return list(EXPERIMENTS)
    experiment = find("target", EXPERIMENTS | {"all": None}, name)  # also suggests 'all'
    assert experiment is not None
    if only and not experiment.variants:
        raise UserError(f"{name} has no rows to pick from: leave out --only")
    for variant in only:
        find(f"row of {name}", {one.name: one for one in experiment.variants}, variant)
    return [name]
