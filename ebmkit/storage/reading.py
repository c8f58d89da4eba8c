"""Read untrusted text, JSON and YAML files with bounded size, as data only.

A downloaded run folder, model or configuration may be malicious. This module reads only regular
files (no pipes or devices, which may never end) of bounded size and nesting depth, in UTF-8. It
accepts a subset of JSON and YAML:

- no duplicate keys in a mapping, of which parsers silently keep the last;
- a limited number of values: YAML aliases repeat a part, and nested repetition grows like ``9**n``;
- no YAML tags other than those of plain values;
- where YAML 1.1 and 1.2 differ, ``on``, ``yes``, ``1:30`` and dates are text, as in YAML 1.2, and
  numbers such as ``010`` are refused;
- no NUL and no lone surrogates, which break paths and output;
- no integers beyond signed 64 bits, which no setting needs and Python may refuse to print;
- no ``NaN`` and ``Infinity`` if ``finite`` is set.

Every function raises a `UserError` that names the file for other content and for unreadable files.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

import yaml

from ebmkit.errors import UserError, shown

MIB = 2**20


class DamagedFile(UserError):
    """A file that differs from what was written."""


DEPTH = 50
"""Maximum nesting depth of values; a configuration has 5."""

YAML_BYTES = MIB // 4
"""Maximum characters of YAML; a resolved configuration has 5,000. Parsing takes 20 s per MiB."""

JSON_BYTES = 64 * MIB
"""Default maximum bytes of a JSON file."""

WHOLE = 2**63

DIGITS = 100
"""Maximum characters of a number, date or similar in YAML; parsing some takes O(n**2) time."""

_OCTAL = re.compile(r"[-+]?0[0-7_]+")

MAX_VALUES = 20_000
"""Maximum number of values of a YAML document with its aliases expanded."""


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[IO[bytes], int]]:
    """Open the regular file ``path`` for reading; also yields its size in bytes."""
    try:
        ordinary = stat.S_ISREG(path.stat().st_mode)  # before opening, which can have side effects
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC) if ordinary else -1
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except ValueError:  # a NUL in the name
        raise UserError(f"there is no file {str(path)!r}") from None
    if not ordinary:
        raise UserError(f"{str(path)!r} is no ordinary file")
    with os.fdopen(handle, "rb") as file:
        try:
            yield file, os.fstat(handle).st_size
        except OSError as error:
            raise UserError(f"cannot read {str(path)!r}: {error.strerror or error}") from None


def read_bytes(path: Path, most: int) -> bytes:
    """Read the regular file ``path`` of at most ``most`` bytes."""
    with opened(path) as (file, size):
        if size > most:
            raise UserError(
                f"{str(path)!r} has {size} bytes, more than the {most} that a file of its kind may "
                "have"
            )
        try:
            return file.read(size)
        except MemoryError:
            raise UserError(f"{str(path)!r} has {size} bytes, too many for this memory") from None


def read_text(path: Path, most: int = JSON_BYTES) -> str:
    """Read UTF-8 text, without a byte order mark."""
    return _decoded(read_bytes(path, most), repr(str(path)))


def _decoded(content: bytes, what: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DamagedFile(f"{what} is damaged: it is not UTF-8") from None


def read_json(path: Path, most: int = JSON_BYTES, finite: bool = False) -> Any:
    """Read a JSON file.

    Args:
        path: a regular file.
        most: maximum bytes.
        finite: refuse NaN and Infinity.
    """
    return parse_json(read_text(path, most), repr(str(path)), finite)


def read_document(path: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one if the file cannot be read or is not an object."""
    try:
        document = read_json(path)
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def parse_json(content: str | bytes, what: str, finite: bool = False) -> Any:
    """Parse JSON, with the checks of `read_json`; ``what`` is its name in messages."""

    def number(digits: str) -> float:
        found = float(digits)
        if finite and not math.isfinite(found):
            raise ValueError(digits)
        return found

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _check_names([("", name) for name, _ in pairs], what)
        return dict(pairs)

    try:
        text = _decoded(content, what) if isinstance(content, bytes) else content
        value = json.loads(
            text, parse_float=number, parse_constant=number, object_pairs_hook=mapping
        )
    except UserError:
        raise
    except (ValueError, RecursionError):  # also numbers with more digits than Python accepts
        raise DamagedFile(f"{what} is damaged: it is not JSON") from None
    return _checked(value, what)


class _Loader(yaml.SafeLoader):
    """SafeLoader without the booleans, dates and numbers that only YAML 1.1 has."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        """Tag of a node without an explicit one."""
        tag: str = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
        name = tag.rpartition(":")[2]
        old = name in ("timestamp", "value") or (name in ("int", "float") and ":" in value)
        if old or (name == "bool" and value.lower() not in ("true", "false")):
            return self.DEFAULT_SCALAR_TAG
        return tag


def parse_yaml(content: str | bytes, what: str) -> Any:
    """Parse YAML; ``what`` is its name in messages. Errors name line and column, from 1."""
    text = _decoded(content, what) if isinstance(content, bytes) else content
    if len(text) > YAML_BYTES:
        raise UserError(f"{what} is not YAML of a legal size: it has {len(text)} characters")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _expanded(node, what, {}, 0)
        value: Any = loader.construct_document(node)
    except UserError:
        raise
    except yaml.MarkedYAMLError as error:
        hint = "; indent by spaces" if "'\\t'" in (error.problem or "") else ""
        reason = f"{_place(error.problem_mark)}{error.problem}{hint}"
        raise UserError(f"{what} is not YAML with plain values only: {reason}") from None
    except Exception as error:  # parsing of numbers raises many classes
        reason = ""
        if isinstance(error, yaml.reader.ReaderError):
            before = text[: error.position].splitlines() or [""]
            place = f"line {len(before)}, column {len(before[-1]) + 1}"
            reason = f": {place}: the character {shown(text[error.position])} is not allowed"
        raise UserError(f"{what} is not YAML with plain values only{reason}") from None
    return _checked(value, what)


def _place(mark: yaml.Mark | None) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""


def _expanded(node: yaml.Node, what: str, known: dict[int, int], depth: int) -> int:
    """Number of values of ``node`` with its aliases expanded."""
    if isinstance(node, yaml.ScalarNode) and len(node.value) > DIGITS and "str" not in node.tag:
        raise UserError(f"{what} holds a value of {len(node.value)} characters that is not text")
    if node.tag.endswith(":int") and _OCTAL.fullmatch(node.value):
        raise UserError(
            f"{what}: {_place(node.start_mark)}{node.value} starts with 0, which YAML 1.1 reads as "
            "octal and YAML 1.2 as decimal: leave out the 0, or quote it if it is text"
        )
    if depth > DEPTH or known.get(id(node), 1) == 0:  # 0: it contains itself
        _deep(what)
    if id(node) in known or isinstance(node, yaml.ScalarNode):
        return known.get(id(node), 1)
    known[id(node)] = 0
    mapping = isinstance(node, yaml.MappingNode)
    parts = [part for pair in node.value for part in pair] if mapping else node.value
    keys = [k for k in parts[::2] if mapping and isinstance(k, yaml.ScalarNode) and k.value != "<<"]
    _check_names([(key.tag, key.value) for key in keys], what, [key.start_mark for key in keys])
    total = 1
    for part in parts:
        total += _expanded(part, what, known, depth + 1)
        if total > MAX_VALUES:
            raise UserError(f"{what} holds more than {MAX_VALUES} values, with aliases expanded")
    known[id(node)] = total
    return total


def _checked(value: Any, what: str) -> Any:
    """Check nesting depth, texts and integers of ``value``; return it."""
    level = [value]
    for _ in range(DEPTH):
        inner: list[Any] = []
        for part in level:
            if isinstance(part, str):
                surrogates = not part.isascii() and any("\ud800" <= c <= "\udfff" for c in part)
                if "\0" in part or surrogates:
                    raise UserError(f"{what} holds text that cannot be written: {part[:40]!a}")
            elif isinstance(part, int) and not -WHOLE < part < WHOLE:
                raise UserError(f"{what} holds a whole number of more than 64 bits")
            elif isinstance(part, dict):
                inner += part.keys()
                inner += part.values()
            elif isinstance(part, (list, tuple, set)):
                inner += part
        if not inner:
            return value
        level = inner
    _deep(what)


def _deep(what: str) -> NoReturn:
    raise UserError(f"{what} is nested deeper than {DEPTH} levels")


def _check_names(
    names: list[tuple[str, str]], what: str, marks: Sequence[yaml.Mark | None] = ()
) -> None:
    """Check that no key (tag, name) of a mapping is duplicated."""
    if len(set(names)) < len(names):
        twice, _ = Counter(names).most_common(1)[0]
        last = len(names) - 1 - names[::-1].index(twice)
        place = f"{what}: {_place(marks[last])}it" if marks else what
        raise UserError(f"{place} has {twice[1][:40]!r} twice in one mapping: remove one of them")


def check_links(folder: Path, home: Path | None = None) -> None:
    """Check that no symbolic link in ``folder`` leads out of it.

    Args:
        folder: folder to check; it may be a link itself.
        home: folder that links may not lead out of; None: ``folder``.
    """
    start = os.path.realpath(folder)
    root = os.path.realpath(home) if home else start
    for place, folders, files in os.walk(start):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            if not os.path.islink(path):
                continue
            target = os.path.realpath(path)
            if os.path.commonpath([root, target]) != root:
                raise UserError(
                    f"{path!r} is a link to {target!r}, out of its folder, and is not followed: "
                    "put the file itself there if you trust it"
                )
