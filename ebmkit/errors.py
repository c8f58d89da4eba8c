"""Errors that a user can mend, each told in one sentence.

`UserError` carries the whole sentence: the offending value, what is legal, what to do. The command
line prints it and ends with exit code 2; from Python it is an ordinary exception.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["UserError", "unknown_name"]


class UserError(ValueError):
    """A mistake in what the user gave: input, option, file or folder."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a ``name`` that is not among the ``known`` ones, with the nearest suggested.

    >>> print(unknown_name("backbone", "gradresnet81", ["gradresnet18", "gradresnet34"]))
    unknown backbone 'gradresnet81': did you mean 'gradresnet18'? Known: gradresnet18, gradresnet34
    """
    names = sorted(known)
    near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? Known: " if near else "known: "
    return UserError(f"unknown {kind} {name!r}: {hint}{', '.join(names)}")
