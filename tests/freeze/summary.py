"""The summary of a result: its numbers under flat names, and digests of its arrays.

It has no text, since wording may change, and no measured times, memory, versions, paths or
repeated settings of the command.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

VOLATILE = {
    *("environment", "settings", "options", "model", "facts", "notes", "command", "fingerprint"),
    *("seconds", "hours", "images_per_s", "step_seconds", "memory", "processes", "threads"),
    *("batch_size", "created", "date", "git_commit", "device"),
}
"""Fields of JSON documents that are measured at each call or repeat its settings."""

LONG = 8
"""Length above which a list of numbers is treated as an array."""


def summarize(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The numbers and digests of nested results.

    Args:
        found: name -> number, text, array, tensor, or a mapping or list of these. The summary of
            `Weights` does not depend on the names and the order of its tensors.

    Returns:
        ``numbers``: flat name -> float, for arrays mean, root mean square and largest magnitude;
        ``digests``: flat name -> SHA-256 of type, shape and bytes, and that of all of them.
    """
    numbers: dict[str, float] = {}
    digests: dict[str, str] = {}
    for name, value in _leaves(found, ""):
        if isinstance(value, float):
            numbers[name] = value
            continue
        parts = value if isinstance(value, Weights) else [value]
        digests[name] = _hash(sorted(_digest(part) for part in parts))
        numbers |= {f"{name}: {key}": v for key, v in _moments(parts).items()}
    total = [f"{name} {value!r}" for name, value in sorted((numbers | digests).items())]
    return {"numbers": numbers, "digests": digests | {"": _hash(total)}}


class Weights(list[np.ndarray]):
    """The tensors of a model, whose names and order do not matter."""


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    if isinstance(value, Mapping):
        for key, own in value.items():
            if str(key) not in VOLATILE:
                yield from _leaves(own, f"{name}/{key}" if name else str(key))
    elif isinstance(value, (bool, int, float)):
        yield name, float(value)
    elif isinstance(value, (np.ndarray, Weights)):
        yield name, value
    elif isinstance(value, Sequence) and not isinstance(value, str):
        array = _array(value)
        if array is not None and array.size > LONG:
            yield name, array
        else:
            for i, own in enumerate(value):
                yield from _leaves(own, f"{name}[{i}]")


def _array(value: Sequence[Any]) -> np.ndarray | None:
    """A list of numbers, or of such lists of one length, as an array; None for other values."""
    try:
        array = np.asarray(value)
    except ValueError:
        return None
    return array.astype(np.float64) if array.dtype.kind in "bif" else None


def _digest(array: np.ndarray) -> str:
    flat = np.ascontiguousarray(array)
    return hashlib.sha256(f"{flat.dtype} {array.shape}".encode() + flat.tobytes()).hexdigest()


def _hash(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _moments(parts: Sequence[np.ndarray]) -> dict[str, float]:
    """Moments of all finite values; the sums are exact, so their order does not matter."""
    flat = np.concatenate([np.asarray(p).ravel().astype(np.float64) for p in parts] or [[]])
    finite = flat[np.isfinite(flat)]
    nonfinite = {"not finite": float(flat.size - finite.size)} if finite.size < flat.size else {}
    if not finite.size:
        return nonfinite
    mean = math.fsum(finite.tolist()) / finite.size
    square = math.fsum((finite**2).tolist()) / finite.size
    return {"mean": mean, "rms": square**0.5, "largest": float(np.abs(finite).max()), **nonfinite}


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Compare two summaries.

    Returns:
        ``same``, ``renamed`` (the same values under other names) or ``different``, and lines that
        describe the differences, the largest relative one first.
    """
    if old["digests"][""] == new["digests"][""]:
        return "same", []
    left, right = ({**s["numbers"], **s["digests"]} for s in (old, new))
    del left[""], right[""]
    gone, added = sorted(left.keys() - right.keys()), sorted(right.keys() - left.keys())
    if sorted(map(repr, left.values())) == sorted(map(repr, right.values())):
        return "renamed", [f"{', '.join(gone[:3])} -> {', '.join(added[:3])}"]
    changed = [n for n in left.keys() & right.keys() if repr(left[n]) != repr(right[n])]
    bits = sorted(name for name in changed if isinstance(left[name], str))
    by = {name: _relative(left[name], right[name]) for name in set(changed) - set(bits)}
    worst = sorted(by, key=lambda name: (-by[name], name))
    lines = [f"{len(by)} of {len(old['numbers'])} numbers differ"] if by else []
    lines += [f"{n}: {left[n]!r} -> {right[n]!r} (relative {by[n]:.2g})" for n in worst[:3]]
    for what, names in (("other bits", bits), ("gone", gone), ("new", added)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"{what}: {', '.join(names[:3])}{more}")
    return "different", lines


def _relative(a: float, b: float) -> float:
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b))
