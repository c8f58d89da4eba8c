"""Lists of training seeds on the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ebmkit.errors import UserError

LARGEST_SEED, MOST_SEEDS = 2**63 - 1, 1000


def parse_seeds(text: str) -> tuple[int, ...]:
    """Parse the seeds of ``--seeds``: numbers and ranges, as in ``0``, ``0-4`` or ``0,2,5-7``.

    Raises:
        UserError: if there are none, they do not parse, or one is repeated.
    """
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,19})\s*(?:-\s*([0-9]{1,19})\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last <= LARGEST_SEED or last - first >= MOST_SEEDS:
            raise UserError(
                f"--seeds {text!r}: {part!r} is no seed or range of up to {MOST_SEEDS} seeds: "
                f"write numbers from 0 to {LARGEST_SEED}, as 0, 0-4 or 0,2,5-7"
            )
        found += range(first, last + 1)
    repeated = [seed for k, seed in enumerate(found) if seed in found[:k]]
    if repeated:
        raise UserError(f"--seeds {text!r} repeats seed {repeated[0]}: write each seed once")
    return tuple(found)


def format_seeds(seeds: Sequence[int]) -> str:
    """Format seeds for ``--seeds``: a range if they are consecutive, else a list.

    >>> format_seeds((0, 1, 2)), format_seeds((3,)), format_seeds((0, 2))
    ('0-2', '3', '0,2')
    """
    if len(seeds) > 1 and list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]}-{seeds[-1]}"
    return ",".join(map(str, seeds))
