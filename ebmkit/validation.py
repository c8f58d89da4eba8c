"""Turning pydantic's reports into one sentence a user can act on."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ebmkit.errors import UserError, plain, shown

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
        raise UserError(_sentence(model, values, error, what)) from None


def _sentence(model: type[BaseModel], values: Any, error: ValidationError, what: str) -> str:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    path, _ = _follow(model, values, location)
    where = plain(".".join(path))
    if first["type"] == "extra_forbidden":
        fields = _follow(model, values, location[:-1])[1].model_fields
        known = sorted(field.alias or name for name, field in fields.items())
        near = difflib.get_close_matches(path[-1][:100], known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        odd = shown(".".join(path))
        return f"{what}: there is no field {odd}: {hint}fields here: {', '.join(known)}"
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "tuple_type":
        reason = f"it takes several values: write [{shown(first['input'])}]"
    if not path:
        return f"{what}: {reason}"
    if isinstance(first["input"], dict):  # a rule about several fields together
        return f"{what}: {where}: {reason}"
    return (
        f"{what}: {where} = {shown(first['input'])} is not legal: {reason[0].lower()}{reason[1:]}"
    )


def _follow(
    model: type[BaseModel], values: Any, location: Sequence[str]
) -> tuple[list[str], type[BaseModel]]:
    """The names in ``location`` that a user writes, and the configuration at its end.

    Where a field is one of several configurations, pydantic adds the kind to the location; where
    its class depends on the value, the class says which (``class_for``).
    """
    names: list[str] = []
    current, choices = _class_for(model, values), dict[str, type[BaseModel]]()
    for part in location:
        if part in choices:
            current, choices = choices[part], {}
            continue
        names.append(part)
        field = current.model_fields.get(part)  # none: a key of a mapping
        values = values.get(part) if isinstance(values, Mapping) else None
        nested = _configurations(field.annotation) if field else []
        choices = {str(c.model_fields["kind"].default): c for c in nested if len(nested) > 1}
        if len(nested) == 1:
            current = _class_for(nested[0], values)
    return names, current


def _class_for(model: type[BaseModel], values: Any) -> type[BaseModel]:
    found: type[BaseModel] = getattr(model, "class_for", lambda given: model)(values)
    return found


def _configurations(annotation: Any) -> list[type[BaseModel]]:
    """The configurations named in a type: itself, or the members of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [c for a in getattr(annotation, "__args__", ()) for c in _configurations(a)]
