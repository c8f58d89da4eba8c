"""Names that other programs have for options and settings, to suggest those of ebmkit."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator
from typing import Any

SYNONYMS = {
    "lr": "learning-rate lr0 base-lr",
    "batch-size": "batch bs b",
    "workers": "num-workers n-workers j",
    "epochs": "epoch num-epochs max-epochs num-train-epochs",
    "steps": "iterations iters num-steps max-steps n-steps step",
    "ema": "ema-decay model-ema",
    "backbone": "model arch network net",
    "objective": "loss criterion",
    "data-dir": "data root data-root data-path dataset-dir path",
    "dataset": "data dataset-name",
    "out": "output output-dir out-dir save-dir o",
    "resume": "checkpoint ckpt resume-from",
    "image-size": "imgsz img-size size resolution",
    "device": "gpu cuda accelerator",
    "precision": "amp fp16 bf16 half dtype",
    "config": "cfg c yaml",
    "sigma": "noise noise-level std level",
    "label": "class class-label c y",
    "count": "num-samples samples number",
    "suite": "metrics task tasks",
    "limit": "num-images max-images subset",
    "top": "topk top-k k",
    "quiet": "silent q",
    "verbose": "debug v",
    "scale": "guidance-scale cfg-scale",
}
"""Option -> names that other programs have for it."""

KEYS = {
    "optimizer": "optimizer.kind",
    "opt": "optimizer.kind",
    "wd": "optimizer.weight_decay",
    "scheduler": "optimizer.schedule",
    "lr-scheduler": "optimizer.schedule",
    "warmup": "optimizer.warmup_steps",
    "grad-clip": "optimizer.clip_norm",
    "clip-grad": "optimizer.clip_norm",
    "max-grad-norm": "optimizer.clip_norm",
    "accumulate-grad-batches": "compute.accumulate",
    "val-images": "validation_images",
    "save-every": "checkpoint_every",
    "eval-every": "validate_every",
    "limit": "dataset.limit",
}
"""Name that other programs have for a setting -> the key of ``ebmkit train --set``."""


def meant(
    name: str, known: Collection[str], keys: Callable[[], list[str]]
) -> tuple[str | None, list[str]]:
    """What an unknown option means: one of the ``known`` options, or else keys of settings.

    Args:
        name: the unknown option.
        known: options, with hyphens between words.
        keys: gives the keys of all settings, such as ``optimizer.lr``; may import PyTorch.
    """
    name = name.replace("_", "-").lower()
    names = [name, *(own for own, others in SYNONYMS.items() if name in others.split())]
    exact = [own for own in names if own in known]
    if name not in KEYS:
        exact += difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    if exact:
        return exact[0], []
    every, leaf = keys(), name.replace("-", "_")
    if KEYS.get(name) in every:
        return None, [KEYS[name]]
    return None, [key for key in every if key.split(".")[-1] == leaf]


def field_keys(model: Any, prefix: str = "") -> Iterator[str]:
    """Names of the fields of a pydantic ``model``, with dots for those of inner models."""
    for name, field in model.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            yield from field_keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
