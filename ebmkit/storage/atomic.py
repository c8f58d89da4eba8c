"""Atomic file replacement and folder locks.

A crash, a full disk or Ctrl-C never leaves a truncated file: the content is written to a temporary
file ``.NAME.RANDOM.partial`` in the same folder, synced to the disk, and then renamed over the old
file. A process that is killed before the rename leaves the temporary file and the old file.

A folder with one writer at a time has an operating system lock on the file ``.lock``, which is
released when the holding process ends for any reason. ``.holder.json`` describes the holder, for
the error message of a second process. Child processes of the holder (workers that read images)
share the lock and may outlive the holder by a few seconds; if the holder was on the same machine
and is dead, a new process waits for them. Locks always work on one machine, and between machines if
the network file system supports ``flock``. `ebmkit.storage.claims` shares work between machines.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ebmkit.errors import UserError

PARTIAL = ".partial"
"""Suffix of temporary file names; the names start with a dot."""

Content = bytes | memoryview


def _umask() -> int:
    """The umask of the process, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


_UMASK = _umask()


def make_folder(path: Path) -> None:
    """Create the folder ``path`` and its parents if they do not exist.

    Raises:
        UserError: if it cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make folder {str(path)!r}: {error.strerror}") from None


@contextlib.contextmanager
def _or_removed(temporary: str | Path) -> Iterator[None]:
    """Context that removes the file ``temporary`` on an exception."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def stage(path: Path, content: Content) -> Path:
    """Write ``content`` to a temporary file in the folder of ``path``, with fsync; return its path.

    Raises:
        OSError: if it cannot be written; the temporary file is removed then.
    """
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent)
    with _or_removed(temporary):
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)
    return Path(temporary)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Context with a temporary file to write, which atomically replaces ``path`` on exit.

    Raises:
        UserError: if it cannot be written; the temporary file is removed then.
    """
    with writing(path):
        temporary = stage(path, b"")
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def replace_file(path: Path, content: Content) -> None:
    """Atomically replace the file ``path`` by ``content``.

    Raises:
        OSError: if it cannot be written; the old file is unchanged.
    """
    temporary = stage(path, content)
    with _or_removed(temporary):
        os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Sync the directory entries of ``folder`` to the disk, if the file system supports it.

    Raises:
        OSError: if the disk fails.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # writable but not readable, or cannot be opened
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


_ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EROFS: "write to another disk",
    errno.EACCES: "check the folder's permissions",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Context that translates an `OSError` to a `UserError` about writing ``path``.

    Raises:
        UserError: if an `OSError` is raised in the context.
    """
    try:
        yield
    except OSError as error:
        advice = f" ({_ADVICE[error.errno]})" if error.errno in _ADVICE else ""
        message = f"cannot write {str(path)!r}: {error.strerror or error}{advice}"
        if not path.parent.is_dir():
            raise UserError(f"{message}: its folder does not exist (moved or removed?)") from error
        raise UserError(f"{message}; the old file, if any, is untouched") from error


def free_name(path: Path) -> Path:
    """``path`` if it does not exist, else the first free one of NAME-2.SUFFIX, NAME-3.SUFFIX..."""
    names = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], names) if not name.exists())


PATIENCE = 15.0
"""Seconds to wait for child processes of a dead holder."""


class FolderLocked(UserError):
    """Another process holds the lock of the folder."""


@contextlib.contextmanager
def held(folder: Path, what: str, advice: str = "choose another --out") -> Iterator[None]:
    """Context that holds the lock of ``folder``.

    Args:
        folder: an existing folder.
        what: activity for the message to other processes, such as "training".
        advice: alternative to waiting, at the end of the error message.

    Raises:
        FolderLocked: if another process holds the lock; the message names its host, process, start.
        UserError: if the folder is not writable.
    """
    path, holder = folder / ".lock", folder / ".holder.json"
    lock = FileLock(path)
    with writing(path):
        _acquire(lock, holder, folder, advice)
    try:
        with writing(holder):
            replace_file(holder, json.dumps(_self(what)).encode())
        yield
    finally:
        with contextlib.suppress(OSError):
            holder.unlink()
        lock.release()


def other_writer(folder: Path) -> str | None:
    """A sentence about another process that holds the lock of ``folder``; None if there is none."""
    holder = _read(folder / ".holder.json")
    own = holder is not None and (holder["process"], holder.get("host")) == (
        os.getpid(),
        platform.node(),
    )
    return None if holder is None or own or _is_dead(holder) else _sentence(folder, holder)


def _acquire(lock: FileLock, path: Path, place: Path, advice: str) -> None:
    until = time.monotonic() + PATIENCE
    while True:
        try:
            lock.acquire(timeout=0)
            return
        except Timeout:
            holder = _read(path)
            if time.monotonic() >= until or not (holder is None or _is_dead(holder)):
                raise FolderLocked(
                    f"{_sentence(place, holder)}: wait for it, or {advice}"
                ) from None
            time.sleep(0.1 if holder else 0.02)


def _self(what: str) -> dict[str, Any]:
    pid, now = os.getpid(), datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    own = {"host": platform.node(), "process": pid, "since": now, "what": what}
    return own | {"started": _started(pid)}


def _read(path: Path) -> dict[str, Any] | None:
    """Read the description of the lock holder; None if there is none (yet)."""
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(65536))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("process"), int) else None


def _sentence(place: Path, holder: dict[str, Any] | None) -> str:
    if holder is None:
        return f"another process works in {str(place)!r}"
    who = f"process {holder['process']} on {str(holder.get('host'))!r}"
    return f"{who} has been {holder.get('what')} in {str(place)!r} since {holder.get('since')}"


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that has ended."""
    if holder.get("host") != platform.node():
        return False
    pid = holder["process"]
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    return _started(pid) != holder.get("started")


def _started(pid: int) -> str | None:
    """Start time of a process in kernel ticks since boot, "dead" for a zombie, None if unknown."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "dead" if after_name[0] in "ZX" else after_name[19]
