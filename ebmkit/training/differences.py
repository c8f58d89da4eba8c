"""Whether two configurations make the same run."""

from __future__ import annotations

from typing import Any

__all__ = ["difference"]

_FREE_TO_CHANGE = (
    "device",
    "log_every",
    "validate_every",
    "checkpoint_every",
    "keep_checkpoints",
    "dataset.data_dir",
    "dataset.workers",
    "dataset.unreadable",
    "dataset.links",
    "compute.precision",
    "compute.compile",
    "compute.accumulate",
    "compute.recompute",
)
"""Fields that a continued run may set differently: they change nothing, or rounding alone."""


def difference(old: dict[str, Any], new: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first field in which two configurations make different runs: its name, old and new.

    The kind of a part, or a schedule, comes before what follows from it.
    """
    before, after = _flat(old), _flat(new)
    for key in sorted(before.keys() | after.keys(), key=lambda key: (not _is_kind(key), key)):
        if key not in _FREE_TO_CHANGE and before.get(key) != after.get(key):
            return key, before.get(key), after.get(key)
    return None


def _is_kind(key: str) -> bool:
    return key.rpartition(".")[2] in ("kind", "schedule")


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return result
