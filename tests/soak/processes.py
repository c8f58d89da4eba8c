"""Commands as processes that can be killed with all that they started."""

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
    """A command that runs in the background; it and all its children carry a mark."""

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
                preexec_fn=heed_hangups,
            )

    def kill(self) -> None:
        """SIGKILL to the command and everything that it started."""
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
        """SIGKILL to the process of one rank; whether there was one."""
        for pid in marked(self.mark):
            if f"RANK={rank}".encode() in environment_of(pid):
                signal_to(pid, signal.SIGKILL)
                return True
        return False

    def signal(self, number: int) -> None:
        """A signal to the command itself."""
        self.process.send_signal(number)

    def wait(self, timeout: float) -> int:
        """Its exit code."""
        return self.process.wait(timeout)

    @property
    def over(self) -> bool:
        """Whether it has ended by itself."""
        return self.process.poll() is not None


def heed_hangups() -> None:
    """As in a terminal, also where the tests were started by ``nohup``, which ignores them."""
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
    """Living processes that carry ``mark``."""
    wanted = f"{MARK}={mark}".encode()
    pids = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]
    return [p for p in pids if wanted in environment_of(p) and not is_zombie(p)]


def ebmkit(*arguments: object, wrapper: str | None = None, ranks: int = 1) -> list[str]:
    """The command line of ``ebmkit ARGUMENTS``.

    Args:
        arguments: of the command.
        wrapper: module that runs it in another way (`ebmkit_tests.soak.unrestored`).
        ranks: processes, started by torchrun.
    """
    words = [str(argument) for argument in arguments]
    module = wrapper or "ebmkit"
    if ranks == 1:
        return [sys.executable, "-m", module, *words]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, f"--nproc-per-node={ranks}", "-m", module, *words]
