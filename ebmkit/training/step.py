r"""One training step: gradient of the loss, and the update.

A batch of B images is split into K parts of equal size on each of W processes, and

.. math:: \nabla L = \frac{1}{KW} \sum_{k,r} \nabla L_{k,r},

since every loss is a mean over images. If compiled, the loss computes the score by
`torch.func.vjp`, so that forward pass, score and loss are one graph (``fullgraph``). Eagerly it
uses `torch.autograd.grad`, which has less overhead and is the reference in tests.

The host never waits for the device within a step. Losses, the norm of the gradient and a flag for
NaN and Inf stay on the device. If the flag is set, the fused optimiser skips this update and every
later one, until `TrainingStep.read` reports it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch._functorch.config as functorch_config  # activation_memory_budget has no public name
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from ebmkit.compile import ISOLATED
from ebmkit.compute import (
    ComputeConfig,
    flush_denormals,
    keep_freed_memory,
    memory_format,
    pick_compile,
    pick_precision,
    prepare_compiler,
    set_tf32,
    subsample_before_1x1,
)
from ebmkit.data import Batch
from ebmkit.distributed import DistributedContext
from ebmkit.errors import UserError, first_line
from ebmkit.models import JointModel
from ebmkit.objectives import TrainingLoss
from ebmkit.training.cost import trace_step
from ebmkit.training.optim import SAM, set_rate, update_average


class OutOfMemory(Exception):
    """The step did not fit in the memory of the device."""


class StepStats(NamedTuple):
    """Statistics of the steps since the last reset, on the host."""

    parts: dict[str, float]  # mean of each term in the last step, or in the failing step
    grad_norm: float  # norm of the gradient in that step, before clipping
    done: int  # number of updates
    skipped: int  # number of steps without update: the failing one and those before `read`
    failed: bool  # whether a loss or the gradient was NaN or Inf, which stopped the updates
    stop_requested: bool  # whether any process was asked to stop

    @property
    def fault(self) -> str | None:
        """Description of the loss or gradient that is NaN or Inf; None if all are finite."""
        for name, loss in self.parts.items():
            if not math.isfinite(loss):
                return f"loss {name!r} is {loss}"
        norm = self.grad_norm
        return None if math.isfinite(norm) else f"the gradient's norm is {norm}"


class TrainingStep:
    """Computes the gradient of a loss and updates the parameters.

    Args:
        loss: model and objectives, on the device of training.
        optimizer: fused optimiser over the model's parameters (`make_optimizer`).
        compute: precision, compilation, accumulation, recomputation.
        clip_norm: maximum norm of the gradient; None: no clipping.
        average: averaged weights to update.
        world: processes that share each batch.
        backend: backend of `torch.compile`.
        sam: sharpness-aware minimisation; None: the plain gradient.

    Attributes:
        precision: precision in use.
        compiled: whether the loss is compiled.

    Raises:
        UserError: if the device does not support the precision or compilation, or the model cannot
            be compiled or recomputed.

    >>> step = TrainingStep(loss, optimizer, ComputeConfig(compile="off"))     # doctest: +SKIP
    >>> step({"classify": batch, "denoise": other}, rate=3e-4)                 # doctest: +SKIP
    >>> step.read().parts                                                      # doctest: +SKIP
    {'ce': 2.3, 'dsm': 0.99}
    """

    def __init__(
        self,
        loss: TrainingLoss,
        optimizer: torch.optim.Optimizer,
        compute: ComputeConfig | None = None,
        clip_norm: float | None = None,
        average: AveragedModel | None = None,
        world: DistributedContext | None = None,
        backend: str = "inductor",
        sam: SAM | None = None,
    ) -> None:
        self.compute = compute or ComputeConfig()
        self.backend = backend
        self.loss, self.optimizer = loss, optimizer
        self.clip_norm, self.average, self.sam = clip_norm, average, sam
        self.world = world or DistributedContext()
        self.parameters = [p for p in loss.model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.precision = pick_precision(self.compute.precision, self.device)
        set_tf32(self.device, self.precision)
        loss.precision = self.precision
        subsample_before_1x1(loss.model)  # ebmkit's models do this themselves; others may not
        loss.model.to(memory_format=memory_format(self.device, loss.needs_input_gradient))
        flush_denormals(self.device)
        keep_freed_memory(self.device)
        self._parallel: nn.Module | None = None  # created with the first batch
        self._compiled_once = self.compiled = False
        # memory budget of the compiler for the backward pass; created once, since each patch leaks
        # a context variable
        keep = {"activation_memory_budget": 0.3} if self.compute.recompute else {}
        self._saving = functorch_config.patch(keep)
        self._compile(self._may_compile())
        self.names = tuple(term.name for term in loss.terms)
        self._values = torch.zeros(len(self.names) + 2, device=self.device)  # parts, stop, norm
        self._failed = torch.zeros((), device=self.device)
        self._done = torch.zeros_like(self._failed)
        self._taken = 0  # steps since `reset`
        self._optimizer_was_empty = True  # before the first of these steps
        optimizer.found_inf = self._failed  # type: ignore[attr-defined]  # optimisers read it

    def __call__(self, batches: Mapping[str, Batch], rate: float, stop: bool = False) -> None:
        """Take one step at learning rate ``rate`` on this process's share of each stream's batch.

        ``stop``: whether this process was asked to stop; `read` reports this to all processes.

        Raises:
            OutOfMemory: if the device has too little memory.
            UserError: if compilation is required and fails.
        """
        set_rate(self.optimizer, rate)
        values = torch.zeros(len(self.names) + 1, device=self.device)
        values[-1] = float(stop)
        if self._taken == 0:
            self._optimizer_was_empty = not self.optimizer.state
        self._taken += 1
        buffers = self.loss.model.buffers() if self.loss.model.has_batch_norm else ()
        moving = [self.loss.running, *buffers]  # to restore if the step fails
        before = [buffer.clone() for buffer in moving]
        with translate_out_of_memory():
            values[:-1] = self._differentiate(batches)
            if self.sam is not None:
                with self.sam.perturbed(self.loss):
                    self._differentiate(batches)
            self.world.mean_(values)
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
            self._record(values, norm)
            if self.clip_norm is not None:
                nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm, norm)
            self.optimizer.step()
        self.loss.update_running(dict(zip(self.names, values[:-1], strict=True)))
        for now, old in zip(moving, before, strict=True):
            now.copy_(torch.where(self._failed > 0, old, now))
        if self.average is not None:
            update_average(self.average, self.loss.model, self._failed)

    def read(self) -> StepStats:
        """Statistics of the last step; waits for the device."""
        *parts, stop, norm, failed, done = torch.cat(
            [self._values, self._failed[None], self._done[None]]
        ).tolist()
        means = dict(zip(self.names, parts, strict=True))
        return StepStats(means, norm, int(done), self._taken - int(done), bool(failed), stop > 0)

    def undo_skipped(self, rate: float) -> None:
        """Set the host's counters back to the last update, at ``rate``, and clear the failure."""
        stats = self.read()
        if self.average is not None:
            self.average.n_averaged -= stats.skipped
        if self._optimizer_was_empty and stats.done == 0:
            self.optimizer.state.clear()  # created by the failing step, for SGD uninitialised
        set_rate(self.optimizer, rate)
        self.reset()

    def reset(self) -> None:
        """Clear failures and counters, after the parameters were set from outside."""
        for counter in (self._failed, self._done):
            counter.zero_()
        self._taken = 0

    def _record(self, values: Tensor, norm: Tensor) -> None:
        """Store the step's values, unless an earlier step failed, and update the failure flag."""
        now = torch.cat([values, norm.reshape(1)])
        self._values.copy_(torch.where(self._failed > 0, self._values, now))
        self._failed.copy_(torch.maximum(self._failed, 1 - now.isfinite().all().float()))
        self._done += 1 - self._failed

    def _differentiate(self, batches: Mapping[str, Batch]) -> Tensor:
        """Compute the parameters' gradients; return each term's mean, (number of terms,)."""
        try:
            values = self._forward_and_backward(batches)
            self._compiled_once = True
            return values
        except Exception as error:  # compilers raise errors of many types, forward or backward
            known = isinstance(error, (torch.OutOfMemoryError, UserError))
            if not self.compiled or self._compiled_once or known:
                raise
            reason = first_line(error)
        if self.compute.compile == "on":
            raise UserError(f"the step cannot be compiled: {reason}; use --compile off")
        warnings.warn(f"not compiled, running eagerly: {reason}", stacklevel=3)
        self._compile(False)
        return self._forward_and_backward(batches)

    def _forward_and_backward(self, batches: Mapping[str, Batch]) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        values = torch.zeros(len(self.names), device=self.device)
        count = self.compute.accumulate
        drawn = {name: batches[name] for name in self.loss.streams}
        parts = list(split_batches(drawn, count, self.loss.separate))
        for i, part in enumerate(parts):
            if self.compiled:
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            with self._no_sync_context(part, last=i == len(parts) - 1), self._saving:
                losses = (self._parallel or self.loss)(part)
                (losses.total / count).backward()  # type: ignore[no-untyped-call]
            for name, value in losses.parts.items():
                values[self.names.index(name)] += value / count
        return values

    def _may_compile(self) -> bool:
        """Whether to compile; raises a `UserError` if compilation is required but impossible."""
        enabled = pick_compile(self.compute.compile, self.device)
        if enabled and self.loss.needs_input_gradient and self.loss.model.has_batch_norm:
            if self.compute.compile == "on":
                raise UserError(
                    "a model with BatchNorm whose score is trained cannot be compiled: use "
                    "--compile off, or model.backbone.norm=group"
                )
            return False
        return enabled

    def _compile(self, compiled: bool) -> None:
        """Set compilation and what depends on it: recomputation, and separate passes of streams."""
        # in one graph a compiler can merge streams, and DDP must see all gradients in one backward
        self.loss.separate = not compiled and self.world.size == 1
        # vjp can be compiled, and with recomputation recomputes only what the score needs
        self.loss.use_autograd = not compiled and not self.compute.recompute
        if compiled or self.compiled:
            if not ISOLATED:  # an older PyTorch counts the compilations of all steps together
                torch.compiler.reset()
            prepare_compiler()
            alone = self.world.size == 1 and self.compute.accumulate == 1
            self.loss.compile(
                fullgraph=True,
                dynamic=False,
                backend=self.backend,
                mode="reduce-overhead" if self.device.type == "cuda" and alone else None,
                disable=not compiled,
                **ISOLATED,
            )
        self.compiled = compiled
        if not self.compute.recompute:
            return
        if not isinstance(self.loss.model, JointModel):
            raise UserError(
                f"{type(self.loss.model).__name__} cannot recompute its activations: set "
                "compute.recompute=false, or split the batch by compute.accumulate"
            )
        self.loss.model.set_recompute(not compiled)

    def _no_sync_context(
        self, batches: dict[str, Batch], last: bool
    ) -> AbstractContextManager[Any]:
        """Context without gradient synchronisation between processes, except for the last part."""
        if self.world.size == 1:
            return nullcontext()
        if self._parallel is None:
            shapes: dict[str, Any] = {name: tuple(b.x.shape) for name, b in batches.items()}
            unused = trace_step(self.loss, shapes).unused
            self._parallel = self.world.wrap(self.loss, unused, self.loss.model.has_batch_norm)
        assert isinstance(self._parallel, DistributedDataParallel)
        return nullcontext() if last else self._parallel.no_sync()


def split_batches(
    batches: Mapping[str, Batch], count: int, separate: bool
) -> Iterator[dict[str, Batch]]:
    """Yield the batches of each forward and backward pass: ``count`` equal parts, by stream if
    ``separate``."""
    sizes = {name: len(batch.x) // count for name, batch in batches.items()}
    for k in range(count):
        part = dict(batches)
        for name, batch in batches.items() if count > 1 else ():
            if len(batch.x) % count:
                raise UserError(
                    f"a batch of {len(batch.x)} does not divide into {count} parts: take a "
                    f"multiple of {count}, or another compute.accumulate"
                )
            part[name] = batch.rows(slice(k * sizes[name], (k + 1) * sizes[name]))
        yield from ({name: batch} for name, batch in part.items()) if separate else [part]


@contextmanager
def translate_out_of_memory() -> Iterator[None]:
    """Convert a failed allocation to `OutOfMemory`."""
    try:
        yield
        return
    except RuntimeError as error:  # OutOfMemoryError on CUDA
        cuda = isinstance(error, torch.OutOfMemoryError)
        if not cuda and "can't allocate memory" not in str(error):
            raise
    raise OutOfMemory  # outside the handler: the traceback keeps the tensors of the step alive
