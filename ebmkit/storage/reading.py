"""Reading files that somebody else may have written: bounded, and taken for data alone.

A run folder, a model or a configuration from a stranger may be made to hurt. What is read through
this module is an ordinary file (no pipe, no device, which never end), of a bounded size, UTF-8, and
a bounded depth. JSON and YAML are read as every reader of ours needs them, which is less than they
allow:

- no name twice in one mapping, of which parsers silently keep the last;
- no more values than the file has room for: YAML's aliases repeat a part, and a part of repeated
  parts grows like ``9**n``;
- no tags of YAML beyond its plain values;
- no characters that no name or text needs and that break paths or output: NUL, lone surrogates;
- no whole numbers beyond 64 bits, which no setting needs and Python may refuse to print;
- no ``NaN`` and ``Infinity`` where ``finite`` is asked for.

Everything else, and what cannot be read, is a `UserError` that names the file, from every function.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

import yaml

from ebmkit.errors import UserError

MIB = 2**20


class DamagedFile(UserError):
    """A file that is not what was written."""


DEPTH = 50
"""Values within values, at the most; a configuration has 5."""

YAML_BYTES = MIB // 4
"""Of a configuration; a resolved one has 5 thousand. Reading takes 20 s for each MiB."""

JSON_BYTES = 64 * MIB
"""Of a document, at the most, where no other number is given."""

WHOLE = 2**64

DIGITS = 100
"""Characters of a number, a date or the like in YAML: some take a time that grows like n**2."""

EXPANDED = 20_000
"""Values that a YAML document may have, where an alias counts as all that it stands for."""


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[IO[bytes], int]]:
    """The ordinary file ``path``, open to be read, and its number of bytes."""
    try:
        ordinary = stat.S_ISREG(path.stat().st_mode)  # before opening, for that can have effects
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC) if ordinary else -1
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except ValueError:  # a NUL in its name
        raise UserError(f"there is no file {str(path)!r}") from None
    if not ordinary:
        raise UserError(f"{str(path)!r} is no ordinary file")
    with os.fdopen(handle, "rb") as file:
        try:
            yield file, os.fstat(handle).st_size
        except OSError as error:
            raise UserError(f"cannot read {str(path)!r}: {error.strerror or error}") from None


def read_bytes(path: Path, most: int) -> bytes:
    """The content of the ordinary file ``path``, of ``most`` bytes at the most."""
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
    """The text of ``path``; a byte order mark is left out."""
    return _decoded(read_bytes(path, most), repr(str(path)))


def _decoded(content: bytes, what: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DamagedFile(f"{what} is damaged: it is not UTF-8") from None


def read_json(path: Path, most: int = JSON_BYTES, finite: bool = False) -> Any:
    """The JSON document in ``path``.

    Args:
        path: an ordinary file.
        most: bytes that it may have.
        finite: refuse numbers that are none.
    """
    return parse_json(read_text(path, most), repr(str(path)), finite)


def read_document(path: Path) -> dict[str, Any]:
    """The JSON document in ``path``; an empty one where there is none that can be read."""
    try:
        document = read_json(path)
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def parse_json(content: str | bytes, what: str, finite: bool = False) -> Any:
    """The value that ``content`` writes in JSON, as `read_json`; ``what`` names it in messages."""

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
    except (ValueError, RecursionError):  # also numbers of more digits than Python takes
        raise DamagedFile(f"{what} is damaged: it is not JSON") from None
    return _checked(value, what)


def parse_yaml(content: str | bytes, what: str) -> Any:
    """The value that ``content`` writes in YAML; ``what`` names it in messages."""
    text = _decoded(content, what) if isinstance(content, bytes) else content
    if len(text) > YAML_BYTES:
        raise UserError(f"{what} is not YAML that is read here: it has {len(text)} characters")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _expanded(node, what, {}, 0)
        value: Any = loader.construct_document(node)
    except UserError:
        raise
    except Exception:  # its arithmetic on numbers and dates raises errors of many classes
        raise UserError(f"{what} is not YAML, or none of plain values") from None
    return _checked(value, what)


def _expanded(node: yaml.Node, what: str, known: dict[int, int], depth: int) -> int:
    """How many values ``node`` stands for, its aliases written out."""
    if isinstance(node, yaml.ScalarNode) and len(node.value) > DIGITS and "str" not in node.tag:
        raise UserError(f"{what} holds a value of {len(node.value)} characters that is no text")
    if depth > DEPTH or known.get(id(node), 1) == 0:  # 0: it is within itself
        _deep(what)
    if id(node) in known or isinstance(node, yaml.ScalarNode):
        return known.get(id(node), 1)
    known[id(node)] = 0
    mapping = isinstance(node, yaml.MappingNode)
    parts = [part for pair in node.value for part in pair] if mapping else node.value
    keys = [k for k in parts[::2] if mapping and isinstance(k, yaml.ScalarNode) and k.value != "<<"]
    _check_names([(key.tag, key.value) for key in keys], what)
    total = 1
    for part in parts:
        total += _expanded(part, what, known, depth + 1)
        if total > EXPANDED:
            raise UserError(f"{what} holds more than {EXPANDED} values, aliases written out")
    known[id(node)] = total
    return total


def _checked(value: Any, what: str) -> Any:
    """``value`` itself, if it is not too deep and its texts are such that one can write them."""
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
    raise UserError(f"{what} is nested deeper than {DEPTH} values within values")


def _check_names(names: list[tuple[str, str]], what: str) -> None:
    """Whether no name of one mapping, with its tag, is there twice."""
    if len(set(names)) < len(names):
        (_, name), _ = Counter(names).most_common(1)[0]
        raise UserError(f"{what} has {name[:40]!r} twice in one place: which is meant?")


def check_links(folder: Path, home: Path | None = None) -> None:
    """Whether no link in ``folder``, which may be one itself, leads out of it, to others' files.

    Args:
        folder: whose files are to be read or written.
        home: what links may not lead out of; None: the folder.
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
