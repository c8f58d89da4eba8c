"""What becomes of a run whose loss or gradient is not finite.

The optimiser skips such a step, and whatever else it moved is put back, so the run is still what it
was before it. Everything drawn is a function of (seed, stream, step): so the step can be looked at
again (`ebmkit.training.diagnose`), also where the host hears of it later. What is found is written
to ``RUN/nonfinite-STEP.json``; the state before the step becomes a checkpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ebmkit.data import Batch
from ebmkit.data.streamed import origin
from ebmkit.errors import UserError, shown
from ebmkit.randomness import keyed_seed
from ebmkit.storage import write_atomically
from ebmkit.training.diagnose import diagnose, plain
from ebmkit.training.engine import StepStats

if TYPE_CHECKING:
    from ebmkit.training.trainer import Trainer

__all__ = ["is_finite", "keep_report", "report_of", "stopped", "told", "write_report"]

SHOWN = 5
"""Images and parameters in the message."""

LARGEST = 3
"""Largest gradients and parameters in the message."""

MOST_REPORTS = 20
"""Reports that a run keeps."""


def is_finite(reading: StepStats) -> bool:
    """Whether the losses and the gradient of a step are numbers."""
    return all(map(math.isfinite, [*reading.parts.values(), reading.grad_norm]))


def stopped(trainer: Trainer, reading: StepStats) -> UserError:
    """The error that ends a run of which a step is not finite, after saving the state before it.

    Args:
        trainer: all of its processes must call.
        reading: of the first step that failed.
    """
    done = trainer.step - reading.skipped
    report = report_of(trainer, done + 1, reading)
    rate = trainer.rate_at(done - 1) if done else trainer.config.optimizer.lr
    trainer.update.undo_skipped(rate)
    trainer.step = trainer.card.steps = done
    where = ""
    if trainer.run is not None:
        where = f"; the state before it is saved in {str(trainer.run.path)!r}"
        try:
            trainer.save()
        except UserError as error:
            where = f"; {error}"
        where += keep_report(trainer.run.path, report)
    sentence = f"{_headline(report)} at step {done + 1}: stopped before the update{where}"
    return UserError(sentence, [*told(report), _advice(report)])


def report_of(
    trainer: Trainer,
    step: int,
    reading: StepStats,
    drawn: Mapping[str, Batch] | None = None,
) -> dict[str, Any]:
    """What is found of ``step`` in all processes, as plain values.

    Args:
        trainer: whose parameters are those before the step. All of its processes must call.
        step: counted from 1.
        reading: of that step.
        drawn: its batches, with their negatives; None: they are drawn again.
    """
    try:
        own = _looked_at(trainer, step, drawn)
    except Exception as error:  # must not hide what it was to explain, nor leave others waiting
        reason = next(iter(str(error).strip().splitlines()), "")
        own = {"failed": f"{type(error).__name__}: {reason}", "streams": {}}
    for name, stream in trainer.streams.items():
        found = own["streams"].setdefault(name, {})
        found["indices"] = stream.numbers(step - 1)
        for row in (*found.get("images", ()), *found.get("largest", ())):
            number = found["indices"][row["position"]]
            row |= origin(stream.source, number)
            if number in stream.skipped:
                row["left_out"] = "cannot be read: one of the next took its place"
    everyone = trainer.world.gather(own)
    report = {
        "step": step,
        "terms": {name: plain(value) for name, value in reading.parts.items()},
        "grad_norm": plain(reading.grad_norm),
        "lr": trainer.rate_at(step - 1),
        "precision": trainer.update.precision,
        "compiled": trainer.update.compiled,
        **own,
    }
    if len(everyone) > 1:
        number = max(range(len(everyone)), key=lambda n: (_at_fault(everyone[n]), -n))
        report |= {**everyone[number], "process": number, "by_process": everyone}
    return report


def told(report: Mapping[str, Any]) -> list[str]:
    """A report in short lines."""
    terms = ", ".join(f"{name} {value}" for name, value in report["terms"].items())
    lines = [f"terms: {terms}; gradient's norm {report['grad_norm']}; lr {report['lr']:.3g}"]
    if "process" in report:
        lines.append(f"process {report['process']} of {len(report['by_process'])}:")
    lines += [f"stream {name}: {_stream(found)}" for name, found in report["streams"].items()]
    if "failed" in report:
        return [*lines, f"the step could not be taken again: {report['failed']}"]
    if report["layer"]:
        lines.append(f"first layer with an output that is not finite: {report['layer']}")
    if report["parameters"]:
        lines.append(f"parameters that are not finite: {_some(report['parameters'])}")
    else:
        lines.append(f"largest parameters: {_largest(report['largest_parameters'])}")
    return [*lines, f"largest gradients: {_largest(report['gradients'])}"]


def write_report(run: Path, report: Mapping[str, Any]) -> Path | None:
    """Write ``nonfinite-STEP.json`` under a name that is free; None if there are too many.

    Raises:
        UserError: if it cannot be written.
    """
    if len(list(run.glob("nonfinite-*.json"))) >= MOST_REPORTS:
        return None
    path, number = run / f"nonfinite-{report['step']}.json", 1
    while path.exists():
        number += 1
        path = run / f"nonfinite-{report['step']}-{number}.json"
    write_atomically(path, json.dumps(report, indent=1, allow_nan=False).encode())
    return path


def keep_report(run: Path, report: Mapping[str, Any]) -> str:
    """Write a report if that can be done; where it is, in words that go on a sentence."""
    try:
        path = write_report(run, report)
    except UserError as error:
        return f"; no report: {error}"
    return f"; no report: there are {MOST_REPORTS}" if path is None else f"; report: {path.name}"


def _looked_at(trainer: Trainer, step: int, drawn: Mapping[str, Batch] | None) -> dict[str, Any]:
    """What this process finds of ``step``."""
    if drawn is None:
        drawn = next(trainer.batches(step - 1, step))
        drawn = trainer.loss.prepared(trainer.preparations, drawn, step - 1)
    left = None
    if trainer.step == step and trainer.update.clip_norm is None:  # nothing touched them since
        named = trainer.model.named_parameters()
        left = {name: p.grad for name, p in named if p.grad is not None}
    if trainer.drops:
        seed, rank = trainer.config.seed, trainer.world.rank
        torch.manual_seed(keyed_seed(seed, "dropout", step - 1, rank))
    sharpness = trainer.update.sharpness
    perturbed = None if sharpness is None else sharpness.perturbed
    return diagnose(trainer.loss, drawn, trainer.config.compute.accumulate, left or None, perturbed)


def _headline(report: Mapping[str, Any]) -> str:
    bad = [(n, v) for n, v in report["terms"].items() if isinstance(v, str)]
    if bad:
        return f"loss {bad[0][0]!r} is {bad[0][1]}"
    return f"the gradient's norm is {report['grad_norm']}"


def _advice(report: Mapping[str, Any]) -> str:
    lower = "try a lower optimizer.lr, or optimizer.clip_norm=1"
    if report["precision"] != "fp32":
        lower += ", or --precision fp32"
    if "failed" in report:
        return lower
    rows = [row for found in report["streams"].values() for row in found["images"]]
    if report["parameters"]:
        return "go on from an earlier checkpoint: these parameters were spoilt before this step"
    if any(not row["finite"]["image"] for row in rows):
        return "mend these images, or leave them out: they hold pixels that are not numbers"
    if not report["reproduced"]:
        how = "eagerly " if report["compiled"] else ""
        return (
            f"taken again {how}the step is finite: go on with --resume, and if it fails again "
            "with --compile off, or on another device"
        )
    return lower


def _stream(found: Mapping[str, Any]) -> str:
    """What was found of a stream, in words."""
    rows = found.get("images")
    if rows and len(rows) == found["size"]:
        return f"none of the {len(rows)} images is finite by itself"
    if rows:
        return f"not finite by themselves: images {_some([_image(row) for row in rows])}"
    images = f"images {_some([str(n) for n in found['indices']], ', ...')}"
    if rows is None:
        return images
    if found["looked_at"] == found["size"]:
        return f"{images}; all {found['size']} are finite by themselves"
    return (
        f"{images}; {found['looked_at']} of {found['size']} were looked at and are finite by "
        "themselves"
    )


def _image(row: Mapping[str, Any]) -> str:
    words = [" and ".join(row["terms"]) or "its gradient", f"sigma {row['sigma']}"]
    words += [] if row["label"] is None else [f"label {row['label']}"]
    words += [f"{name} not finite" for name, fine in row["finite"].items() if not fine]
    file = f" ({shown(row['file'])})" if "file" in row else ""
    return f"{row['image']}{file} [{', '.join(words)}]"


def _largest(rows: list[Mapping[str, Any]]) -> str:
    words = []
    for row in rows[:LARGEST]:
        bad = row["not_finite"] / row["entries"]
        share = f" ({bad:.0%} not finite)" if bad else ""
        words.append(f"{row['parameter']} {row['largest']}{share}")
    return ", ".join(words)


def _some(words: list[str], more: str | None = None) -> str:
    """The first of ``words``, and how many more there are (or just ``more``)."""
    left = len(words) - SHOWN
    rest = f" and {left} more" if more is None else more
    return ", ".join(words[:SHOWN]) + (rest if left > 0 else "")


def _at_fault(own: Mapping[str, Any]) -> tuple[bool, bool, bool]:
    """How sure it is that the fault lies in what a process was given; larger is surer."""
    if "failed" in own:
        return False, False, False
    images = any(found["images"] for found in own["streams"].values())
    return images, own["layer"] is not None, own["reproduced"]
