"""What went wrong in a step whose loss or gradient is not finite.

The optimiser skips such a step, so the network is still what it was before it, and everything drawn
is a function of (seed, stream, step): the step can be looked at again, piece by piece. It is, in
eager mode: each term, each image of the batch by itself, each layer in the order of the forward
pass, each parameter's gradient. What is found is written to ``RUN/nonfinite-STEP.json``; the state
before the step becomes a checkpoint.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ebmkit.data import Batch, StreamedSet
from ebmkit.data.reading import FolderReader
from ebmkit.errors import UserError
from ebmkit.objectives import Losses, TrainingLoss
from ebmkit.storage import write_atomically
from ebmkit.training.engine import Reading, split_batches

if TYPE_CHECKING:
    from ebmkit.training.trainer import Trainer

__all__ = ["diagnose", "is_finite", "report_of", "stopped", "told", "write_report"]

SHOWN = 5
"""Images, parameters and the like in the message, and the largest gradients in the report."""

MOST_REPORTS = 20
"""Reports that a run keeps."""

SECONDS = 60.0
"""Time to look at images one by one."""


def is_finite(reading: Reading) -> bool:
    """Whether the losses and the gradient of a step are numbers."""
    return all(map(math.isfinite, [*reading.parts.values(), reading.grad_norm]))


def stopped(trainer: Trainer, step: int, reading: Reading) -> UserError:
    """The error that ends a run whose step ``step`` is not finite, after saving the state before.

    Args:
        trainer: all of its processes must call.
        step: the first that failed, counted from 1.
        reading: of that step.
    """
    report = report_of(trainer, step, reading)
    trainer.update.reset()
    trainer.step = trainer.card.steps = step - 1
    for group in trainer.optimizer.param_groups:
        group["lr"] = trainer.rate_at(step - 2) if step > 1 else trainer.config.optimizer.lr
    if trainer.average is not None:
        trainer.average.n_averaged.fill_(step - 1)  # which may have been counted on
    where = ""
    if trainer.run is not None:
        path = write_report(trainer.run.path, report)
        trainer.save()
        report_is = f"; all of it is in {path.name}" if path else ""
        where = f"; the state before it is saved in {str(trainer.run.path)!r}{report_is}"
    lines = [f"{_headline(report)} at step {step}: stopped before the update{where}"]
    lines += [f"  {line}" for line in told(report)]
    return UserError("\n".join([*lines, "  try a lower optimizer.lr, or optimizer.clip_norm=1"]))


def report_of(
    trainer: Trainer,
    step: int,
    reading: Reading,
    drawn: Mapping[str, Batch] | None = None,
) -> dict[str, Any]:
    """What is found of ``step`` in all processes, as plain values.

    Args:
        trainer: whose parameters are those before the step.
        step: counted from 1.
        reading: of that step.
        drawn: its batches with all that joined them; None: they are drawn again.
    """
    if drawn is None:
        drawn = next(trainer.batches(step - 1, step))
        if trainer.attacks is not None:
            drawn = trainer.attacks.join(drawn, step - 1)
    seen = None
    if trainer.step == step:  # nothing came after
        named = trainer.model.named_parameters()
        seen = {name: p.grad for name, p in named if p.grad is not None}
    own = diagnose(trainer.loss, drawn, trainer.config.compute.accumulate, seen)
    for name, found in own["streams"].items():
        _name_images(trainer, name, step - 1, found)
    everyone = trainer.world.gather(own)
    report = {
        "step": step,
        "terms": {name: _plain(value) for name, value in reading.parts.items()},
        "grad_norm": _plain(reading.grad_norm),
        "lr": trainer.rate_at(step - 1),
        **own,
    }
    if len(everyone) > 1:
        report["by_process"] = everyone
        at_fault = [n for n, other in enumerate(everyone) if _at_fault(other)]
        report |= everyone[at_fault[0]] if at_fault else {}
        report["process"] = at_fault[0] if at_fault else 0
    return report


def diagnose(
    loss: TrainingLoss,
    batches: Mapping[str, Batch],
    parts: int = 1,
    gradients: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Look at a step piece by piece; nothing is changed.

    Args:
        loss: model and objectives.
        batches: stream -> its batch.
        parts: that a batch is split into, to need less memory.
        gradients: that the step left, by parameter, where they are at hand; told of where taking
            them again finds nothing.

    Returns:
        ``gradients``: the largest, by parameter; ``parameters``: those that are not finite;
        ``layer``: the first whose output is not, or None; ``streams``: by name, the ``images``
        (numbers in the batch) whose loss or gradient is not finite, and ``looked_at``, how many.
    """
    kept = [(buffer, buffer.clone()) for buffer in loss.model.buffers()]
    with _eagerly(loss):
        with _first_bad_layer(loss.model) as layer:
            again = _taken_again(loss, batches, parts)
        streams = {name: _images(loss, name, batch) for name, batch in batches.items()}
    for buffer, before in kept:  # statistics of BatchNorm, which a forward pass moves
        buffer.copy_(before)
    return {
        "gradients": _largest(again if gradients is None or _bad(again) else gradients),
        "parameters": [
            name for name, p in loss.model.named_parameters() if not bool(p.isfinite().all())
        ],
        "layer": layer[0] if layer else None,
        "streams": streams,
    }


def told(report: Mapping[str, Any]) -> list[str]:
    """A report in short lines."""
    terms = ", ".join(f"{name} {value}" for name, value in report["terms"].items())
    lines = [f"terms: {terms}; gradient's norm {report['grad_norm']}; lr {report['lr']:.3g}"]
    if "process" in report:
        lines.append(f"process {report['process']} of {len(report['by_process'])}")
    for name, found in report["streams"].items():
        rows = found["images"]
        if rows:
            words = ", ".join(_image_in_words(row) for row in rows[:SHOWN])
            more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
            lines.append(f"stream {name}: not finite by themselves: images {words}{more}")
        else:
            numbers = ", ".join(map(str, found["indices"][:SHOWN]))
            more = ", ..." if len(found["indices"]) > SHOWN else ""
            lines.append(
                f"stream {name}: images {numbers}{more}; of {found['size']}, {found['looked_at']} "
                "were looked at and are finite by themselves"
            )
    if report["layer"]:
        lines.append(f"first layer with an output that is not finite: {report['layer']}")
    if report["parameters"]:
        lines.append(f"parameters that are not finite: {', '.join(report['parameters'][:SHOWN])}")
    largest = ", ".join(f"{g['parameter']} {g['largest']}" for g in report["gradients"][:SHOWN])
    return [*lines, f"largest gradients: {largest}"]


def write_report(run: Path, report: Mapping[str, Any]) -> Path | None:
    """Write ``nonfinite-STEP.json`` under a name that is free; None if there are too many."""
    if len(list(run.glob("nonfinite-*.json"))) >= MOST_REPORTS:
        return None
    path, number = run / f"nonfinite-{report['step']}.json", 1
    while path.exists():
        number += 1
        path = run / f"nonfinite-{report['step']}-{number}.json"
    write_atomically(path, json.dumps(report, indent=1, allow_nan=False).encode())
    return path


def _headline(report: Mapping[str, Any]) -> str:
    bad = [(n, v) for n, v in report["terms"].items() if isinstance(v, str)]
    if bad:
        return f"loss {bad[0][0]!r} is {bad[0][1]}"
    return f"the gradient's norm is {report['grad_norm']}"


def _image_in_words(row: Mapping[str, Any]) -> str:
    file = f" ({row['file']})" if row.get("file") else ""
    terms = " and ".join(row["terms"]) or "its gradient"
    return f"{row.get('image', row['position'])}{file} [{terms}, sigma {row['sigma']}]"


def _taken_again(loss: TrainingLoss, batches: Mapping[str, Batch], parts: int) -> dict[str, Tensor]:
    """The gradient of the whole step, by parameter."""
    named = [(n, p) for n, p in loss.model.named_parameters() if p.requires_grad]
    totals: dict[str, Tensor] = {}
    for part in split_batches(dict(batches), parts, True):
        for (name, _), own in zip(named, _gradient(loss.forward(part), named), strict=True):
            if own is not None:
                totals[name] = totals.get(name, torch.zeros_like(own)) + own / parts
    return totals


def _bad(gradients: Mapping[str, Tensor]) -> bool:
    return not all(bool(gradient.isfinite().all()) for gradient in gradients.values())


def _largest(gradients: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Gradients that are not finite first, then the largest."""
    rows = []
    for name, gradient in gradients.items():
        bad = int((~gradient.isfinite()).sum())
        largest = float(gradient.abs().max())
        rows.append((bad, math.inf if math.isnan(largest) else largest, name, gradient))
    rows.sort(key=lambda row: (-row[0], -row[1]))
    return [
        {
            "parameter": name,
            "largest": _plain(largest),
            "norm": _plain(float(gradient.norm())),
            "not_finite": bad,
            "entries": gradient.numel(),
        }
        for bad, largest, name, gradient in rows[: 4 * SHOWN]
    ]


def _gradient(losses: Losses, named: list[tuple[str, nn.Parameter]]) -> tuple[Tensor | None, ...]:
    """By parameter; not by `backward`, which other processes would hear of."""
    found: tuple[Tensor | None, ...] = torch.autograd.grad(
        losses.total, [p for _, p in named], allow_unused=True
    )
    return found


def _images(loss: TrainingLoss, stream: str, batch: Batch) -> dict[str, Any]:
    """The images of a batch that are at fault by themselves."""
    count = len(batch.x)
    if loss.model.has_batch_norm:  # an image by itself is another thing
        return {"images": [], "looked_at": 0, "size": count}
    named = [(n, p) for n, p in loss.model.named_parameters() if p.requires_grad]
    rows, looked_at, begun = [], 0, time.perf_counter()
    for position, part in enumerate(split_batches({stream: batch}, count, True)):
        if time.perf_counter() - begun > SECONDS:
            break
        looked_at += 1
        losses = loss.forward(part)
        terms = [name for name, mean in losses.parts.items() if not math.isfinite(float(mean))]
        gradients = _gradient(losses, named)
        if terms or not all(bool(g.isfinite().all()) for g in gradients if g is not None):
            own = part[stream]
            rows.append(
                {
                    "position": position,
                    "terms": terms,
                    "sigma": f"{float(own.sigma[0]) * 255:.4g}/255",
                    "label": None if own.labels is None else int(own.labels[0]),
                    "image_is_finite": bool(own.x.isfinite().all()),
                    "noisy_is_finite": bool(own.y.isfinite().all()),
                }
            )
    return {"images": rows, "looked_at": looked_at, "size": count}


def _name_images(trainer: Trainer, name: str, step: int, found: dict[str, Any]) -> None:
    """Add the numbers of a batch's images in the data set, and names of files."""
    stream = trainer.streams[name]
    numbers = stream.numbers(step)
    source, reader = stream.source, getattr(stream.source, "reader", None)
    found["indices"] = numbers
    for row in found["images"]:
        row["image"] = numbers[row["position"]]
        if isinstance(source, StreamedSet) and isinstance(reader, FolderReader):
            row["file"] = reader.name(int(source.rows[row["image"]]))


@contextmanager
def _eagerly(loss: TrainingLoss) -> Iterator[None]:
    """Within, scores are recorded, as hooks of layers can follow them."""
    recorded, loss.recorded = loss.recorded, True
    try:
        yield
    finally:
        loss.recorded = recorded


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


def _at_fault(own: Mapping[str, Any]) -> bool:
    return any(found["images"] for found in own["streams"].values())


def _plain(value: float) -> float | str:
    """A number as JSON has it; others in words."""
    return float(f"{value:.6g}") if math.isfinite(value) else str(value)
