"""Commands that can be killed together with all processes that they start."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

MARK = "SOAK_PROCESS"


class Command:
    """A command in the background; its environment carries a mark that all its children inherit."""

    def __init__(self, arguments: list[str], cwd: Path, log: Path) -> None:
        self.mark = uuid.uuid4().hex
        environment = os.environ | {
            MARK: self.mark,
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "160",
            "PYTHONPATH": str(ROOT),
        }
        self.log = log
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                arguments,
                cwd=cwd,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=restore_sighup,
            )

    def kill(self) -> None:
        """Send SIGKILL to the command and all processes that it started."""
        for _ in range(100):
            members = marked(self.mark)
            if not members and self.process.poll() is not None:
                return
            for pid in members:
                signal_to(pid, signal.SIGKILL)
            self.process.poll()
            time.sleep(0.005)
        raise RuntimeError(f"processes {marked(self.mark)} outlive SIGKILL")

    def kill_one(self, rank: int) -> bool:
        """Send SIGKILL to the process of one rank; return whether it exists."""
        for pid in marked(self.mark):
            if f"RANK={rank}".encode() in environment_of(pid):
                signal_to(pid, signal.SIGKILL)
                return True
        return False

    def signal(self, number: int) -> None:
        """Send a signal to the command itself."""
        self.process.send_signal(number)

    def wait(self, timeout: float) -> int:
        """Wait for the end of the command; return its exit code."""
        return self.process.wait(timeout)

    @property
    def ended(self) -> bool:
        """Whether the command has ended."""
        return self.process.poll() is not None


def restore_sighup() -> None:
    """Restore the default action of SIGHUP, which ``nohup`` ignores."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def signal_to(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def environment_of(pid: int) -> set[bytes]:
    try:
        return set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    except OSError:
        return set()


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def marked(mark: str) -> list[int]:
    """Ids of the running processes that carry ``mark``."""
    wanted = f"{MARK}={mark}".encode()
    pids = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]
    return [p for p in pids if wanted in environment_of(p) and not is_zombie(p)]


def ebmkit(*arguments: object, wrapper: str | None = None, ranks: int = 1) -> list[str]:
    """The command line of ``ebmkit ARGUMENTS``.

    Args:
        arguments: arguments of the command.
        wrapper: module to run instead of `ebmkit` (`ebmkit_tests.soak.unrestored`).
        ranks: number of processes, started by torchrun.
    """
    words = [str(argument) for argument in arguments]
    module = wrapper or "ebmkit"
    if ranks == 1:
        return [sys.executable, "-m", module, *words]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, f"--nproc-per-node={ranks}", "-m", module, *words]
