"""The manifest of a run folder: atomic commits of several files, and detection of damage."""

import contextlib
import errno
import json
import os
import shutil
import tempfile
import threading
from pathlib import Path

import pytest

from ebmkit.errors import UserError
from ebmkit.storage import (
    DamagedFile,
    atomic,
    commit_files,
    read_together,
    remove_file,
    verify,
    write_atomically,
)
from ebmkit.storage.manifest import begin_manifest, entry_of, read_manifest, recover
from ebmkit.storage.verify import accept_files, stale_temporary_files, verify_run

OLD = {"model.json": b"old card", "checkpoints/step-1.pt": b"state 1", "model.st": b"old weights"}
NEW = {"model.json": b"new card", "checkpoints/step-2.pt": b"state 2", "model.st": b"new weights"}
DROPPED = "checkpoints/step-1.pt"

STEPS = [(os, "replace"), (os, "unlink"), (os, "fsync"), (os, "chmod"), (tempfile, "mkstemp")]
"""The disk operations of a commit; each can fail, and a process can be killed before each."""


class Killed(BaseException):
    """Simulates SIGKILL: no later disk operation is executed."""


@contextlib.contextmanager
def failing_at(number, error, forever):
    """Let the ``number``-th disk operation raise ``error``, and all later ones if ``forever``.

    Yields the list of the operations so far.
    """
    done = []

    def wrapped(name, act):
        def run(*arguments, **options):
            failed = len(done) == number or (forever and len(done) > number)
            done.append(name)
            if failed:
                raise error
            return act(*arguments, **options)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for module, name in STEPS:
            patch.setattr(module, name, wrapped(name, getattr(module, name)))
        yield done


def make_run(root):
    (root / "checkpoints").mkdir(parents=True)
    begin_manifest(root, {})
    commit_files(root, OLD)
    return root


def commit_new_files(root):
    commit_files(root, NEW, drop=[DROPPED])


def contents(root):
    """Contents of all files that the manifest lists."""
    return read_together(root, read_manifest(root).files)


OPERATIONS = 29
"""Upper bound for `commit_new_files`, checked by `test_bound_covers_every_disk_operation`."""


def test_bound_covers_every_disk_operation(tmp_path):
    make_run(tmp_path / "run")
    with failing_at(10**6, Killed(), False) as done:
        commit_new_files(tmp_path / "run")
    assert 15 < len(done) <= OPERATIONS, len(done)


@pytest.mark.parametrize("number", range(OPERATIONS))
def test_kill_at_any_disk_operation_leaves_all_old_or_all_new_files(tmp_path, number):
    """The process is killed before one operation. The state is consistent without `recover`."""
    root = make_run(tmp_path / "run")
    with failing_at(number, Killed(), True), contextlib.suppress(Killed):
        commit_new_files(root)
    seen = contents(root)
    assert seen in (OLD, NEW)
    recover(root)
    assert contents(root) == seen
    for path in stale_temporary_files(root):
        path.unlink()
    on_disk = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}
    assert on_disk - {"manifest.json", ".manifest.json.lock"} == set(seen)
    commit_new_files(root)
    assert contents(root) == NEW


@pytest.mark.parametrize(
    ("code", "forever"),
    [
        (errno.ENOSPC, True),
        (errno.EIO, False),
        *(
            pytest.param(code, forever, marks=pytest.mark.slow)
            for code in (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO)
            for forever in (False, True)
            if (code, forever) not in ((errno.ENOSPC, True), (errno.EIO, False))
        ),
    ],
)
def test_disk_error_leaves_all_old_or_all_new_files(tmp_path, code, forever):
    """For each single operation: the error states the cause, and no file is damaged."""
    for number in range(OPERATIONS):
        root = make_run(tmp_path / str(number))
        error, message = OSError(code, os.strerror(code)), None
        with failing_at(number, error, forever) as done:
            try:
                commit_new_files(root)
            except UserError as caught:
                message = str(caught)
        if len(done) <= number:
            break
        seen = contents(root)
        assert seen in (OLD, NEW)
        assert message is None or os.strerror(code) in message
        assert message is not None or seen == NEW
        commit_new_files(root)  # without disk errors
        assert contents(root) == NEW
        assert {f.state for f in verify_run(root)} == {"whole"}


def test_error_names_a_file_in_a_deleted_folder(tmp_path):
    root = make_run(tmp_path / "run")
    shutil.rmtree(root)
    with pytest.raises(UserError, match=r"cannot write .*model\.json.*No such file or directory"):
        commit_new_files(root)
    assert not root.exists()


def test_concurrent_readers_see_a_consistent_state(tmp_path):
    """Card and weights always match, although readers take no lock."""
    root = make_run(tmp_path / "run")
    ended = threading.Event()

    def write():
        for number in range(2000):
            text = str(number).encode()
            commit_files(root, {"model.json": text, "model.st": text * 10_000})
            if number >= 20 and len(seen) > 3:  # until the reader was scheduled between writes
                break
        ended.set()

    commit_files(root, {"model.json": b"x", "model.st": b"x" * 10_000})
    writer, seen = threading.Thread(target=write), set[bytes]()
    writer.start()
    while not ended.is_set():
        found = read_together(root, ["model.json", "model.st"])
        assert found["model.st"] == found["model.json"] * 10_000
        seen.add(found["model.json"])
    writer.join()
    assert len(seen) > 3


def test_changes_during_each_check_are_not_damage(tmp_path, monkeypatch):
    """A new checkpoint replaces the last one after each read of the manifest."""
    root, numbers, read = make_run(tmp_path / "run"), iter(range(2, 10_000)), verify.read_manifest

    def read_and_write(place):
        found, number = read(place), next(numbers)
        names = [f"checkpoints/step-{k}.pt" for k in (number, number - 1)]
        commit_files(root, {names[0]: b"state"}, drop=names[1:])
        return found

    monkeypatch.setattr(verify, "read_manifest", read_and_write)
    assert {f.name: f.state for f in verify_run(root) if f.state != "whole"} == {}


def test_verification_during_writes_finds_no_damage(tmp_path):
    """Added and removed checkpoints are neither missing nor unknown."""
    root = make_run(tmp_path / "run")
    ended = threading.Event()

    def write():
        for number in range(2, 30):
            names = [f"checkpoints/step-{k}.pt" for k in (number, number - 1)]
            commit_files(root, {names[0]: b"state"}, drop=names[1:])
        ended.set()

    writer, checks = threading.Thread(target=write), 0
    writer.start()
    while not ended.is_set():
        assert {f.name: f.state for f in verify_run(root) if f.state != "whole"} == {}
        checks += 1
    writer.join()
    assert checks > 3


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o027, 0o640)])
def test_file_modes_follow_the_umask(tmp_path, monkeypatch, umask, mode):
    """The umask is read when the module is imported."""
    before = os.umask(umask)
    try:
        monkeypatch.setattr(atomic, "_UMASK", atomic._umask())
    finally:
        os.umask(before)
    path = tmp_path / "weights"
    write_atomically(path, b"private")
    assert path.stat().st_mode & 0o777 == mode


def damaged(content, how):
    if how == "emptied":
        return b""
    if how == "cut short":
        return content[:-1]
    if how == "longer":
        return content + b"\0"
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


@pytest.mark.parametrize("how", ["emptied", "cut short", "longer", "one bit"])
@pytest.mark.parametrize("name", OLD)
def test_damage_error_names_the_file(tmp_path, name, how):
    root = make_run(tmp_path / "run")
    path = root / name
    path.write_bytes(damaged(path.read_bytes(), how))
    with pytest.raises(DamagedFile, match=rf"{path.name}.* is damaged: it"):
        read_together(root, [name])
    assert {f.name: f.state for f in verify_run(root)} == dict.fromkeys(OLD, "whole") | {
        name: "changed"
    }


def test_verification_distinguishes_missing_changed_and_unknown_files(tmp_path):
    root = make_run(tmp_path / "run")
    (root / "model.json").unlink()
    shutil.copy(root / "model.st", root / "checkpoints" / "step-1.pt")
    (root / "mine.txt").write_text("a note")
    assert {f.name: f.state for f in verify_run(root)} == {
        "model.json": "missing",
        "checkpoints/step-1.pt": "changed",
        "model.st": "whole",
        "mine.txt": "unknown",
    }
    with pytest.raises(DamagedFile, match=r"model\.json' is damaged: it is missing"):
        read_together(root, ["model.json"])
    accept_files(root, ["checkpoints/step-1.pt", "mine.txt"])
    assert [f.name for f in verify_run(root) if f.state != "whole"] == ["model.json"]
    with pytest.raises(UserError, match=r"no file '\.\./elsewhere'"):
        accept_files(root, ["../elsewhere"])


@pytest.mark.parametrize("how", ["emptied", "cut short", "one bit"])
def test_damaged_manifest_is_detected(tmp_path, how):
    root = make_run(tmp_path / "run")
    path = root / "manifest.json"
    path.write_bytes(damaged(path.read_bytes(), how))
    with pytest.raises(DamagedFile, match=r"manifest\.json' is damaged"):
        read_manifest(root)


def test_log_may_grow_beyond_its_recorded_length(tmp_path):
    root = make_run(tmp_path / "run")
    path = root / "metrics.jsonl"
    path.write_bytes(b"1\n2\n")
    commit_files(root, {}, grown={"metrics.jsonl": entry_of(b"1\n2\n", grows=True)})
    with path.open("ab") as file:
        file.write(b"3\n")
    assert read_together(root, ["metrics.jsonl"]) == {"metrics.jsonl": b"1\n2\n3\n"}
    path.write_bytes(b"1\n5\n3\n")
    with pytest.raises(DamagedFile):
        read_together(root, ["metrics.jsonl"])


def test_manifest_lists_files_written_individually(tmp_path):
    root = make_run(tmp_path / "run")
    (root / "evaluation" / "set").mkdir(parents=True)
    (root / "mine").mkdir()
    write_atomically(root / "evaluation" / "set" / "classify.json", b"{}")
    write_atomically(root / "mine" / "note.json", b"{}")
    assert "evaluation/set/classify.json" in read_manifest(root).files
    assert "mine/note.json" not in read_manifest(root).files
    remove_file(root / "evaluation" / "set" / "classify.json")
    assert not (root / "evaluation" / "set" / "classify.json").exists()
    assert set(read_manifest(root).files) == set(OLD)


def test_unrelated_manifest_json_stays_unchanged(tmp_path):
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    write_atomically(tmp_path / "picture.png", b"png")
    assert (tmp_path / "manifest.json").read_text() == '{"name": "a web page"}'


def altered(root, **entries):
    """Replace entries of the manifest and update its digest."""
    from ebmkit.storage.manifest import _digest

    values = json.loads((root / "manifest.json").read_text())
    values |= entries
    del values["sha256"]
    (root / "manifest.json").write_text(json.dumps(values | {"sha256": _digest(values)}))


ENTRY = {"bytes": 3, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "entries",
    [
        {"files": {"../victim": ENTRY}},
        {"files": {"/etc/passwd": ENTRY}},
        {"files": {"a/../../victim": ENTRY}},
        {"files": {"model.json": ENTRY}, "pending": {"model.json": "../.model.json.x.partial"}},
        {"files": {"model.json": ENTRY}, "pending": {"model.json": "victim"}},
        {"pending": {"../victim": ".victim.x.partial"}},
        {"removed": ["../victim"]},
        {"removed": ["/etc/passwd"]},
        {"removed": [["model.json"]]},
        {"files": ["model.json"]},
        {"files": {"model.json": {"bytes": "many", "sha256": 3}}},
        {"files": {"model.json": None}},
        {"files": {"model.json": {"bytes": float("inf"), "sha256": "0" * 64}}},
        {"files": {"model.json": {"bytes": -1, "sha256": "0" * 64}}},
        {"files": {"model.json": {"bytes": True, "sha256": "0" * 64}}},
    ],
)
def test_manifest_with_outside_paths_or_invalid_entries_is_refused(tmp_path, entries):
    root = make_run(tmp_path / "run")
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".model.json.x.partial").write_text("poison")
    altered(root, **entries)
    with pytest.raises(DamagedFile):
        read_manifest(root)
    with pytest.raises(DamagedFile):
        recover(root)
    assert (tmp_path / "victim").read_text() == "precious"


def test_run_of_a_later_format_is_refused(tmp_path):
    root = make_run(tmp_path / "run")
    altered(root, format=3)
    with pytest.raises(UserError, match="run of format 3, and this version supports at most 2"):
        read_manifest(root)


def test_temporary_files_of_other_processes_are_stale_only_when_old(tmp_path):
    root = make_run(tmp_path / "run")
    (root / "evaluation").mkdir()
    names = ("checkpoints/.step-9.pt.abc.partial", ".metrics.jsonl.abc.partial")
    others = (".means.h5.abc.partial", "evaluation/.classify.json.abc.partial")
    for name in (*names, *others):
        (root / name).write_bytes(b"half")
    assert {p.relative_to(root).as_posix() for p in stale_temporary_files(root)} == set(names)
    for name in others:
        os.utime(root / name, (0, 0))
    assert {p.relative_to(root).as_posix() for p in stale_temporary_files(root)} == {
        *names,
        *others,
    }


def test_write_outside_a_run_creates_no_manifest(tmp_path):
    write_atomically(tmp_path / "a.txt", b"text")
    assert [p.name for p in Path(tmp_path).iterdir()] == ["a.txt"]
