"""Signals to a training process, and concurrent processes on one run."""

import hashlib
import json
import os
import re
import signal
import time

import pytest
from ebmkit_tests.soak.compare import differences, last_step, logged_step
from ebmkit_tests.soak.kills import START
from ebmkit_tests.soak.processes import Command, marked
from ebmkit_tests.soak.processes import ebmkit as command_line
from ebmkit_tests.soak.scenarios import MLP, SMALL
from ebmkit_tests.support.command_line import ebmkit_command

import ebmkit
from ebmkit.storage.verify import verify_run

pytestmark = pytest.mark.slow

STEPS = 500


WORDS = ("train", "--no-evaluate", "--device", "cpu", *MLP, *SMALL)


def train(tmp_path, *arguments, steps=STEPS, ranks=1):
    line = command_line(*WORDS, "--steps", steps, *arguments, ranks=ranks)
    return Command(line, tmp_path, tmp_path / "log.txt")


def wait_until(condition, timeout=START):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def logs_a_new_step(run):
    """A function that returns True once the run logs a step after the current one."""
    before = logged_step(run) if run.exists() else 0
    return lambda: run.exists() and logged_step(run) > before


def test_resume_is_bit_identical_after_sigterm_sigint_and_sighup(tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert ebmkit_command(*WORDS, "--steps", STEPS, "--out", whole, cwd=tmp_path).returncode == 0
    signals = [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
    where = ["--out", run]
    for number, code in signals:
        command = train(tmp_path, *where)
        wait_until(logs_a_new_step(run))
        command.signal(number)
        assert command.wait(60) == code
        assert last_step(run) == logged_step(run)  # every logged step is saved
        where = ["--resume", run]
    assert "ebmkit train --resume" in (tmp_path / "log.txt").read_text()
    assert train(tmp_path, *where).wait(300) == 0
    assert differences(whole, run) == []


def test_sigterm_while_saving_or_starting_leaves_the_run_intact(tmp_path):
    run = tmp_path / "run"
    command = train(tmp_path, "--out", run)
    folder = run / "checkpoints"
    wait_until(lambda: folder.is_dir() and any(n.endswith(".partial") for n in os.listdir(folder)))
    command.signal(signal.SIGTERM)
    assert command.wait(60) == 143
    assert all(found.state == "whole" for found in verify_run(run))
    for seconds in (0.2, 2.5):  # before the first new step
        command = train(tmp_path, "--resume", run)
        time.sleep(seconds)
        command.signal(signal.SIGTERM)
        assert command.wait(60) in (143, -signal.SIGTERM)
    assert all(found.state == "whole" for found in verify_run(run))


def test_sigterm_to_torchrun_saves_a_checkpoint(tmp_path):
    run = tmp_path / "run"
    command = train(tmp_path, "--out", run, ranks=2)
    wait_until(logs_a_new_step(run), 90)
    command.signal(signal.SIGTERM)
    assert command.wait(90) != 0
    assert last_step(run) == logged_step(run) > 0
    assert all(found.state == "whole" for found in verify_run(run))
    assert marked(command.mark) == []


def test_second_command_is_refused_and_a_stale_lock_is_released(tmp_path):
    run = tmp_path / "run"
    first = train(tmp_path, "--out", run, steps=100_000)
    wait_until(logs_a_new_step(run))
    second = train(tmp_path, "--resume", run, steps=100_000)
    assert second.wait(60) == 2
    output = (tmp_path / "log.txt").read_text()
    assert re.search(
        rf"process {first.process.pid} on '.*' has been training in .* since 20", output
    )
    assert "Traceback" not in output
    first.kill()
    third = train(tmp_path, "--resume", run, steps=100_000)
    wait_until(logs_a_new_step(run))
    third.signal(signal.SIGTERM)
    assert third.wait(60) == 143


def test_concurrent_reader_sees_matching_card_and_weights(tmp_path):
    """In many loads during training, the same number of steps comes with the same weights."""
    run = tmp_path / "run"
    command = train(tmp_path, "--set=checkpoint_every=1", "--out", run, steps=100_000)
    wait_until(lambda: (run / "model.json").exists())
    seen, loads, end = {}, 0, time.monotonic() + 4
    while time.monotonic() < end:
        model = ebmkit.load(run)
        content = json.dumps([p.sum().item() for p in model.parameters()])
        seen.setdefault(model.card.steps, set()).add(hashlib.sha256(content.encode()).hexdigest())
        loads += 1
    command.kill()
    assert loads > 40
    assert len(seen) > 10
    assert all(len(found) == 1 for found in seen.values())
