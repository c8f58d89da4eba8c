"""Stopping between steps, not within one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Interrupted", "Stop", "exit_code", "stop_requested"]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):
    """Training was stopped by a signal, after its state was saved.

    Attributes:
        step: where.
        signal: by which; None: another process was asked to.
    """

    def __init__(self, step: int, signum: int | None = None) -> None:
        super().__init__(f"interrupted after step {step}")
        self.step, self.signal = step, signum


class Stop:
    """Whether the process was asked to stop, and by which signal; call it to know."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self) -> bool:
        return self.signal is not None


def exit_code(signum: int | None) -> int:
    """What a process ends with that a signal stopped: 128 and its number, as shells have it.

    130 for Ctrl-C, 143 for a request to terminate (also where only another process was asked), 129
    for a terminal that was closed.
    """
    return 128 + (signal.SIGTERM if signum is None else signum)


@contextmanager
def stop_requested() -> Iterator[Stop]:
    """Within, the first of `SIGNALS` only raises a flag, so that no step is cut in half.

    A SIGINT after that interrupts at once. A closed terminal that the process was started to
    ignore, by ``nohup``, stays ignored.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(signum: int, frame: object) -> None:
        if stop() and signum == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = stop.signal or signum

    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    heard = [s for s in SIGNALS if not (ignored and s == signal.SIGHUP)]
    before = {s: signal.signal(s, handle) for s in heard}
    try:
        yield stop
    finally:
        for number, old in before.items():
            signal.signal(number, old)
