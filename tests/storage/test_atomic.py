"""Atomic writes, and locks of folders.

A lock error names the holder. The locks of dead processes are released.
"""

import errno
import json
import multiprocessing
import os
import platform
import re
import time

import pytest

from ebmkit.errors import UserError
from ebmkit.storage import FolderLocked, atomic, held, write_atomically
from ebmkit.storage.atomic import replacing


def disk_full(*_args):
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupted(*_args):
    raise KeyboardInterrupt


def test_write_replaces_the_old_content(tmp_path):
    path = tmp_path / "a.json"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_leaves_only_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, call, disk_full)
    with pytest.raises(UserError, match=r"No space left on device .*; the old file") as caught:
        write_atomically(path, b"new")
    assert str(path) in str(caught.value)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_ctrl_c_leaves_only_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, call, interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_missing_folder_error_names_the_folder(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.*No such file or directory"):
        write_atomically(tmp_path / "nowhere" / "a.json", b"new")


def test_failed_incremental_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "samples.h5"
    path.write_bytes(b"old")
    with pytest.raises(UserError, match="cannot write"), replacing(path) as temporary:
        temporary.write_bytes(b"half")
        disk_full()
    assert path.read_bytes() == b"old"
    with replacing(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


# --- locks ---------------------------------------------------------------------------------------

FORK = multiprocessing.get_context("fork")
"""A fork needs no imports, so it starts quickly."""


def hold(folder, forks=False):
    """Start a process that holds the lock of ``folder``."""
    ready = FORK.Event()

    def training():
        with held(folder, "training"):
            if forks and os.fork() == 0:
                time.sleep(1.5)  # like a worker process that exits a little later
                os._exit(0)
            ready.set()
            time.sleep(60)

    process = FORK.Process(target=training, daemon=True)
    process.start()
    assert ready.wait(30)
    return process


def test_lock_error_names_host_process_and_start_of_the_holder(tmp_path):
    process = hold(tmp_path)
    try:
        message = (
            rf"process {process.pid} on '{re.escape(platform.node())}' has been training in "
            rf"'{re.escape(str(tmp_path))}' since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC: wait for it"
        )
        with pytest.raises(FolderLocked, match=message), held(tmp_path, "training"):
            pass
    finally:
        process.kill()
        process.join()
    with held(tmp_path, "training"):  # the holder was killed and left its files
        pass
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


def test_surviving_children_of_a_dead_holder_do_not_block(tmp_path):
    process = hold(tmp_path, forks=True)
    process.kill()
    process.join()
    with held(tmp_path, "training"):
        pass


def test_holder_on_another_machine_is_not_considered_dead(tmp_path):
    with held(tmp_path, "training"):
        path = tmp_path / ".holder.json"
        values = json.loads(path.read_text())
        path.write_text(json.dumps(values | {"host": "elsewhere", "process": 999_999_999}))
        with (
            pytest.raises(FolderLocked, match="process 999999999 on 'elsewhere'"),
            held(tmp_path, "x"),
        ):
            pass


def test_process_with_a_reused_id_is_not_the_holder(tmp_path):
    own = atomic._self("training")
    assert not atomic._is_dead(own)
    assert atomic._is_dead(own | {"started": "12"})
    assert atomic._is_dead(own | {"process": 10**40})


@pytest.mark.parametrize("content", [b"", b"[]", b'{"process": "1"}', b"[" * 50_000, b"\xff"])
def test_lock_is_effective_with_an_invalid_holder_file(tmp_path, monkeypatch, content):
    monkeypatch.setattr(atomic, "PATIENCE", 0.1)
    with held(tmp_path, "training"):
        (tmp_path / ".holder.json").write_bytes(content)
        with (
            pytest.raises(FolderLocked, match="another process works in"),
            held(tmp_path, "training"),
        ):
            pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_error_names_a_folder_without_write_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write"), held(tmp_path, "training"):
        pass
