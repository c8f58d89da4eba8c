"""Case: how a malicious file is made, which function opens it, and the required outcome.

A module ``tests/hostile/files_*.py`` defines ``CASES``, a list of `Case`, and ``OPENERS``, which
maps each kind to the function that opens such a file as a user would.

>>> def bomb(folder):
...     path = folder / "bomb.png"
...     path.write_bytes(...)
...     return path
>>> CASES = [Case("an image of 10^10 pixels", "image", bomb, "too large")]
>>> OPENERS = {"image": lambda path: Image.open(path)}
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["SECRET", "Case", "outside"]

SECRET = "the content of secret.txt"


@dataclass(frozen=True)
class Case:
    """One malicious file or folder.

    Attributes:
        name: unique; becomes the name of its folder.
        kind: key of the function in ``OPENERS``.
        make: writes the file into an empty folder and returns the path to open.
        message: regular expression for the `UserError`; None if opening must succeed.
        mib: memory limit, MiB.
        seconds: limit of processor time.
        slow: skipped by ``--quick``.
    """

    name: str
    kind: str
    make: Callable[[Path], Path]
    message: str | None
    mib: int = 200
    seconds: float = 5.0
    slow: bool = False


def outside(folder: Path) -> Path:
    """Forbidden folder to which the case in ``folder`` may point.

    It contains ``secret.txt``; a case may add the targets of its links. A case fails if anything,
    C libraries included, opens or changes a file of this folder while the case is opened.
    """
    return folder.parents[1] / "outside" / folder.name
