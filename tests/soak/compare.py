"""Bit-exact comparison of two runs, except for measured times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ebmkit.storage.verify import verify_run
from ebmkit.training import RunFolder

CLOCK = ("images_per_s", "seconds")

PER_PROCESS = ("environment.json", "cost.json")
"""Files that describe one process or its speed."""


def differences(one: Path, other: Path) -> list[str]:
    """Descriptions of all differences between two finished runs."""
    found = []
    names = [{f.name for f in verify_run(run)} - {*PER_PROCESS} for run in (one, other)]
    if names[0] != names[1]:
        found.append(f"files: {sorted(names[0] ^ names[1])}")
    for run in (one, other):
        found += [f"{f.name} is {f.state}" for f in verify_run(run) if f.state != "whole"]
        found += [f"{p.name} was left behind" for p in run.rglob("*.partial")]
    for name in sorted(names[0] & names[1]):
        a, b = (run / name for run in (one, other))
        if name.endswith((".safetensors", ".h5")) or name == "model.json":
            if a.read_bytes() != b.read_bytes():
                found.append(f"{name} differs")
        elif name.endswith(".jsonl") and rows(a) != rows(b):
            found.append(f"{name} differs")
        elif name.endswith(".pt"):
            states = [torch.load(path, weights_only=True) for path in (a, b)]
            found += [f"{name}: {where} differs" for where in unequal(*states)]
    return found


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a log without measured times."""
    lines = path.read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]


def unequal(one: Any, other: Any, where: str = "state") -> list[str]:
    """Where nested states differ. Tensors are compared by their bits, so NaN equals NaN."""
    if type(one) is not type(other):
        return [where]
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        if same:
            a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
            same = torch.equal(a, b)
        return [] if same else [where]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{where}: keys"]
        keys = [key for key in one if key not in CLOCK]
        return [d for key in keys for d in unequal(one[key], other[key], f"{where}.{key}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [f"{where}: length"]
        pairs = zip(one, other, strict=True)
        return [d for i, (a, b) in enumerate(pairs) for d in unequal(a, b, f"{where}.{i}")]
    return [] if one == other else [where]


def last_step(run: Path) -> int:
    """The step in the name of the newest checkpoint; 0 if there is none."""
    names = [p.stem for p in (run / "checkpoints").glob("step-*.pt")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


def logged_step(run: Path) -> int:
    """The step of the last row of the log; 0 if there is none."""
    found = RunFolder(run).metrics()
    return found[-1]["step"] if found else 0
