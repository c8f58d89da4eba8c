"""Mutations of inputs: flipped bits; parts deleted, repeated or exchanged; extreme values."""

from __future__ import annotations

import random

EXTREMES = [
    *(bytes([b]) * n for b in (0x00, 0xFF) for n in (1, 4, 8)),
    b"\x7f",
    b"\x80",
    b"\x7f" + b"\xff" * 7,
]
WORDS = [
    *(b"1e999", b"-1", b"nan", b"inf", b"999999999999999999999999", b"0/0", b"1" * 5000),
    *(b"\xf0\x9f\x92\xa5", b"\x1b[2J", b"\x00", b"\xed\xa0\x80", b"\xd9\xa3"),
    *(b"../", b"{", b"[" * 50, b"*a", b"&a", b"!!python/object:os.system"),
    *(b"+", b"*", b"=", b":", b",", b"e", b".", b"-", b'"', b"'", b"\n", b"null", b"true"),
]


def mutated(drawn: random.Random, seeds: list[bytes]) -> bytes:
    """A seed with one or more random mutations."""
    content = bytearray(drawn.choice(seeds))
    for _ in range(1 + int(drawn.expovariate(0.5))):
        at = drawn.randrange(len(content) + 1)
        size = min(len(content) - at, 1 + int(drawn.expovariate(0.1)))
        edit = drawn.randrange(8)
        if edit == 0 and content:
            content[at % len(content)] ^= 1 << drawn.randrange(8)
        elif edit == 1:
            del content[at : at + size]
        elif edit == 2:
            content[at:at] = content[at : at + size]
        elif edit == 3:
            extreme = drawn.choice(EXTREMES)
            content[at : at + len(extreme)] = extreme
        elif edit == 4:
            content[at:at] = drawn.choice(WORDS)
        elif edit == 5:
            del content[at:]
        elif edit == 6:
            other = drawn.choice(seeds)
            start = drawn.randrange(len(other) + 1)
            content[at : at + size] = other[start : start + size]
        else:
            content[at:at] = drawn.randbytes(size)
    return bytes(content[: 2**20])
