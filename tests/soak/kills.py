"""Training that is killed over and over, and must end as if it never was."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ebmkit_tests.soak.compare import differences, last_step, logged_step
from ebmkit_tests.soak.processes import Command, ebmkit

START = 40.0
"""Seconds in which a command must have begun to train."""


@dataclass(frozen=True)
class Training:
    """A training command to be killed.

    Attributes:
        name: of the scenario.
        about: what it covers.
        options: of `ebmkit train`.
        steps: of the whole run; of the quick form.
        ranks: processes, by torchrun.
        defect: put in as a control; the run must then come out different.
    """

    name: str
    description: str
    options: tuple[str, ...]
    steps: tuple[int, int]
    ranks: int = 1
    defect: str | None = None

    def command(self, *arguments: object, quick: bool) -> list[str]:
        steps = self.steps[1] if quick else self.steps[0]
        wrapper = "ebmkit_tests.soak.unrestored" if self.defect else None
        words = ["train", "--no-evaluate", "--device", "cpu", "--steps", steps, *self.options]
        return ebmkit(*words, *arguments, wrapper=wrapper, ranks=self.ranks)


@dataclass
class Outcome:
    """What became of a run.

    Attributes:
        kills: processes killed.
        in_a_save: of them, those that left a file half written.
        one_rank: of them, those of one rank alone.
        at_start: of them, those before the first step of that process.
        steps_lost: steps that were taken again.
        seconds: of it all, the uninterrupted run included.
        differing: where the run differs from the uninterrupted one.
    """

    kills: int = 0
    in_a_save: int = 0
    one_rank: int = 0
    at_start: int = 0
    steps_lost: int = 0
    seconds: float = 0.0
    differing: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        return {**self.__dict__, "seconds": round(self.seconds, 1)}


Tell = Callable[[str], None]


def reference(training: Training, place: Path, quick: bool) -> Path:
    """The run that is never interrupted."""
    run = place / "whole"
    finish(training.command("--out", run, quick=quick), place, place / "whole.log", training.defect)
    return run


def killed(
    training: Training, place: Path, kills: int, saves: int, seed: int, quick: bool, tell: Tell
) -> Outcome:
    """Kill the run so often, of which so many in a save at least, and compare how it ends."""
    begun, outcome = time.monotonic(), Outcome()
    drawn = random.Random(seed)
    whole, run = reference(training, place, quick), place / "killed"
    log = place / "killed.log"
    went_on = False  # from a checkpoint; else a defect in going on could not show
    while (
        outcome.kills < kills
        or (outcome.in_a_save < saves and outcome.kills < 3 * kills)
        or (not went_on and outcome.kills < 9 * kills)
    ):
        if run.exists() and last_step(run) >= training.steps[quick]:
            raise RuntimeError(f"the run ended after {outcome.kills} kills; make it longer")
        resume = ["--resume", run] if run.exists() else ["--out", run]
        command = Command(training.command(*resume, quick=quick), place, log)
        try:
            wanted = saves - outcome.in_a_save
            in_a_save = drawn.random() < max(wanted, 0) / max(1, kills - outcome.kills)
            if in_a_save:
                hit = kill_in_a_save(command, run, drawn)
                outcome.in_a_save += hit
            else:
                kill_at_random(command, run, drawn, outcome, training.ranks)
        finally:
            command.kill()
        if command.process.returncode not in (-9, 1):  # torchrun ends with 1 when a rank was killed
            raise RuntimeError(f"not killed: exit code {command.process.returncode}; see {log}")
        if command.process.returncode == 1 and training.ranks == 1:
            raise RuntimeError(f"failed by itself; see {log}")
        outcome.kills += 1
        lost = max(0, logged_step(run) - last_step(run)) if run.exists() else 0
        outcome.steps_lost += lost
        went_on = went_on or last_step(run) > 0
        tell(f"kill {outcome.kills} of {kills}, at step {last_step(run)}")
    resume = ["--resume", run] if run.exists() else ["--out", run]
    finish(training.command(*resume, quick=quick), place, log, training.defect)
    outcome.differing = differences(whole, run)
    outcome.seconds = time.monotonic() - begun
    return outcome


def finish(arguments: list[str], place: Path, log: Path, defect: str | None) -> None:
    """Run a command to its end."""
    if defect:
        os.environ["SOAK_DEFECT"] = defect
    code = Command(arguments, place, log).wait(1800)
    if code:
        raise RuntimeError(f"exit code {code}; see {log}:\n{log.read_text()[-2000:]}")


def kill_in_a_save(command: Command, run: Path, drawn: random.Random) -> bool:
    """Kill while a checkpoint is written; whether the file that was left behind proves it."""
    folder, first = run / "checkpoints", last_step(run)
    after = drawn.randrange(3)  # saves that this process finishes before
    until, seen = time.monotonic() + START, set()
    while time.monotonic() < until and not command.over:
        try:
            names = os.listdir(folder)
        except FileNotFoundError:
            continue
        seen |= {n for n in names if n.startswith("step-") and int(n[5:13]) > first}
        if len(seen) >= after and any(n.endswith(".partial") for n in names):
            command.kill()
            return any(n.endswith(".partial") for n in os.listdir(folder))
    return False


def kill_at_random(
    command: Command, run: Path, drawn: random.Random, outcome: Outcome, ranks: int
) -> None:
    """Kill during the start, or some time after the first step."""
    metrics = run / "metrics.jsonl"
    size = metrics.stat().st_size if metrics.exists() else -1
    if drawn.random() < 0.15:
        time.sleep(drawn.uniform(0.0, 4.0))
        outcome.at_start += 1
        return
    until = time.monotonic() + START
    while time.monotonic() < until and not command.over:
        now = metrics.stat().st_size if metrics.exists() else -1
        if now > size:
            break
        size = min(size, now)  # cut back to the checkpoint
        time.sleep(0.01)
    time.sleep(drawn.uniform(0.0, 1.0))
    if ranks > 1 and drawn.random() < 0.5 and command.kill_one(drawn.randrange(ranks)):
        outcome.one_rank += 1
        until = time.monotonic() + START
        while time.monotonic() < until and not command.over:  # torchrun ends the others
            time.sleep(0.05)
