"""What ``ebmkit reproduce`` can be asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ebmkit.errors import UserError
from ebmkit.experiments.figures import FIG4, run_claims, run_fig1, run_fig3, run_fig4
from ebmkit.experiments.guidance import FAMILY, run_guidance
from ebmkit.experiments.guidance_rows import NETWORKS
from ebmkit.experiments.rows import Row, Table
from ebmkit.experiments.runs import Rows
from ebmkit.experiments.tables import CLAIMS, GRID, TABLES
from ebmkit.experiments.tabulate import run_table
from ebmkit.registry import find

__all__ = ["TARGETS", "Target", "check_targets", "targets_of"]


class Target(NamedTuple):
    """A table or figure.

    Attributes:
        about: one line.
        run: trains, measures and reports, with the names of the rows wanted (none: all); gives the
            paths of what it wrote.
        rows: names of its rows, for ``--only``; none where it has no rows.
        needs: its runs, each with the family of settings that it is trained by.
    """

    description: str
    run: Callable[[Rows, Sequence[str]], list[Path]]
    rows: tuple[str, ...] = ()
    needs: tuple[tuple[Row, str], ...] = ()


def _names(rows: Sequence[Row]) -> tuple[str, ...]:
    return tuple(row.name for row in rows)


def _needs(rows: Sequence[Row], family: str = "cifar10") -> tuple[tuple[Row, str], ...]:
    return tuple((row, family) for row in rows if row.missing is None and row.run is None)


def _table(table: Table) -> Target:
    def run(rows: Rows, only: Sequence[str]) -> list[Path]:
        return run_table(table, rows, only)

    return Target(table.title, run, _names(table.rows), _needs(table.rows, table.family))


TARGETS: dict[str, Target] = {
    **{name: _table(table) for name, table in TABLES.items()},
    "fig1": Target("bias and variance of generative and discriminative fits", run_fig1),
    "fig3": Target(
        "Jacobian of the denoiser, local linearity", run_fig3, _names(GRID), _needs(GRID)
    ),
    "fig4": Target("accuracy under attack", run_fig4, _names(FIG4), _needs(FIG4)),
    "guidance": Target(
        "guiding a diffusion model by energies (the second paper)",
        lambda rows, only: run_guidance(rows, only),
        _names(NETWORKS),
        _needs(NETWORKS, FAMILY),
    ),
    "claims": Target(CLAIMS.title, run_claims, _names(CLAIMS.rows), _needs(CLAIMS.rows)),
}


def check_targets(names: Sequence[str], rows: Rows) -> None:
    """All mistakes first: whether everything that ``names`` need can be trained.

    Raises:
        UserError: if something cannot, or its data is missing.
    """
    for name in names:
        for row, family in TARGETS[name].needs:
            rows.check([row], family)


def targets_of(name: str, only: Sequence[str]) -> list[str]:
    """The targets that ``name`` means; ``all``: each of them.

    Raises:
        UserError: if there is no such target, or a row of ``only`` is none of it.
    """
    if name == "all":
        if only:
            raise UserError("--only picks rows of one target: name it instead of all")
        return list(TARGETS)
    target = find("target", TARGETS | {"all": None}, name)  # 'all' is suggested, too
    assert target is not None
    if only and not target.rows:
        raise UserError(f"{name} has no rows to pick from: leave out --only")
    for row in only:
        find(f"row of {name}", dict.fromkeys(target.rows), row)
    return [name]
