"""``ebmkit`` with an injected defect, as a control: seeds depend on the number of earlier draws.

This is how a program behaves that does not save the state of its random generator: uninterrupted
runs are equal, and a resumed run differs. ``SOAK_DEFECT=optimizer`` instead does not restore the
state of the optimiser.
"""

from __future__ import annotations

import itertools
import os

from ebmkit import randomness

_count = itertools.count()


def _seed_by_count(*key: object) -> int:
    import hashlib

    from ebmkit_tests.soak.unrestored import _count

    digest = hashlib.blake2b(repr((key[0], next(_count))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def inject(defect: str) -> None:
    """Inject the defect."""
    if defect == "randomness":
        randomness.keyed_seed.__code__ = _seed_by_count.__code__
    elif defect == "optimizer":
        from ebmkit.training import state

        state.restore_optimizer = lambda optimizer, saved: None
    else:
        raise ValueError(defect)


if __name__ == "__main__":
    inject(os.environ.get("SOAK_DEFECT", "randomness"))
    from ebmkit.cli import main

    main()
