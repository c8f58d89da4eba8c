"""Errors that a user can mend, each told in one sentence.

`UserError` carries the whole sentence: the offending value, what is legal, what to do. The command
line prints it and ends with exit code 2; from Python it is an ordinary exception.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

__all__ = ["UserError", "plain", "shown", "unknown_name"]


MOST = 1000
"""Characters of a sentence; a longer one, which quotes something long, loses its middle."""


class UserError(ValueError):
    r"""A mistake in what the user gave: input, option, file or folder.

    Its sentence stays one, whatever it quotes: characters that would act on a terminal are spelled
    out, and the middle of a very long one is left out.

    >>> print(UserError("there is no file " + "evil\x1b[2J\n"))
    there is no file evil\x1b[2J\n

    Args:
        sentence: what is wrong, and what to do.
        details: lines below it, where one sentence cannot hold what was found.
    """

    def __init__(self, sentence: object = "", details: Iterable[str] = ()) -> None:
        super().__init__("\n".join([_one(str(sentence)), *(f"  {_one(line)}" for line in details)]))


def _one(text: str) -> str:
    """``text`` as one line that a terminal can show."""
    if len(text) > MOST:
        text = f"{text[: MOST - 300]} ... {text[-300:]}"
    if not text.isprintable():
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text


def shown(value: Any, most: int = 200) -> str:
    """``value`` as messages show it: as Python writes it, cut where it is long.

    >>> shown("x" * 1000, most=12)
    "'xxxxxxxxxxx..."
    """
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def plain(text: str) -> str:
    """``text`` itself; as Python writes it if it holds what would act on a terminal.

    >>> print(plain("streams.denoise"), plain("evil\\x1b[2J"))
    streams.denoise 'evil\\x1b[2J'
    """
    return text if text.isprintable() and len(text) <= 200 else shown(text)


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a ``name`` that is not among the ``known`` ones, with the nearest suggested.

    >>> print(unknown_name("backbone", "gradresnet81", ["gradresnet18", "gradresnet34"]))
    unknown backbone 'gradresnet81': did you mean 'gradresnet18'? Known: gradresnet18, gradresnet34
    """
    names = sorted(known)
    near = difflib.get_close_matches(name[:100].lower(), names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? Known: " if near else "known: "
    return UserError(f"unknown {kind} {shown(name)}: {hint}{', '.join(names)}")
