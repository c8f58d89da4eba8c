"""One writer to a folder.

The lock is one of the operating system's on the file ``.lock``: it ends with the process that holds
it, however that ends. Beside it ``.holder.json`` says who holds it, for the message to whoever
comes second. Processes that the holder started (readers of images) share the lock and outlive it by
a few seconds, for which a newcomer waits where the holder was on the same machine and is dead.

Locks reach as far as the file system carries them: on one machine always, between machines where
the network file system knows ``flock``.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ebmkit.errors import UserError
from ebmkit.storage.atomic import replace_file, writing

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
        except Timeout:
            holder = _read(path)
            if time.monotonic() < until and (holder is None or _is_dead(holder)):
                time.sleep(0.1 if holder else 0.02)
                continue
            raise Busy(f"{_sentence(place, holder)}: wait for it, or {advice}") from None
        return


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
