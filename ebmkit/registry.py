"""Named presets, one table per kind of component.

A preset is a configuration and a line about it. The tables are plain dictionaries beside the
components; `ebmkit list` and the tests read the same ones, so that registering is being tested.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from pydantic import BaseModel

from ebmkit.errors import UserError, unknown_name

C = TypeVar("C", bound=BaseModel, covariant=True)
T = TypeVar("T")


@dataclass(frozen=True)
class Preset(Generic[C]):
    """A named configuration: ``config`` and one line of text, its ``description``."""

    config: C
    description: str


class Table(dict[str, T]):
    """Parts of one ``kind`` by their names; a name that is taken cannot be given to another.

    So a plugin adds its part by ``TABLE["name"] = part``, and cannot replace one by mistake.
    """

    def __init__(self, kind: str, parts: Mapping[str, T]) -> None:
        super().__init__(parts)
        self.kind = kind

    def __setitem__(self, name: str, part: T) -> None:
        """Add ``part``.

        Raises:
            UserError: if the name is taken.
        """
        if name in self:
            raise UserError(f"there is a {self.kind} {name!r} already: choose another name")
        super().__setitem__(name, part)


def find(kind: str, table: dict[str, T], name: str) -> T:
    """The entry of ``table`` called ``name``.

    Raises:
        UserError: if there is none; it names the nearest.
    """
    if name not in table:
        raise unknown_name(kind, name, table)
    return table[name]
