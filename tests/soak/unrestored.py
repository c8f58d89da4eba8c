"""``ebmkit`` with a defect put in, for controls: what is drawn depends on what was drawn before.

As in a program that keeps a generator and does not save its state: two runs that are never stopped
are equal, and one that was stopped and went on is not. ``SOAK_DEFECT=optimizer`` leaves the
optimiser's state behind instead.
"""

from __future__ import annotations

import itertools
import os

from ebmkit import randomness

_count = itertools.count()


def _forgetful(*key: object) -> int:
    import hashlib

    from ebmkit_tests.soak.unrestored import _count

    digest = hashlib.blake2b(repr((key[0], next(_count))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def spoil(defect: str) -> None:
    """Put the defect in."""
    if defect == "randomness":
        randomness.keyed_seed.__code__ = _forgetful.__code__
    elif defect == "optimizer":
        from ebmkit.training import state

        state.restore_optimizer = lambda optimizer, saved: None
    else:
        raise ValueError(defect)


if __name__ == "__main__":
    spoil(os.environ.get("SOAK_DEFECT", "randomness"))
    from ebmkit.cli import main

    main()
