"""``ebmkit reproduce --slurm``: the same command as a SLURM array, by submitit."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ebmkit.errors import UserError
from ebmkit.terminal import console

LISTS = ("setup", "teardown", "srun_args")
"""Options of submitit with several values: each repetition adds one."""


@dataclass
class Job:
    """A job that runs ``ebmkit`` with ``arguments``; SLURM may interrupt and repeat it."""

    arguments: list[str]
    runs: ClassVar[bool] = False  # whether this process is a job, which ignores --slurm

    def __call__(self) -> None:
        """Run the command in this process, which exits."""
        Job.runs, sys.argv[1:] = True, self.arguments
        runpy.run_module("ebmkit", run_name="__main__")

    def checkpoint(self) -> Any:
        """What submitit puts into the queue when the job reaches its time limit: the same job."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def parse_options(given: Sequence[str]) -> dict[str, Any]:
    """Parameters for submitit from ``KEY=VALUE`` options, such as ``partition=gpu``.

    Raises:
        UserError: if one has no value, or the time is missing or no number of minutes.
    """
    found: dict[str, Any] = {}
    for option in given:
        key, equals, text = option.partition("=")
        key = key.strip().lstrip("-").replace("-", "_")
        if not equals or not key:
            raise UserError(f"--slurm-option {option!r} is not KEY=VALUE, such as partition=gpu")
        value: Any = {"true": True, "false": False}.get(text, int(text) if text.isdigit() else text)
        found[key] = [*found.get(key, []), text] if key in LISTS else value
    if type(found.get("time")) is not int:
        raise UserError(
            f"the time limit of a job is {found.get('time')!r}: give it in minutes, as in "
            "--slurm-option time=720"
        )
    return {f"slurm_{key}": value for key, value in found.items()}


def submit(count: int, given: Sequence[str], name: str, out: Path) -> None:
    """Submit an array of ``count`` times this command, logs in ``out/slurm``; print how to follow.

    Raises:
        UserError: if submitit or SLURM is missing, an option is unknown, or SLURM refuses the job.
    """
    if importlib.util.find_spec("submitit") is None:
        raise UserError('--slurm needs submitit: pip install "ebmkit-vision[slurm]"')
    import submitit

    parameters = {"slurm_job_name": name} | parse_options(given)
    logs = (out / "slurm").absolute()
    try:
        executor = submitit.AutoExecutor(logs, cluster="slurm")
        executor.update_parameters(**parameters)
        jobs = executor.submit_array([Job(sys.argv[1:])] * count)
    except NameError as error:  # its first line names the unknown option and the legal ones
        raise UserError(f"--slurm-option: {str(error).splitlines()[0]}") from None
    except (RuntimeError, OSError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"SLURM does not take the jobs: {reason}") from None
    array = jobs[0].job_id.partition("_")[0]
    console.say(
        f"submitted: SLURM job {array}, {count} processes that share the rows in {out}\n"
        f"  state:   squeue -j {array}\n"
        f"  output:  tail -f {logs}/{array}_*_log.out\n"
        f"  stop:    scancel {array}\n"
        f"The reports will be in {out}. Repeat the command to continue what was stopped."
    )
