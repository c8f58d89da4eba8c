"""Opening a file in a process of its own, where all that it does is seen and its memory bounded.

Three things watch: an audit hook of Python sees every file that is opened, every command and every
connection; inotify sees files that C libraries (HDF5) open in the folder that nothing may look
into; and the parent sees memory, time, and a process that dies. `os.fork` makes the process, so
that nothing is imported anew.
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

__all__ = ["Ending", "Watch", "opened"]

MIB = 2**20
ADDRESSES = 4096
"""MiB of address space beyond what is mapped at the start: allocations beyond that fail."""

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
"""What Python and its libraries read of themselves."""

NEVER = re.compile(
    r"os\.(system|exec|posix_spawn|spawn|fork|forkpty|startfile)|subprocess\.|pty\.|urllib\.|"
    r"socket\.(connect|bind|sendto|getaddrinfo|gethostby)|ftplib\.|smtplib\.|webbrowser\.|"
    r"marshal\.loads"
)
CHANGES = re.compile(
    r"os\.(mkdir|rename|remove|rmdir|link|symlink|truncate|chmod|chown|utime)|"
    r"shutil\.(rmtree|move|copy|unpack_archive|make_archive|chown)"
)
LOOKS = ("open", "os.listdir", "os.scandir")


@dataclass
class Ending:
    """How opening a file ended.

    Attributes:
        how: ``opened``, ``refused`` (by `UserError`), ``raised`` (anything else), ``died``.
        text: of the error.
        seconds: of the processor that it took, whatever else the machine was doing.
        mib: by how much the memory in use grew at its highest.
        touched: what it opened, changed or ran that is not its own.
    """

    how: str
    text: str = ""
    seconds: float = 0.0
    mib: float = 0.0
    touched: list[str] = field(default_factory=list)


class Watch:
    """Sees what this process does, from `begin` to `end`; a hook cannot be taken off again."""

    def __init__(self) -> None:
        self.own: tuple[str, ...] = ()
        self.touched: list[str] = []
        self.on = False
        sys.addaudithook(self._hook)

    def begin(self, *own: Path) -> None:
        """Files under ``own`` may be read and written from now on."""
        self.own = tuple(os.path.realpath(path) for path in own)
        self.touched, self.on = [], True

    def end(self) -> list[str]:
        """What was touched that is not its own."""
        self.on = False
        return list(dict.fromkeys(self.touched))

    def _hook(self, event: str, args: tuple[object, ...]) -> None:
        if not self.on:
            return
        looks = event in LOOKS
        if not looks and not NEVER.match(event) and not CHANGES.match(event):
            return
        self.on = False  # what is done here is not looked at
        try:
            if NEVER.match(event):
                if event != "marshal.loads" or not _importing():
                    self.touched.append(f"{event} {args!r:.200}")
            else:
                self._look(event, args, looks)
        finally:
            self.on = True

    def _look(self, event: str, args: tuple[object, ...], looks: bool) -> None:
        writes = not looks or (
            event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        )
        may = self.own if writes else (*self.own, *READABLE)
        for path in args[:2] if event.startswith(("os.rename", "os.link", "shutil")) else args[:1]:
            if isinstance(path, (str, bytes, os.PathLike)):
                place = os.path.realpath(os.fsdecode(path))
                if not any(place == root or place.startswith(root + os.sep) for root in may):
                    self.touched.append(f"{event} {place}{' to write' if writes else ''}")


def _importing() -> bool:
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def _opened_in(folder: Path, touched: list[str]) -> Iterator[None]:
    """Adds the files in ``folder`` that any process opens meanwhile, as the kernel tells."""
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
    """An entry of this process's memory, MiB."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def _attempt(call: Callable[[Path], object], path: Path, own: Path) -> Ending:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the highest of memory begins anew
    before = _status("VmRSS")
    most = int(_status("VmSize") + ADDRESSES) * MIB
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    watch, start = Watch(), time.process_time()
    watch.begin(own)
    try:
        call(path)
        ending = Ending("opened")
    except UserError as error:
        ending = Ending("refused", str(error))
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error!s:.300} ({where.filename}:{where.lineno})"
        ending = Ending("raised", text)
    ending.touched = watch.end()
    ending.seconds = round(time.process_time() - start, 3)
    ending.mib = round(_status("VmHWM") - before, 1)
    return ending


def opened(
    call: Callable[[Path], object], path: Path, own: Path, forbidden: Path, seconds: float
) -> Ending:
    """What comes of ``call(path)`` in a process of its own.

    Args:
        call: opens a file as a user would.
        path: what to open.
        own: the folder whose files may be read and written.
        forbidden: a folder that nothing may look into.
        seconds: of the processor that it may take; after four times as many on the clock, and two
            more, it is killed.
    """
    touched: list[str] = []
    reader, writer = os.pipe()
    with _opened_in(forbidden, touched):
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
        ending = Ending(**json.loads(content))
    else:
        why = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "no answer"
        ending = Ending("died", why if ready else "never ended", 4 * seconds + 2)
    ending.touched += list(dict.fromkeys(touched))
    return ending
