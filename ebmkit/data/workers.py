"""Worker processes that read images, and errors when a worker dies or stalls.

A worker gets requests for whole batches and returns pixels. It returns a `UserError` as a value, so
that no traceback is printed. Workers ignore SIGINT and SIGTERM, which all processes of a group
receive: the main process ends its workers, by SIGKILL if necessary.
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
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ebmkit.data.augment import Cut
from ebmkit.data.imagesets import StreamedSet
from ebmkit.errors import UserError, first_line

WORKER_TIMEOUT = 900.0
"""Maximum seconds to wait for a batch from a worker."""

SHARED_MEMORY_ADVICE = "enlarge /dev/shm (docker run --shm-size=2g), or set dataset.workers=0"

_WORKERS: set[Any] = set()
"""Worker processes that may still run; they ignore SIGTERM."""


def _kill_workers() -> None:
    for process in list(_WORKERS):
        process.kill()


atexit.register(_kill_workers)  # runs before multiprocessing's handler, which would wait

Request = tuple[list[int], Cut | None]
"""Indices of the images of a batch, and their crops or None."""

Item = tuple[Tensor, Tensor | None, dict[int, str]]
"""Images, labels, and index -> error message of the skipped images."""


@contextmanager
def translate_worker_errors(saved: Callable[[], str] = str) -> Iterator[None]:
    """Translate PyTorch's error about a dead or stalled worker to a `UserError`.

    PyTorch raises the error at any point of the main thread.

    Args:
        saved: function that returns the end of the message, about saved checkpoints.

    Raises:
        UserError: if a worker died or stalled.
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
    """Message for PyTorch's error ``text`` about workers; None for another error."""
    if "DataLoader timed out" in text:
        return (
            f"no image was read for {WORKER_TIMEOUT:.0f} s: check whether the disk or network of "
            "the images still responds"
        )
    if "DataLoader worker" not in text:
        return None
    reason = text.partition("killed by signal: ")[2].split(".")[0].strip()
    if not reason:
        ended = "a worker process that reads images ended unexpectedly"
        return f"{ended}: see its output, or reduce dataset.workers"
    cause = "memory may be too small: reduce dataset.workers"
    if "Bus" in reason:
        cause = f"shared memory may be full: {SHARED_MEMORY_ADVICE}"
    elif "Segmentation" in reason:
        cause = "a library that decodes images may have crashed on a damaged one"
    return f"a worker process that reads images was killed by a signal, {reason}; {cause}"


def read_batches(
    source: StreamedSet,
    requests: Iterable[Request],
    workers: int,
    pinned: bool,
) -> Iterator[Item]:
    """Yield the batches of ``requests`` in order.

    Args:
        source: data set.
        requests: indices and crops of each batch.
        workers: number of worker processes; 0: this process reads.
        pinned: return images and labels in pinned memory.

    Raises:
        UserError: if an image cannot be read.
        RuntimeError: if a worker died or stalls; see `translate_worker_errors`.
    """
    loader: DataLoader[Any] = DataLoader(
        _Batches(source),
        timeout=WORKER_TIMEOUT if workers else 0,
        batch_size=None,
        sampler=requests,
        num_workers=workers,
        pin_memory=pinned,
        worker_init_fn=_leave_ends_to_the_main_process,
        generator=torch.Generator(),  # does not change the global random state
    )
    try:
        items = iter(loader)
    except OSError as error:  # of semaphores in /dev/shm, or of a process
        raise UserError(
            f"{workers} worker processes that read images cannot be started ({first_line(error)}): "
            f"{SHARED_MEMORY_ADVICE}"
        ) from None
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
        # PyTorch asks workers to end, waits some seconds and sends SIGTERM, which they ignore. On a
        # busy machine some survive that, and the exit of this process would wait for them.
        getattr(items, "_shutdown_workers", tuple)()
        for process in processes:
            process.kill()
        _WORKERS.difference_update(processes)


class _Batches(Dataset[Item | UserError]):
    """Reads whole batches in the workers; returns a `UserError` instead of raising it."""

    def __init__(self, source: StreamedSet) -> None:
        self._source = source

    def __getitem__(self, request: Request) -> Item | UserError:
        self._source.skipped.clear()
        try:
            images, labels = self._source.read(*request)
            if get_worker_info() is not None:  # here, as the queue's thread drops what it cannot
                for tensor in (images, labels):
                    _share(tensor)
            return images, labels, dict(self._source.skipped)
        except UserError as error:
            return error


def _share(tensor: Tensor | None) -> None:
    """Move ``tensor`` to shared memory."""
    if tensor is None:
        return
    try:
        tensor.share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise UserError(
            f"a batch of {tensor.nbytes:,} bytes does not fit into shared memory "
            f"({first_line(error)}): {SHARED_MEMORY_ADVICE}"
        ) from None


def _leave_ends_to_the_main_process(worker: int) -> None:
    """Initialise a worker: ignore SIGINT and SIGTERM, and print no traceback on disconnection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.excepthook = _unless_disconnected


def _unless_disconnected(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Exception hook that prints no traceback if the main process is gone."""
    if not issubclass(kind, (EOFError, ConnectionError, ProcessError)):
        sys.__excepthook__(kind, error, trace)
