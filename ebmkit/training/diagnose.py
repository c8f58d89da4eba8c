"""Taking a step again that was not finite, piece by piece, to see what was at fault.

Eagerly, so that hooks can follow: the whole step, with the outputs of each layer in the order of
the forward pass and the gradient of each parameter; then each image by itself, forward and
backward, in evaluation mode, where a BatchNorm lets no image see another and nothing is dropped.
Whatever moves meanwhile is put back.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ebmkit.data import Batch
from ebmkit.objectives import TrainingLoss
from ebmkit.training.engine import split_batches

__all__ = ["diagnose", "plain"]

LARGEST = 20
"""Gradients that are told of, the largest first."""

LARGEST_PARAMETERS = LARGEST_IMAGES = 5

SECONDS = 60.0
"""Time to look at the images of a stream one by one."""

Named = Sequence[tuple[str, nn.Parameter]]
Uphill = Callable[[nn.Module], AbstractContextManager[None]]


def diagnose(
    loss: TrainingLoss,
    batches: Mapping[str, Batch],
    parts: int = 1,
    gradients: Mapping[str, Tensor] | None = None,
    perturbed: Uphill | None = None,
) -> dict[str, Any]:
    """Look at a step piece by piece; nothing is changed but the parameters' ``grad``.

    No other process hears of it.

    Args:
        loss: model and objectives.
        batches: stream -> its batch.
        parts: that a batch is split into, to need less memory.
        gradients: that the step left, by parameter, where they are at hand; told of where taking
            them again finds nothing.
        uphill: where the gradient is taken a second time (`Sharpness.perturbed`).

    Returns:
        Plain values. ``reproduced``: whether the step is not finite again. ``layer``: the first
        whose output is not, or None. ``gradients``: those that are not finite, then the largest.
        ``parameters``: those that are not finite; ``largest_parameters``. ``streams``: by name,
        ``size`` of the batch, ``looked_at``, how many of its images, ``images``, those whose loss
        or gradient is not finite by itself, and ``largest``, the others by their gradient.
    """
    model, kept = loss.model, [(b, b.clone()) for b in loss.model.buffers()]
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    training, use_autograd = model.training, loss.use_autograd
    try:
        loss.use_autograd = True
        with _first_bad_layer(model) as layer:
            again, fine = _taken_again(loss, batches, parts, named, perturbed)
        model.eval()
        streams = {name: _images(loss, name, batch, named) for name, batch in batches.items()}
    finally:
        loss.use_autograd = use_autograd
        model.train(training)
        for buffer, before in kept:  # statistics of BatchNorm, which a forward pass moves
            buffer.copy_(before)
        for _, p in named:
            p.grad = None
    return {
        "reproduced": not fine,
        "layer": layer[0] if layer else None,
        "gradients": _largest(again if gradients is None or not fine else gradients, LARGEST),
        "parameters": [n for n, p in model.named_parameters() if not bool(p.isfinite().all())],
        "largest_parameters": _largest(
            {n: p.detach() for n, p in model.named_parameters()}, LARGEST_PARAMETERS
        ),
        "streams": streams,
    }


def plain(value: float) -> float | str:
    """A number as JSON has it; "nan", "inf" or "-inf" where it has none."""
    return float(f"{value:.6g}") if math.isfinite(value) else str(value)


def _taken_again(
    loss: TrainingLoss,
    batches: Mapping[str, Batch],
    parts: int,
    named: Named,
    perturbed: Uphill | None,
) -> tuple[dict[str, Tensor], bool]:
    """The gradient of the whole step by parameter, and whether it and the losses are finite."""
    totals: dict[str, Tensor] = {}
    fine = True
    for again in (False, True) if perturbed is not None else (False,):
        if again and not fine:
            break
        with perturbed(loss) if again and perturbed is not None else nullcontext():
            totals = {}
            for part in split_batches(dict(batches), parts, True):
                total, values = _losses(loss, part)
                fine = fine and all(map(math.isfinite, values.values()))
                for name, own in _gradient(total, named).items():
                    totals[name] = totals.get(name, torch.zeros_like(own)) + own / parts
        fine = fine and all(bool(g.isfinite().all()) for g in totals.values())
        for name, p in named:
            p.grad = totals.get(name)
    return totals, fine


def _losses(loss: TrainingLoss, part: Mapping[str, Batch]) -> tuple[Tensor, dict[str, float]]:
    losses = loss.forward(part)  # not called, which may be compiled
    return losses.total, {name: float(mean) for name, mean in losses.parts.items()}


def _gradient(total: Tensor, named: Named) -> dict[str, Tensor]:
    """By parameter; not by `backward`, which other processes would hear of."""
    found = torch.autograd.grad(total, [p for _, p in named], allow_unused=True)
    return {n: g for (n, _), g in zip(named, found, strict=True) if g is not None}


def _largest(tensors: Mapping[str, Tensor], count: int) -> list[dict[str, Any]]:
    """Those that are not finite first, then those with the largest entries."""
    rows = []
    for name, tensor in tensors.items():
        bad = int((~tensor.isfinite()).sum())
        largest = _most(tensor)
        rows.append((bad, math.inf if math.isnan(largest) else largest, name, tensor))
    rows.sort(key=lambda row: (-row[0], -row[1]))
    return [
        {
            "parameter": name,
            "largest": plain(_most(tensor)),
            "largest_finite": plain(_most(tensor[tensor.isfinite()])),
            "norm": plain(float(tensor.norm())),
            "not_finite": bad,
            "entries": tensor.numel(),
        }
        for bad, _, name, tensor in rows[:count]
    ]


def _most(tensor: Tensor) -> float:
    """The largest size of an entry; 0 without entries."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _images(loss: TrainingLoss, stream: str, batch: Batch, named: Named) -> dict[str, Any]:
    """The images of a batch, each by itself: those that are not numbers themselves first."""
    size = len(batch.x)
    single = [part[stream] for part in split_batches({stream: batch}, size, True)]
    order = sorted(range(size), key=lambda i: all(_finite(single[i]).values()))
    at_fault, others, begun = [], [], time.perf_counter()
    for position in order:
        if time.perf_counter() - begun > SECONDS:
            break
        own = single[position]
        total, values = _losses(loss, {stream: own})
        gradients = list(_gradient(total, named).values())
        norm = float(nn.utils.get_total_norm(gradients))
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        row = {
            "position": position,
            "losses": {name: plain(value) for name, value in values.items()},
            "gradient": plain(norm),
            "sigma": f"{float(own.sigma[0]) * 255:.4g}/255",
            "label": None if own.labels is None else int(own.labels[0]),
            "range": [plain(float(own.x.min())), plain(float(own.x.max()))],
        }
        if bad or not math.isfinite(norm):
            at_fault.append({**row, "terms": bad, "finite": _finite(own)})
        else:
            others.append((norm, row))
    others.sort(key=lambda pair: -pair[0])
    return {
        "size": size,
        "looked_at": len(at_fault) + len(others),
        "images": sorted(at_fault, key=lambda row: int(row["position"])),
        "largest": [row for _, row in others[:LARGEST_IMAGES]],
    }


def _finite(own: Batch) -> dict[str, bool]:
    """Whether the image, what was made of it, and its noise are numbers, by their names."""
    given = {
        "image": own.x,
        "noisy": own.y,
        "sigma": own.sigma,
        "noise": own.eps,
        **{name.split(".")[-1]: column for name, column in own.extra.items()},
    }
    return {name: bool(t.isfinite().all()) for name, t in given.items() if t is not None}


@contextmanager
def _first_bad_layer(model: nn.Module) -> Iterator[list[str]]:
    """Collects the names of layers whose outputs are not finite, in order."""
    found: list[str] = []
    hooks = []
    for name, module in model.named_modules():
        if next(module.children(), None) is None:

            def look(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
                if isinstance(output, Tensor) and not bool(output.detach().isfinite().all()):
                    found.append(f"{name} ({type(module).__name__})")

            hooks.append(module.register_forward_hook(look))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
