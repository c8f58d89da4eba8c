"""Claims: one process works, and others take over the work of dead processes and machines."""

import os
import signal
import subprocess
import sys
import time

import pytest

from ebmkit.storage import Claim, FolderLocked
from ebmkit.storage.claims import LEASE_SECONDS

HOLD = """
import sys, time
from pathlib import Path
from ebmkit.storage import Claim
with Claim(Path(sys.argv[1])).held():
    print("held", flush=True)
    time.sleep(60)
"""


def is_free(claim):
    try:
        with claim.held():
            return True
    except FolderLocked:
        return False


def other_machine(path, seconds):
    """Write the file of a claim that a process of another machine holds, in filelock's format."""
    record = f"filelock/2\npid=12\nhost=node7\nmode=lease\ntoken=abc\nduration={seconds!r}\n"
    path.with_name(f"{path.name}.claim").write_text(record)


def test_claim_excludes_others_and_leaves_no_file(tmp_path):
    row = tmp_path / "joint"
    claim = Claim(row)
    with claim.held(), claim.held():  # a holder may nest it
        assert not is_free(Claim(row))
        assert is_free(Claim(tmp_path / "relu"))
        with pytest.raises(FolderLocked, match=f"process {os.getpid()} on .*works on '{row}'"):
            Claim(row).held().__enter__()
    assert is_free(Claim(row))
    assert os.listdir(tmp_path) == []


def test_names_with_dots_have_separate_claims(tmp_path):
    with Claim(tmp_path / "robust-0.25").held(), Claim(tmp_path / "robust-0.5").held():
        assert sorted(os.listdir(tmp_path)) == ["robust-0.25.claim", "robust-0.5.claim"]


@pytest.mark.slow
def test_claim_of_a_killed_process_is_free_at_once_on_its_machine(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "joint")]
    claim = Claim(tmp_path / "joint")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        assert not is_free(claim)
        process.kill()
    assert is_free(claim)


@pytest.fixture
def clock(monkeypatch):
    """A clock of this process: a list with the time in seconds."""
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("clock_error", [0, -86_400, 86_400])
def test_claim_of_a_dead_machine_is_free_after_the_lease(tmp_path, clock, clock_error):
    """Whatever time its clock gave the file."""
    row = tmp_path / "joint"
    other_machine(row, LEASE_SECONDS)
    when = time.time() + clock_error
    os.utime(tmp_path / "joint.claim", (when, when))
    claim = Claim(row)
    assert not is_free(claim)
    clock[0] += LEASE_SECONDS - 1
    assert not is_free(claim)
    clock[0] += 2
    assert is_free(claim)
    assert os.listdir(tmp_path) == []


def test_claim_that_another_machine_renews_stays_taken(tmp_path, clock):
    row = tmp_path / "joint"
    other_machine(row, LEASE_SECONDS)
    claim = Claim(row)
    for minute in range(0, 20, 4):
        os.utime(tmp_path / "joint.claim", (minute, minute))
        assert not is_free(claim)
        clock[0] += 240
    clock[0] += 240
    assert is_free(claim)


def test_holder_renews_its_claim(tmp_path):
    path = tmp_path / "joint.claim"
    with Claim(tmp_path / "joint", 0.5).held():
        os.utime(path, (0, 0))
        until = time.monotonic() + 5
        while path.stat().st_mtime == 0 and time.monotonic() < until:
            time.sleep(0.02)
        assert path.stat().st_mtime > 0


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt, whatever handler the test process has."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_holder_that_lost_its_claim_is_interrupted(tmp_path):
    """As after a suspension that was longer than the lease."""
    row = tmp_path / "joint"
    with pytest.raises(FolderLocked, match="was not renewed in time"), Claim(row, 0.5).held():
        (tmp_path / "joint.claim").unlink()
        other_machine(row, 0.5)
        for _ in range(100):
            time.sleep(0.05)
    assert not is_free(Claim(row, 0.5))  # the other's claim is not removed


def test_ctrl_c_is_not_taken_for_a_lost_claim(tmp_path):
    with pytest.raises(KeyboardInterrupt), Claim(tmp_path / "joint").held():
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []
