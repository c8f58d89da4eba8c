"""Writing a file in one move, by one process at a time.

So a crash, a full disk or Ctrl-C never leaves half of a file: the content goes to a temporary file
beside the file's place, ``.NAME.RANDOM.partial``, is brought to the disk, and is then moved over
what was there. A process that is killed on the way leaves the temporary behind and the file as it
was.

A folder that one process at a time may write into has a lock of the operating system's on the file
``.lock``: it ends with the process that holds it, however that ends. Beside it ``.holder.json``
says who holds it, for the message to whoever comes second. Processes that the holder started
(readers of images) share the lock and outlive it by a few seconds, for which a newcomer waits where
the holder was on the same machine and is dead. Locks reach as far as the file system carries them:
on one machine always, between machines where the network file system knows ``flock``.
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
"""What the names of temporary files end in; they begin with a dot."""

Content = bytes | memoryview


def _umask() -> int:
    """The process's mask of permissions, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


_UMASK = _umask()


def make_folder(path: Path) -> None:
    """Make the folder ``path``, and those above it, if they are not there.

    Raises:
        UserError: if it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make folder {str(path)!r}: {error.strerror}") from None


@contextlib.contextmanager
def _or_removed(temporary: str | Path) -> Iterator[None]:
    """Remove the file ``temporary`` if something fails within."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def stage(path: Path, content: Content) -> Path:
    """Write ``content`` to a temporary file beside ``path``, down to the disk; its path.

    Raises:
        OSError: if it cannot be written; nothing is left behind then.
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
    """Within, a temporary file beside ``path`` to write, which then takes its place in one move.

    Raises:
        UserError: if it cannot be written; nothing is left behind then.
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
    """Put ``content`` in the place of ``path``, in one move.

    Raises:
        OSError: if it cannot be written; what was there before is untouched.
    """
    temporary = stage(path, content)
    with _or_removed(temporary):
        os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in ``folder`` to the disk; where a file system cannot, nothing happens.

    Raises:
        OSError: if the disk fails.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # a folder that one may write into and not read, or none that can be opened
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
    """Tell of an `OSError` within as of ``path``, which could not be written.

    Raises:
        UserError: then.
    """
    try:
        yield
    except OSError as error:
        advice = f" ({_ADVICE[error.errno]})" if error.errno in _ADVICE else ""
        message = f"cannot write {str(path)!r}: {error.strerror or error}{advice}"
        if not path.parent.is_dir():
            raise UserError(f"{message}: the folder is not there (moved, or removed?)") from error
        raise UserError(f"{message}; what was there before is untouched") from error


def free_name(path: Path) -> Path:
    """``path`` if nothing has that name, else the first free of NAME-2.SUFFIX, NAME-3.SUFFIX..."""
    names = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], names) if not name.exists())


PATIENCE = 15.0
"""Seconds to wait for the processes that a dead holder left."""


class Busy(UserError):
    """Another process works in the folder."""


@contextlib.contextmanager
def held(
    folder: Path, what: str, advice: str = "choose another --out", name: str = ""
) -> Iterator[None]:
    """Within, no other process works in ``folder``, or on what is called ``name`` in it.

    Args:
        folder: an existing folder.
        what: is done there, for others to read, as "training".
        advice: what else to do than wait, as a message ends.
        name: of a part of the folder that has a lock of its own, ``NAME.lock``.

    Raises:
        Busy: if another process holds it: its host, number and start.
        UserError: if the folder cannot be written into.
    """
    path = folder / f"{name}.lock"
    holder = folder / (f".{name}.holder.json" if name else ".holder.json")
    lock = FileLock(path)
    with writing(path):
        _acquire(lock, holder, folder / name, advice)
    try:
        with writing(holder):
            replace_file(holder, json.dumps(_self(what)).encode())
        yield
    finally:
        with contextlib.suppress(OSError):
            holder.unlink()
        lock.release()


def _acquire(lock: FileLock, path: Path, place: Path, advice: str) -> None:
    until = time.monotonic() + PATIENCE
    while True:
        try:
            lock.acquire(timeout=0)
            return
        except Timeout:
            holder = _read(path)
            if time.monotonic() >= until or not (holder is None or _is_dead(holder)):
                raise Busy(f"{_sentence(place, holder)}: wait for it, or {advice}") from None
            time.sleep(0.1 if holder else 0.02)


def _self(what: str) -> dict[str, Any]:
    pid, now = os.getpid(), datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    own = {"host": platform.node(), "process": pid, "since": now, "what": what}
    return own | {"started": _started(pid)}


def _read(path: Path) -> dict[str, Any] | None:
    """Who says at ``path`` that it holds the lock; None if it has not said so (yet)."""
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
    """Whether the holder was a process of this machine and is no more."""
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
    """When a process began, in the kernel's ticks since it booted; None where it does not say.

    A zombie is no more.
    """
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "dead" if after_name[0] in "ZX" else after_name[19]
