"""The monitor of malicious files reports accesses, outcomes and memory."""

import faulthandler
import mmap
import os
import subprocess
import time

import h5py
import numpy as np
import pytest
from ebmkit_tests.hostile.watch import run_in_fork

from ebmkit.errors import UserError

pytestmark = pytest.mark.slow


def raises_user_error(path):
    raise UserError(f"{path.name} is refused")


def raises_key_error(path):
    path.read_bytes()
    raise KeyError("name")


def reads_other_files(path):
    os.listdir("/")
    open("/etc/hostname").close()


def starts_a_process(path):
    subprocess.run(["true"], check=True)


def writes_outside_its_folder(path):
    (path.parents[1] / "new").write_text("x")


def follows_a_link(path):
    (path.parent / "link").read_text()


def reads_through_hdf5(path):
    with h5py.File(path.parents[1] / "outside" / "a.h5") as file:
        assert file["x"][()] == 1


def fills_memory(path):
    """Fill a new mapping of 400 MiB, which cannot reuse memory freed by earlier tests."""
    with mmap.mmap(-1, 400 * 2**20) as memory, memoryview(memory) as view:
        np.frombuffer(view, np.uint8).fill(1)


def allocates_too_much(path):
    np.ones(2**40)


def aborts(path):
    faulthandler.disable()
    os.abort()


def sleeps(path):
    time.sleep(60)


OUTCOMES = {
    raises_user_error: ("refused", "mine is refused", ""),
    raises_key_error: ("raised", "KeyError: 'name'", ""),
    reads_other_files: ("opened", "", "os.listdir /; open /etc/hostname"),
    starts_a_process: ("opened", "", "subprocess.Popen"),
    writes_outside_its_folder: ("opened", "", "new to write"),
    follows_a_link: ("opened", "", "secret.txt"),
    reads_through_hdf5: ("opened", "", "opened outside a.h5"),
    allocates_too_much: ("raised", "MemoryError", ""),
    aborts: ("died", "signal 6", ""),
    sleeps: ("died", "never ended", ""),
}


@pytest.fixture
def monitored(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "own" / "mine").write_text("x")
    (tmp_path / "outside" / "secret.txt").write_text("x")
    (tmp_path / "own" / "link").symlink_to("../outside/secret.txt")
    with h5py.File(tmp_path / "outside" / "a.h5", "w") as file:
        file["x"] = 1
    return lambda call: run_in_fork(
        call, tmp_path / "own" / "mine", tmp_path / "own", tmp_path / "outside", 0.1
    )


@pytest.mark.parametrize("call", OUTCOMES, ids=lambda call: call.__name__)
def test_monitor_reports_outcome_and_accesses(monitored, call):
    how, text, touched = OUTCOMES[call]
    outcome = monitored(call)
    assert outcome.how == how, outcome
    assert text in outcome.text
    assert touched in "; ".join(outcome.touched)
    assert bool(touched) == bool(outcome.touched), outcome.touched


def test_monitor_measures_memory(monitored):
    assert monitored(fills_memory).mib > 300
    assert monitored(raises_key_error).mib < 100
