"""User errors, each explained in one sentence.

The sentence of a `UserError` states the offending value, the legal values and the fix. The command
line prints it and ends with exit code 2; in Python it is an ordinary exception. `validated`
converts pydantic's errors. Only functions import pydantic, so that ``--help`` stays fast.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

M = TypeVar("M", bound="BaseModel")


MOST = 1000
"""Maximum number of characters of a sentence; the middle of a longer one is cut."""


class UserError(ValueError):
    r"""Error in the user's input: an argument, option, file or folder.

    Control characters and line breaks in the sentence are escaped, and the middle of a very long
    sentence is cut.

    >>> print(UserError("there is no file " + "evil\x1b[2J\n"))
    there is no file evil\x1b[2J\n

    Args:
        sentence: the problem and its fix.
        details: further lines, for findings that do not fit into one sentence.
    """

    def __init__(self, sentence: object = "", details: Iterable[str] = ()) -> None:
        super().__init__("\n".join([_one(str(sentence)), *(f"  {_one(line)}" for line in details)]))


class Interrupted(Exception):
    """Work stopped on request after ``step`` of ``total`` steps, and its state was saved: the same
    call resumes it. ``signal`` is the signal of the request, None if this process got none."""

    def __init__(self, step: int, total: int, signum: int | None = None) -> None:
        super().__init__(f"interrupted after step {step} of {total}")
        self.step, self.total, self.signal = step, total, signum


def _one(text: str) -> str:
    """``text`` as one printable line."""
    if len(text) > MOST:
        text = f"{text[: MOST - 300]} ... {text[-300:]}"
    if not text.isprintable():
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text


def shown(value: Any, most: int = 200) -> str:
    """Format ``value`` for a message: its ``repr``, cut after ``most`` characters.

    >>> shown("x" * 1000, most=12)
    "'xxxxxxxxxxx..."
    """
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def plain(text: str) -> str:
    """Format ``text`` for a message: its ``repr`` if it is long or not printable, else unchanged.

    >>> print(plain("streams.denoise"), plain("evil\\x1b[2J"))
    streams.denoise 'evil\\x1b[2J'
    """
    return text if text.isprintable() and len(text) <= 200 else shown(text)


def first_line(error: BaseException) -> str:
    """The first line of a library's ``error``; its class name if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a ``name`` that is not in ``known``, with the most similar name suggested.

    >>> print(unknown_name("backbone", "gradresnet81", ["gradresnet18", "gradresnet34"]))
    unknown backbone 'gradresnet81': did you mean 'gradresnet18'? Known: gradresnet18, gradresnet34
    """
    names = sorted(known)
    near = difflib.get_close_matches(name[:100].lower(), names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? Known: " if near else "known: "
    return UserError(f"unknown {kind} {shown(name)}: {hint}{', '.join(names)}")


def validated(model: type[M], values: dict[str, Any], what: str) -> M:
    """Build ``model`` from ``values``.

    Raises:
        UserError: if ``what`` has an illegal field, with the field, its value and the legal values.
    """
    from pydantic import ValidationError

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
    if isinstance(first["input"], dict):  # a validator of several fields
        return f"{what}: {where}: {reason}"
    return (
        f"{what}: {where} = {shown(first['input'])} is not legal: {reason[0].lower()}{reason[1:]}"
    )


def _follow(
    model: type[BaseModel], values: Any, location: Sequence[str]
) -> tuple[list[str], type[BaseModel]]:
    """The field names in ``location``, and the configuration class at its end.

    For a union of configurations, pydantic adds the kind to the location, which is not a field
    name. If the class of a configuration depends on the value, ``class_for`` returns it.
    """
    names: list[str] = []
    current = _class_for(model, values)
    choices: dict[str, type[BaseModel]] = {}
    for part in location:
        if part in choices:
            current, choices = choices[part], {}
            continue
        names.append(part)
        field = current.model_fields.get(part)  # None: a key of a mapping
        values = values.get(part) if isinstance(values, Mapping) else None
        nested = _configurations(field.annotation) if field else []
        choices = {str(c.model_fields["kind"].default): c for c in nested if len(nested) > 1}
        if len(nested) == 1:
            current = _class_for(nested[0], values)
    return names, current


def _class_for(model: type[BaseModel], values: Any) -> type[BaseModel]:
    try:
        found: type[BaseModel] = getattr(model, "class_for", lambda given: model)(values)
    except UserError:  # unknown class, which the message reports
        return model
    return found


def _configurations(annotation: Any) -> list[type[BaseModel]]:
    """The configuration classes in a type annotation: the class, or the members of a union."""
    from pydantic import BaseModel

    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [c for a in getattr(annotation, "__args__", ()) for c in _configurations(a)]
