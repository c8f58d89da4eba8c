r"""Distributed data parallelism: one process per device.

``torchrun`` starts the same command once per device and passes each process its *rank* r of W by
environment variables; `join` initialises the process group. Each process holds the whole model and
a share of each batch. Every loss is a mean over images, so

.. math:: \nabla L = \frac1W \sum_r \nabla L_r ,

which `torch.nn.parallel.DistributedDataParallel` computes during the backward pass. Ranks take
slices of one global random draw (`ebmkit.data.Stream`), so their number changes results only by
rounding. Only rank 0 writes files.
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
TIMEOUT = timedelta(hours=2)
"""Timeout of waiting for other processes, one of which may download or decode data for all. The
launcher detects a dead process immediately."""


class PeerLost(UserError):
    """Another process ended, and has reported the reason."""


@dataclass(frozen=True)
class DistributedContext:
    """Rank of this process, and number of processes of the run."""

    rank: int = 0
    size: int = 1  # number of processes
    local_rank: int = 0  # rank on this machine, the index of the GPU

    @property
    def first(self) -> bool:
        """Whether this process is rank 0, which writes the files."""
        return self.rank == 0

    def mean_(self, values: Tensor) -> Tensor:
        """Replace ``values`` by their mean over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def broadcast(self, thing: T) -> T:
        """Return the ``thing`` of rank 0 on all processes (tensors on the CPU)."""
        if self.size == 1:
            return thing
        box: list[Any] = [thing if self.first else None]
        dist.broadcast_object_list(box, src=0)
        received: T = box[0]
        return received

    def gather(self, thing: T) -> list[T]:
        """Return the ``thing`` of each rank, in order, on all processes (tensors on the CPU)."""
        if self.size == 1:
            return [thing]
        everything: list[Any] = [None] * self.size
        dist.all_gather_object(everything, thing)
        return everything

    def wrap(
        self, module: nn.Module, unused: Sequence[str] = (), share_buffers: bool = False
    ) -> DistributedDataParallel:
        """Wrap ``module`` in DDP, which averages gradients over all processes.

        Args:
            module: module whose forward returns the loss.
            unused: names of parameters that get no gradient.
            share_buffers: broadcast the buffers of rank 0 before each forward pass.
        """
        # a gradient with one row has two equivalent layouts, and DDP may expect the other one
        warnings.filterwarnings("ignore", "(?s)Grad strides do not match bucket view strides")
        torch._dynamo.config.optimize_ddp = False  # a step with a score must stay one graph
        ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        ignore(module, unused)  # type: ignore[no-untyped-call]
        return DistributedDataParallel(
            module, broadcast_buffers=share_buffers, gradient_as_bucket_view=True
        )


def is_launched() -> bool:
    """Whether a launcher set the environment variables of a process group."""
    return all(name in os.environ for name in _VARIABLES)


@contextmanager
def join() -> Iterator[DistributedContext]:
    """Context of the process group that ``torchrun`` set up; without a launcher, of one process.

    The backend is NCCL between GPUs and gloo between CPUs.

    Raises:
        UserError: if an environment variable is illegal, the port in use, or another process
            unreachable.
    """
    if not is_launched():
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
        # torchrun keeps one store over restarts, with the addresses of dead processes
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store, _, _ = next(rendezvous("env://", rank, size, timeout=TIMEOUT))
        store.set_timeout(TIMEOUT)
        store = dist.PrefixStore(f"attempt {attempt}", store)  # type: ignore[attr-defined]
        dist.init_process_group(store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise UserError(_unreachable(world, error)) from None
    try:
        yield world
    except RuntimeError as error:
        is_lost = isinstance(error, dist.DistError) or any(w in str(error).lower() for w in _LOST)
        if not is_lost:
            raise
        raise PeerLost(
            f"process {rank} of {size} lost the others: one of them ended; see its error message"
        ) from None
    # not after an error: destroying the group would wait for processes that wait for this one
    dist.destroy_process_group()


def restarted() -> bool:
    """Whether torchrun or SLURM started this command again after it failed or was preempted."""
    names = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(os.environ.get(name, "0") not in ("", "0") for name in names)


def launch() -> str | None:
    """Identifier of this launch, the same after restarts: torchrun's job id (its process and host
    if the job has no id) or SLURM's; None without a launcher."""
    job = os.environ.get("TORCHELASTIC_RUN_ID")
    if job == "none":
        return f"torchrun {os.getppid()} on {platform.node()}"
    return job or os.environ.get("SLURM_JOB_ID")


def device_of_rank(device: torch.device) -> torch.device:
    """The device of this process: the GPU of its local rank, or the CPU. A `UserError` if more
    processes than GPUs were started on this machine."""
    if device.type != "cuda" or not is_launched():
        return device
    local, count = _number("LOCAL_RANK", 0), torch.cuda.device_count()
    if local >= count:
        raise UserError(
            f"process {local} of this machine has no GPU of its own, there are {count}: start "
            f"torchrun with --nproc-per-node {count}"
        )
    return torch.device("cuda", local)


def wait_for_root_cause(error: UserError) -> None:
    """Wait until the process at fault has reported ``error``: rank 0 if all processes have it, or
    the process that the others lost. Its exit makes the launcher stop the waiting processes."""
    if isinstance(error, PeerLost):
        time.sleep(20)
    elif is_launched() and os.environ["RANK"] != "0":
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
