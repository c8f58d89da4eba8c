"""What a hostile file is: how it is made, who opens it, and what must come of that.

A module ``tests/hostile/files_*.py`` holds ``CASES``, a list of `Case`, and ``OPENERS``, by kind
the function that opens a file of that kind as a user would. Both are found by the module's name.

>>> def bomb(folder):
...     path = folder / "bomb.png"
...     path.write_bytes(...)
...     return path
>>> CASES = [Case("a picture of 10^10 pixels", "image", bomb, "too large")]
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
    """One hostile file or folder.

    Attributes:
        name: unique; becomes the name of its folder.
        kind: which of the ``OPENERS`` gets it.
        make: given an empty folder of its own, writes it there and returns what is to be opened.
        says: a regular expression that the `UserError` must match; None: it opens, harmlessly.
        mib: memory that opening it may take, MiB.
        seconds: of the processor that it may take.
        slow: left out by ``--quick``.
    """

    name: str
    kind: str
    make: Callable[[Path], Path]
    says: str | None
    mib: int = 200
    seconds: float = 5.0
    slow: bool = False


def outside(folder: Path) -> Path:
    """A folder that nothing may look into, for the case made in ``folder`` to point at.

    It holds ``secret.txt``; a case may put there what its own file names. Whoever opens or changes
    anything in it while a case is being opened has failed, C libraries included.
    """
    return folder.parents[1] / "outside" / folder.name
