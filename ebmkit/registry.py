"""Named presets, one table per kind of component.

A preset is a configuration and a line about it. The tables are plain dictionaries beside the
components; `ebmkit list` and the tests read the same ones, so that registering is being tested.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from pydantic import BaseModel

from ebmkit.errors import unknown_name

__all__ = ["Preset", "find"]

C = TypeVar("C", bound=BaseModel, covariant=True)
T = TypeVar("T")


@dataclass(frozen=True)
class Preset(Generic[C]):
    """A named configuration: ``config`` and one line of text ``about`` it."""

    config: C
    description: str


def find(kind: str, table: dict[str, T], name: str) -> T:
    """The entry of ``table`` called ``name``.

    Raises:
        UserError: if there is none; it names the nearest.
    """
    if name not in table:
        raise unknown_name(kind, name, table)
    return table[name]
