"""NaN and Inf: diagnosis of a step whose loss or gradient has them, and its report.

The optimiser skips such a step, and all random numbers are functions of (seed, stream, step). So
the step can be repeated eagerly and part by part: first the whole step, to check the outputs of
each layer and the gradient of each parameter; then each image by itself, in evaluation mode, in
which BatchNorm does not mix images and dropout is off. Buffers and modes are restored afterwards.
The report is written to ``RUN/nonfinite-STEP.json``.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from ebmkit.data import Batch, Stream
from ebmkit.data.imagesets import origin
from ebmkit.distributed import DistributedContext
from ebmkit.errors import UserError, first_line, shown
from ebmkit.objectives import TrainingLoss
from ebmkit.storage import write_atomically
from ebmkit.storage.atomic import free_name
from ebmkit.training.optim import SAM
from ebmkit.training.step import StepStats, split_batches

LARGEST, LARGEST_PARAMETERS, LARGEST_IMAGES = 20, 5, 5
"""Maximum number of gradients, parameters and images in a report, the largest first."""

SHOWN, SHOWN_LARGEST = 5, 3
"""Maximum number of failing images and parameters, and of the largest ones, in the message."""

SECONDS = 60.0
"""Time limit for checking the images of a stream one by one, seconds."""

MOST_REPORTS = 20
"""Maximum number of reports of a run."""

Named = Sequence[tuple[str, nn.Parameter]]


def diagnose(
    loss: TrainingLoss,
    batches: Mapping[str, Batch],
    parts: int = 1,
    gradients: Mapping[str, Tensor] | None = None,
    sam: SAM | None = None,
) -> dict[str, Any]:
    """Repeat a step part by part, in this process; only the parameters' ``grad`` changes.

    Args:
        loss: model and objectives.
        batches: stream -> its batch.
        parts: number of parts that a batch is split into, to save memory.
        gradients: gradients of the step by parameter, if available; reported if the repeated step
            is finite.
        sam: sharpness-aware minimisation, which computes the gradient a second time.

    Returns:
        Plain values. ``reproduced``: whether the repeated step has NaN or Inf. ``layer``: the first
        with NaN or Inf in its output, or None. ``gradients``: those with NaN or Inf, then the
        largest. ``parameters``: those with NaN or Inf; ``largest_parameters``. ``streams``: by
        name, ``size`` of the batch, ``looked_at``: number of images checked, ``images``: those
        whose own loss or gradient is NaN or Inf, and ``largest``: others with large gradients.
    """
    model, buffers = loss.model, [(b, b.clone()) for b in loss.model.buffers()]
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    training, use_autograd = model.training, loss.use_autograd
    try:
        loss.use_autograd = True
        with _first_bad_layer(model) as layer:
            again, finite = _repeat_step(loss, batches, parts, named)
            if sam is not None and finite:
                with sam.perturbed(loss):
                    again, finite = _repeat_step(loss, batches, parts, named)
        model.eval()
        streams = {name: _images(loss, name, batch, named) for name, batch in batches.items()}
    finally:
        loss.use_autograd = use_autograd
        model.train(training)
        for buffer, before in buffers:  # statistics of BatchNorm, which a forward pass updates
            buffer.copy_(before)
        for _, p in named:
            p.grad = None
    everything = dict(model.named_parameters())
    return {
        "reproduced": not finite,
        "layer": layer[0] if layer else None,
        "gradients": _largest(again if gradients is None or not finite else gradients, LARGEST),
        "parameters": [n for n, p in everything.items() if not bool(p.isfinite().all())],
        "largest_parameters": _largest(everything, LARGEST_PARAMETERS),
        "streams": streams,
    }


def _plain(value: float | Tensor) -> float | str:
    """A number for JSON; "nan", "inf" or "-inf", which JSON does not have, as strings."""
    value = float(value)
    return float(f"{value:.6g}") if math.isfinite(value) else str(value)


def _repeat_step(
    loss: TrainingLoss, batches: Mapping[str, Batch], parts: int, named: Named
) -> tuple[dict[str, Tensor], bool]:
    """Gradient of the whole step by parameter, and whether it and all losses are finite."""
    totals: dict[str, Tensor] = {}
    finite = True
    for part in split_batches(dict(batches), parts, True):
        losses = loss.forward(part)  # not loss(part), which may be compiled
        finite = finite and all(math.isfinite(mean) for mean in losses.parts.values())
        for name, own in _gradient(losses.total, named).items():
            totals[name] = totals.get(name, torch.zeros_like(own)) + own / parts
    for name, p in named:
        p.grad = totals.get(name)
    return totals, finite and all(bool(g.isfinite().all()) for g in totals.values())


def _gradient(total: Tensor, named: Named) -> dict[str, Tensor]:
    """Gradient by parameter; without `backward`, which would synchronise processes."""
    found = torch.autograd.grad(total, [p for _, p in named], allow_unused=True)
    return {n: g for (n, _), g in zip(named, found, strict=True) if g is not None}


@torch.no_grad()
def _largest(tensors: Mapping[str, Tensor], count: int) -> list[dict[str, Any]]:
    """Facts of ``count`` tensors: those with NaN or Inf first, then those of largest entries."""
    bad = {name: int((~tensor.isfinite()).sum()) for name, tensor in tensors.items()}

    def order(name: str) -> tuple[int, float]:
        largest = _max_abs(tensors[name])
        return -bad[name], -math.inf if math.isnan(largest) else -largest

    return [
        {
            "parameter": name,
            "largest": _plain(_max_abs(tensor := tensors[name])),
            "largest_finite": _plain(_max_abs(tensor[tensor.isfinite()])),
            "norm": _plain(tensor.norm()),
            "not_finite": bad[name],
            "entries": tensor.numel(),
        }
        for name in sorted(tensors, key=order)[:count]
    ]


def _max_abs(tensor: Tensor) -> float:
    """The largest absolute value of an entry; 0 without entries."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _images(loss: TrainingLoss, stream: str, batch: Batch, named: Named) -> dict[str, Any]:
    """Check the images of a batch one by one, those whose data has NaN or Inf first."""
    size = len(batch.x)
    single = [part[stream] for part in split_batches({stream: batch}, size, True)]
    order = sorted(range(size), key=lambda i: all(_finite_by_name(single[i]).values()))
    at_fault, others, start_time = [], [], time.perf_counter()
    for position in order:
        if time.perf_counter() - start_time > SECONDS:
            break
        own = single[position]
        losses = loss.forward({stream: own})
        norm = float(nn.utils.get_total_norm(list(_gradient(losses.total, named).values())))
        bad = [name for name, value in losses.parts.items() if not math.isfinite(value)]
        row = {
            "position": position,
            "losses": {name: _plain(value) for name, value in losses.parts.items()},
            "gradient": _plain(norm),
            "sigma": f"{float(own.sigma[0]) * 255:.4g}/255",
            "label": None if own.labels is None else int(own.labels[0]),
            "range": [_plain(float(own.x.min())), _plain(float(own.x.max()))],
        }
        if bad or not math.isfinite(norm):
            at_fault.append({**row, "terms": bad, "finite": _finite_by_name(own)})
        else:
            others.append((norm, row))
    others.sort(key=lambda pair: -pair[0])
    return {
        "size": size,
        "looked_at": len(at_fault) + len(others),
        "images": sorted(at_fault, key=lambda row: int(row["position"])),
        "largest": [row for _, row in others[:LARGEST_IMAGES]],
    }


def _finite_by_name(own: Batch) -> dict[str, bool]:
    """Whether an image, its noisy version, its noise and added columns are finite, by name."""
    given = {"image": own.x, "noisy": own.y, "sigma": own.sigma, "noise": own.eps}
    given |= {name.split(".")[-1]: column for name, column in own.extra.items()}
    return {name: bool(t.isfinite().all()) for name, t in given.items() if t is not None}


@contextmanager
def _first_bad_layer(model: nn.Module) -> Iterator[list[str]]:
    """Collect the names of layers with NaN or Inf in their outputs, in order."""
    found: list[str] = []
    layers = {m: name for name, m in model.named_modules() if next(m.children(), None) is None}

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        if module in layers and isinstance(output, Tensor) and not bool(output.isfinite().all()):
            found.append(f"{layers[module]} ({type(module).__name__})")

    with register_module_forward_hook(look):
        yield found


def report(
    find: Callable[[], dict[str, Any]],
    step: int,
    stats: StepStats,
    streams: Mapping[str, Stream],
    world: DistributedContext,
    **circumstances: Any,
) -> dict[str, Any]:
    """Report on ``step``, counted from 1, as plain values; all processes must call this together.

    ``find`` calls `diagnose` with the data of the step; ``circumstances``: lr, precision, compiled.
    """
    try:
        own = find()
    except Exception as error:  # must not hide the original error nor leave processes waiting
        own = {"failed": f"{type(error).__name__}: {first_line(error)}", "streams": {}}
    for name, stream in streams.items():
        found = own["streams"].setdefault(name, {})
        found["indices"] = stream.numbers(step - 1)
        for row in (*found.get("images", ()), *found.get("largest", ())):
            number = found["indices"][row["position"]]
            row |= origin(stream.source, number)
            if number in stream.skipped:
                row["left_out"] = "cannot be read: replaced by one of the next images"
    everyone = world.gather(own)
    result = {
        "step": step,
        "terms": {name: _plain(value) for name, value in stats.parts.items()},
        "grad_norm": _plain(stats.grad_norm),
        **circumstances,
        **own,
    }
    if len(everyone) > 1:
        number = max(range(len(everyone)), key=lambda n: (_at_fault(everyone[n]), -n))
        result |= {**everyone[number], "process": number, "by_process": everyone}
    return result


def _at_fault(own: Mapping[str, Any]) -> tuple[bool, bool, bool]:
    """Evidence that the cause lies in this process's data; larger is stronger."""
    if "failed" in own:
        return False, False, False
    images = any(found["images"] for found in own["streams"].values())
    return images, own["layer"] is not None, own["reproduced"]


def write_report(run: Path, report: Mapping[str, Any]) -> str:
    """Write ``nonfinite-STEP.json`` under a free name, up to `MOST_REPORTS` per run. Return text
    with its name, or with the reason why it was not written."""
    if len(list(run.glob("nonfinite-*.json"))) >= MOST_REPORTS:
        return f"no report: the run already has {MOST_REPORTS}"
    path = free_name(run / f"nonfinite-{report['step']}.json")
    try:
        write_atomically(path, json.dumps(report, indent=1, allow_nan=False).encode())
    except UserError as error:
        return f"no report: {error}"
    return f"report: {path.name}"


def describe(report: Mapping[str, Any]) -> list[str]:
    """Summarise a report in short lines."""
    terms = ", ".join(f"{name} {value}" for name, value in report["terms"].items())
    lines = [f"terms: {terms}; gradient's norm {report['grad_norm']}; lr {report['lr']:.3g}"]
    if "process" in report:
        lines.append(f"process {report['process']} of {len(report['by_process'])}:")
    lines += [f"stream {name}: {_stream(found)}" for name, found in report["streams"].items()]
    if "failed" in report:
        return [*lines, f"the step could not be repeated: {report['failed']}"]
    if report["layer"]:
        lines.append(f"first layer with NaN or Inf in its output: {report['layer']}")
    if report["parameters"]:
        lines.append(f"parameters with NaN or Inf: {_some(report['parameters'])}")
    else:
        lines.append(f"largest parameters: {_sizes(report['largest_parameters'])}")
    return [*lines, f"largest gradients: {_sizes(report['gradients'])}"]


def advice(report: Mapping[str, Any]) -> str:
    """Suggested fix."""
    lower = "try a lower optimizer.lr, or optimizer.clip_norm=1"
    if report["precision"] != "fp32":
        lower += ", or --precision fp32"
    if "failed" in report:
        return lower
    rows = [row for found in report["streams"].values() for row in found["images"]]
    if report["parameters"]:
        return "resume from an earlier checkpoint: these parameters were NaN or Inf before the step"
    if any(not row["finite"]["image"] for row in rows):
        return "repair or remove these images: they have NaN or Inf pixels"
    if not report["reproduced"]:
        how = "repeated eagerly" if report["compiled"] else "repeated"
        return (
            f"{how}, the step is finite: resume with --resume, and if it fails again "
            "with --compile off, or on another device"
        )
    return lower


def _stream(found: Mapping[str, Any]) -> str:
    """Summarise the findings of a stream."""
    rows = found.get("images")
    if rows and len(rows) == found["size"]:
        return f"none of the {len(rows)} images is finite by itself"
    if rows:
        return f"NaN or Inf by themselves: images {_some([_image(row) for row in rows])}"
    images = f"images {_some([str(n) for n in found['indices']])}"
    if rows is None:
        return images
    looked_at, size = found["looked_at"], found["size"]
    count = f"all {size}" if looked_at == size else f"{looked_at} of {size} were checked and"
    return f"{images}; {count} are finite by themselves"


def _image(row: Mapping[str, Any]) -> str:
    words = [" and ".join(row["terms"]) or "its gradient", f"sigma {row['sigma']}"]
    words += [] if row["label"] is None else [f"label {row['label']}"]
    words += [f"{name} NaN or Inf" for name, fine in row["finite"].items() if not fine]
    file = f" ({shown(row['file'])})" if "file" in row else ""
    return f"{row['image']}{file} [{', '.join(words)}]"


def _sizes(rows: list[Mapping[str, Any]]) -> str:
    shares = [(row, row["not_finite"] / row["entries"]) for row in rows[:SHOWN_LARGEST]]
    return ", ".join(
        f"{row['parameter']} {row['largest']}{f' ({bad:.0%} NaN or Inf)' if bad else ''}"
        for row, bad in shares
    )


def _some(words: list[str]) -> str:
    """The first of ``words``, and the number of further ones."""
    left = len(words) - SHOWN
    return ", ".join(words[:SHOWN]) + (f" and {left} more" if left > 0 else "")
