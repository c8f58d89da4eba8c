"""What watches over the opening of hostile files sees what it is there to see."""

import faulthandler
import mmap
import os
import subprocess
import time

import h5py
import numpy as np
import pytest
from ebmkit_tests.hostile.watch import opened

from ebmkit.errors import UserError

pytestmark = pytest.mark.slow


def refuses(path):
    raise UserError(f"{path.name} is refused")


def succeeds(path):
    path.read_bytes()
    raise KeyError("name")


def reads_beside(path):
    os.listdir("/")
    open("/etc/hostname").close()


def runs(path):
    subprocess.run(["true"], check=True)


def writes_in_the_library(path):
    (path.parents[1] / "new").write_text("x")


def follows_a_link(path):
    (path.parent / "link").read_text()


def reads_by_c(path):
    with h5py.File(path.parents[1] / "outside" / "a.h5") as file:
        assert file["x"][()] == 1


def fills_memory(path):
    """Fill 400 MiB that no earlier test can have left free in this process."""
    with mmap.mmap(-1, 400 * 2**20) as memory, memoryview(memory) as view:
        np.frombuffer(view, np.uint8).fill(1)


def asks_for_all_memory(path):
    np.ones(2**40)


def dies(path):
    faulthandler.disable()
    os.abort()


def never_ends(path):
    time.sleep(60)


ENDS = {
    refuses: ("refused", "mine is refused", ""),
    succeeds: ("raised", "KeyError: 'name'", ""),
    reads_beside: ("opened", "", "os.listdir /; open /etc/hostname"),
    runs: ("opened", "", "subprocess.Popen"),
    writes_in_the_library: ("opened", "", "new to write"),
    follows_a_link: ("opened", "", "secret.txt"),
    reads_by_c: ("opened", "", "opened outside a.h5"),
    asks_for_all_memory: ("raised", "MemoryError", ""),
    dies: ("died", "signal 6", ""),
    never_ends: ("died", "never ended", ""),
}


@pytest.fixture
def world(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "own" / "mine").write_text("x")
    (tmp_path / "outside" / "secret.txt").write_text("x")
    (tmp_path / "own" / "link").symlink_to("../outside/secret.txt")
    with h5py.File(tmp_path / "outside" / "a.h5", "w") as file:
        file["x"] = 1
    return lambda call: opened(
        call, tmp_path / "own" / "mine", tmp_path / "own", tmp_path / "outside", 0.1
    )


@pytest.mark.parametrize("call", ENDS, ids=lambda call: call.__name__)
def test_it_sees(world, call):
    how, text, touched = ENDS[call]
    ending = world(call)
    assert ending.how == how, ending
    assert text in ending.text
    assert touched in "; ".join(ending.touched)
    assert bool(touched) == bool(ending.touched), ending.touched


def test_it_measures_memory(world):
    assert world(fills_memory).mib > 300
    assert world(succeeds).mib < 100
