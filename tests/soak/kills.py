"""Training that is killed repeatedly and resumed, compared with an uninterrupted run."""

from __future__ import annotations

import os
import random
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ebmkit_tests.soak.compare import differences, last_step, logged_step
from ebmkit_tests.soak.processes import Command, ebmkit
from ebmkit_tests.support.command_line import ebmkit_command

START = 40.0
"""Seconds within which a command must begin to train."""


@dataclass(frozen=True)
class Training:
    """A training command to be killed.

    Attributes:
        name: name of the scenario.
        description: what it covers.
        options: options of `ebmkit train`.
        steps: number of steps of the long form and of the quick form.
        ranks: number of processes, started by torchrun.
        defect: a defect injected as a control; the resumed run must then differ.
    """

    name: str
    description: str
    options: tuple[str, ...]
    steps: tuple[int, int]
    ranks: int = 1
    defect: str | None = None

    def words(self, quick: bool) -> list[object]:
        steps = self.steps[1] if quick else self.steps[0]
        return ["train", "--no-evaluate", "--device", "cpu", "--steps", steps, *self.options]

    def command(self, *arguments: object, quick: bool) -> list[str]:
        wrapper = "ebmkit_tests.soak.unrestored" if self.defect else None
        return ebmkit(*self.words(quick), *arguments, wrapper=wrapper, ranks=self.ranks)


@dataclass
class Outcome:
    """The outcome of a run that was killed and resumed.

    Attributes:
        kills: number of kills.
        in_a_save: kills during a save, shown by a partial file.
        one_rank: kills of a single rank.
        at_start: kills before the first step of the process.
        steps_lost: steps that were repeated.
        seconds: total time, including the uninterrupted run.
        differing: differences between the run and the uninterrupted one.
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


Progress = Callable[[str], None]


def reference(training: Training, place: Path, quick: bool) -> Path:
    """Train the uninterrupted run; return its folder.

    The quick form trains in this process unless a plugin or defect would change later tests.
    """
    run = place / "whole"
    changes_process = training.defect is not None or "--plugin" in str(training.options)
    if quick and training.ranks == 1 and not changes_process:
        with warnings.catch_warnings():  # in a test they would be errors
            warnings.simplefilter("always")
            ended = ebmkit_command(*training.words(quick), "--out", run, cwd=place)
        assert ended.returncode == 0, ended.stderr
        return run
    finish(training.command("--out", run, quick=quick), place, place / "whole.log", training.defect)
    return run


def kill_and_compare(
    training: Training,
    place: Path,
    kills: int,
    saves: int,
    seed: int,
    quick: bool,
    progress: Progress,
) -> Outcome:
    """Kill and resume a run, and compare its end with an uninterrupted run.

    Args:
        training: the scenario.
        place: folder of both runs.
        kills: minimum number of kills.
        saves: minimum number of kills during a save, unless 3 * ``kills`` kills do not reach it.
        seed: seed of the kill times.
        quick: use the quick form of the scenario.
        progress: function that shows progress.
    """
    begun, outcome = time.monotonic(), Outcome()
    drawn = random.Random(seed)
    whole, run = reference(training, place, quick), place / "killed"
    log = place / "killed.log"
    resumed = False  # from a checkpoint; otherwise a defect of resuming could not be detected
    while (
        outcome.kills < kills
        or (outcome.in_a_save < saves and outcome.kills < 3 * kills)
        or (not resumed and outcome.kills < 9 * kills)
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
        if command.process.returncode not in (-9, 1):  # torchrun exits with 1 if a rank is killed
            raise RuntimeError(f"not killed: exit code {command.process.returncode}; see {log}")
        if command.process.returncode == 1 and training.ranks == 1:
            raise RuntimeError(f"failed by itself; see {log}")
        outcome.kills += 1
        lost = max(0, logged_step(run) - last_step(run)) if run.exists() else 0
        outcome.steps_lost += lost
        resumed = resumed or last_step(run) > 0
        progress(f"kill {outcome.kills} of {kills}, at step {last_step(run)}")
    resume = ["--resume", run] if run.exists() else ["--out", run]
    finish(training.command(*resume, quick=quick), place, log, training.defect)
    outcome.differing = differences(whole, run)
    outcome.seconds = time.monotonic() - begun
    return outcome


def finish(arguments: list[str], place: Path, log: Path, defect: str | None) -> None:
    """Run a command until it ends."""
    if defect:
        os.environ["SOAK_DEFECT"] = defect
    code = Command(arguments, place, log).wait(1800)
    if code:
        raise RuntimeError(f"exit code {code}; see {log}:\n{log.read_text()[-2000:]}")


def kill_in_a_save(command: Command, run: Path, drawn: random.Random) -> bool:
    """Kill while a checkpoint is written; return whether a partial file proves it."""
    folder, first = run / "checkpoints", last_step(run)
    after = drawn.randrange(3)  # saves that this process completes first
    until, seen = time.monotonic() + START, set()
    while time.monotonic() < until and not command.ended:
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
    """Kill during the start, or up to one second after the first step."""
    metrics = run / "metrics.jsonl"
    size = metrics.stat().st_size if metrics.exists() else -1
    if drawn.random() < 0.15:
        time.sleep(drawn.uniform(0.0, 4.0))
        outcome.at_start += 1
        return
    until = time.monotonic() + START
    while time.monotonic() < until and not command.ended:
        now = metrics.stat().st_size if metrics.exists() else -1
        if now > size:
            break
        size = min(size, now)  # truncated to the checkpoint
        time.sleep(0.01)
    time.sleep(drawn.uniform(0.0, 1.0))
    if ranks > 1 and drawn.random() < 0.5 and command.kill_one(drawn.randrange(ranks)):
        outcome.one_rank += 1
        until = time.monotonic() + START
        while time.monotonic() < until and not command.ended:  # torchrun ends the others
            time.sleep(0.05)
