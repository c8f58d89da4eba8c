"""Turning pydantic's reports into one sentence a user can act on."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ebmkit.errors import UserError

__all__ = ["validated"]

M = TypeVar("M", bound=BaseModel)


def validated(model: type[M], values: dict[str, Any], what: str) -> M:
    """Build ``model`` from ``values``.

    Raises:
        UserError: with the first illegal field of ``what``, its value, and what would be legal.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError(_sentence(model, error, what)) from None


def _sentence(model: type[BaseModel], error: ValidationError, what: str) -> str:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    where = ".".join(path)
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"{what}: there is no field {where!r}: {hint}fields here: {', '.join(known)}"
    reason = first["msg"].removeprefix("Value error, ")
    if not path:
        return f"{what}: {reason}"
    if isinstance(first["input"], dict):  # a rule about several fields together
        return f"{what}: {where}: {reason}"
    return f"{what}: {where} = {first['input']!r} is not legal: {reason[0].lower()}{reason[1:]}"


def _fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """Names of the fields of the configuration found by following ``path`` from ``model``."""
    current: Any = model
    for part in path:
        field = current.model_fields.get(part) if _is_model(current) else None
        if field is None:  # a union member or a mapping key: stay where we are
            continue
        nested = [a for a in (field.annotation, *_arguments(field.annotation)) if _is_model(a)]
        if nested:
            current = nested[0]
    return sorted(current.model_fields)


def _arguments(annotation: Any) -> tuple[Any, ...]:
    return getattr(annotation, "__args__", ())


def _is_model(candidate: Any) -> bool:
    return isinstance(candidate, type) and issubclass(candidate, BaseModel)
