"""``metrics.jsonl``: one JSON object per line, which only grows.

A process that is killed may leave a last line cut short. Whoever goes on cuts the file after the
last row that its checkpoint knows, to the byte, and writes the later ones again.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ebmkit.storage.atomic import writing
from ebmkit.storage.manifest import Entry
from ebmkit.storage.reading import MIB, read_bytes

__all__ = ["Journal", "as_lines", "whole_rows"]

LARGEST = 1024 * MIB
"""Bytes: some 5 million rows."""


class Journal:
    """The file at ``path``, appended to.

    Args:
        path: of the file, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._size, self._hash = 0, hashlib.sha256()
        self._known = False

    def append(self, row: dict[str, Any]) -> None:
        """Write ``row`` at the end.

        Raises:
            UserError: if it cannot be written.
        """
        self._look()
        line = as_lines([row])
        with writing(self.path), self.path.open("ab") as file:
            file.write(line)
        self._size += len(line)
        self._hash.update(line)

    def content(self) -> bytes:
        """All bytes; none if there is no file.

        Raises:
            UserError: if it is something else than a file, or larger than any run makes it.
        """
        if not os.path.lexists(self.path):
            return b""
        return read_bytes(self.path, LARGEST)

    def rows(self) -> list[dict[str, Any]]:
        """Its rows, up to the first that is not whole."""
        return [row for row, _ in whole_rows(self.content())]

    def up_to(self, step: int) -> bytes:
        """The bytes of the rows up to ``step``, as far as they are whole."""
        content = self.content()
        end = 0
        for row, stop in whole_rows(content):
            if row["step"] > step:
                break
            end = stop
        return content[:end]

    def after(self, step: int) -> list[dict[str, Any]]:
        """The rows after ``step``."""
        return [row for row in self.rows() if row["step"] > step]

    def entry(self) -> Entry:
        """What is written so far, brought to the disk.

        Raises:
            UserError: if the disk fails.
        """
        self._look()
        if self._size:
            with writing(self.path), self.path.open("rb") as file:
                os.fsync(file.fileno())
        return Entry(self._size, self._hash.hexdigest(), grows=True)

    def look_again(self) -> None:
        """The file was changed from outside."""
        self._known = False

    def _look(self) -> None:
        if not self._known:
            content = self.content()
            self._size, self._hash = len(content), hashlib.sha256(content)
            self._known = True


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    """Rows as they are written."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def whole_rows(content: bytes) -> list[tuple[dict[str, Any], int]]:
    """The rows in ``content`` and where each ends, up to the first that is not whole."""
    found: list[tuple[dict[str, Any], int]] = []
    end = 0
    for line in content.splitlines(keepends=True):
        end += len(line)
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not (line.endswith(b"\n") and isinstance(row, dict) and type(row.get("step")) is int):
            break
        found.append((row, end))
    return found
