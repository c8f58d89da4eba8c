r"""Many processes, one run.

``torchrun`` starts the same command once per device and tells each process its *rank* r of W by
environment variables; `join` makes a group of them. Every process holds the whole model and a share
of each batch; as every loss is a mean over images,

.. math:: \nabla L = \frac1W \sum_r \nabla L_r ,

which `torch.nn.parallel.DistributedDataParallel` computes while the backward pass runs. Nothing is
drawn per rank: ranks slice one global draw (`ebmkit.data.Stream`), so their number changes rounding
and nothing else. The first rank alone writes.
"""

from __future__ import annotations

import os
import platform
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from ebmkit.errors import UserError, first_line

T = TypeVar("T")

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LOST = ("connection closed", "connection reset", "connection refused", "broken pipe", "gloo")
PATIENCE = timedelta(hours=2)
"""How long a process waits for the others before it gives up: one may fetch or decode data for all.
A process that dies is noticed at once, by the launcher."""


class LostOthers(UserError):
    """Another process ended, and said why."""


@dataclass(frozen=True)
class DistributedContext:
    """The processes of one run, seen from one of them."""

    rank: int = 0  # this process's number
    size: int = 1  # how many there are
    local_rank: int = 0  # its number on its own machine, which is that of its GPU

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def mean_(self, values: Tensor) -> Tensor:
        """Replace ``values`` by their mean over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def broadcast(self, thing: T) -> T:
        """What the first process passed here, on all of them (tensors on the CPU)."""
        if self.size == 1:
            return thing
        box: list[Any] = [thing if self.first else None]
        dist.broadcast_object_list(box, src=0)
        received: T = box[0]
        return received

    def gather(self, thing: T) -> list[T]:
        """What each process passed here, by rank, on all of them (tensors on the CPU)."""
        if self.size == 1:
            return [thing]
        everything: list[Any] = [None] * self.size
        dist.all_gather_object(everything, thing)
        return everything

    def wrap(
        self, module: nn.Module, unused: Sequence[str] = (), share_buffers: bool = False
    ) -> DistributedDataParallel:
        """``module``, whose gradients become means over all processes.

        Args:
            module: its forward must return the loss.
            unused: names of parameters that no gradient reaches.
            share_buffers: give all processes the first's buffers before each forward pass.
        """
        # a gradient of one row has two equal layouts, of which DDP may expect the other
        warnings.filterwarnings("ignore", "(?s)Grad strides do not match bucket view strides")
        torch._dynamo.config.optimize_ddp = False  # the score keeps the step in one graph
        ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        ignore(module, unused)  # type: ignore[no-untyped-call]
        return DistributedDataParallel(
            module, broadcast_buffers=share_buffers, gradient_as_bucket_view=True
        )


def announced() -> bool:
    """Whether a launcher says that this process is one of several."""
    return all(name in os.environ for name in _VARIABLES)


@contextmanager
def join() -> Iterator[DistributedContext]:
    """The group that ``torchrun`` announced, for as long as the context lasts; else one process.

    Tensors travel by NCCL between GPUs and by gloo between CPUs.

    Raises:
        UserError: if the announcement is illegal, the port in use, or the others out of reach.
    """
    if not announced():
        yield DistributedContext()
        return
    rank, size = _number("RANK"), _number("WORLD_SIZE")
    if not 0 <= rank < size:
        raise UserError(f"RANK {rank} must be at least 0 and below WORLD_SIZE {size}")
    world = DistributedContext(rank, size, _number("LOCAL_RANK", rank))
    if size == 1:
        yield world
        return
    if world.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(world.local_rank)
    try:
        # torchrun keeps one store over restarts, where those who died left their addresses
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store, _, _ = next(rendezvous("env://", rank, size, timeout=PATIENCE))
        store.set_timeout(PATIENCE)
        store = dist.PrefixStore(f"attempt {attempt}", store)  # type: ignore[attr-defined]
        dist.init_process_group(store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise UserError(_unreachable(world, error)) from None
    try:
        yield world
    except RuntimeError as error:
        is_lost = isinstance(error, dist.DistError) or any(w in str(error).lower() for w in _LOST)
        if not is_lost:
            raise
        raise LostOthers(
            f"process {rank} of {size} lost the others: one of them ended; see what it says"
        ) from None
    # not after an error: leaving the group in order would wait for processes that wait for this one
    dist.destroy_process_group()


def restarted() -> bool:
    """Whether torchrun or SLURM started this command again after it failed or was preempted."""
    names = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(os.environ.get(name, "0") not in ("", "0") for name in names)


def launch() -> str | None:
    """What tells this start of the command, and its restarts, from others: torchrun's job (its
    process where the job has no name) or SLURM's; None without a launcher."""
    job = os.environ.get("TORCHELASTIC_RUN_ID")
    if job == "none":
        return f"torchrun {os.getppid()} on {platform.node()}"
    return job or os.environ.get("SLURM_JOB_ID")


def device_of_rank(device: torch.device) -> torch.device:
    """The device of this process: each has the GPU of its local rank, or the CPU. A `UserError` if
    more processes than GPUs were started on this machine."""
    if device.type != "cuda" or not announced():
        return device
    local, count = _number("LOCAL_RANK", 0), torch.cuda.device_count()
    if local >= count:
        raise UserError(
            f"process {local} of this machine has no GPU of its own, there are {count}: start "
            f"torchrun with --nproc-per-node {count}"
        )
    return torch.device("cuda", local)


def yield_to_others(error: UserError) -> None:
    """Let the process speak first whose ``error`` it is: the first of all where all met it, or
    the one that the others lost. Then it ends, and the launcher stops those that wait here."""
    if isinstance(error, LostOthers):
        time.sleep(20)
    elif announced() and os.environ["RANK"] != "0":
        time.sleep(5)


def _unreachable(world: DistributedContext, error: Exception) -> str:
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if "in use" in str(error).lower() or "eaddrinuse" in str(error).lower():
        return (
            f"port {port} is in use on this machine: choose another by torchrun --master-port, or "
            "let torchrun --standalone find a free one"
        )
    return (
        f"process {world.rank} of {world.size} cannot reach the others at {host}:{port} "
        f"({first_line(error)}): check that each is started and that the address and port can be "
        "reached from every machine"
    )


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    try:
        return int(text)
    except ValueError:
        raise UserError(
            f"environment variable {name}={text!r} must be a whole number: start with torchrun"
        ) from None
