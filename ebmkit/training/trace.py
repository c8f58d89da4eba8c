r"""A training step without its arithmetic: what it multiplies, and what it holds in memory.

The step runs on fake tensors, which have shapes, types, devices and storages but no numbers, on a
copy of the model that takes no memory either. Every operation passes a recorder, which adds up

- the *FLOPs* of matrix products and convolutions, two to a multiply-add, forward, pulled back and
  differentiated again, by the formulas of `torch.utils.flop_counter`;
- the *bytes alive*: each storage counts from the operation that made it until it is released.

A step of one stream comes to about 3 forward passes where the loss is of the forward pass alone
(cross-entropy: the forward, then 2 for the gradient by activations and weights), and to
:math:`3 + 3k` where k different scores are pulled back from it: one for each pull-back and two for
differentiating it. So dsm costs 6, and dsm with cdsm on one batch 9; a cross-entropy beside them on
the same batch is free. A product with the Hessian, as ism takes, differentiates forward pass and
score by the image once more, so ism costs 12. The count is exact for the eager step. It is up to
3 % off the rule, for ism 10 %: the gradient of a strided convolution by its weights is computed on
a larger window the second time, and cross-entropy never needs the gradient by the image.

Bytes are linear in the number of images at each moment, so two rehearsals tell every batch size.
What an operation allocates and releases within itself (workspaces of convolution libraries) is not
seen, nor is what an allocator wastes.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ebmkit.data import Batch
from ebmkit.energy import EnergyModel, ScoreModel, WeightedLogProbability
from ebmkit.objectives import TrainingLoss

__all__ = [
    "Recorder",
    "Shapes",
    "StepTrace",
    "forward_flops",
    "score_flops",
    "trace_step",
    "unused_parameters",
]

Shapes = Mapping[str, tuple[int, int, int, int]]
"""Stream -> shape (B, C, H, W) of the images that this process takes of it in a step."""

M = TypeVar("M", bound=nn.Module)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the FLOPs and the bytes of the tensors made within, real or fake.

    Attributes:
        flops: FLOPs so far.
        live: bytes of living storages, after each operation that made one.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.live: list[int] = [0]
        self._now = 0
        self._bytes: dict[int, int] = {}

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count ``tensors`` that were made before."""
        for tensor in tensors:
            self._add(tensor)
        self.live.append(self._now)

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Never count ``tensors`` nor views of them."""
        self._bytes |= {tensor.untyped_storage()._cdata: 0 for tensor in tensors}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += int(count(*args, **(kwargs or {}), out_val=out))
        made = [self._add(leaf) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if any(made):
            self.live.append(self._now)
        return out

    def _add(self, tensor: Tensor) -> bool:
        """Count the storage of ``tensor``; whether it is a new one."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._bytes:
            return False
        self._bytes[key] = storage.nbytes()
        self._now += storage.nbytes()
        weakref.finalize(storage, self._release, key).atexit = False
        return True

    def _release(self, key: int) -> None:
        self._now -= self._bytes.pop(key)


@dataclass(frozen=True)
class StepTrace:
    """What a rehearsed step took.

    Attributes:
        flops: FLOPs of forward and backward, of the whole batch.
        live: bytes alive at each moment, without parameters, buffers and the optimiser.
        gradients: bytes of the parameters' gradients, which are alive at the end.
    """

    flops: int
    live: tuple[int, ...]
    gradients: int


def trace_step(loss: TrainingLoss, shapes: Shapes, accumulate: int = 1) -> StepTrace:
    """Run forward and backward of ``loss`` on fake batches of ``shapes``; ``loss`` is untouched.

    Args:
        loss: model and objectives, on the device and in the precision to train in. If it is
            compiled, it is the eager step that is rehearsed.
        shapes: images of each stream of ``loss``.
        accumulate: parts that the batches are run in, one after the other, adding up gradients.
    """
    recorder = Recorder()
    parts_run = min(accumulate, 2)  # from the second on they are alike
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are about the model, and training itself says them
        fake = _fake(loss, mode).train()
        fake.zero_grad(set_to_none=True)
        batches = _batches(fake, shapes)
        recorder.ignore([*fake.parameters(), *fake.buffers()])
        recorder.hold(t for batch in batches.values() for t in batch.tensors)
        with recorder, torch.enable_grad():
            for _ in range(parts_run):
                part = {name: _part(batch, accumulate) for name, batch in batches.items()}
                groups = [{n: b} for n, b in part.items()] if loss.separate else [part]
                for group in groups:
                    fake(group).total.backward()
        gradients = sum(p.grad.nbytes for p in fake.parameters() if p.grad is not None)
    return StepTrace(recorder.flops * accumulate // parts_run, tuple(recorder.live), gradients)


def forward_flops(model: ScoreModel, shape: tuple[int, int, int]) -> int:
    """FLOPs of the forward pass of one image of ``shape`` (C, H, W), two to a multiply-add."""
    recorder = Recorder()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        fake = _fake(model, mode)
        image = torch.empty(1, *shape, device=next(fake.parameters()).device)
        sigma = torch.empty(1, device=image.device) if model.noise_conditional else None
        with recorder:
            fake(image, sigma)
    return recorder.flops


def score_flops(
    model: ScoreModel, shape: tuple[int, int, int, int], of_labels: bool = False
) -> int:
    """FLOPs of the score of a batch of ``shape`` (B, C, H, W), without a gradient of it.

    Args:
        model: any.
        shape: of the batch.
        of_labels: of the gradient of log-posteriors instead, which an attack climbs.
    """
    recorder = Recorder()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fake = _fake(model, mode).eval()
        images = torch.empty(shape, device=next(fake.parameters()).device)
        sigma = torch.empty(shape[0], device=images.device) if model.noise_conditional else None
        with recorder, torch.no_grad():
            if of_labels:
                assert isinstance(fake, EnergyModel)
                weights = torch.ones(len(images), fake.num_classes, device=images.device)
                fake.value_and_grads(images, sigma, WeightedLogProbability(weights))
            else:
                fake.score(images, sigma)
    return recorder.flops


def unused_parameters(loss: TrainingLoss, shapes: Shapes) -> list[str]:
    """Names in ``loss`` of the trained parameters that get no gradient on batches of ``shapes``."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fake = _fake(loss, mode).train()
        fake.zero_grad(set_to_none=True)
        with torch.enable_grad():
            fake(_batches(fake, shapes)).total.backward()
        return [n for n, p in fake.named_parameters() if p.requires_grad and p.grad is None]


def _fake(module: M, mode: FakeTensorMode) -> M:
    """A copy of ``module`` without numbers; nothing is allocated."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(t): mode.from_tensor(t) for t in tensors})


def _batches(loss: TrainingLoss, shapes: Shapes) -> dict[str, Batch]:
    """A batch of each stream, with all that who trains adds to it."""
    classes, device = loss.model.num_classes, next(loss.parameters()).device
    batches = {name: _batch(shapes[name], classes, device) for name in loss.streams}
    for term in loss.terms:
        name = loss.stream_of[term.name]
        columns = {column: torch.empty_like(batches[name].x) for column in term.objective.columns}
        batches[name] = batches[name].with_columns(term.name, columns)
    return batches


def _batch(shape: tuple[int, int, int, int], num_classes: int, device: torch.device) -> Batch:
    count = shape[0]
    x, y, eps = (torch.empty(shape, device=device) for _ in range(3))
    sigma = torch.empty(count, device=device)
    labels = soft = None
    if num_classes:
        labels = torch.empty(count, dtype=torch.int64, device=device)
        soft = torch.empty(count, num_classes, device=device)
    return Batch(x, y, sigma, eps, labels, soft)


def _part(batch: Batch, accumulate: int) -> Batch:
    """The first of ``accumulate`` parts, as views."""
    count = -(-len(batch.x) // accumulate)
    return batch.rows(slice(0, count))
