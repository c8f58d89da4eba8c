"""Claims of pieces of work that processes on several machines share.

A claim is a file on the shared storage, created exclusively (``O_EXCL``), which needs no locks of
the file system: those of a dead machine may stay, and some file systems have none (Lustre without
``flock``) or only local ones. While the claim is held, a thread renews the time of the file. The
claim of a dead process becomes free

- at once for processes on its machine, which see that the process has ended;
- for other machines when they have seen the file unchanged for `LEASE_SECONDS`.

Each process measures that time by its own monotonic clock, from the first attempt to claim, so
clocks need not agree, and attributes of files that a network file system caches for a minute do no
harm. A holder that was suspended for longer loses the claim, and is interrupted when it wakes up.
"""

from __future__ import annotations

import _thread
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import SoftFileLease, Timeout

from ebmkit.errors import Interrupted
from ebmkit.storage.atomic import FolderLocked, writing

LEASE_SECONDS = 300.0
"""Seconds without renewal after which a claim of another machine is free."""


class Claim:
    """The claim of the work on ``path``, in the file ``path.claim``; `held` holds it.

    Keep the object between attempts: it measures how long the file has not been renewed.

    Args:
        path: a folder or file to work on, which need not exist; its parent must.
        seconds: lease, the same for all processes; it is renewed ten times as often.
    """

    def __init__(self, path: Path, seconds: float = LEASE_SECONDS) -> None:
        self.path = path
        self._lease = SoftFileLease(
            path.with_name(f"{path.name}.claim"),
            lease_duration=seconds,
            heartbeat_interval=seconds / 10,
            on_compromise=lambda lost: _thread.interrupt_main(),
        )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Context that holds the claim; it may be nested.

        Raises:
            FolderLocked: if another process holds it, or has taken it over in the meantime.
            UserError: if the folder is not writable.
        """
        with writing(self.path):
            try:
                self._lease.acquire(timeout=0)
            except Timeout:
                raise FolderLocked(f"{self._holder()} works on {str(self.path)!r}") from None
        try:
            yield
        except (Interrupted, KeyboardInterrupt):
            if self._lease.compromise is None:
                raise
            raise FolderLocked(
                f"the claim of {str(self.path)!r} was not renewed in time (was this machine "
                "suspended?), and another process may have taken it over"
            ) from None
        finally:
            self._lease.release()

    def _holder(self) -> str:
        owner = self._lease.owner
        return "another process" if owner is None else f"process {owner.pid} on {owner.hostname!r}"
