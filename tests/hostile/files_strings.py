"""Malicious YAML configurations, JSON documents and option strings."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from ebmkit_tests.hostile.case import Case, outside

from ebmkit.errors import UserError
from ebmkit.guidance.guides import parse_schedule
from ebmkit.noise import parse_radius, parse_sigma
from ebmkit.objectives import parse_objective
from ebmkit.storage.reading import read_json, read_text
from ebmkit.training import resolve
from ebmkit.training.config import parse_assignments, read_config


def written(text: str | bytes, name: str = "config.yaml"):
    """A file that contains ``text``, with OUTSIDE replaced by the path of the forbidden folder."""

    def make(folder: Path) -> Path:
        content = text.encode() if isinstance(text, str) else text
        path = folder / name
        path.write_bytes(content.replace(b"OUTSIDE", os.fsencode(outside(folder))))
        return path

    return make


def laughs(first: str, more: str) -> str:
    lines = [f"a0: &a0 {first}"]
    for i in range(1, 30):
        lines.append(f"a{i}: &a{i} {more.replace('*', f'*a{i - 1}')}")
    return "\n".join(lines)


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "config.yaml")
    return folder / "config.yaml"


def device(folder: Path) -> Path:
    (folder / "config.yaml").symlink_to("/dev/zero")
    return folder / "config.yaml"


def sparse(folder: Path) -> Path:
    path = folder / "config.yaml"
    path.write_text("seed: 1\n")
    os.truncate(path, 2**40)
    return path


def config(name: str, content: str | bytes, message: str | None) -> Case:
    return Case(f"yaml: {name}", "config", written(content), message)


def document(name: str, content: str | bytes, message: str | None) -> Case:
    return Case(f"json: {name}", "json", written(content, "a.json"), message)


NOT_YAML = "is not YAML"
NO_INTEGER = "input should be a valid integer"

CASES = [
    config("tag runs a command", "seed: !!python/object/apply:os.system ['id']", NOT_YAML),
    config(
        "tag opens a file",
        "seed: !!python/object/apply:builtins.open ['OUTSIDE/secret.txt']",
        NOT_YAML,
    ),
    config("tag names a function", "seed: !!python/name:os.system", NOT_YAML),
    config("unknown tag", "seed: !evil 1", NOT_YAML),
    config("a billion laughs", laughs("[x, x, x]", "[*, *, *, *]"), "more than 20000 values"),
    config("a billion laughs merged", laughs("{a: 1}", "{<<: [*, *, *]}"), "more than 20000"),
    config("a recursive value", "a: &a [*a]", "nested deeper than 50"),
    config("deeply nested", "[" * 1000 + "]" * 1000, "not YAML|nested deeper"),
    config("nested mappings", "".join("{a: " for _ in range(100)) + "}" * 100, "nested deeper"),
    config("a duplicate name", "seed: 1\nseed: 2", "'seed' twice"),
    config("200,000 digits", "seed: " + "9" * 200_000, "not text"),
    config("200,000 hexadecimal digits", "seed: 0x" + "f" * 200_000, "not text"),
    config("60,000 digits of base 60", "seed: 1" + ":59" * 60_000, NO_INTEGER),
    config("float of base 60", "seed: 1" + ":59" * 60_000 + ".5", NO_INTEGER),
    config("an invalid date", "seed: 2001-99-99", NO_INTEGER),
    config("an invalid timestamp", "seed: !!timestamp x", NOT_YAML),
    config("an invalid integer", "seed: !!int ''", NOT_YAML),
    config("NaN", "optimizer: {lr: .nan}", "lr = nan is not legal"),
    config("not UTF-8", b"\xff\xfe\x00", "not UTF-8"),
    config("NUL in a path", 'dataset: {data_dir: "a\\0b"}', "cannot be written"),
    config("a lone surrogate", 'dataset: {name: "\\ud800"}', "cannot be written"),
    config("control characters in a name", '"seed\\e[2J": 1', r"no field .*x1b"),
    config("control characters in a value", 'backbone: "x\\e[2J"', r"unknown backbone 'x.x1b"),
    config("a long value", "backbone: " + "x" * 200_000, "unknown backbone"),
    config("a long objective", "objective: " + "ce+" * 50_000, "does not parse|twice"),
    config("an objective of stars", "objective: '" + "*" * 100_000 + "'", "does not parse"),
    config("number as a name", "1: 2", "no field|not legal|names"),
    config("mapping instead of a name", "backbone: {a: b}", "backbone"),
    config("sequence instead of a section", "dataset: [1, 2]", "dataset"),
    config("sequence instead of the objective", "objective: [ce]", "objective"),
    config("sequence instead of a kind", "model: {backbone: {kind: [1]}}", "backbone"),
    config("2^64 steps", "steps: 18446744073709551616", "more than 64 bits"),
    config("a batch of 2^63 - 1", "streams: {classify: {batch_size: 9223372036854775807}}", None),
    config("a byte order mark", b"\xef\xbb\xbfseed: 3", None),
    config("NEL and separators", "seed: 3\u2028", None),
    Case("yaml: a pipe", "config", pipe, "no ordinary file"),
    Case("yaml: a device", "config", device, "no ordinary file"),
    Case("yaml: a terabyte", "config", sparse, "more than the"),
    Case("yaml: a folder", "config", lambda folder: folder, "no ordinary file"),
    document("deeply nested", "[" * 100_000 + "]" * 100_000, "not JSON|nested deeper"),
    document("nested 60 deep", "[" * 60 + "]" * 60, "nested deeper than 50"),
    document("a duplicate name", '{"a": 1, "a": 2}', "'a' twice"),
    document("NaN", '{"a": NaN}', "not JSON"),
    document("infinite by exponent", '{"a": 1e999999}', "not JSON"),
    config("more than 64 bits", "seed: 0x" + "f" * 30, "more than 64 bits"),
    document("100,000 digits", "[" + "9" * 100_000 + "]", "not JSON"),
    document("a lone surrogate", '["\\ud800"]', "cannot be written"),
    document("NUL", '["\\u0000"]', "cannot be written"),
    document("a byte order mark", b"\xef\xbb\xbf[1]", None),
    document("UTF-16", '{"a": 1}'.encode("utf-16"), "not UTF-8"),
]

NINES = "9" * 100_000
"""More digits than Python converts to or from an integer."""

STRINGS = {
    "objective": (
        parse_objective,
        ["", "+", "*", "ce+ce", "1e999999*ce", "nan*ce", "0*ce", "ce\0", "\ud800", NINES + "*ce",
         "1" + "0" * 400 + "*ce", "ce" + " " * 100_000 + "+", "*" * 5000 + "ce", "+" * 100_000,
         "٣*ce*", "-1*ce", "ce+dsm+" * 1000, "1__0*ce", "()" * 9999],
    ),
    "sigma": (
        parse_sigma,
        ["", "/", "1/0", "0/0", "nan", "inf", "1e999999", "-1", "25", "1/2/3", NINES, f"1/{NINES}",
         f"{NINES}/{NINES}", "\0", "\ud800", "1e308/1e-308", "0x10", "1" * 10**6 + "/x", "½"],
    ),
    "radius": (
        parse_radius,
        ["", "/", "1/0", "nan", "inf", "1e999999", "-1", NINES, "\0", "\ud800", "x" * 10**6],
    ),
    "schedule": (
        parse_schedule,
        ["", ":", "power:", "power:k", "power:k=", "power:k=nan", "power:k=1e999",
         "power:k=1,k=2", "power:k=-1", "step:at=1/0", "sigmoid:t0=" + NINES, "\0", "\ud800",
         "power:" + "k=1," * 50_000, "power:" + "=" * 10**5],
    ),
    "assignment": (
        lambda text: parse_assignments([text]),
        ["", "=", "a", ".=1", "a..b=1", "a=[", "a=" + "[" * 9999, "a=!!python/name:os.system",
         "a=\0", "a=\ud800", "." * 10**5 + "=1", "a." * 10**4 + "b=1", "a=" + NINES,
         "a={b: 1, b: 2}", "a=&a [*a]", "=" * 10**6],
    ),
}  # fmt: skip
"""Parsers, and texts that they must refuse."""


def read_strings(path: Path) -> None:
    """Check that each text is refused in a printable message."""
    parse, texts = STRINGS[path.stem]
    for text in texts:
        with pytest.raises(UserError) as caught:
            parse(text)
        assert str(caught.value).isprintable()
    raise UserError("all are refused")


CASES += [
    Case(f"strings: {name}", "strings", written("", f"{name}.txt"), "all are refused")
    for name in STRINGS
]


def read_document(path: Path) -> object:
    return read_json(path, finite=True), read_text(path)


OPENERS = {
    "config": lambda path: resolve(read_config(path)),
    "json": read_document,
    "strings": read_strings,
}
