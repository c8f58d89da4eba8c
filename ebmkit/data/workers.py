"""Processes that read images of a set on disk, and what is done when one dies or stalls.

Each gets the requests of whole batches and hands over pixels; a user's mistake comes as a value, so
that it has no traceback. They do not heed Ctrl-C and requests to end, for these reach all processes
of a group: the main one ends them in its own time, by SIGKILL where it must.
"""

from __future__ import annotations

import atexit
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import ProcessError
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ebmkit.data.augment import Cut
from ebmkit.data.imagesets import StreamedSet
from ebmkit.errors import UserError

WORKER_TIMEOUT = 900.0
"""Seconds to wait for a process that reads images."""

_WORKERS: set[Any] = set()
"""Processes that read and may still live; they do not heed a request to end."""


def _kill_workers() -> None:
    for process in list(_WORKERS):
        process.kill()


atexit.register(_kill_workers)  # before multiprocessing's own, which would wait for them

Request = tuple[list[int], Cut | None]
"""Numbers of the images of a batch, and the crops of whole images to take of them."""

Item = tuple[Tensor, Tensor | None, dict[int, str]]
"""Images, labels, and the numbers of those that were left out with the reasons."""


@contextmanager
def translate_worker_errors(saved: Callable[[], str] = str) -> Iterator[None]:
    """Within, the end of a process that reads images is told in one sentence.

    PyTorch raises it wherever the main thread is at the time.

    Args:
        saved: says what is not lost.

    Raises:
        UserError: then.
    """
    try:
        yield
    except RuntimeError as error:
        sentence = _worker_sentence(str(error))
        if sentence is None:
            raise
        _kill_workers()
        raise UserError(f"{sentence}{saved()}") from None


def _worker_sentence(text: str) -> str | None:
    """What an error of PyTorch's says of worker processes, in words; None if it is of others."""
    if "DataLoader timed out" in text:
        return (
            f"no image was read for {WORKER_TIMEOUT:.0f} s: see whether the disk or network that "
            "they lie on still answers"
        )
    if "DataLoader worker" not in text:
        return None
    reason = text.partition("killed by signal: ")[2].split(".")[0].strip()
    if not reason:
        ended = "a process that reads images ended unasked"
        return f"{ended}: see what it said, or take fewer dataset.workers"
    cause = "the memory may not suffice: take fewer dataset.workers"
    if "Bus" in reason:
        cause = "shared memory may be full: enlarge /dev/shm, or take fewer dataset.workers"
    elif "Segmentation" in reason:
        cause = "a library that decodes images may have met a damaged one"
    return f"a process that reads images was killed by a signal, {reason}; {cause}"


def read_batches(
    source: StreamedSet,
    requests: Iterable[Request],
    workers: int,
    pinned: bool,
) -> Iterator[Item]:
    """What ``requests`` ask for, in order, read by ``workers`` processes, or by this one for 0.

    Raises:
        UserError: if an image cannot be read.
        RuntimeError: if a process ended or stalls; `translate_worker_errors` puts it in words.
    """
    loader: DataLoader[Any] = DataLoader(
        _Batches(source),
        timeout=WORKER_TIMEOUT if workers else 0,
        batch_size=None,
        sampler=requests,
        num_workers=workers,
        pin_memory=pinned,
        worker_init_fn=_leave_ends_to_the_main_process,
        generator=torch.Generator(),  # leaves the process's own generator alone
    )
    items = iter(loader)
    processes = list(getattr(items, "_workers", ()))
    _WORKERS.update(processes)
    try:
        for item in items:
            if isinstance(item, UserError):
                raise item
            yield item
    except (RuntimeError, ConnectionError, EOFError) as error:
        getattr(items, "_shutdown_workers", tuple)()
        codes = [process.exitcode for process in processes if process.exitcode]
        if codes and min(codes) < 0 and "killed by signal" not in str(error):
            name = signal.strsignal(-min(codes))
            raise RuntimeError(f"DataLoader worker is killed by signal: {name}. ") from None
        if isinstance(error, RuntimeError):
            raise
        raise RuntimeError("DataLoader worker ended") from None
    finally:
        # PyTorch asks them to end, waits some seconds, and asks once more by a signal that they
        # ignore: on a busy machine some outlive that, and the exit of this process waits for them
        getattr(items, "_shutdown_workers", tuple)()
        for process in processes:
            process.kill()
        _WORKERS.difference_update(processes)


class _Batches(Dataset[Item | UserError]):
    """What workers run: whole batches; a user's mistake is handed over without a traceback."""

    def __init__(self, source: StreamedSet) -> None:
        self._source = source

    def __getitem__(self, request: Request) -> Item | UserError:
        self._source.skipped.clear()
        try:
            images, labels = self._source.read(*request)
            return images, labels, dict(self._source.skipped)
        except UserError as error:
            return error


def _leave_ends_to_the_main_process(worker: int) -> None:
    """Ctrl-C and a launcher's request to end are the main process's, which ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.excepthook = _unless_disconnected


def _unless_disconnected(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Print an error, but not that there is no main process any more to hand pixels to."""
    if not issubclass(kind, (EOFError, ConnectionError, ProcessError)):
        sys.__excepthook__(kind, error, trace)
