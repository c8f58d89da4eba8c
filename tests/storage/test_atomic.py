"""Files are written whole or not at all."""

import errno
import os

import pytest

from ebmkit.errors import UserError
from ebmkit.storage import write_atomically
from ebmkit.storage.atomic import replacing


def disk_full(*_args):
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupted(*_args):
    raise KeyboardInterrupt


def test_content_replaces_what_was_there(tmp_path):
    path = tmp_path / "a.json"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, call, disk_full)
    with pytest.raises(
        UserError, match=r"No space left on device .*; what was there before"
    ) as caught:
        write_atomically(path, b"new")
    assert str(path) in str(caught.value)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_ctrl_c_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, call, interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.*No such file or directory"):
        write_atomically(tmp_path / "nowhere" / "a.json", b"new")


def test_a_file_that_is_written_in_pieces_takes_its_place_whole_or_not_at_all(tmp_path):
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
