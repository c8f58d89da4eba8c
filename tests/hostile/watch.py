"""Open a file in a monitored process with limited memory.

An audit hook of Python reports every opened file, command and connection. inotify reports files
that C libraries (HDF5) open in the forbidden folder. The parent process observes time and crashes.
The process is a fork, so nothing has to be imported again.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import resource
import select
import signal
import site
import struct
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ebmkit.errors import UserError

__all__ = ["Monitor", "Outcome", "run_in_fork"]

MIB = 2**20
ADDRESSES = 4096
"""MiB of address space in addition to the mappings at the start; larger allocations fail."""

REPOSITORY = Path(__file__).resolve().parents[2]

READABLE = tuple(
    os.path.realpath(path)
    for path in {
        *(sys.prefix, sys.base_prefix, sys.exec_prefix, *site.getsitepackages(), os.__file__[:-5]),
        *(str(REPOSITORY / "ebmkit"), str(REPOSITORY / "tests"), "/proc", "/sys", "/dev/urandom"),
        *("/dev/null", "/usr/share/zoneinfo", "/etc/mime.types", "/etc/nsswitch.conf"),
        "/etc/localtime",
    }
)
"""Files that Python and its libraries read for their own purposes."""

FORBIDDEN = re.compile(
    r"os\.(system|exec|posix_spawn|spawn|fork|forkpty|startfile)|subprocess\.|pty\.|urllib\.|"
    r"socket\.(connect|bind|sendto|getaddrinfo|gethostby)|ftplib\.|smtplib\.|webbrowser\.|"
    r"marshal\.loads"
)
WRITES = re.compile(
    r"os\.(mkdir|rename|remove|rmdir|link|symlink|truncate|chmod|chown|utime)|"
    r"shutil\.(rmtree|move|copy|unpack_archive|make_archive|chown)"
)
READS = ("open", "os.listdir", "os.scandir")


@dataclass
class Outcome:
    """Result of opening a file.

    Attributes:
        how: ``opened``, ``refused`` (by `UserError`), ``raised`` (anything else), ``died``.
        text: message of the error.
        seconds: processor time.
        mib: peak growth of resident memory, MiB.
        touched: accesses outside its folder, and started processes.
    """

    how: str
    text: str = ""
    seconds: float = 0.0
    mib: float = 0.0
    touched: list[str] = field(default_factory=list)


class Monitor:
    """Audit hook that records accesses between `begin` and `end`; a hook cannot be removed."""

    def __init__(self) -> None:
        self.own: tuple[str, ...] = ()
        self.touched: list[str] = []
        self.on = False
        sys.addaudithook(self._hook)

    def begin(self, *own: Path) -> None:
        """Start recording; files below ``own`` may be read and written."""
        self.own = tuple(os.path.realpath(path) for path in own)
        self.touched, self.on = [], True

    def end(self) -> list[str]:
        """Stop recording and return the accesses."""
        self.on = False
        return list(dict.fromkeys(self.touched))

    def _hook(self, event: str, args: tuple[object, ...]) -> None:
        if not self.on:
            return
        reads = event in READS
        if not reads and not FORBIDDEN.match(event) and not WRITES.match(event):
            return
        self.on = False  # the hook does not record itself
        try:
            if FORBIDDEN.match(event):
                if event != "marshal.loads" or not _importing():
                    self.touched.append(f"{event} {args!r:.200}")
            else:
                self._check_paths(event, args, reads)
        finally:
            self.on = True

    def _check_paths(self, event: str, args: tuple[object, ...], reads: bool) -> None:
        writes = not reads or (
            event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        )
        allowed = self.own if writes else (*self.own, *READABLE)
        for path in args[:2] if event.startswith(("os.rename", "os.link", "shutil")) else args[:1]:
            if isinstance(path, (str, bytes, os.PathLike)):
                real = os.path.realpath(os.fsdecode(path))
                if not any(real == root or real.startswith(root + os.sep) for root in allowed):
                    self.touched.append(f"{event} {real}{' to write' if writes else ''}")


def _importing() -> bool:
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def _inotify(folder: Path, touched: list[str]) -> Iterator[None]:
    """Add to ``touched`` the files in ``folder`` that any process opens or changes meanwhile."""
    libc = ctypes.CDLL(None, use_errno=True)
    handle = libc.inotify_init1(os.O_NONBLOCK)
    opened, changed = 0x20, 0x2 | 0x4 | 0x100 | 0x200 | 0x40 | 0x80
    libc.inotify_add_watch(handle, os.fsencode(folder), opened | changed)
    try:
        yield
        with contextlib.suppress(BlockingIOError):
            content = os.read(handle, 2**16)
            while content:
                _, mask, _, length = struct.unpack_from("iIII", content)
                name = content[16 : 16 + length].rstrip(b"\0").decode()
                touched.append(f"{'opened' if mask & opened else 'changed'} outside {name}")
                content = content[16 + length :]
    finally:
        os.close(handle)


def _status(key: str) -> float:
    """Value of ``key`` in /proc/self/status, MiB."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def _attempt(call: Callable[[Path], object], path: Path, own: Path) -> Outcome:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak of resident memory
    before = _status("VmRSS")
    limit = int(_status("VmSize") + ADDRESSES) * MIB
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    monitor, start = Monitor(), time.process_time()
    monitor.begin(own)
    try:
        call(path)
        outcome = Outcome("opened")
    except UserError as error:
        outcome = Outcome("refused", str(error))
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error!s:.300} ({where.filename}:{where.lineno})"
        outcome = Outcome("raised", text)
    outcome.touched = monitor.end()
    outcome.seconds = round(time.process_time() - start, 3)
    outcome.mib = round(_status("VmHWM") - before, 1)
    return outcome


def run_in_fork(
    call: Callable[[Path], object], path: Path, own: Path, forbidden: Path, seconds: float
) -> Outcome:
    """Outcome of ``call(path)`` in a fork of this process.

    Args:
        call: opens a file as a user would.
        path: path to open.
        own: folder whose files may be read and written.
        forbidden: folder of which no file may be opened.
        seconds: limit of processor time; the process is killed 4 ``seconds`` + 2 s after its start.
    """
    touched: list[str] = []
    reader, writer = os.pipe()
    with _inotify(forbidden, touched):
        child = os.fork()
        if not child:
            os.close(reader)
            with contextlib.suppress(BaseException):
                answer = json.dumps(_attempt(call, path, own).__dict__)
                os.write(writer, answer.encode("utf-8", "backslashreplace")[: 2**16])
            os._exit(0)
        os.close(writer)
        try:
            ready, _, _ = select.select([reader], [], [], 4 * seconds + 2)
            content = os.read(reader, 2**16) if ready else b""
            if not ready:
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        finally:
            os.close(reader)
    if content:
        outcome = Outcome(**json.loads(content))
    else:
        why = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "no answer"
        outcome = Outcome("died", why if ready else "never ended", 4 * seconds + 2)
    outcome.touched += list(dict.fromkeys(touched))
    return outcome
