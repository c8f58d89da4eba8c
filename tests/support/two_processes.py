"""Two threads in place of the processes of a distributed evaluation."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import torch

from ebmkit.distributed import DistributedContext


@dataclass(frozen=True)
class Threads(DistributedContext):
    """`DistributedContext` that gathers between threads instead of processes."""

    slots: list = field(default_factory=lambda: [None, None])
    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(2, timeout=60))

    def gather(self, value):
        self.slots[self.rank] = value
        self.barrier.wait()
        values = list(self.slots)
        self.barrier.wait()
        return values


def run_shared(run, setting):
    """Results of ``run`` in each of two threads that share the work of ``setting``."""
    first = Threads(rank=0, size=2)
    second = replace(first, rank=1)

    def one(world):
        with torch.no_grad():
            return run(replace(setting, world=world))

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, (first, second)))
