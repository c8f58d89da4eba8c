"""``ebmkit verify``: whether every file of a run is what was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from rich.table import Table
from typer import Option

from ebmkit.cli.console import console
from ebmkit.errors import UserError


def verify(
    run: Path,
    *,
    accept: list[str] | None = None,
    as_json: Annotated[bool, Option("--json")] = False,
) -> None:
    """Compare every file of a run with its checksum in manifest.json.

    Exit code 2 if a file is changed or missing. Writes nothing unless --accept is given.

    Args:
        accept: accept the present content of this file, changed on purpose; repeatable
        as_json: print JSON instead of a table
    """
    from ebmkit.storage.verify import accept_files, verify_run

    if not run.is_dir():
        raise UserError(f"there is no run folder {str(run)!r}")
    if accept:
        accept_files(run, accept)
    found = verify_run(run)
    wrong = [finding for finding in found if finding.state in ("changed", "missing")]
    if as_json:
        console.print_json(json.dumps([finding._asdict() for finding in found]))
    else:
        table = Table(show_edge=False)
        longest = max((len(finding.name) for finding in found), default=0)
        table.add_column("file", no_wrap=True, min_width=longest)
        for title in ("state", "bytes", ""):
            table.add_column(title, justify="right" if title == "bytes" else "left")
        for name, state, size, reason in found:
            table.add_row(name, state, f"{size:,}", reason)
        console.print(table)
    if wrong:
        names = ", ".join(finding.name for finding in wrong)
        raise UserError(
            f"{len(wrong)} of {len(found)} files in {str(run)!r} are not what was written: {names};"
            " `ebmkit train --resume` continues from what is undamaged, --accept NAME accepts a"
            " file that was changed on purpose"
        )
    if not as_json:
        whole = sum(finding.state == "whole" for finding in found)
        console.say(f"all {whole} files of the run are whole")
